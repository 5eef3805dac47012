"""Sparse: store kept values and their positions, not the zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from lilliput.stored import positions
from lilliput.stored.base import NAMED, Floats, Head, HeadReader, Mask, Plan, Section, Source, Storage, Stored
from lilliput.stored.operators import Operators
from lilliput.stored.plain import Plain
from lilliput.stored.positions import position_bits, spread

WHOLE = NAMED + 1 << 1
"""What stands in place of the inner kind where all of the inner tensor is stored, outside of the mask too."""


@dataclass(frozen=True, eq=False)
class Sparse(Stored):
    """Store the positions of what is kept and its values, in any kind, but not the zeros.

    Positions cost the least of several ways (see `position_bits`). Where the kind of the values cannot be cut up (a
    product of factors), it is stored whole, or the kept values decoded, whichever is smaller.

    Args:
        mask: bool, the tensor's shape, True where kept.
        inner: the kept entries in C order as one axis, or a tensor of the mask's own shape (so that it can have a
            scale per channel) whose entries outside the mask do not count.
        block: how many entries along each axis are kept or dropped together, such as (4, 1, 1, 1).

    Raises:
        ValueError: for shapes that do not fit, or a mask that is not constant over its blocks.

    Example:
        >>> mask = np.array([[True, False, False, True]])
        >>> Sparse(mask, Plain(np.array([1.0, 2.0], np.float32))).decode()
        array([[1., 0., 0., 2.]], dtype=float32)
    """

    mask: NDArray[np.bool_]
    inner: Stored
    block: tuple[int, ...] | None = None

    tag: ClassVar[int | str] = 2

    def __post_init__(self) -> None:
        kept = int(np.count_nonzero(self.mask))
        if self.mask.dtype != np.bool_:
            raise ValueError(f"Sparse: mask must be bool, got {self.mask.dtype}. Compare it with zero first.")
        if self.inner.shape not in ((kept,), self.mask.shape):
            raise ValueError(
                f"Sparse: values must have shape ({kept},) or the mask's {self.mask.shape}, got {self.inner.shape}. "
                "Give the kept entries in C order."
            )
        if self.block is not None:
            fits = len(self.block) == self.mask.ndim and all(
                b > 0 and n % b == 0 for b, n in zip(self.block, self.mask.shape, strict=True)
            )
            if not fits or not (spread(self.positions, self.block) == self.mask).all():
                raise ValueError(
                    f"Sparse: mask must be constant over blocks of {self.block} that divide {self.mask.shape}, got "
                    "another. Leave block out, or make the mask from blocks."
                )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.mask.shape

    @property
    def positions(self) -> NDArray[np.bool_]:
        """The mask with one entry a block."""
        return self.mask if self.block is None else self.mask[tuple(slice(None, None, b) for b in self.block)]

    @property
    def _whole(self) -> bool:
        return self.inner.shape == self.shape

    @cached_property
    def _part(self) -> tuple[Stored, bool]:
        """What is written of the inner tensor, and whether it is all of it."""
        if not self._whole:
            return self.inner, False
        kept = self.inner.kept(self.mask)
        if kept is not None:
            return kept, False
        decoded = Plain(self.inner.decode()[self.mask])
        cheap = self.inner.storage().bits <= decoded.storage().bits
        return (self.inner, True) if cheap else (decoded, False)

    @property
    def values(self) -> int:
        return self._part[0].values

    @property
    def bits(self) -> float:
        return self._part[0].bits

    def decode(self) -> Floats:
        """The values where kept, zero elsewhere."""
        values = self.inner.decode()
        whole = np.zeros(self.shape, np.float32)
        whole[self.mask] = values[self.mask] if self._whole else values
        return whole

    def storage(self) -> Storage:
        """The values kept and the cheapest way to say where."""
        return Storage((*self._part[0].storage().parts, ("positions", 1, position_bits(self.positions)[1])))

    def reshaped(self, shape: tuple[int, ...]) -> Sparse | None:
        inner = self.inner.reshaped(shape) if self._whole else self.inner
        return None if inner is None or self.block is not None else Sparse(self.mask.reshape(shape), inner)

    def facts(self) -> dict[str, Any]:
        sparsity = 1 - int(np.count_nonzero(self.mask)) / max(self.mask.size, 1)
        return self.inner.facts() | {"sparsity": round(sparsity, 4)}

    def write(self, head: Head, section: Section) -> None:
        head.number(0 if self.block is None else 1)
        for b in self.block or ():
            head.number(b)
        positions.write(self.positions, head, section)
        part, all_of_it = self._part
        if all_of_it:
            head.number(WHOLE)
            head.tensor(part, section)
            return
        # A kind that was cut up knows the shape that it comes from.
        whole = self._whole and part.tag == self.inner.tag
        head.number(head.number_of(part) << 1 | whole)
        head.name_of(part)
        part.write(head, section)

    @classmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        block = tuple(head.number() for _ in range(axes)) if head.number() else None
        way = positions.Positions(head)
        number = head.number()
        all_of_it = head.tensor()[0] if number == WHOLE else None
        # As one axis of kept entries, or cut out of a tensor of this one's axes.
        part = None if all_of_it else head.kind(number >> 1).read(head, axes if number & 1 else 1)

        def plan(source: Source, shape: tuple[int, ...], mask: Mask | None) -> Sparse:
            source.claim(shape)
            if block is not None and any(b < 1 or n % b for b, n in zip(block, shape, strict=True)):
                raise ValueError(f"blocks of {block} do not divide {shape}")
            at = shape if block is None else tuple(n // b for n, b in zip(shape, block, strict=True))
            kept = spread(way.read(source, math.prod(at)).reshape(at), block)
            if all_of_it is not None:
                return Sparse(kept, all_of_it(source), block)
            assert part is not None
            if number & 1:
                return Sparse(kept, part(source, shape, kept), block)
            return Sparse(kept, part(source, (int(np.count_nonzero(kept)),), None), block)

        return plan

    def onnx(self, writer: Operators, name: str) -> None:
        """The inner kind's own operators on a tensor that holds the zeros; else those of the whole tensor, times flags.

        The flags take a bit an entry. Where the decoded tensor is smaller, it is written.
        """
        dense = self.inner.zeroed(self.mask)
        if dense is not None:
            dense.onnx(writer, name)
            return
        trial = Operators(writer.tiny)
        if self._whole:
            self._flagged(trial, name)
            if trial.size_bytes(name) < self.mask.size * 4:
                self._flagged(writer, name)
                return
        super().onnx(writer, name)

    def _flagged(self, writer: Operators, name: str) -> None:
        whole = writer.fresh()
        self.inner.onnx(writer, whole)
        writer.node("Mul", [whole, writer.flags(self.mask)], name)
