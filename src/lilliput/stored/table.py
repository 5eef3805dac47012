"""Table: store indices into a codebook of values or short vectors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from lilliput.stored.base import Floats, Head, HeadReader, Mask, Plan, Section, Source, Storage, Stored, smaller
from lilliput.stored.bits import Array
from lilliput.stored.operators import Operators


@dataclass(frozen=True, eq=False)
class Table(Stored):
    """Store indices into a codebook: `value = codebook[indices]`, k entries of one value, or of d values along the last
    axis.

    Args:
        indices: integers in [0, k): the tensor's shape, or (..., n / d) for one of (..., n).
        codebook: float32 or float16, (k,) or (k, d), k from 1 to 65,536.

    Raises:
        ValueError: where one of these does not hold.

    Example:
        >>> Table(np.array([[0, 1], [2, 1]]), np.array([-1.0, 0.0, 1.0], np.float16)).decode()
        array([[-1.,  0.],
               [ 1.,  0.]], dtype=float32)
    """

    indices: Array
    codebook: Array

    tag: ClassVar[int | str] = 4

    def __post_init__(self) -> None:
        if self.codebook.dtype.name not in ("float32", "float16") or self.codebook.ndim not in (1, 2):
            raise ValueError(
                f"Table: codebook must be float32 or float16 of shape (k,) or (k, d), got {self.codebook.dtype} "
                f"{self.codebook.shape}. Convert it first."
            )
        if not 1 <= len(self.codebook) <= 1 << 16 or 0 in self.codebook.shape:
            raise ValueError(f"Table: codebook must have 1 to 65,536 entries, got {self.codebook.shape}.")
        if not np.issubdtype(self.indices.dtype, np.integer) or (self.codebook.ndim == 2 and not self.indices.ndim):
            raise ValueError(f"Table: indices must be integers, got {self.indices.dtype} {self.indices.shape}.")
        if self.indices.size and not (self.indices.min() >= 0 and self.indices.max() < len(self.codebook)):
            raise ValueError(
                f"Table: indices must lie in [0, {len(self.codebook)}), got [{self.indices.min()}, "
                f"{self.indices.max()}]. Give the codebook that they were made for."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        if self.codebook.ndim == 1:
            return self.indices.shape
        return (*self.indices.shape[:-1], self.indices.shape[-1] * self.codebook.shape[1])

    @property
    def width(self) -> int:
        """The bits of an index."""
        return (len(self.codebook) - 1).bit_length()

    @property
    def values(self) -> int:
        return self.indices.size

    @property
    def bits(self) -> float:
        return float(self.width)

    @property
    def _symbols(self) -> NDArray[np.uint16]:
        return self.indices.ravel().astype(np.uint16)

    def decode(self) -> Floats:
        """The codebook's entries in their places."""
        return self.codebook.astype(np.float32)[self.indices].reshape(self.shape)

    def storage(self) -> Storage:
        """The codebook, and the indices in their width or entropy-coded, whichever is smaller."""
        book = ("codebook", self.codebook.size, 8 * self.codebook.dtype.itemsize)
        return Storage((book, smaller("indices", self._symbols, self.width)))

    def kept(self, mask: Mask) -> Table | None:
        return replace(self, indices=self.indices[mask]) if self.codebook.ndim == 1 else None

    def zeroed(self, mask: Mask) -> Table | None:
        if self.codebook.ndim == 2:
            return None
        zeros = np.flatnonzero(self.codebook == 0)
        book = self.codebook if zeros.size else np.append(self.codebook, np.zeros(1, self.codebook.dtype))
        if len(book) > 1 << 16:
            return None
        indices = np.full(mask.shape, zeros[0] if zeros.size else len(book) - 1, np.int64)
        indices[mask] = self.indices[mask] if self.shape == mask.shape else self.indices
        return Table(indices, book)

    def write(self, head: Head, section: Section) -> None:
        section.floats(self.codebook.ravel())
        coded = section.codes(self._symbols, self.width)
        entry = self.codebook.shape[1] if self.codebook.ndim == 2 else 0
        head.number(len(self.codebook) << 1 | (self.codebook.dtype == np.float16))
        head.number(entry << 1 | bool(coded))
        if coded:
            head.number(coded)

    @classmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        number, second = head.number(), head.number()
        coded = head.number() if second & 1 else 0
        k, d = number >> 1, second >> 1
        if not 1 <= k <= 1 << 16:
            raise ValueError(f"a codebook has {k} entries")

        def plan(source: Source, shape: tuple[int, ...], mask: Mask | None) -> Table:
            if d and (mask is not None or not shape or shape[-1] % d):
                raise ValueError(f"entries of {d} values do not divide the shape {shape}")
            book = source.floats(source.claim((k, d or 1)), np.dtype(np.float16 if number & 1 else np.float32))
            count = source.claim(shape) if mask is None else int(np.count_nonzero(mask))
            indices = source.codes(count // (d or 1), (k - 1).bit_length(), coded).astype(np.int32)
            if mask is None:
                indices = indices.reshape((*shape[:-1], shape[-1] // d) if d else shape)
            return cls(indices, book.reshape(k, d) if d else book)

        return plan

    def onnx(self, writer: Operators, name: str) -> None:
        """Indices in the narrowest type -> Cast -> Gather from the codebook (-> Reshape)."""
        index = writer.node("Cast", [writer.integers(self.indices)], to=TensorProto.INT32)
        book = writer.floats(self.codebook.astype(np.float32))
        if self.codebook.ndim == 1:
            writer.node("Gather", [book, index], name)
        else:
            writer.reshaped(writer.node("Gather", [book, index]), self.shape, name)
