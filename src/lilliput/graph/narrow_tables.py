"""NarrowTables: lookup tables of fewer columns, those mixtures of columns that say most."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.graph import slicing
from lilliput.graph.basis import Basis, freedom, mix_, mixtures, moment, unmixed
from lilliput.graph.channels import groups
from lilliput.graph.group import Group
from lilliput.graph.narrow import narrow_
from lilliput.graph.use import placed, use
from lilliput.graph.widths import taylor
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage, calibration
from lilliput.task import Task, call, leaves, length, predict, take

MEASURED = 256  # examples on which a group's columns are missed
PROBED = 16  # examples of them at a time, where columns are weighed one by one
SHARE = 2 / 3  # of the numbers in tables that stay, from one option to the next


@dataclass(frozen=True)
class NarrowTables(Stage):
    """Narrow lookup tables, each alone where a layer reads it, together where a dot product does.

    Where what reads a table is linear, its columns are mixed so that the first carry most of what the training data
    sends through them; in dot products they are rotated (`lilliput.graph.basis`); elsewhere those columns stay whose
    absence would change the outputs most, to first order.

    Args:
        widths: (path of a table, how many columns of it, and of those that go with it, stay).

    Raises:
        KeyError: for a table whose columns must stay, or no table.
        ValueError: unless at least one column stays.

    Example:
        >>> net, x = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 2)), torch.arange(9)
        >>> NarrowTables((("0", 3),))(net, Task("ids", train=x, val=x), None)
        Sequential(
          (0): Embedding(9, 3)
          (1): Linear(in_features=3, out_features=2, bias=True)
        )

    Source:
        Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1936, with rows
        weighted by their use.
    """

    widths: tuple[tuple[str, int], ...]

    structural: ClassVar[bool] = True
    same_graph: ClassVar[bool] = True
    untrained: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"
    follows: ClassVar[tuple[str, ...]] = ("DropTables", "FoldRows", "RemoveBlocks", "EarlierStride")

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        found, counts, chosen = _groups(model, task), use(model, task), []
        for name, count in self.widths:
            path = placed(model, name, "NarrowTables")
            group = next((g for g in found if path in {part.layer for part in g.parts if part.side == "out"}), None)
            if path and group is None:
                raise KeyError(f"NarrowTables: the columns of '{path}' must be free to go, but they stay.")
            if count < 1:
                raise ValueError(f"NarrowTables: '{name}' must keep at least one column, got {count}.")
            if group is not None and count < group.size:  # else it was dropped, or is as narrow already
                chosen.append((group, _basis(model, task, group, counts), count))
        return _narrowed(model, chosen)

    def label(self) -> str:
        return f"tables of width {', '.join(str(count) for count in sorted({count for _, count in self.widths}))}"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer two thirds of the tables' numbers, two thirds of that and so on, down to one column each: always the
        column goes whose absence changes the outputs least for the numbers that it takes.
        """
        found = [group for group in _groups(model, task) if group.size > 1]
        if not found:
            return Refusal("no lookup table may lose columns")
        counts, inputs = use(model, task), calibration(task, MEASURED)
        dense = predict(model, inputs)
        tails, prices = {}, {}
        for group in found:
            made = _basis(model, task, group, counts)
            harm = float(task.divergence(predict(_narrowed(model, [(group, made, 1)]), inputs), dense).mean())
            rest = made.importance.flip(0).cumsum(0).flip(0)  # what goes with column i and those behind it
            tails[group.name] = (harm * rest / rest[1].clamp_min(1e-300)).tolist()
            prices[group.name] = _price(model, group)
        options = tuple(cls(tuple(sorted(widths.items()))) for widths in _ever_narrower(tails, prices))
        return Proposals(options, min(2, len(options)))


def _ever_narrower(tails: dict[str, list[float]], prices: dict[str, int]) -> Iterator[dict[str, int]]:
    widths = {name: len(tail) for name, tail in tails.items()}
    size = sum(prices[name] * width for name, width in widths.items())
    wanted = SHARE * size
    while any(width > 1 for width in widths.values()):
        name = min((n for n in widths if widths[n] > 1), key=lambda n: tails[n][widths[n] - 1] / prices[n])
        widths[name] -= 1
        size -= prices[name]
        if size <= wanted or all(width == 1 for width in widths.values()):
            yield dict(widths)
            wanted = SHARE * size


def _groups(model: nn.Module, task: Task) -> list[Group]:
    """The groups of lookup tables whose channels may go."""
    return [group for group in groups(model, task.example) if group.removable and of_tables(model, group)]


def of_tables(model: nn.Module, group: Group) -> bool:
    """Whether at least half of the layers that make a group's channels are lookup tables."""
    layers = [model.get_submodule(part.layer) for part in group.parts if part.side == "out"]
    tables = sum(isinstance(layer, slicing.TABLES) for layer in layers)
    return 0 < tables >= sum(isinstance(layer, slicing.MAPS) for layer in layers)


def _basis(model: nn.Module, task: Task, group: Group, counts: dict[str, Tensor]) -> Basis:
    free = freedom(model, task.example, group)
    if free != "none":
        return mixtures(model, group, free, moment(model, group, counts))
    heard = taylor(model, [group], lambda net: _probes(net, calibration(task, MEASURED)))
    return unmixed(heard[group.name])


def _probes(model: nn.Module, inputs: Any) -> Iterator[Tensor]:
    """Sums of outputs with random signs: the squared gradient of one is in the mean that of all outputs, squared."""
    draw = torch.Generator().manual_seed(0)
    for rows in torch.arange(length(inputs)).split(PROBED):
        outputs = [leaf for leaf in leaves(call(model, take(inputs, rows))) if leaf.is_floating_point()]
        signs = [torch.randint(0, 2, leaf.shape, generator=draw).to(leaf) * 2 - 1 for leaf in outputs]
        yield torch.stack([(leaf * sign).sum() for leaf, sign in zip(outputs, signs, strict=True)]).sum()


def _narrowed(model: nn.Module, chosen: Sequence[tuple[Group, Basis, int]]) -> nn.Module:
    """Copy a model, mix each group's channels, and keep the first mixtures."""
    model = copy_model(model)
    with torch.no_grad():
        for group, made, _ in chosen:
            mix_(model, group, made.made, made.read)
        narrow_(model, [g for g, _, _ in chosen], {g.name: torch.arange(count) for g, _, count in chosen})
    return model


def _price(model: nn.Module, group: Group) -> int:
    """How many numbers a channel takes."""
    total = 0
    for part in group.parts:
        layer = model.get_submodule(part.layer)
        numbers = sum(p.numel() for p in layer.parameters(recurse=False))
        total += numbers * len(part.index) // (slicing.width(layer, part.side) * group.size)
    return max(total, 1)
