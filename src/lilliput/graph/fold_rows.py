"""FoldRows: the rows of lookup tables that training data seldom reads become one; tables really get shorter."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.graph.lookup import FirstRows, SomeRows, Table, shortened
from lilliput.graph.trace import replace_
from lilliput.graph.use import placed, replaceable, use
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage
from lilliput.task import Task

MAP, CLAMP = 200, 40
"""Bytes of the operators that map ids, by bits and by a clamp: a short table is better left as it is."""
STEPS = 16
"""How many shares of the rows are offered, each two thirds of the one before."""


@dataclass(frozen=True)
class FoldRows(Stage):
    """Keep the rows of lookup tables that matter most, and fold all others into one row that unknown ids read.

    A row matters by how often the training data reads it, times how far it lies from the row that would stand for it:
    s_r = n_r ||e_r - m||, with m = sum n_r e_r / sum n_r. The unknown row is that mean over the folded rows. Ids are
    mapped by a bit for each row, or by a clamp where the first rows stay, as in vocabularies ordered by frequency.

    Args:
        rows: (path of a table, how many of its rows stay), in any order.
        first: the paths of those tables whose first rows stay, not the ones that matter most.

    Raises:
        KeyError: for a path that is no table that can be replaced.
        ValueError: unless at least one row of each stays.

    Example:
        >>> net, x = nn.Sequential(nn.Embedding(100, 8), nn.Flatten(), nn.Linear(8, 2)), torch.arange(9)[:, None] % 4
        >>> FoldRows((("0", 4),))(net, Task("ids", train=x, val=x), None)[0].table
        Embedding(5, 8)

    Source:
        No paper: the vocabulary with one word for all unknown ones, of every language model.
    """

    rows: tuple[tuple[str, int], ...]
    first: tuple[str, ...] = ()

    structural: ClassVar[bool] = True
    untrained: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        counts = use(model, task)
        model = copy_model(model)
        for path, count in self.rows:
            if count < 1:
                raise ValueError(f"FoldRows: at least one row of '{path}' must stay, got {count}.")
            at = placed(model, path, "FoldRows")
            table = replaceable(model)[at] if at else None
            if table is None or table.num_embeddings < count + 2:
                continue  # it is as short already
            read = counts.get(at, torch.zeros(table.num_embeddings, dtype=torch.float64))
            if path in self.first:
                stays = torch.arange(table.num_embeddings) < count
            else:
                stays = torch.zeros(table.num_embeddings, dtype=torch.bool)
                stays[_matter(table, read).argsort(descending=True, stable=True)[:count]] = True
            replace_(model, table, _folded(table, stays, read, path in self.first))
        return model

    def label(self) -> str:
        return f"{sum(count for _, count in self.rows):,} rows"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer the rows that training data reads, then ever fewer, shared out over all tables by what matters most."""
        counts = {path: read for path, read in use(model, task).items() if len(read) > 2}
        found = replaceable(model)
        if not counts:
            return Refusal("no lookup table of its own is called")
        matter = {path: _matter(found[path], read) / found[path].embedding_dim for path, read in counts.items()}
        ranked = torch.cat(list(matter.values())).sort(descending=True).values
        read = int((torch.cat(list(counts.values())) > 0).sum())
        options: dict[FoldRows, None] = {}
        for step in range(STEPS):
            total = math.ceil(read * (2 / 3) ** step)
            least = float(ranked[total - 1])
            rows = {path: max(int((score >= max(least, 1e-300)).sum()), 1) for path, score in matter.items()}
            if option := _option(found, matter, rows):
                options[cls(*option)] = None
        if not options:
            return Refusal("no table would take fewer bytes with the map of its rows")
        return Proposals(tuple(options), min(3, len(options)))


def _option(
    found: Mapping[str, Table], matter: Mapping[str, Tensor], rows: Mapping[str, int]
) -> tuple[tuple[tuple[str, int], ...], tuple[str, ...]] | None:
    """What stays of each table that gets shorter: its best rows and a bit for each row, or so many first rows that they
    hold as much of what matters, whichever takes fewer bytes of one byte a number."""
    chosen, first = [], []
    for path, count in rows.items():
        score, dim = matter[path], found[path].embedding_dim
        held = score.cumsum(0)
        wanted = float(score.sort(descending=True).values[:count].sum())
        ahead = int((held < wanted * (1 - 1e-9)).sum()) + 1
        whole, by_clamp, by_bits = dim * len(score), dim * ahead + CLAMP, dim * count + len(score) / 8 + MAP
        if by_clamp <= by_bits and by_clamp < whole and ahead <= len(score) - 2:
            chosen.append((path, ahead))
            first.append(path)
        elif by_bits < whole and count <= len(score) - 2:
            chosen.append((path, count))
    return (tuple(chosen), tuple(first)) if chosen else None


def _matter(table: Table, read: Tensor) -> Tensor:
    """How much each row matters; the row of padding more than any."""
    rows = table.weight.detach().double().cpu()
    mean = (read[:, None] * rows).sum(0) / read.sum().clamp_min(1)
    score: Tensor = read * (rows - mean).norm(dim=1)
    if table.padding_idx is not None:
        score[table.padding_idx] = score.max() + 1
    return score


def _folded(table: Table, stays: Tensor, read: Tensor, first: bool) -> nn.Module:
    """The shorter table: rows that stay, and the mean of the others, each as often as it is read."""
    rows = table.weight.detach()
    weight = torch.where(stays, torch.zeros_like(read), read)
    weight = (weight if bool(weight.any()) else (~stays).double()).to(rows)
    unknown = (weight[:, None] * rows).sum(0, keepdim=True) / weight.sum()
    kept = rows[stays.to(rows.device)]
    short = shortened(table, torch.cat([kept, unknown] if first else [unknown, kept]))
    if table.padding_idx is not None:
        short.padding_idx = int(stays[: table.padding_idx].sum()) + (not first)
    return FirstRows(short, table) if first else SomeRows(short, table, stays)
