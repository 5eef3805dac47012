"""Pruning of channels: remove whole channels with everything coupled to them, which gives smaller plain layers."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.errors import near
from lilliput.graph import slicing
from lilliput.graph.channels import groups, remove_channels
from lilliput.graph.group import Group
from lilliput.graph.widths import kept, rounded, taylor
from lilliput.stage import Reference, Stage
from lilliput.statistics.sources import Labelled
from lilliput.task import Task

SCORES = ("l1", "l2", "geometric_median", "batchnorm_scale", "taylor", "random")
COMPARABLE = ("batchnorm_scale", "taylor", "random")  # between groups as they are; the others after division


@dataclass(frozen=True)
class PruneChannels(Stage):
    """Remove the channels of the lowest scores, through whatever couples them to other layers.

    Coupled are layers joined by additions, concatenations, grouped and depthwise convolutions, norms and recurrent
    layers. What is left is a plain module of smaller layers. Groups that cannot lose channels are left alone (see
    `skipped`): the outputs, layers with one channel, tied and frozen layers, and what an operation mixes.

    The score of channel c is taken over its filter W_c, everything that makes it, and summed over the layers that make
    it together. "l1", "l2": the norm of W_c. "geometric_median": the sum of its distances ||W_c - W_j|| to all filters
    j of the layer, small where others can stand in for it. "batchnorm_scale": |gamma_c| of the batch norms (train with
    `Slimming` first). "taylor": (sum of g w over the channel)^2, on 256 training examples. "random".

    Args:
        sparsity: The fraction of channels that goes, in [0, 1).
        score: One of the names above.
        allocation: "uniform" (the same fraction of every group) or "global" (the lowest anywhere; norms and distances
            are divided by their mean in the group, and at least one channel of each stays).
        multiple: Widths are multiples of this, where a group is that wide.
        where: Glob patterns on the layers that make the channels, separated by commas.
        seed: The seed of the random score and of drawn labels.

    Raises:
        ValueError: For settings out of range, for weights that are NaN, and where nothing matches or may go.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 8, 3), nn.ReLU(), nn.Conv1d(8, 2, 3)); x = torch.randn(4, 1, 9)
        >>> task = Task("signals", train=x, val=x)
        >>> PruneChannels(0.75)(net, task, None)[2]
        Conv1d(2, 2, kernel_size=(3,), stride=(1,))

    Source:
        Li et al., Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710, section 3.1 (l1); He et al.,
        Filter pruning via geometric median, CVPR 2019, arXiv:1811.00250, equation 4; Liu et al., Learning efficient
        convolutional networks through network slimming, ICCV 2017, arXiv:1708.06519, section 3; Molchanov et al.,
        Importance estimation for neural network pruning, CVPR 2019, arXiv:1906.10771, equation 8; Fang et al.,
        DepGraph, CVPR 2023, arXiv:2301.12900 (what goes together).
    """

    sparsity: float
    score: str = "l2"
    allocation: str = "uniform"
    multiple: int = 1
    where: str = "*"
    seed: int = 0

    structural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"PruneChannels: sparsity must be in [0, 1), got {self.sparsity:g}. For half the channels write 0.5."
            )
        if self.score not in SCORES:
            raise ValueError(
                f"PruneChannels: score must be a known name, got {self.score!r}. {near(self.score, SCORES)}"
            )
        if self.allocation not in ("uniform", "global"):
            raise ValueError(f"PruneChannels: allocation must be 'uniform' or 'global', got {self.allocation!r}.")
        if self.multiple < 1:
            raise ValueError(f"PruneChannels: multiple must be at least 1, got {self.multiple}.")

    def skipped(self, model: nn.Module, task: Task) -> dict[str, str]:
        """List the groups that `where` takes in but that keep all their channels, each with the reason."""
        return {g.name: g.reason for g in self._chosen(model, groups(model, task.example)) if g.reason}

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        every = groups(model, task.example)
        chosen = self._chosen(model, every)
        free = [g for g in chosen if g.removable]
        if not free:
            raise ValueError(f"PruneChannels: some channels must be free to go, got none: {chosen[0]} Widen where=.")
        scores = self.rated(model, task, free)
        for name, score in scores.items():
            if not bool(score.isfinite().all()):
                raise ValueError(
                    f"PruneChannels: scores must be finite, got NaN or infinity for {name}. Load a sound "
                    "checkpoint, or leave it out with where=."
                )
        return remove_channels(model, task.example, kept(free, scores, self._counts(free, scores)), every)

    def rated(self, model: nn.Module, task: Task, candidates: Iterable[Group]) -> dict[str, Tensor]:
        """Compute one score a channel, (size,) for each group."""
        candidates = list(candidates)
        if self.score == "taylor":
            scores = _taylor(model, task, candidates, self.seed)
        elif self.score == "random":
            generator = torch.Generator().manual_seed(self.seed)
            scores = {g.name: torch.rand(g.size, generator=generator) for g in candidates}
        else:
            scores = {g.name: RATED[self.score](model, g) for g in candidates}
        if self.allocation == "global" and self.score not in COMPARABLE:
            scores = {name: score / score.mean().clamp_min(1e-30) for name, score in scores.items()}
        return scores

    def _chosen(self, model: nn.Module, every: tuple[Group, ...]) -> list[Group]:
        patterns = [pattern.strip() for pattern in self.where.split(",")]
        makers = {g.name: [p.layer for p in g.parts if p.side == "out"] or [g.name] for g in every}
        chosen = [g for g in every if any(fnmatchcase(m, p) for m in makers[g.name] for p in patterns)]
        if not chosen:
            raise ValueError(
                f"PruneChannels: where must match a layer that makes channels, got {self.where!r}. "
                f"{near(self.where, [m for of in makers.values() for m in of])}"
            )
        if self.score != "batchnorm_scale":
            return chosen
        why = "no batch norm scales its channels"
        return [g if g.reason or _scales(model, g) else replace(g, reason=why) for g in chosen]

    def _counts(self, free: list[Group], scores: dict[str, Tensor]) -> dict[str, int]:
        """How many channels of each group stay."""
        if self.allocation == "uniform" or not self.sparsity:
            wanted = {g.name: (1 - self.sparsity) * g.size for g in free}
        else:
            least = {g.name: min(math.lcm(g.multiple, self.multiple), g.size) for g in free}
            wanted = {g.name: g.size for g in free}
            goal = int(self.sparsity * sum(g.size for g in free) + 1e-9)
            for _, _, name in sorted((float(s), i, name) for name, of in scores.items() for i, s in enumerate(of)):
                if goal and wanted[name] > least[name]:
                    wanted[name], goal = wanted[name] - 1, goal - 1
        return {g.name: rounded(g, wanted[g.name], self.multiple) for g in free}


def filters(layer: nn.Module) -> Tensor:
    """Stack everything that makes each of a layer's channels, without the biases.

    Args:
        layer: A linear, convolutional or recurrent layer.

    Returns:
        A matrix (channels, numbers).

    Raises:
        ValueError: For a grouped transposed convolution.

    Example:
        >>> filters(nn.Conv2d(3, 8, 5)).shape, filters(nn.GRU(4, 6)).shape
        (torch.Size([8, 75]), torch.Size([6, 30]))
    """
    if isinstance(layer, nn.RNNBase):  # the gates lie one after the other; so do layers and directions
        of = [p.detach() for name, p in layer.named_parameters() if name.startswith("weight")]
        return torch.cat([w.unflatten(0, (-1, layer.hidden_size)).transpose(0, 1).flatten(1) for w in of], 1)
    weight: Tensor = layer.weight.detach()  # type: ignore[operator]
    if isinstance(layer, slicing.TRANSPOSED) and layer.groups > 1 and not slicing.depthwise(layer):
        raise ValueError("filters: a transposed convolution must not be grouped, got one that is.")
    dim = slicing.channels(layer, "out", "weight")
    return weight.transpose(0, dim or 0).flatten(1)


def _makers(model: nn.Module, group: Group) -> Iterator[tuple[Tensor, Tensor]]:
    """For each layer that makes the group's channels: its filters (n, numbers), and the channel each belongs to."""
    for part in group.parts:
        layer = model.get_submodule(part.layer)
        if part.side == "out" and isinstance(layer, (*slicing.MAPS, *slicing.TABLES)):
            yield filters(layer).float().cpu()[torch.tensor(part.index)], torch.tensor(part.channel)


def l1(model: nn.Module, group: Group) -> Tensor:
    """Add up ||W_c||_1 over the layers that make channel c: (size,)."""
    total = torch.zeros(group.size)
    for w, channel in _makers(model, group):
        total.index_add_(0, channel, w.abs().sum(1))
    return total


def l2(model: nn.Module, group: Group) -> Tensor:
    """Add up ||W_c||_2 over the layers that make channel c: (size,)."""
    total = torch.zeros(group.size)
    for w, channel in _makers(model, group):
        total.index_add_(0, channel, w.norm(dim=1))
    return total


def geometric_median(model: nn.Module, group: Group) -> Tensor:
    """Add up sum_j ||W_c - W_j||_2 over the filters j of a layer and the layers that make channel c: (size,).

    It is the function whose minimum is the geometric median of the filters, at W_c.
    """
    total = torch.zeros(group.size)
    for w, channel in _makers(model, group):
        total.index_add_(0, channel, torch.cdist(w, w, compute_mode="donot_use_mm_for_euclid_dist").sum(1))
    return total


def batchnorm_scale(model: nn.Module, group: Group) -> Tensor:
    """Add up |gamma_c| over the batch norms of channel c: (size,)."""
    total = torch.zeros(group.size)
    for gamma, index, channel in _scales(model, group):
        total.index_add_(0, channel, gamma.detach().abs().float().cpu()[index])
    return total


def _scales(model: nn.Module, group: Group) -> list[tuple[Tensor, Tensor, Tensor]]:
    norms = [(part, model.get_submodule(part.layer)) for part in group.parts]
    return [
        (norm.weight, torch.tensor(part.index), torch.tensor(part.channel))
        for part, norm in norms
        if isinstance(norm, slicing.BATCH_NORMS) and norm.affine
    ]


RATED = {"l1": l1, "l2": l2, "geometric_median": geometric_median, "batchnorm_scale": batchnorm_scale}


def _taylor(model: nn.Module, task: Task, candidates: list[Group], seed: int) -> dict[str, Tensor]:
    def losses(net: nn.Module) -> Iterator[Tensor]:
        data = Labelled.of(net.float(), task, 256, seed)
        return (loss for loss, _ in data.losses())

    return taylor(model, candidates, losses)
