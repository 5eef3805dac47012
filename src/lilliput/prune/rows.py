"""PruneRows: drop the least important rows of lookup tables; the file stores only the kept rows."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lilliput.graph.tables import tables
from lilliput.prune.prune import Prune
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class PruneRows(Stage):
    """Set whole rows of lookup tables to zero, those of the smallest magnitude first.

    A word or item whose row is gone reads as zero. The packed file stores which rows stay and their values; model.onnx
    keeps the zeros: there, and where training data tells which rows matter, `FoldRows` gives less.

    Args:
        sparsity: the fraction of rows that goes, in [0, 1).
        where: the tables, by name; "" takes those that hold most of the model's values.

    Raises:
        ValueError: for a sparsity out of range, or where the model has no such table.

    Example:
        >>> net = PruneRows(0.5)(nn.Sequential(nn.EmbeddingBag(100, 8), nn.Linear(8, 2)), None, None)
        >>> int((net[0].weight == 0).all(1).sum())
        50

    Source:
        No paper: magnitude pruning by whole rows.
    """

    sparsity: float
    where: str = ""

    same_graph: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Prune(self.sparsity, pattern="channel")

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        chosen = self.where or ",".join(tables(model))
        if not chosen:
            raise ValueError(
                f"PruneRows: the model must have a lookup table that holds most of its values, got none in "
                f"{type(model).__name__}. Name one with where=."
            )
        return Prune(self.sparsity, pattern="channel", where=chosen)(model, task, reference)
