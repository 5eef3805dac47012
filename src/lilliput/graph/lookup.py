"""Modules that stand in the place of a lookup table: one of fewer rows, and none."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

Table = nn.Embedding | nn.EmbeddingBag
ANSWERED = frozenset({"weight", *nn.Embedding.__constants__, *nn.EmbeddingBag.__constants__}) - {
    "num_embeddings",
    "padding_idx",
}
"""What a network may ask a table for beside rows, and the shorter table answers."""


def shortened(table: Table, rows: Tensor) -> Table:
    """A table like this one with other rows, none of them that of padding."""
    short = copy.copy(table)
    short._parameters = {"weight": nn.Parameter(rows.clone(), requires_grad=table.weight.requires_grad)}
    short.num_embeddings, short.padding_idx = len(rows), None
    return short


class Fewer(nn.Module):
    """A lookup table behind the ids of a longer one. What a network asks the longer one for, it answers: the number of
    ids and the id of padding are those of before, weights and width those of the shorter table.

    Args:
        table: the shorter table.
        like: the longer one.
    """

    table: Table

    def __init__(self, table: Table, like: Table) -> None:
        super().__init__()
        self.table, self.num_embeddings, self.padding_idx = table, like.num_embeddings, like.padding_idx

    def forward(self, input: Tensor, *args: Any, **settings: Any) -> Tensor:
        return cast(Tensor, self.table(self.row(input), *args, **settings))

    def row(self, ids: Tensor) -> Tensor:
        """The row of the shorter table that each id reads."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name) if name in ANSWERED else super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}"


class FirstRows(Fewer):
    """A lookup table whose first rows stayed: every id behind them reads the last row, the unknown one.

    Args:
        table: the shorter table, its last row the unknown one.
        like: the longer one.

    Example:
        >>> FirstRows(nn.Embedding(3, 8), nn.Embedding(100, 8)).row(torch.tensor([0, 1, 2, 99])).tolist()
        [0, 1, 2, 2]
    """

    def row(self, ids: Tensor) -> Tensor:
        return ids.clamp_max(self.table.num_embeddings - 1)


class SomeRows(Fewer):
    """A lookup table of which some rows stayed, in their order; every other id reads row 0, the unknown one.

    Which rows stayed takes one bit a row: a file holds these bits, and operators on constants, which a runtime computes
    when it loads the file, count them up to the row of each id.

    Args:
        table: the shorter table, its row 0 the unknown one.
        like: the longer one.
        stays: bool (rows of the longer table,).

    Example:
        >>> stays = torch.tensor([False, True, False, True])
        >>> SomeRows(nn.Embedding(3, 8), nn.Embedding(4, 8), stays).row(torch.arange(4)).tolist()
        [0, 1, 0, 2]
    """

    bits: Tensor
    index: Tensor

    def __init__(self, table: Table, like: Table, stays: Tensor) -> None:
        super().__init__(table, like)
        padded = torch.zeros(-(-len(stays) // 8) * 8, dtype=torch.uint8)
        padded[: len(stays)] = stays
        self.register_buffer("bits", (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8))
        self.register_buffer("index", self.counted(), persistent=False)
        self.register_load_state_dict_post_hook(_count_again_)  # type: ignore[no-untyped-call]

    def counted(self) -> Tensor:
        """The row of the shorter table for each id, from the bits."""
        # In a file this is one operator, where dividing by powers would be eight.
        powers = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=self.bits.device)
        stays = (self.bits.unsqueeze(1) & powers).bool().flatten().long()
        return stays.cumsum(0) * stays

    def row(self, ids: Tensor) -> Tensor:
        index = self.counted() if torch.compiler.is_exporting() else self.index  # a file shall hold the bits
        return index[ids]


def _count_again_(module: nn.Module, _: Any) -> None:
    cast(SomeRows, module).index = cast(SomeRows, module).counted()


class Nothing(nn.Module):
    """Give no numbers at all for an id, in the place of a lookup table.

    Args:
        bag: whether a whole bag of ids, not each id, is looked up.

    Example:
        >>> Nothing()(torch.zeros(4, 3, dtype=torch.long)).shape
        torch.Size([4, 3, 0])
    """

    def __init__(self, bag: bool = False) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, input: Tensor, *args: Any, **settings: Any) -> Tensor:
        shape = input.shape[:1] if self.bag else input.shape
        return torch.zeros(*shape, 0, device=input.device)
