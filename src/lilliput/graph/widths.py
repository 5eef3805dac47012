"""Widths: how many channels each group keeps, and which, by importance, a multiplier or a budget."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lilliput.graph import slicing
from lilliput.graph.group import Group, choose
from lilliput.graph.trace import copied, evaluating, tensors
from lilliput.task import call, leaves

Scores = Mapping[str, Tensor]


def magnitude(model: nn.Module, groups: Iterable[Group]) -> dict[str, Tensor]:
    """Score each channel by the L2 norm of everything the group's layers hold for it, as a share of the group.

    s_c = sqrt(sum over coupled tensors of ||W_c||^2), then s * n / sum(s), with n the number of layers that make the
    group's channels: a channel that many layers make is dearer. Layers that only normalise are not counted, since the
    layer before them sets the scale.

    Args:
        model: The model.
        groups: Its groups.

    Returns:
        Scores (size,) by the name of the group.

    Example:
        >>> from lilliput.graph.channels import groups
        >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 1.0]]))
        >>> _ = net[1].weight.data.fill_(0)
        >>> magnitude(net, groups(net, torch.rand(1, 2)))["0"].tolist()
        [0.75, 0.0, 0.25]

    Source:
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, arXiv:1608.08710, over the groups of Fang et al.,
        DepGraph, CVPR 2023, arXiv:2301.12900, equation 4.
    """
    modules = dict(model.named_modules())
    scores = {}
    for group in groups:
        total = torch.zeros(group.size)
        for sums in _sums(modules, group, lambda p: p.detach().float() ** 2):
            total += sums
        total = total.sqrt()
        makers = sum(p.side == "out" and isinstance(modules[p.layer], slicing.MAPS) for p in group.parts) or 1
        share = total / total.sum() if float(total.sum()) > 0 else torch.full_like(total, 1 / max(group.size, 1))
        scores[group.name] = share * makers
    return scores


def taylor(
    model: nn.Module, groups: Iterable[Group], losses: Callable[[nn.Module], Iterable[Tensor]]
) -> dict[str, Tensor]:
    """Score each channel by the squared first-order change of the loss when its weights go to zero.

    s_c = sum over batches and coupled tensors of (sum over the channel of g * w)^2, comparable between groups.

    Args:
        model: The model.
        groups: Its groups.
        losses: A function of a model that yields one scalar loss a batch, computed on the copy it is given, in eval
            mode: `lambda net: (task.loss(net(b.inputs), b) for b in task.batches(8, seed=0))`.

    Returns:
        Scores (size,) by the name of the group.

    Source:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv:1906.10771, equation 8.
    """
    groups = tuple(groups)
    work = copied(model, "taylor")
    for p in work.parameters():
        p.requires_grad_(p.is_floating_point())
    modules = dict(work.named_modules())
    scores = {group.name: torch.zeros(group.size) for group in groups}
    with evaluating(work), torch.enable_grad():
        for loss in losses(work):
            work.zero_grad()
            loss.backward()
            for group in groups:
                for sums in _sums(modules, group, _product):
                    scores[group.name] += sums**2
    return scores


def _product(p: Tensor) -> Tensor:
    return (p.detach() * p.grad).float() if p.grad is not None else torch.zeros(p.shape)


def _sums(modules: dict[str, nn.Module], group: Group, each: Callable[[Tensor], Tensor]) -> Iterable[Tensor]:
    """For every coupled tensor, the sum of each(parameter) over each of the group's channels; none where they stay."""
    for part in group.parts if group.removable else ():
        layer = modules[part.layer]
        if not isinstance(layer, (*slicing.MAPS, *slicing.TABLES)):
            continue
        for name, p in layer.named_parameters(recurse=False):
            sums = slicing.per_channel(layer, part.side, name, each(p).cpu())
            if sums is not None:
                yield torch.zeros(group.size).index_add_(0, torch.tensor(part.channel), sums[torch.tensor(part.index)])


def kept(groups: Iterable[Group], scores: Scores, counts: Mapping[str, int]) -> dict[str, Tensor]:
    """Choose what `remove_channels` takes: for each group whose count is below its size, the best channels, sorted."""
    return {
        g.name: choose(g, scores[g.name], counts[g.name])
        for g in groups
        if g.removable and counts.get(g.name, g.size) < g.size
    }


def rounded(group: Group, count: float, round_to: int = 1) -> int:
    """Return the width next to `count` that is a multiple of `round_to` and of the group's runs; at most its size,
    never 0.
    """
    step = math.lcm(group.multiple, round_to)
    if group.reason or step > group.size:  # too narrow for the rounding: only the runs bind
        step = group.multiple
    if group.reason or count >= group.size:
        return group.size
    return min(max(round(count / step), 1) * step, group.size // step * step)


def uniform(groups: Iterable[Group], multiplier: float, round_to: int = 8) -> dict[str, int]:
    """Keep the same share of every group: multiplier * size, rounded to `round_to`; groups that stay keep all.

    Raises:
        ValueError: Unless 0 < multiplier <= 1.
    """
    if not 0 < multiplier <= 1:
        raise ValueError(f"uniform: multiplier must be in (0, 1], got {multiplier}. For half the channels write 0.5.")
    return {g.name: rounded(g, multiplier * g.size, round_to) for g in groups}


@dataclass(frozen=True)
class Size:
    """Count values (parameters) and multiply-accumulates of one example."""

    values: int
    macs: int


class Sizes:
    """Compute values and MACs of a model as a function of its groups' widths, without building it.

    Args:
        model: The model.
        example: One example of inputs.
        groups: Its groups.

    Example:
        >>> from lilliput.graph.channels import groups
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.rand(1, 4)
        >>> Sizes(net, x, groups(net, x))({"0": 4})
        Size(values=30, macs=24)
    """

    def __init__(self, model: nn.Module, example: Any, groups: Iterable[Group]) -> None:
        self.groups = {g.name: g for g in groups}
        self.modules = {n: m for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
        self.counted: dict[str, set[str]] = {}  # layer -> its parameters that no layer before it holds too
        held: set[int] = set()
        for name, module in self.modules.items():
            mine = {n: p for n, p in module.named_parameters(recurse=False) if id(p) not in held}
            self.counted[name] = set(mine)
            held |= {id(p) for p in mine.values()}
        self.positions = _positions(copied(model, "Sizes"), example)
        self.sides: dict[str, list[tuple[str, str, float]]] = {}  # group -> (layer, side, positions a channel)
        for g in self.groups.values():
            self.sides[g.name] = [(p.layer, p.side, len(p.index) / len(set(p.channel))) for p in g.parts if p.index]
        self.joins: dict[str, list[tuple[str, str, float]]] = {}  # layer -> (group, side, positions a channel)
        for group, sides in self.sides.items():
            for layer, side, per in sides:
                self.joins.setdefault(layer, []).append((group, side, per))

    def __call__(self, counts: Mapping[str, int]) -> Size:
        return self._sum(self.modules, counts)

    def touched(self, name: str) -> set[str]:
        """The layers that a group's width changes."""
        return {layer for layer, _, _ in self.sides[name]}

    def saving(self, counts: Mapping[str, int], name: str, count: int) -> Size:
        """What taking group `name` from counts[name] to `count` saves."""
        layers = self.touched(name)
        now, then = self._sum(layers, counts), self._sum(layers, {**counts, name: count})
        return Size(now.values - then.values, now.macs - then.macs)

    def _sum(self, layers: Iterable[str], counts: Mapping[str, int]) -> Size:
        sizes = [
            self._layer(name, self._share(name, "out", counts), self._share(name, "in", counts)) for name in layers
        ]
        return Size(sum(s.values for s in sizes), sum(s.macs for s in sizes))

    def _share(self, layer: str, side: str, counts: Mapping[str, int]) -> float:
        gone = sum(
            (self.groups[g].size - counts.get(g, self.groups[g].size)) * per
            for g, s, per in self.joins.get(layer, ())
            if s == side
        )
        return 1 - gone / slicing.width(self.modules[layer], side) if gone else 1.0

    def _layer(self, name: str, out: float, into: float) -> Size:
        layer = self.modules[name]
        values = weights = 0
        for tensor, p in layer.named_parameters(recurse=False):
            if isinstance(layer, nn.RNNBase) and p.ndim == 2:
                share = out * (into if tensor.startswith("weight_ih_l0") else out)
            elif isinstance(layer, slicing.MAPS) and p.ndim > 1 and not slicing.depthwise(layer):
                share = out * into
            else:
                share = out
            numbers = round(p.numel() * share)
            values += numbers if tensor in self.counted[name] else 0
            weights += numbers if p.ndim > 1 else 0
        return Size(values, round(weights * self.positions.get(name, 0.0)))


def _positions(model: nn.Module, example: Any) -> dict[str, float]:
    """How often each linear, convolutional or recurrent layer applies its weights to one example."""
    times: dict[str, float] = {}
    batch = max(len(leaves(example)[0]), 1)

    def hook(name: str) -> Any:
        def seen(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            into, out = tensors(list(args)), tensors(output)
            if into and out:
                side = "in" if isinstance(module, (*slicing.TRANSPOSED, nn.RNNBase)) else "out"
                tensor = into[0] if side == "in" else out[0]
                times[name] = times.get(name, 0.0) + tensor.numel() / slicing.width(module, side) / batch

        return seen

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, slicing.MAPS)]
    try:
        with evaluating(model), torch.no_grad():
            call(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return times


def widths(
    model: nn.Module,
    example: Any,
    groups: Iterable[Group],
    target: float,
    scores: Scores,
    *,
    of: Literal["values", "macs"] = "values",
    round_to: int = 8,
    sensitivity: Mapping[str, Mapping[int, float]] | None = None,
) -> dict[str, int]:
    """Choose counts under which the model has at most `target` of its values or MACs, losing as little as possible.

    Greedy: take the step to the next narrower width that costs least per value (or MAC) saved, until the target is met
    or nothing can be narrower. A group's loss at width k is sensitivity[name][k] where it was measured (linear between
    the measured widths), else total * -log(sum of the k largest scores / total), which is about the discarded score at
    first and grows without bound as the group empties.

    Args:
        model: The model.
        example: One example of inputs.
        groups: Its groups.
        target: The share that stays, in (0, 1].
        scores: Scores (size,) by the name of the group.
        of: What `target` counts, "values" or "macs".
        round_to: Counts are multiples of this.
        sensitivity: Measured losses, by the name of the group and the width.

    Returns:
        Counts by the name of the group.

    Raises:
        ValueError: Unless 0 < target <= 1.
    """
    if not 0 < target <= 1:
        raise ValueError(f"widths: target must be in (0, 1], got {target}. For a quarter write 0.25.")
    free = [g for g in groups if g.removable]
    sizes = Sizes(model, example, free)
    counts = {g.name: g.size for g in free}
    losses = {g.name: _curve(g, scores, (sensitivity or {}).get(g.name)) for g in free}
    size = getattr(sizes(counts), of)
    goal = target * size
    steps: dict[str, tuple[float, int, float]] = {}  # group -> (price, next width, what it saves)
    stale = {g.name: g for g in free}
    while size > goal:
        for name, g in stale.items():
            count = _narrower(g, counts[name], round_to)
            saved = getattr(sizes.saving(counts, name, count), of)
            steps[name] = ((losses[name](count) - losses[name](counts[name])) / max(saved, 1e-9), count, saved)
        name = min((n for n in steps if steps[n][1] < counts[n]), key=lambda n: steps[n][0], default="")
        if name not in counts:
            break
        size -= steps[name][2]
        counts[name] = steps[name][1]
        stale = {g.name: g for g in free if sizes.touched(g.name) & sizes.touched(name)}
    return counts


def _narrower(group: Group, count: int, round_to: int) -> int:
    step = math.lcm(group.multiple, round_to)
    step = group.multiple if step > group.size else step
    return max((count - 1) // step * step, 0) or count


def _curve(group: Group, scores: Scores, measured: Mapping[int, float] | None) -> Callable[[int], float]:
    if measured:
        points = sorted({**measured, group.size: measured.get(group.size, 0.0)}.items())

        def between(count: int) -> float:
            low = max((p for p in points if p[0] <= count), default=points[0])
            high = min((p for p in points if p[0] >= count), default=points[-1])
            if low[0] == high[0]:
                return low[1] if count >= low[0] else low[1] * low[0] / count
            return low[1] + (high[1] - low[1]) * (count - low[0]) / (high[0] - low[0])

        return between
    best = scores[group.name].double().clamp(min=0).sort(descending=True).values.cumsum(0)
    total = float(best[-1])
    return lambda count: -total * math.log(max(float(best[count - 1]) / total, 1e-12)) if total > 0 else 0.0
