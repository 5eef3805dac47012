"""Pruning under a budget: choose each tensor's sparsity by its sensitivity, for so many bytes, MACs or milliseconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.code.base import pack, realize, storage
from lilliput.code.names import find, parameter_names
from lilliput.cost.measure import latency
from lilliput.graph.fold import fold_batchnorm
from lilliput.onnx.trace import trace
from lilliput.prune import patterns, scores
from lilliput.prune.prune import Prune
from lilliput.registry import lookup
from lilliput.stage import Reference, Stage, calibration
from lilliput.statistics.calibrate import statistics
from lilliput.stored.plain import Plain
from lilliput.stored.sparse import Sparse
from lilliput.task import Task, call, predict

Pairs = tuple[tuple[str, float], ...]
Masks = dict[str, dict[float, Tensor]]
LEVELS = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
TIMED_LEVELS = (0.0, 0.8, 0.9, 0.95)  # each is a network to compile
CELLS = 20_000


def allocate(
    model: nn.Module,
    task: Task,
    *,
    bytes: int | None = None,
    macs: int | None = None,
    latency_ms: float | None = None,
    where: str = "*",
    score: str = "magnitude",
    pattern: str = "elements",
    levels: Sequence[float] | None = None,
    seed: int = 0,
) -> Pairs:
    """Choose the sparsity of each tensor, for `Prune(allocation=...)`, under one budget.

    Each tensor i alone is pruned to each level s: d_i(s) is the mean divergence of the outputs from the model's own on
    256 training inputs (`Task.divergence`, no labels), c_i(s) what it then costs. Chosen is the s_i that minimise
    sum d_i(s_i) with sum c_i(s_i) within the budget: a multiple-choice knapsack, solved by dynamic programming.

    Args:
        model: The model to prune.
        task: What must be preserved.
        bytes: A budget for all the model's tensors as `model.lil` stores them (`lilliput.code.base.storage`).
        macs: A budget of multiply-accumulates of one example with the weights that stay; products of two activations
            are not counted.
        latency_ms: A budget for one example in the engine on this machine, one thread. A network is compiled for each
            tensor and level, which takes minutes.
        where: As in `Prune`.
        score: As in `Prune`.
        pattern: As in `Prune`.
        levels: The sparsities to choose from, in [0, 1).
        seed: As in `Prune`.

    Returns:
        Pairs (tensor, sparsity).

    Raises:
        ValueError: Unless one budget is given, for levels out of range, and for a budget below what the highest levels
            take.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
        >>> task = Task("tiny", train=(x, torch.arange(32) % 4), val=(x, torch.arange(32) % 4))
        >>> sum(round((1 - s) * net.get_parameter(n).numel()) for n, s in allocate(net, task, macs=60)) <= 60
        True

    Source:
        The divergence of one tensor at a time: Li, Kadav, Durdanovic, Samet and Graf, Pruning filters for efficient
        ConvNets, ICLR 2017, arXiv:1608.08710, section 3.2 (sensitivity). The choice under a budget: Frantar and
        Alistarh, SPDY: accurate pruning with speedup guarantees, ICML 2022, arXiv:2201.13096, section 3.2 (dynamic
        programming).
    """
    given = {
        key: value for key, value in (("bytes", bytes), ("macs", macs), ("latency_ms", latency_ms)) if value is not None
    }
    if len(given) != 1 or min(given.values()) <= 0:
        raise ValueError(f"allocate: one of bytes, macs and latency_ms must be given, above zero, got {given or None}.")
    ((kind, budget),) = given.items()
    rule = patterns.parse(pattern)
    tried = sorted({0.0, *(TIMED_LEVELS if kind == "latency_ms" else LEVELS)} if levels is None else {0.0, *levels})
    if not 0 <= tried[0] <= tried[-1] < 1:
        raise ValueError(f"allocate: levels must be in [0, 1), got {tried}. They are fractions of zeros.")
    tried = sorted({min(level, rule.most) for level in tried})
    skipped = Prune(0.0, score=score, pattern=pattern, where=where).skipped(model)
    names = [name for name in find(model, where, who="allocate") if name not in skipped]
    if not names:
        raise ValueError(f"allocate: some tensor must be left to prune, got none: {next(iter(skipped.values()))}.")
    masks = _masks(model, task, names, score, rule, tried, seed)
    lost = _divergences(model, task, masks)
    if latency_ms is not None:
        return tuple(_timed(_Timer(model, task), lost, masks, latency_ms).items())
    fixed, costs = (_bytes if kind == "bytes" else _macs)(model, task, masks, rule)
    return tuple(_cheapest(lost, costs, budget - fixed, kind, fixed).items())


def _timed(timer: "_Timer", lost: Mapping[str, Mapping[float, float]], masks: Masks, budget: float) -> dict[str, float]:
    """The choice within a budget of milliseconds. Times do not add up exactly: what is chosen is measured, and chosen
    anew where it takes longer."""
    fixed, costs = timer.costs(masks)
    target = over = budget
    for _ in range(4):
        pairs = _cheapest(lost, costs, target - fixed, "latency_ms", fixed)
        over = timer.ms({name: masks[name][level] for name, level in pairs.items()}) - budget
        if over <= 0:
            return pairs
        target -= 1.1 * over
    raise ValueError(
        f"allocate: latency_ms must leave room for what the times of layers alone do not show, got "
        f"{budget:g}, and the best choice takes {budget + over:g}. Raise it."
    )


@dataclass(frozen=True)
class PruneToBudget(Stage):
    """Prune with an allocation by sensitivity, so that the result keeps a budget: see `allocate`.

    Give one of bytes, macs and latency_ms.

    Args:
        bytes: A budget for all the model's tensors as `model.lil` stores them.
        macs: A budget of multiply-accumulates of one example.
        latency_ms: A budget for one example in the engine on this machine, one thread.
        score: As in `Prune`.
        pattern: As in `Prune`.
        where: As in `Prune`.
        seed: As in `Prune`.

    Raises:
        ValueError: As `allocate` does.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32, 8)
        >>> task = Task("tiny", train=(x, torch.arange(32) % 4), val=(x, torch.arange(32) % 4))
        >>> small = PruneToBudget(macs=60)(net, task, None)
        >>> int(sum((layer.weight != 0).sum() for layer in small[::2])) <= 60
        True

    Source:
        Frantar and Alistarh, SPDY: accurate pruning with speedup guarantees, ICML 2022, arXiv:2201.13096.
    """

    bytes: int | None = None
    macs: int | None = None
    latency_ms: float | None = None
    score: str = "magnitude"
    pattern: str = "elements"
    where: str = "*"
    seed: int = 0

    def __post_init__(self) -> None:
        if [self.bytes, self.macs, self.latency_ms].count(None) != 2:
            raise ValueError(
                "PruneToBudget: one of bytes, macs and latency_ms must be given, got "
                f"bytes={self.bytes}, macs={self.macs}, latency_ms={self.latency_ms}."
            )
        Prune(0.0, score=self.score, pattern=self.pattern, where=self.where)

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        pairs = allocate(
            model,
            task,
            bytes=self.bytes,
            macs=self.macs,
            latency_ms=self.latency_ms,
            where=self.where,
            score=self.score,
            pattern=self.pattern,
            seed=self.seed,
        )
        return Prune(allocation=pairs, score=self.score, pattern=self.pattern, seed=self.seed)(model, task, reference)


@torch.no_grad()
def _masks(
    model: nn.Module,
    task: Task,
    names: list[str],
    score: str,
    pattern: patterns.Pattern,
    levels: list[float],
    seed: int,
) -> Masks:
    """The mask of each tensor at each level; what is zero already goes first."""
    function, tensors = scores.lookup(score), parameter_names(model)
    known = statistics(model, task, names, scores.needs(function), seed=seed)
    masks: Masks = {}
    for name in names:
        weight = tensors[name].detach().float()
        rated = function(weight, **known[name])
        rated = torch.where(weight != 0, rated, -torch.finfo(rated.dtype).tiny)
        masks[name] = {level: pattern.of(name)(rated, level) for level in levels}
    return masks


@torch.no_grad()
def _divergences(model: nn.Module, task: Task, masks: Masks) -> dict[str, dict[float, float]]:
    """What pruning each tensor alone does to the outputs."""
    work, inputs = realize(model).eval(), calibration(task)
    dense = predict(work, inputs)
    lost: dict[str, dict[float, float]] = {}
    for name, levels in masks.items():
        parameter = work.get_parameter(name)
        original = parameter.detach().clone()
        lost[name] = {}
        for level, mask in levels.items():
            parameter.copy_(original * mask)
            lost[name][level] = max(0.0, float(task.divergence(predict(work, inputs), dense).mean()))
        parameter.copy_(original)
    return lost


def _cheapest(
    lost: Mapping[str, Mapping[float, float]],
    costs: Mapping[str, Mapping[float, float]],
    budget: float,
    kind: str,
    fixed: float,
) -> dict[str, float]:
    """The level of each tensor that minimises the summed loss with the summed cost within the budget.

    Costs are counted in cells of the budget, rounded up, so that the budget is kept whatever the rounding.
    """
    least = {name: min(row.values()) for name, row in costs.items()}
    room, most = budget - sum(least.values()), sum(max(row.values()) for row in costs.values())
    if room < 0:
        raise ValueError(
            f"allocate: {kind} must be at least {fixed + sum(least.values()):g} at these levels, got "
            f"{fixed + budget:g}. Raise it, give higher levels, or let where= take in more tensors."
        )
    if budget >= most:
        return {name: min(row, key=lambda level: (row[level], level)) for name, row in lost.items()}
    cell, best = max(room / CELLS, 1e-30), np.zeros(CELLS + 1)
    taken: list[tuple[str, list[float], Any]] = []
    for name, row in costs.items():
        levels = list(row)
        offered = np.full((len(levels), CELLS + 1), np.inf)
        for i, level in enumerate(levels):
            cells = int(np.ceil((row[level] - least[name]) / cell - 1e-9))
            if cells <= CELLS:
                offered[i, cells:] = best[: CELLS + 1 - cells] + lost[name][level]
        taken.append((name, levels, offered.argmin(0)))
        best = offered.min(0)
    at, chosen = CELLS, {}
    for name, levels, choice in reversed(taken):
        chosen[name] = levels[int(choice[at])]
        at -= int(np.ceil((costs[name][chosen[name]] - least[name]) / cell - 1e-9))
    return {name: chosen[name] for name in costs}


def _bytes(
    model: nn.Module, task: Task, masks: Masks, pattern: patterns.Pattern
) -> tuple[float, dict[str, dict[float, float]]]:
    """(bytes of the other tensors, bytes of each of these at each level)."""
    tensors = parameter_names(model)
    fixed = sum(held.size_bytes for name, held in storage(model).items() if name not in masks)
    costs = {}
    for name, levels in masks.items():
        values, block = Plain(tensors[name].detach().float().cpu().numpy()), pattern.of(name).block(tensors[name].shape)
        costs[name] = {
            level: float(Sparse(mask.cpu().numpy(), values, block).storage().size_bytes)
            for level, mask in levels.items()
        }
    return float(fixed), costs


@torch.no_grad()
def _macs(
    model: nn.Module, task: Task, masks: Masks, pattern: patterns.Pattern
) -> tuple[float, dict[str, dict[float, float]]]:
    """(multiply-accumulates with the other weights, those with these at each level), for one example."""
    plain = realize(model).eval()
    uses: dict[str, int] = {}

    def listen(path: str, module: nn.Module) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for key, value in module.named_parameters(recurse=False):
                name = f"{path}.{key}".lstrip(".")
                if value.dim() > 1 and (count := _uses(module, inputs[0], output)):
                    uses[name] = uses.get(name, 0) + count

        return module.register_forward_hook(hook)

    hooks = [listen(path, module) for path, module in plain.named_modules()]
    call(plain, task.example)
    for hook in hooks:
        hook.remove()
    if unknown := [name for name in masks if name not in uses]:
        raise ValueError(
            f"allocate: macs must be counted, but nothing shows how often {unknown[0]} is used. Leave it "
            "out with where=, or give bytes."
        )
    fixed = sum(count * int((plain.get_parameter(n) != 0).sum()) for n, count in uses.items() if n not in masks)
    return float(fixed), {
        name: {level: float(uses[name] * int(mask.sum())) for level, mask in levels.items()}
        for name, levels in masks.items()
    }


def _uses(module: nn.Module, x: Any, y: Any) -> int:
    """How often each weight of a layer is multiplied, for a batch of one; 0 where that is not known."""
    if isinstance(module, nn.Linear):
        return int(y.numel() // y.shape[-1])
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return int(y[0, 0].numel())
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return int(x[0, 0].numel())
    return int(x.shape[1 if module.batch_first else 0]) if isinstance(module, nn.RNNBase) else 0


class _Timer:
    """Milliseconds of one example in the engine, with masks on some tensors."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        self.engine = lookup("runtime", "engine")  # by its name: runtimes know all rooms below them, this one too
        plain, self.example = realize(model).cpu().eval(), task.example
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in plain.modules()):
            plain = fold_batchnorm(plain, task.example)
        self.structure, self.stored = trace(plain, task.example), pack(plain)
        self.dense = self._session({})
        alone: dict[str, Any] = {"dense": self.dense}
        self.dense_ms = latency(alone, self.example, seconds=0.5)["dense"].median_ms

    def _session(self, masks: Mapping[str, Tensor]) -> Any:
        changed = {name: Plain(self.stored[name].decode() * mask.cpu().numpy()) for name, mask in masks.items()}
        return self.engine(self.structure.write({**self.stored, **changed}))

    def ms(self, masks: Mapping[str, Tensor]) -> float:
        """The time with these masks, taken in turns with the dense network and in its milliseconds."""
        sessions: dict[str, Any] = {"dense": self.dense, "masked": self._session(masks)}
        times = latency(sessions, self.example, seconds=0.5)
        return self.dense_ms / times["masked"].ratio

    def costs(self, masks: Masks) -> tuple[float, dict[str, dict[float, float]]]:
        """(milliseconds of the dense network, what each tensor at each level adds to them: mostly below zero)."""
        return self.dense_ms, {
            name: {level: self.ms({name: mask}) - self.dense_ms if level else 0.0 for level, mask in levels.items()}
            for name, levels in masks.items()
        }
