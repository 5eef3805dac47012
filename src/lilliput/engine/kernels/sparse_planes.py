"""Pack the non-zeros of a sparse convolution, and choose the tiles in which its outputs are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lilliput.engine.graph import Array
from lilliput.engine.kernels.convolution import Geometry


@dataclass(frozen=True)
class Packed:
    """Where the non-zeros of a layer are.

    Args:
        counts: How many, by output and part.
        places: `Sparse.packed` says what they are.
        indices: The flat index of each one's weight, -1 where there is none and only a step is made.
    """

    counts: Array
    places: Array
    indices: Array


@dataclass(frozen=True)
class Sparse:
    """A sparse convolution in tiles of `rows` rows of `vectors` vectors, from column `start` on for each of `starts`.

    Args:
        shifts: By column of the kernel, how far its sum is shifted; with `copied`, each has a copy of the planes
            that is shifted already, and all are summed as one.
        wide: Vectors of a row that is read.
    """

    g: Geometry
    lanes: int
    rows: int
    vectors: int
    wide: int
    shifts: tuple[int, ...]
    copied: bool
    starts: tuple[int, ...] = (0,)

    @property
    def row_bits(self) -> int:
        """Bits of a place that say the kernel's row; the others count planes from the place before."""
        return max(self.g.kernel[0] - 1, 0).bit_length()

    @property
    def parts(self) -> list[list[int]]:
        """The columns of the kernel that are summed together, in the order in which they are run through."""
        columns = range(self.g.kernel[1])
        if self.copied:
            return [list(columns)]
        return [[k] for k in sorted(columns, key=lambda k: (self.shifts[k] == 0, k))]

    @property
    def copies(self) -> int:
        """Planes that are made of each one that is read."""
        return self.g.kernel[1] if self.copied else 1

    def ordered(self, weight: Array) -> tuple[Array, Array]:
        """(where each non-zero is read, the flat index of its weight), in the order in which they are run through.

        Where: rows of the kernel, in all planes of all parts of all outputs, counted one after the other.
        """
        g = self.g
        flat = np.arange(weight.size).reshape(g.outs, g.ins, *g.kernel)
        # By output, part, channel, column within the part, row.
        order = np.stack([flat[:, :, :, part].transpose(0, 1, 3, 2) for part in self.parts], 1).reshape(-1)
        where = np.flatnonzero(weight.reshape(-1)[order])
        return where, order[where]

    def packed(self, weight: Array) -> Packed:
        """A byte for each non-zero: planes from the one before, through all runs, and the kernel's row."""
        g, bits = self.g, self.row_bits
        most, places, indices, planes, at = 255 >> bits, [], [], [], 0
        for where, index in zip(*(x.tolist() for x in self.ordered(weight)), strict=True):
            plane, row = divmod(where, g.kernel[0])
            while plane - at > most:
                places.append(most << bits)
                indices.append(-1)
                at += most
                planes.append(at)
            places.append((plane - at) << bits | row)
            indices.append(index)
            planes.append(plane)
            at = plane
        return Packed(self._counts(planes), np.array(places, np.uint8), np.array(indices, np.int64))

    def _counts(self, planes: Sequence[int] | Array) -> Array:
        """How many places there are in each run, given the plane of each, counted through all runs."""
        runs = np.asarray(planes, np.int64) // (self.g.ins * self.copies)
        return _small(np.bincount(runs, minlength=self.g.outs * len(self.parts)))

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copies, none where there are none."""
        return -(-4 * self.copy_floats() // 64) * 64 if self.copied else 0

    def copy_rows(self) -> int:
        """Rows of each copy."""
        g = self.g
        return g.made[0] if g.kernel[0] == 1 else (g.made[0] - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1

    def copy_floats(self) -> int:
        """Floats of all copies."""
        return self.g.channels * self.g.kernel[1] * self.copy_rows() * self.wide * self.lanes

    @property
    def loaded(self) -> int:
        """Vectors that are loaded of a row that is copied, 0 where it is copied by elements."""
        g = self.g
        count = -(-g.size[1] // (self.lanes * g.stride[1])) * g.stride[1]
        return count if g.stride[1] in (1, 2) and count <= 16 else 0


def _small(numbers: Array) -> Array:
    """Whole numbers in the narrowest type that holds them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def _high(rows: int, vectors: int, most: int) -> int:
    """Rows of a tile of at most `most` vectors: those with which all rows take the least."""
    highest = max(min(most // vectors, rows), 1)
    return min(range(highest, 0, -1), key=lambda high: -(-rows // high) * (high * vectors + 1.5))


def shifting(g: Geometry, lanes: int, held: int) -> Sparse | None:
    """The convolution whose sums are shifted, where whole rows fit the registers; None where they do not."""
    if g.stride[1] != 1:
        return None
    wide, vectors = -(-g.size[1] // lanes), -(-g.made[1] // lanes)
    shifts = tuple(k * g.dilation[1] - g.before[1] for k in range(g.kernel[1]))
    alone = shifts == (0,) and wide == vectors
    most = (held - 4) // (1 if alone else 2)
    if max(wide, vectors) > most:
        return None
    high = _high(g.made[0], max(wide, vectors), min(most, 16 if alone else 10))
    if high * max(wide, vectors) < 4 and high < g.made[0]:
        return None
    return Sparse(g, lanes, high, vectors, wide, shifts, copied=False)


def copying(g: Geometry, lanes: int, held: int) -> Sparse:
    """The convolution over shifted copies of the planes."""
    shifts = tuple(k * g.dilation[1] - g.before[1] for k in range(g.kernel[1]))
    most = min(held - 4, 16)
    vectors = -(-g.made[1] // lanes)
    if vectors <= most:
        return Sparse(g, lanes, _high(g.made[0], vectors, most), vectors, vectors, shifts, copied=True)
    step, last = most * lanes, g.made[1] - most * lanes
    return Sparse(g, lanes, 1, most, vectors, shifts, True, (*range(0, last, step), last))
