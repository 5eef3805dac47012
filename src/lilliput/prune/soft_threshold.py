"""STR: soft thresholds, one a layer, learnt by gradient descent along with the weights."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from lilliput.code.base import codes, copy_model, holders
from lilliput.code.names import theta
from lilliput.prune import patterns
from lilliput.prune._masking import attach_gates, harden_, second
from lilliput.prune.masks import Allocation, check_allocation, check_sparsity, select
from lilliput.prune.threshold import SoftThreshold
from lilliput.rule import Rule, State
from lilliput.schedule import Cubic, Schedule, at
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class STR(Stage, Rule):
    """Learn a soft threshold for each tensor along with its weights; what it leaves becomes a mask when the training
    ends.

        W_l = sign(w_l) relu(|w_l| - exp(s_l + c))

    s_l is learnt for each tensor l and finds how sparse each should be. c is common to all tensors and makes the whole
    as sparse as the schedule says: it is the quantile of log |w| - s_l. Since c takes what the s_l have in common, only
    their differences are learnt, and `decay` pulls them together. With sparsity=None there is no c, as in the paper:
    `decay` is then an L2 penalty on s, which pulls it up to 0, and determines how sparse the result is.

    As a rule of `Train` it needs nothing else. In a loop that is not ours apply it as a stage first, then make the
    optimizer, which must hold s too.

    Args:
        sparsity: A number s means Cubic(s, begin=0.1); a schedule of the step; None for no target.
        decay: The strength of the pull on s.
        allocation: As in `Prune`; with another one than "global", c is each tensor's own.
        where: As in `Prune`.
        every: Steps between quantiles.
        start: The first s, the logarithm of a weight's size.

    Raises:
        ValueError: For settings out of range.
        NotSupported: For tensors that have a code already.

    Example:
        >>> net = STR(0.5)(nn.Linear(8, 8), None, None); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with STR(0.5).attached(net, sgd, steps=4):
        ...     for _ in range(4): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade and Farhadi, Soft threshold weight reparameterization for
        learnable sparsity, ICML 2020, arXiv:2002.03231, equations 2 to 6; the common c is ours.
    """

    sparsity: float | Schedule | None = None
    decay: float = 0.1
    allocation: Allocation = "global"
    where: str = "*"
    every: int = 5
    start: float = -10.0

    def __post_init__(self) -> None:
        check_allocation(self.allocation, "STR")
        pairs = () if isinstance(self.allocation, str) else self.allocation
        for value in (at(self.schedule, 0, 1), at(self.schedule, 1, 1), *(value for _, value in pairs)):
            check_sparsity(value, patterns.parse("elements"), "STR")
        if not self.decay >= 0 or self.every < 1:
            raise ValueError(
                f"STR: decay must be at least 0 and every at least 1, got decay={self.decay}, every={self.every}."
            )

    @property
    def schedule(self) -> Schedule:
        """How sparse the network is while it trains, where c is steered."""
        given = 0.0 if self.sparsity is None else self.sparsity
        return Cubic(given, begin=0.1) if isinstance(given, int | float) else given

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        model = copy_model(model)
        self.begin(model, task, reference, 1)
        return model

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        attach_gates(model, self.where, self.allocation, "STR", lambda name: SoftThreshold(self.start))
        return {}

    def thresholds(self, model: nn.Module) -> dict[str, tuple[SoftThreshold, Tensor]]:
        """Return the code and s of each tensor, by its name."""
        thresholds = {name: chain[0] for name, chain in codes(model).items() if isinstance(chain[0], SoftThreshold)}
        return {name: (code, second(model, name)) for name, code in thresholds.items()}

    def _rated(self, model: nn.Module) -> dict[str, Tensor]:
        return {
            name: theta(model, name).detach().float().abs() / s.detach().exp()
            for name, (_, s) in self.thresholds(model).items()
        }

    @torch.no_grad()
    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        learnt = [s for _, s in self.thresholds(model).values() if s.grad is not None]
        if not learnt:
            return state
        gradient = torch.stack([cast(Tensor, s.grad) for s in learnt]) + self.decay * torch.stack(learnt)
        if self.sparsity is not None:  # c takes what they have in common
            gradient = gradient - gradient.mean()
        for s, g in zip(learnt, gradient, strict=True):
            cast(Tensor, s.grad).copy_(g)
        return state

    @torch.no_grad()
    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        if self.sparsity is None or ((step + 1) % self.every and step + 1 < steps):
            return state
        rated = self._rated(model)
        kept = self._select(rated, at(self.schedule, step + 1, steps))
        top = {name: rated[name].masked_fill(mask, 0).max() for name, mask in kept.items()}
        common = torch.stack(list(top.values())).max()
        for name, (code, _) in self.thresholds(model).items():
            # A tensor whose last entries were spared has a threshold of its own.
            spared = self.allocation != "global" or bool(common >= rated[name][kept[name]].min())
            code.shift.copy_((top[name] if spared else common).log())
        return state

    def _select(self, rated: dict[str, Tensor], sparsity: float) -> dict[str, Tensor]:
        return select(rated, sparsity, self.allocation, patterns.parse("elements"), at(self.schedule, 1, 1))

    def end(self, state: State, model: nn.Module) -> State:
        if self.sparsity is None:
            kept = {name: _weight(model, name) != 0 for name in self.thresholds(model)}
        else:
            kept = self._select(self._rated(model), at(self.schedule, 1, 1))
        for name, mask in kept.items():
            harden_(model, name, mask)
        return state


def _weight(model: nn.Module, name: str) -> Tensor:
    module, attribute = holders(model, name)[0]
    return cast(Tensor, getattr(module, attribute)).detach()
