"""Store which entries of a tensor are kept, in the cheapest of several ways.

0: a bitmap. 1: a bitmap, entropy-coded. 2 to 17: gaps between kept entries in Golomb-Rice code with 0 to 15 low bits.
18 and up: one of C(m, n) choices for each m consecutive entries, of which exactly n are kept.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from lilliput.stored.base import Head, HeadReader, Section, Source
from lilliput.stored.bits import to_bits
from lilliput.stored.entropy import coded_bits, decode, encode

PATTERNS = ((2, 4), (1, 4), (1, 2), (4, 8), (2, 8), (1, 8), (1, 16), (2, 16))
"""The N:M patterns whose positions have a code of their own: n kept of every m in C order."""
GAPS, CHOICES = 2, 18


def spread(positions: NDArray[np.bool_], block: tuple[int, ...] | None) -> NDArray[np.bool_]:
    """The full mask of block positions: each entry repeated over its block."""
    for axis, b in enumerate(block or ()):
        positions = np.repeat(positions, b, axis=axis)
    return positions


def gaps(flat: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many zeros precede each kept position."""
    return np.diff(np.flatnonzero(flat), prepend=-1).astype(np.int64) - 1


def position_bits(positions: NDArray[np.bool_]) -> tuple[str, int]:
    """The cheapest way to write which positions are kept, and its bits.

    Returns:
        "bitmap", "coded", "gaps r" (Golomb-Rice with r low bits: `sum(gap >> r) + k (r + 1)` bits) or "n:m"
        (`ceil(log2 C(m, n))` bits for each m).

    Example:
        >>> position_bits(np.arange(64) % 16 == 0)
        ('1:16', 16)
    """
    flat = positions.ravel()
    ways = {"bitmap": flat.size, "coded": coded_bits(flat.astype(np.uint16), 1)}
    skipped = gaps(flat)
    for r in range(16):
        ways[f"gaps {r}"] = int((skipped >> r).sum()) + skipped.size * (r + 1)
    for n, m in PATTERNS:
        if flat.size and flat.size % m == 0 and (flat.reshape(-1, m).sum(1) == n).all():
            ways[f"{n}:{m}"] = flat.size // m * (math.comb(m, n) - 1).bit_length()
    return min(ways.items(), key=lambda way: way[1])


def write(positions: NDArray[np.bool_], head: Head, section: Section) -> None:
    """The way in the head, the positions in the section."""
    way, bits = position_bits(positions)
    flat = positions.ravel()
    if way == "bitmap":
        head.number(0)
        section.stream(flat.astype(np.uint8))
    elif way == "coded":
        head.number(1)
        head.number(bits)
        section.stream(encode(flat.astype(np.uint16), 1))
    elif way.startswith("gaps"):
        skipped, r = gaps(flat), int(way[5:])
        quotients = skipped >> r
        total = int(quotients.sum())
        for number in (GAPS + r, skipped.size, total):
            head.number(number)
        unary = np.zeros(total + skipped.size, np.uint8)
        unary[np.cumsum(quotients + 1) - 1] = 1
        section.stream(unary)
        section.stream(to_bits(skipped & ((1 << r) - 1), r))
    else:
        n, m = map(int, way.split(":"))
        head.number(CHOICES + PATTERNS.index((n, m)))
        weights = 1 << np.arange(m)
        number_of = {sum(1 << i for i in chosen): k for k, chosen in enumerate(itertools.combinations(range(m), n))}
        numbers = np.asarray([number_of[int(key)] for key in flat.reshape(-1, m) @ weights], np.int64)
        section.stream(to_bits(numbers, (math.comb(m, n) - 1).bit_length()))


class Positions:
    """How positions were written, from the head; `read` gives them from the section."""

    def __init__(self, head: HeadReader) -> None:
        self.way = head.number()
        self.first = head.number() if self.way == 1 or GAPS <= self.way < CHOICES else 0
        self.second = head.number() if GAPS <= self.way < CHOICES else 0
        if self.way >= CHOICES + len(PATTERNS):
            raise ValueError(f"positions are written in an unknown way {self.way}")

    def read(self, source: Source, count: int) -> NDArray[np.bool_]:
        """A flat mask of `count` positions."""
        if self.way == 0:
            return source.stream(count).astype(np.bool_)
        if self.way == 1:
            return decode(source.stream(self.first), count, 1).astype(np.bool_)
        if self.way < CHOICES:
            return self._gaps(source, count)
        n, m = PATTERNS[self.way - CHOICES]
        table = np.zeros((math.comb(m, n), m), np.bool_)
        for row, chosen in zip(table, itertools.combinations(range(m), n), strict=True):
            row[list(chosen)] = True
        if count % m:
            raise ValueError(f"{n}:{m} does not divide {count} positions")
        numbers = source.numbers(count // m, (math.comb(m, n) - 1).bit_length())
        return table[numbers].ravel()

    def _gaps(self, source: Source, count: int) -> NDArray[np.bool_]:
        r, kept, total = self.way - GAPS, self.first, self.second
        unary = source.stream(kept + total)
        ends = np.flatnonzero(unary)
        if ends.size != kept or (kept and ends[-1] != unary.size - 1):
            raise ValueError("its index gaps do not add up")
        quotients = np.diff(ends, prepend=-1) - 1
        at = np.cumsum((quotients << r | source.numbers(kept, r)) + 1) - 1
        if kept and not (at[0] >= 0 and at[-1] < count):
            raise ValueError("its index gaps lead outside of the tensor")
        flat = np.zeros(count, np.bool_)
        flat[at] = True
        return flat
