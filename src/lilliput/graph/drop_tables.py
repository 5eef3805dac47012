"""DropTables: whole lookup tables leave the network, a constant in their place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.graph.channels import groups
from lilliput.graph.group import Group
from lilliput.graph.lookup import FirstRows, Nothing, Table, shortened
from lilliput.graph.narrow_tables import of_tables
from lilliput.graph.slicing import narrow_
from lilliput.graph.trace import agree, replace_, run
from lilliput.graph.use import placed, replaceable, use
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage, calibration
from lilliput.task import Task, leaves, length, predict

MEASURED = 256  # examples on which a missing table is missed


@dataclass(frozen=True)
class DropTables(Stage):
    """Replace lookup tables by one row each, which joins the bias of the layers that read it where it can.

    With W the columns of a Linear that read the table and m the mean of its rows, each as often as training data reads
    it, b becomes b + W m and W goes: nothing is looked up. Where something else reads the table, such as a dot product,
    every id reads the row m, which is trained on.

    Args:
        tables: their paths.

    Raises:
        KeyError: for a path that is no table that can be replaced.

    Example:
        >>> net, x = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), torch.arange(8)
        >>> DropTables(("0",))(net, Task("ids", train=x, val=x), None)
        Sequential(
          (0): Nothing()
          (1): Linear(in_features=0, out_features=2, bias=True)
        )

    Source:
        No paper: a feature selection in which the network is the judge.
    """

    tables: tuple[str, ...]

    structural: ClassVar[bool] = True
    untrained: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        return dropped(model, task, self.tables)

    def label(self) -> str:
        return f"without {', '.join(self.tables)}" if len(self.tables) < 3 else f"{len(self.tables)} tables fewer"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer one table, two tables and so on, those first whose absence changes the outputs least for their size.

        Tables to which many layers add (the words of a transformer) are no features and stay.
        """
        inputs, counts = calibration(task, MEASURED), use(model, task)
        streams = {p.layer for g in groups(model, task.example) if not of_tables(model, g) for p in g.parts}
        found = {path: table for path, table in replaceable(model).items() if path in counts and _is_mean(table)}
        found = {path: table for path, table in found.items() if path not in streams}
        if not found:
            return Refusal("no lookup table is a feature of its own")
        dense, missed = predict(model, inputs), {}
        for path, table in found.items():
            without = predict(_replaced(model, counts, [path]), inputs)
            missed[path] = float(task.divergence(without, dense).mean()) / table.weight.numel()
        order = tuple(sorted(missed, key=missed.__getitem__))
        if length(inputs) > 1 and _constant(predict(_replaced(model, counts, found), inputs)):
            order = order[:-1]  # one of them must stay, or the network answers the same to everything
        if not order:
            return Refusal("the only lookup table is all that the network reads")
        return Proposals(tuple(cls(order[:count]) for count in range(1, len(order) + 1)))


def dropped(model: nn.Module, task: Task, paths: Iterable[str]) -> nn.Module:
    """Copy a model without these tables; see `DropTables`."""
    places = [at for path in paths if (at := placed(model, path, "DropTables"))]
    listed = [g for g in groups(model, task.example) if g.name in places and _linear(model, g)]
    model = _replaced(model, use(model, task), places)
    absorbed = _absorbed(model, listed)
    return absorbed if _same(model, absorbed, task) else model


def _same(model: nn.Module, absorbed: nn.Module, task: Task) -> bool:
    """Whether a network computes the same without its tables; not where its forward pass reads attributes of theirs."""
    try:
        return agree(run(model, task.example), run(absorbed, task.example), 1e-4)
    except Exception:  # the forward pass is the user's and may raise whatever it likes
        return False


def _is_mean(table: Table) -> bool:
    """Whether the mean row is what the table gives in the mean."""
    return isinstance(table, nn.Embedding) or table.mode == "mean"


def _replaced(model: nn.Module, counts: Mapping[str, Tensor], paths: Iterable[str]) -> nn.Module:
    """A copy in which every id reads the same row of these tables."""
    model = copy_model(model)
    for path in paths:
        table = cast(Any, model.get_submodule(path))
        read = counts.get(path, torch.ones(table.num_embeddings)).to(table.weight)
        mean = (read[:, None] * table.weight.detach()).sum(0, keepdim=True) / read.sum().clamp_min(1)
        replace_(model, table, FirstRows(shortened(table, mean), table))
    return model


def _linear(model: nn.Module, group: Group) -> bool:
    """Whether a table's channels are its own, and read by Linears with a bias alone."""
    readers = [(part.side, model.get_submodule(part.layer)) for part in group.parts[1:]]
    return group.removable and all(
        side == "in" and isinstance(reader, nn.Linear) and reader.bias is not None for side, reader in readers
    )


def _absorbed(model: nn.Module, listed: Iterable[Group]) -> nn.Module:
    """A copy in which what the rows give is added to the biases of their readers, whose columns for them go."""
    model = copy_model(model)
    columns: dict[str, Tensor] = {}
    with torch.no_grad():
        for group in listed:
            shorter = cast(FirstRows, model.get_submodule(group.name))
            row = shorter.table.weight[0]
            for part in group.parts[1:]:
                reader = cast(nn.Linear, model.get_submodule(part.layer))
                index = torch.tensor(part.index)
                reader.bias.add_(reader.weight[:, index] @ row[torch.tensor(part.channel)])
                columns.setdefault(part.layer, torch.ones(reader.in_features, dtype=torch.bool))[index] = False
            replace_(model, shorter, Nothing(isinstance(shorter.table, nn.EmbeddingBag)))
        for path, stays in columns.items():
            narrow_(model.get_submodule(path), None, stays.nonzero().flatten())
    return model


def _constant(outputs: Any) -> bool:
    return all(bool((leaf == leaf[:1]).all()) for leaf in leaves(outputs))
