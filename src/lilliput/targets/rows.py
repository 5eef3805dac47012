"""Rows of a CSV file, and the three splits that targets by name make of their examples."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PARTS = (0.7, 0.15)
"""The shares of train and val; the rest is test."""
FEWEST = 40


def columns(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV file with a header, by name.

    Args:
        path: the file; commas, semicolons or tabs separate.

    Raises:
        ValueError: for a missing file, one without a header, and rows of other lengths.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (file := Path(folder, "data.csv")).write_text("a;b" + chr(10) + "1;x" + chr(10))
        ...     columns(file)
        {'a': ['1'], 'b': ['x']}
    """
    if not path.is_file():
        raise ValueError(f"TARGET: the table must exist, got {path}.")
    with path.open(newline="", encoding="utf-8-sig") as file:
        head = file.readline()
        file.seek(0)
        separator = max(",;\t", key=head.count)
        header, *rows = [row for row in csv.reader(file, delimiter=separator) if row] or [[]]
    if not header or len(set(header)) < len(header):
        raise ValueError(f"TARGET: the first row of {path} must name each column once, got {header}.")
    for place, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(
                f"TARGET: each row of {path} must hold {len(header)} values, but row {place} has {len(row)}."
            )
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def column(table: dict[str, list[str]], asked: str | None, usual: Sequence[str], path: Path) -> str:
    """The name of the column of labels: as asked, one of the usual names, or the last.

    Raises:
        ValueError: for a name that the table lacks.
    """
    from lilliput.errors import near

    if asked is not None and asked not in table:
        raise ValueError(f"shrink: --label must be a column of {path}, got {asked!r}. {near(asked, table)}")
    return asked or next((name for name in usual if name in table), list(table)[-1])


def splits(labels: "Tensor", where: Path) -> "dict[str, Tensor]":
    """The places of the examples of train, val and test, drawn so that every class has its share in each.

    Args:
        labels: the class of each example, or zeros, (n,).
        where: what they were read from, for messages.

    Raises:
        ValueError: for fewer examples than can be split.
    """
    from lilliput.data import stratified

    count = len(labels)
    if count < FEWEST:
        raise ValueError(
            f"TARGET: {where} must hold at least {FEWEST} examples to train, choose and test on, got {count}."
        )
    train, val = (int(part * count) for part in PARTS)
    parts = stratified(labels, (train, val, count - train - val), seed=0)
    return dict(zip(("train", "val", "test"), parts, strict=True))
