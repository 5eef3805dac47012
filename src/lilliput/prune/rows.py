"""PruneRows: drop the least important rows of lookup tables; the file stores only the kept rows."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from lilliput.graph.tables import tables
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.prune.prune import Prune
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class PruneRows(Stage):
    """Set whole rows of lookup tables to zero, those of the smallest magnitude first.

    A word or item whose row is gone reads as zero. The packed file stores which rows stay and their values.

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
    moment: ClassVar[str] = "structure"
    follows: ClassVar[tuple[str, ...]] = ("Factorize",)

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

    def label(self) -> str:
        return f"{self.sparsity:.0%} of rows gone"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer 30 to 80% of the rows of the tables that hold most of the values."""
        chosen = ",".join(tables(model))
        if not chosen:
            return Refusal("no lookup table is most of the network")
        return Proposals(tuple(cls(sparsity, chosen) for sparsity in (0.3, 0.5, 0.6, 0.7, 0.8)), 3)
