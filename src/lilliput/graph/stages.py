"""Stages that change a network's graph: make a student that is narrower and shallower, fold batch norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from lilliput.graph.blocks import removable, remove_blocks, skipped_blocks
from lilliput.graph.channels import groups, remove_channels
from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.group import Group, skipped
from lilliput.graph.narrow_tables import of_tables
from lilliput.graph.stride import earlier_stride, poolable, set_stride
from lilliput.graph.students import student
from lilliput.graph.widths import Scores, kept, magnitude, uniform, widths
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage, calibration
from lilliput.task import Task, predict

WIDE, NARROWER = 64, 0.7
WIDTHS = (0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625)
MEASURED = 64  # examples on which a missing block is missed


@dataclass(frozen=True)
class FoldBatchNorm(Stage):
    """Fold every batch norm into the layer before it; the function stays the same.

    Example:
        >>> import torch
        >>> net, x = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)).eval(), torch.rand(1, 1, 8, 8)
        >>> FoldBatchNorm()(net, Task("images", train=x, val=x), None)[1]
        Identity()

    Source:
        Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
        2018, arXiv:1712.05877, section 3.2.
    """

    structural: ClassVar[bool] = True

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return fold_batchnorm(model, task.example)


@dataclass(frozen=True)
class Student(Stage):
    """Make a narrower and shallower copy that inherits the dense network's weights where it can.

    Args:
        remove: Paths of whole blocks that go.
        stride: Layers that take a stride of two.
        pool: Layers that read an input averaged two by two.
        width: The fraction of channels of every coupled group that stays, those of the largest norm.
        target: Instead of `width`, the fraction of values or MACs that stays, spread over the groups by how much their
            channels weigh.
        of: What `target` counts, "values" or "macs".
        multiple: Counts of channels are multiples of this.
        init: "dense" inherits the weights, "random" draws them anew.
        seed: The seed of drawn weights.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)); x = torch.rand(1, 4)
        >>> Student(width=0.5)(net, Task("some", train=x, val=x), None)[2]
        Linear(in_features=8, out_features=2, bias=True)

    Source:
        Li et al., Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710 (norms); Fang et al., DepGraph,
        CVPR 2023, arXiv:2301.12900 (coupled groups).
    """

    remove: tuple[str, ...] = ()
    stride: tuple[str, ...] = ()
    pool: tuple[str, ...] = ()
    width: float = 1.0
    target: float = 1.0
    of: Literal["values", "macs"] = "values"
    multiple: int = 1
    init: str = "dense"
    seed: int = 0

    structural: ClassVar[bool] = True

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return student(
            model,
            task.example,
            remove=self.remove,
            stride=self.stride,
            pool=self.pool,
            width=self.width,
            target=self.target,
            of=self.of,
            multiple=self.multiple,
            init=self.init,
            seed=self.seed,
        )


@dataclass(frozen=True)
class RemoveBlocks(Stage):
    """Remove whole blocks of a network, such as residual blocks.

    Args:
        blocks: paths of the blocks that go.

    Raises:
        KeyError: for a block that the model does not have.
        ValueError: for one that cannot go, since its output has another shape than its input.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> x = torch.rand(8, 4)
        >>> len(list(RemoveBlocks(("1",))(net, Task("toy", (x, x), (x, x)), None).parameters()))
        4

    Source:
        Huang, Sun, Liu, Sedra and Weinberger, Deep networks with stochastic depth, ECCV 2016, arXiv:1603.09382
        (residual networks survive missing blocks).
    """

    blocks: tuple[str, ...]

    structural: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"
    version: ClassVar[int] = 2

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        return remove_blocks(model, task.example, self.blocks)

    def label(self) -> str:
        return f"{len(self.blocks)} block{'s' if len(self.blocks) > 1 else ''} fewer"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer one block, two blocks and so on, those first whose absence changes the outputs least."""
        example = task.example
        for block in skipped_blocks(model, example):
            known.skip(block.name, block.reason)
        names = removable(model, example)
        if not names:
            return Refusal("no block keeps its shape")
        inputs = calibration(task, MEASURED)
        dense = predict(model, inputs)
        missed = {
            name: float(task.divergence(predict(remove_blocks(model, example, [name]), inputs), dense).mean())
            for name in names
        }
        order = tuple(sorted(missed, key=missed.__getitem__))
        while not _runs(model, example, order):  # each can go, but not the last one of a transformer's encoder
            order = order[:-1]
        return Proposals(tuple(cls(order[:count]) for count in range(1, len(order) + 1)), len(order))


def _runs(model: nn.Module, example: Any, blocks: tuple[str, ...]) -> bool:
    try:
        remove_blocks(model, example, blocks)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class EarlierStride(Stage):
    """Compute on fewer positions from an early layer on: twice its stride, or an input averaged two by two.

    Args:
        layers: paths of convolutions.
        pool: average two by two positions before the convolution, whose own stride stays.

    Raises:
        KeyError: for a layer that the model does not have.
        ValueError: where the output would change its shape.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
        >>> x = torch.rand(8, 1, 8)
        >>> EarlierStride(("0",))(net, Task("toy", (x, x), (x, x)), None)[0].stride
        (2,)
    """

    layers: tuple[str, ...]
    pool: bool = False

    structural: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"
    follows: ClassVar[tuple[str, ...]] = ("RemoveBlocks",)

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        for name in self.layers:
            model = set_stride(model, task.example, name, pool=self.pool)
        return model

    def label(self) -> str:
        return "early stride"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer the first layer that may take twice its stride, else the first that may read a pooled input."""
        if strides := earlier_stride(model, task.example)[:1]:
            return Proposals((cls(tuple(strides)),), 1)
        if pools := poolable(model, task.example):
            return Proposals((cls(pools, pool=True),), 1)
        return Refusal("no convolution may take an earlier stride")


@dataclass(frozen=True)
class Narrow(Stage):
    """Keep a fraction of the channels of every coupled group, those of the largest norm.

    Args:
        width: the fraction of channels that stays, in (0, 1].
        multiple: widths are multiples of it.
        spread: let widths differ, by how much each group's channels weigh, so that width^2 of all values stay.
        tables: narrow lookup tables too (`NarrowTables` does so better).

    Raises:
        ValueError: unless 0 < width <= 1.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> x = torch.rand(8, 4)
        >>> Narrow(0.5)(net, Task("toy", (x, x), (x, x)), None)[0]
        Linear(in_features=4, out_features=8, bias=True)

    Source:
        Li, Kadav, Durdanovic, Samet and Graf, Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710
        (norms); Fang, Ma, Song, Mi and Wang, DepGraph, CVPR 2023, arXiv:2301.12900 (coupled groups).
    """

    width: float
    multiple: int = 4
    spread: bool = False
    tables: bool = True

    structural: ClassVar[bool] = True
    same_graph: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"
    follows: ClassVar[tuple[str, ...]] = ("RemoveBlocks", "EarlierStride", "NarrowTables")

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        listed = groups(model, task.example)
        scores = magnitude(model, listed)
        counts = self._counts(model, task, listed, scores)
        return remove_channels(model, task.example, kept(listed, scores, counts), listed)

    def _counts(self, model: nn.Module, task: Task, listed: Sequence[Group], scores: Scores) -> dict[str, int]:
        chosen = [group for group in listed if self.tables or not of_tables(model, group)]
        if self.spread:
            target = round(self.width**2, 6)
            return widths(model, task.example, chosen, target, scores, round_to=self.multiple)
        return uniform(chosen, self.width, self.multiple)

    def label(self) -> str:
        return f"width {self.width:g}{' spread' if self.spread else ''}"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer widths from 7/8 to 1/16, each uniform, spread by weight and uniform in eights; then to one channel.

        Where the widest group has at least 64 channels, widths down to 1/16 are multiples of four.
        """
        channels = groups(model, task.example)
        for item in skipped(channels):
            known.skip(item.name, item.reason)
        sizes = [group.size for group in channels if group.removable and not of_tables(model, group)]
        if not sizes:
            return Refusal("no channel can go")
        shares, options = list(WIDTHS), list[Narrow]()
        typical = sorted(sizes)[len(sizes) // 2]
        while shares[-1] * NARROWER * typical > 1:
            shares.append(round(shares[-1] * NARROWER, 4))
        for share in shares:
            hows: tuple[tuple[int, bool], ...] = ((1, False), (1, True))
            if share < WIDTHS[-1]:
                hows = ((1, False),)
            elif max(sizes) >= WIDE:
                hows = ((4, False), (4, True), (8, False))
            options += [cls(share, *how, tables=False) for how in hows]
        distinct: dict[tuple[Any, ...], Narrow] = {}
        for option in options:
            counts = () if option.spread else tuple(sorted(uniform(channels, option.width, option.multiple).items()))
            distinct.setdefault((option.spread, option.width if option.spread else counts), option)
        options = list(distinct.values())
        half = min(range(len(options)), key=lambda i: (abs(options[i].width - 0.5), options[i].spread))
        return Proposals(tuple(options), 1 + half)
