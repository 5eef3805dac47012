"""DropTables: whole lookup tables leave the network, a constant in their place."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.graph.channels import groups
from lilliput.graph.group import Group
from lilliput.graph.lookup import OneRow
from lilliput.graph.slicing import narrow_
from lilliput.graph.trace import agree, replace_, run
from lilliput.graph.use import tables
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage, calibration
from lilliput.task import Task, leaves, length, predict

MEASURED = 512  # examples on which a missing table is missed, and its mean output is taken


@dataclass(frozen=True)
class DropTables(Stage):
    """Replace lookup tables by their mean output, which joins the bias of the layers that read it where it can.

    With W the columns of a Linear that read the table and m its mean output over training inputs, b becomes b + W m and
    W goes. Where something else reads the table (a dot product), every id reads the one row m, which is trained on.

    Args:
        tables: their paths.

    Raises:
        KeyError: for a path that is no table that can be replaced.

    Example:
        >>> net, x = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.arange(8)
        >>> net = DropTables(("0",))(net, Task("ids", train=x, val=x), None)
        >>> sum(p.numel() for p in net.parameters())
        2

    Source:
        No paper: a feature selection in which the network is the judge.
    """

    tables: tuple[str, ...]

    structural: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        return dropped(model, task, self.tables)

    def label(self) -> str:
        return f"without {', '.join(self.tables)}" if len(self.tables) < 3 else f"{len(self.tables)} tables fewer"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer one table, two tables and so on, those first whose absence changes the outputs least for their size."""
        inputs = calibration(task, MEASURED)
        means = _means(model, inputs, tables(model))
        if not means:
            return Refusal("no lookup table of its own is called")
        dense, missed = predict(model, inputs), {}
        for path, mean in means.items():
            without = _replaced(model, {path: mean})
            harm = float(task.divergence(predict(without, inputs), dense).mean())
            missed[path] = harm / cast(Any, model.get_submodule(path)).weight.numel()
        order = tuple(sorted(missed, key=missed.__getitem__))
        if length(inputs) > 1 and _constant(predict(_replaced(model, means), inputs)):
            order = order[:-1]  # one of them must stay, or the network answers the same to everything
        if not order:
            return Refusal("the only lookup table is all that the network reads")
        return Proposals(tuple(cls(order[:count]) for count in range(1, len(order) + 1)))


def dropped(model: nn.Module, task: Task, paths: Iterable[str]) -> nn.Module:
    """Copy a model without these tables; see `DropTables`."""
    paths, known = tuple(paths), tables(model)
    if unknown := [path for path in paths if path not in known]:
        raise KeyError(
            f"DropTables: '{unknown[0]}' must be a lookup table of its own, got {', '.join(known) or 'none'}."
        )
    means = _means(model, calibration(task, MEASURED), {path: known[path] for path in paths})
    listed = [g for g in groups(model, task.example) if g.name in means and _linear(model, g)]
    model = _replaced(model, means)
    absorbed = _absorbed(model, listed)
    return absorbed if agree(run(model, task.example), run(absorbed, task.example), 1e-4) else model


def _means(model: nn.Module, inputs: Any, found: dict[str, Any]) -> dict[str, Tensor]:
    """The mean output of each table that is called."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def hook(path: str) -> Any:
        def add(module: nn.Module, args: Any, output: Tensor) -> None:
            rows = output.detach().double().flatten(0, -2)
            before, count = sums.get(path, (torch.zeros(rows.shape[1], dtype=torch.float64), 0))
            sums[path] = before + rows.sum(0).cpu(), count + len(rows)

        return add

    handles = [module.register_forward_hook(hook(path)) for path, module in found.items()]
    try:
        predict(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {path: (total / count).to(found[path].weight) for path, (total, count) in sums.items()}


def _replaced(model: nn.Module, means: dict[str, Tensor]) -> nn.Module:
    model = copy_model(model)
    for path, mean in means.items():
        table = model.get_submodule(path)
        replace_(model, table, OneRow(mean.clone(), isinstance(table, nn.EmbeddingBag)))
    return model


def _linear(model: nn.Module, group: Group) -> bool:
    """Whether a table's channels are its own, and read by Linears with a bias alone."""
    readers = [(part.side, model.get_submodule(part.layer)) for part in group.parts[1:]]
    return group.removable and all(
        side == "in" and isinstance(reader, nn.Linear) and reader.bias is not None for side, reader in readers
    )


def _absorbed(model: nn.Module, listed: Iterable[Group]) -> nn.Module:
    """What the constants give, added to the biases of their readers, whose columns for them go."""
    model = copy_model(model)
    columns: dict[str, Tensor] = {}
    with torch.no_grad():
        for group in listed:
            constant = cast(OneRow, model.get_submodule(group.name))
            for part in group.parts[1:]:
                reader = cast(nn.Linear, model.get_submodule(part.layer))
                index = torch.tensor(part.index)
                reader.bias += reader.weight[:, index] @ constant.row[torch.tensor(part.channel)]
                columns.setdefault(part.layer, torch.ones(reader.in_features, dtype=torch.bool))[index] = False
            constant.row = nn.Parameter(constant.row.new_zeros(0))
        for path, stays in columns.items():
            narrow_(model.get_submodule(path), None, stays.nonzero().flatten())
    return model


def _constant(outputs: Any) -> bool:
    return all(bool((leaf == leaf[:1]).all()) for leaf in leaves(outputs))
