"""Read and write numbers as bits and bytes, for the head and the sections of a packed file.

The head is a string of bytes: variable-length numbers (7 bits a byte, the lowest first), signed ones with the sign in
the lowest bit, and texts with their length. A section is a string of bits, the lowest bit of a number first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lilliput.errors import ExportError

Array = NDArray[Any]
Bits = NDArray[np.uint8]


def to_bits(numbers: Array, bits: int) -> Bits:
    """Non-negative integers as zeros and ones, `bits` each, lowest first.

    Example:
        >>> to_bits(np.array([1, 6]), 3)
        array([1, 0, 0, 0, 1, 1], dtype=uint8)
    """
    numbers = np.asarray(numbers).ravel()
    out = np.empty((numbers.size, bits), np.uint8)
    for b in range(bits):
        out[:, b] = numbers >> b & 1
    return out.ravel()


def from_bits(stream: Bits, bits: int) -> NDArray[np.int64]:
    """The integers that `to_bits` wrote.

    Example:
        >>> from_bits(np.array([1, 0, 0, 0, 1, 1], np.uint8), 3)
        array([1, 6])
    """
    table = stream.reshape(-1, bits)
    numbers = np.zeros(len(table), np.int64)
    for b in range(bits):
        numbers |= table[:, b].astype(np.int64) << b
    return numbers


def varint(number: int) -> bytes:
    """A number that is not negative in as many bytes as it needs.

    >>> varint(300)
    b'\\xac\\x02'
    """
    if number < 0:
        raise ExportError(f"pack: a size must not be negative, got {number}.")
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


class ByteWriter:
    """Numbers and texts of a head, one behind the other in `data`."""

    def __init__(self) -> None:
        self.data = bytearray()

    def raw(self, data: bytes) -> None:
        """Bytes as they are."""
        self.data += data

    def number(self, number: int) -> None:
        """A number that is not negative."""
        self.data += varint(number)

    def signed(self, number: int) -> None:
        """Any integer."""
        self.data += varint(2 * number if number >= 0 else -2 * number - 1)

    def text(self, text: str | bytes) -> None:
        """A text, or bytes, with its length."""
        raw = text.encode() if isinstance(text, str) else text
        self.data += varint(len(raw)) + raw


class ByteReader:
    """What a `ByteWriter` wrote, each number checked against what is left."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def raw(self, count: int) -> bytes:
        """The next bytes."""
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError(f"the head ends {count - len(self.data) + self.at} bytes early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        """A number that is not negative."""
        number = shift = 0
        while True:
            byte = self.raw(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("a number is longer than 64 bits")

    def signed(self) -> int:
        """Any integer."""
        number = self.number()
        return -(number + 1) // 2 if number & 1 else number // 2

    def text(self) -> str:
        """A text with its length."""
        return self.raw(self.number()).decode()

    def count(self) -> int:
        """A number of things of which each takes at least a byte."""
        number = self.number()
        if number > len(self.data) - self.at:
            raise ValueError(f"{number} entries cannot follow in {len(self.data) - self.at} bytes")
        return number
