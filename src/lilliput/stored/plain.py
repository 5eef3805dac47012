"""Plain: the numbers themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto

from lilliput.stored.base import Floats, Head, HeadReader, Mask, Plan, Section, Source, Storage, Stored
from lilliput.stored.bits import Array
from lilliput.stored.operators import Operators

PLAIN_TYPES = ("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")


def span(array: Array) -> tuple[int, int]:
    """The smallest number, and the bits that hold the difference to it: (0, 16 or 32) for floats.

    Example:
        >>> span(np.array([5, 6, 8]))
        (5, 2)
    """
    if np.issubdtype(array.dtype, np.floating):
        return 0, 8 * array.dtype.itemsize
    if not array.size:
        return 0, 0
    low = int(array.min())
    return low, (int(array.max()) - low).bit_length()


@dataclass(frozen=True, eq=False)
class Plain(Stored):
    """Store the numbers themselves: floats in `8 * itemsize` bits each, integers in as many as their range needs.

    Args:
        array: float32, float16, bool or an integer type; any shape.

    Raises:
        TypeError: for another type.

    Example:
        >>> Plain(np.zeros((2, 3), np.float16)).storage().bits
        96
    """

    array: Array

    tag: ClassVar[int | str] = 0
    plain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.array.dtype.name not in PLAIN_TYPES:
            raise TypeError(
                f"Plain: array must be one of {', '.join(PLAIN_TYPES)}, got {self.array.dtype}. Convert it first."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def values(self) -> int:
        return self.array.size

    @property
    def bits(self) -> float:
        return float(8 * self.array.dtype.itemsize)

    def decode(self) -> Floats:
        """The values as float32 (integers beyond 2^24 are rounded: read `array` where that matters)."""
        return np.array(self.array, dtype=np.float32, order="C")

    def native(self) -> Array:
        return self.array

    def storage(self) -> Storage:
        return Storage((("values", self.array.size, span(self.array)[1]),))

    def kept(self, mask: Mask) -> Plain:
        return Plain(self.array[mask])

    def zeroed(self, mask: Mask) -> Plain:
        whole = np.zeros(mask.shape, np.float32)
        whole[mask] = self.array[mask] if self.shape == mask.shape else self.array
        return Plain(whole)

    def reshaped(self, shape: tuple[int, ...]) -> Plain:
        return Plain(self.array.reshape(shape))

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"kind": "float"}

    def write(self, head: Head, section: Section) -> None:
        head.number(PLAIN_TYPES.index(self.array.dtype.name))
        if np.issubdtype(self.array.dtype, np.floating):
            section.floats(self.array.ravel())
            return
        low, bits = span(self.array)
        head.signed(low)
        head.number(bits)
        section.numbers(self.array.ravel().astype(np.int64).view(np.uint64) - np.uint64(low % 2**64), bits)

    @classmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        dtype = np.dtype(PLAIN_TYPES[head.number()])
        low, bits = (0, 0) if np.issubdtype(dtype, np.floating) else (head.signed(), head.number())
        if bits > 64:
            raise ValueError(f"an integer has {bits} bits")

        def plan(source: Source, shape: tuple[int, ...], mask: Mask | None) -> Plain:
            count = source.claim(shape) if mask is None else int(np.count_nonzero(mask))
            if np.issubdtype(dtype, np.floating):
                array = source.floats(count, dtype)
            else:
                wide = source.numbers(count, bits).astype(np.uint64) + np.uint64(low % 2**64)
                array = wide.view(np.int64).astype(dtype)
            return Plain(array.reshape(shape) if mask is None else array)

        return plan

    def onnx(self, writer: Operators, name: str) -> None:
        if np.issubdtype(self.array.dtype, np.integer):
            writer.node("Cast", [writer.shared(self.array)], name, to=TensorProto.FLOAT)
        else:
            writer.floats(self.decode(), name)
