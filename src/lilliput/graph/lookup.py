"""Modules that stand in the place of a lookup table: one of fewer rows, and none."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

Table = nn.Embedding | nn.EmbeddingBag


def shortened(table: Table, rows: Tensor) -> Table:
    """A table like this one with other rows, none of them that of padding."""
    short = copy.copy(table)
    short._parameters = {"weight": nn.Parameter(rows.clone(), requires_grad=table.weight.requires_grad)}
    short.num_embeddings, short.padding_idx = len(rows), None
    return short


class Fewer(nn.Module):
    """A lookup table behind the ids of a longer one; whatever is asked of it beside a lookup, the table answers."""

    table: Table

    def forward(self, input: Tensor, *args: Any, **settings: Any) -> Tensor:
        return cast(Tensor, self.table(self.row(input), *args, **settings))

    def row(self, ids: Tensor) -> Tensor:
        """The row of the shorter table that each id reads."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "table":
                raise
            return getattr(self.table, name)


class FirstRows(Fewer):
    """A lookup table whose first rows stayed: every id behind them reads the last row, the unknown one.

    Args:
        table: the shorter table, its last row the unknown one.

    Example:
        >>> FirstRows(nn.Embedding(3, 8)).row(torch.tensor([0, 1, 2, 99])).tolist()
        [0, 1, 2, 2]
    """

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table = table

    def row(self, ids: Tensor) -> Tensor:
        return ids.clamp_max(self.table.num_embeddings - 1)


class SomeRows(Fewer):
    """A lookup table of which some rows stayed, in their order; every other id reads row 0, the unknown one.

    Which rows stayed takes one bit a row: a file holds these bits, and operators on constants, which a runtime computes
    when it loads the file, count them up to the row of each id.

    Args:
        table: the shorter table, its row 0 the unknown one.
        stays: bool (rows of the longer table,).

    Example:
        >>> SomeRows(nn.Embedding(3, 8), torch.tensor([False, True, False, True])).row(torch.arange(4)).tolist()
        [0, 1, 0, 2]
    """

    bits: Tensor
    index: Tensor

    def __init__(self, table: Table, stays: Tensor) -> None:
        super().__init__()
        self.table, self.rows = table, len(stays)
        padded = torch.zeros(-(-len(stays) // 8) * 8, dtype=torch.uint8)
        padded[: len(stays)] = stays
        self.register_buffer("bits", (padded.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8))
        self.register_buffer("index", self.counted(), persistent=False)
        self.register_load_state_dict_post_hook(_count_again_)  # type: ignore[no-untyped-call]

    def counted(self) -> Tensor:
        """The row of the shorter table for each id, from the bits."""
        powers = 2 ** torch.arange(8, device=self.bits.device)
        stays = (self.bits.long().unsqueeze(1) // powers % 2).flatten()[: self.rows]
        return stays.cumsum(0) * stays

    def row(self, ids: Tensor) -> Tensor:
        index = self.counted() if torch.compiler.is_exporting() else self.index  # a file shall hold the bits
        return index[ids]

    def extra_repr(self) -> str:
        return f"{self.rows}"


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
