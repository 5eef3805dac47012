"""Prune: set the weights that matter least to zero, at once or gradually while training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model, holders
from lilliput.code.masked import Masked
from lilliput.code.names import theta
from lilliput.prune import patterns, scores
from lilliput.prune.masks import attach_masks, check_allocation, check_sparsity, chosen, prunable, put_, select
from lilliput.rule import Rule, State
from lilliput.schedule import Cubic, Schedule, at
from lilliput.stage import Reference, Stage
from lilliput.statistics.calibrate import Statistics, of_layer_inputs, running, statistics, taken_from
from lilliput.statistics.sources import sees_inputs
from lilliput.task import Task


@dataclass(frozen=True)
class Prune(Stage, Rule):
    """Set the weights of the lowest score to zero: W = m * theta, m keeping a fraction 1 - sparsity of the entries.

    As a stage it prunes once. As a rule it starts dense and raises the sparsity by a schedule (a number s means
    Cubic(s)), taking new masks every `every` steps. What was dropped stays dropped, unless the schedule falls (Cyclic):
    then what matters most by the score comes back with the values it had.

    Args:
        sparsity: The fraction that becomes zero, in [0, 1), or a schedule of the step.
        score: A registered score, such as "magnitude", "taylor" or "wanda".
        pattern: "elements", "even", "channel", "2:4" (any N:M) or "block 4x1" (any size).
        allocation: "global" (one threshold), "erk", "uniform", or pairs (tensor, final sparsity), which need no
            `sparsity`.
        where: Glob patterns on the names of tensors or modules, separated by commas. Tensors that are tied, or that the
            pattern does not divide, are left alone (see `skipped`).
        every: Steps between masks while training.
        seed: The seed of the random score and of drawn labels.

    Raises:
        ValueError: For settings out of range, or when there is no tensor left to prune.
        NotSupported: For a tensor that is already quantized or factorised.

    Example:
        >>> net = Prune(0.75)(nn.Linear(4, 4), None, None)
        >>> int((net.weight == 0).sum())
        12

    Source:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1.
    """

    sparsity: float | Schedule | None = None
    score: str = "magnitude"
    pattern: str = "elements"
    allocation: str | tuple[tuple[str, float], ...] = "global"
    where: str = "*"
    every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        pattern, given = patterns.parse(self.pattern), self.allocation
        scores.lookup(self.score)
        check_allocation(given, "Prune")
        if self.sparsity is None and isinstance(given, str):
            raise ValueError("Prune: sparsity must be given, got None. Write Prune(0.9) for 90% zeros.")
        pairs = () if isinstance(given, str) else given
        for value in [] if self.sparsity is None else [at(self.sparsity, 0, 1), at(self.sparsity, 1, 1)]:
            check_sparsity(value, pattern, "Prune", self.pattern)
        for _, value in pairs:
            check_sparsity(value, pattern, "Prune", self.pattern)
        if self.every < 1:
            raise ValueError(f"Prune: every must be at least 1 step, got {self.every}.")

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """List the tensors that `where` takes in but that are left alone, each with the reason."""
        return self._sort(model)[1]

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        model = copy_model(model)
        names = self._attach(model)
        needs = scores.needs(scores.lookup(self.score))
        known = statistics(model, task, names, needs, seed=self.seed) if needs else {name: {} for name in names}
        self._mask(model, names, known, at(self._schedule, 1, 1))
        return model

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        names = self._attach(model)
        needs = set(scores.needs(scores.lookup(self.score)))
        state: State = {"sparsity": torch.zeros((), dtype=torch.float64)}
        # What the training itself can gather is read from it; the rest is measured once, before it.
        if once := needs - set(running()):
            if task is None and any(taken_from(need) != "none" for need in once):
                raise ValueError(f"Prune: a task must be given for the score {self.score!r}, got None. Pass task=.")
            for name, known in statistics(model, task, names, once, seed=self.seed).items():
                state |= {f"{need} {name}": value for need, value in known.items()}
        return state

    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        wanted = scores.needs(scores.lookup(self.score))
        gathered = {need: update for need, update in running().items() if need in wanted} if wanted else {}
        if not gathered:
            return state
        state = dict(state)
        for name in self._masked(model):
            weight = theta(model, name)
            if weight.grad is not None:
                for need, update in gathered.items():
                    key = f"{need} {name}"
                    held = state[key] if key in state else torch.zeros_like(weight)
                    state[key] = update(held, weight.detach(), weight.grad)
        return state

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        done = step + 1
        sparsity = at(self._schedule, done, steps)
        if (done % self.every and done < steps) or sparsity == float(state["sparsity"]):
            return state
        known: Statistics = {name: {} for name in self._masked(model)}
        for key, value in state.items():
            need, _, name = key.partition(" ")
            if name in known:
                known[name][need] = value
        self._mask(model, list(known), known, sparsity, grow=sparsity < float(state["sparsity"]))
        return {**state, "sparsity": torch.tensor(sparsity, dtype=torch.float64)}

    @property
    def _schedule(self) -> Schedule:
        """How far the pruning has come: of the sparsity, or of the whole way where the pairs give the amounts."""
        if self.sparsity is None:
            return Cubic(1.0)
        return Cubic(float(self.sparsity)) if isinstance(self.sparsity, int | float) else self.sparsity

    def _sort(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        kept, skipped = prunable(model, self.where, patterns.parse(self.pattern), "Prune", self.allocation)
        if any(map(of_layer_inputs, scores.needs(scores.lookup(self.score)))):
            for name in [name for name in kept if not sees_inputs(model, name)]:
                kept.remove(name)
                skipped[name] = f"the score {self.score!r} needs its inputs, which no module shows"
        return kept, skipped

    def _attach(self, model: nn.Module) -> list[str]:
        names, skipped = self._sort(model)
        if not names:
            raise ValueError(
                f"Prune: some tensor must be left to prune, got none of {list(skipped)[:3]}: "
                f"{next(iter(skipped.values()), 'the allocation is empty')}."
            )
        attach_masks(model, names, patterns.parse(self.pattern))
        return names

    def _masked(self, model: nn.Module) -> dict[str, Masked]:
        return chosen(model, self.where, self.allocation)

    @torch.no_grad()
    def _mask(self, model: nn.Module, names: list[str], known: Statistics, sparsity: float, grow: bool = False) -> None:
        """New masks at an overall sparsity (with pairs: at that share of the way to their amounts)."""
        pattern, score, masked = patterns.parse(self.pattern), scores.lookup(self.score), self._masked(model)
        rated: dict[str, Tensor] = {}
        for name in names:
            if set(scores.needs(score)) <= set(known[name]):
                module, attribute = holders(model, name)[0]
                weight = theta(model, name) if grow else getattr(module, attribute)
                rated[name] = score(weight.float(), **known[name])
                if not grow:  # what is dropped goes first, before a kept weight that scores nothing
                    rated[name] = torch.where(masked[name].mask, rated[name], -torch.finfo(rated[name].dtype).tiny)
        if not rated:
            raise ValueError(
                f"Prune: score {self.score!r} must have its statistics for some tensor, got none for "
                f"{names[:3]}. Use score='magnitude' for these."
            )
        new = select(rated, sparsity, self.allocation, pattern, at(self._schedule, 1, 1))
        if not grow:
            new = {name: mask & masked[name].mask for name, mask in new.items()}
        put_(masked, new, pattern)
