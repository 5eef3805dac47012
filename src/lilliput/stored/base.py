"""Stored: the interface of one way to store a tensor, and the head and sections that it is written into.

A stored tensor is plain numpy. `decode()` gives the float32 tensor that every artifact must reproduce bit for bit;
`storage()` predicts, from the numbers alone and by formula, how many bits its section of `model.lil` takes. Nothing
there calls a writer, and the writers never ask `storage()`: a test compares the two.

A new kind is one class in one file. Kinds of this package have a small number as their tag; a kind from elsewhere is
written by its name and found again because its class was imported, or through the registry.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lilliput.stored.bits import Array, Bits, ByteReader, ByteWriter, from_bits, to_bits
from lilliput.stored.entropy import coded_bits, decode, encode
from lilliput.stored.operators import Operators

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

NAMED = 7  # the number of every kind that is written by its name
DEEPEST = 8  # how many tensors may lie inside one another


@dataclass(frozen=True)
class Storage:
    """What a tensor's section consists of: `parts` of `count` numbers of `bits` each.

    Example:
        >>> Storage((("codes", 10, 3), ("scale", 1, 16))).size_bytes
        6
    """

    parts: tuple[tuple[str, int, int], ...]

    @property
    def bits(self) -> int:
        """All parts together, in bits."""
        return sum(count * bits for _, count, bits in self.parts)

    @property
    def size_bytes(self) -> int:
        """The section's length in the file: its bits, rounded up to a whole byte."""
        return -(-self.bits // 8)


class Stored(ABC):
    """One kind of storing a tensor.

    A kind must say its `shape` and `bits`, what it decodes to, what it costs, and how it is written and read;
    everything else has a default. `tag` is left out by kinds from other packages: it is then the name of the class,
    which must be the only one of that name.

    Attributes:
        shape: the decoded tensor's shape.
        bits: the mean width of a number, without what all of them share (scales, codebooks).
        tag: what a file says: a small number, or the name of the class.
        kinds: every kind that has been imported, by its tag.
        plain: whether it is the numbers themselves, so that an artifact must predict exactly what the model predicts.
    """

    tag: ClassVar[int | str] = ""
    plain: ClassVar[bool] = False

    kinds: ClassVar[dict[int | str, type[Stored]]] = {}

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        tag = cls.__dict__.get("tag", cls.__name__)
        other = Stored.kinds.get(tag)
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(
                f"Stored: a kind must have a tag of its own, but {cls.__module__}.{cls.__qualname__} and "
                f"{other.__module__}.{other.__qualname__} are both {tag!r}. Rename one of the classes."
            )
        cls.tag = tag
        Stored.kinds[tag] = cls

    if TYPE_CHECKING:  # a kind may have them as fields, whose defaults dataclass would look for here

        @property
        def shape(self) -> tuple[int, ...]:
            """The decoded tensor's shape."""

        @property
        def bits(self) -> float:
            """The mean width of a number, without what all of them share."""

    @abstractmethod
    def decode(self) -> Floats:
        """The tensor in float32, the same on every machine."""

    @abstractmethod
    def storage(self) -> Storage:
        """The section's parts, counted from the numbers alone."""

    @abstractmethod
    def write(self, head: Head, section: Section) -> None:
        """Describe the tensor in the head (not its shape: that is there already), and put its numbers into the section.

        What is counted by `storage()` is what must go into the section.
        """

    @classmethod
    @abstractmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        """Read the description back, and return what reads the numbers, once all of the head is read.

        Args:
            head: where `write` has written.
            axes: how many axes the tensor has.

        Returns:
            A function of the sections, the tensor's shape, and, where `kept(mask)` was written, that mask.

        Raises:
            ValueError: for a description that `write` does not write.
        """

    @property
    @abstractmethod
    def values(self) -> int:
        """How many numbers are kept."""

    @property
    def refers(self) -> tuple[str, ...]:
        """The names of tensors that this one is made from; they are written before it."""
        return ()

    def alone(self) -> Stored:
        """The same tensor without reference to others."""
        return self

    def onnx(self, writer: Operators, name: str) -> None:
        """Write operators that compute the float32 tensor `name`; where a kind has none, its decoded values.

        The operators read constants only, so that a runtime computes them once, when it loads the file.
        """
        writer.floats(self.decode(), name)
        writer.decoded.append(name)

    def native(self) -> Array:
        """The numbers in the type in which a graph takes them: float32 but for plain integers."""
        return self.decode()

    def kept(self, mask: Mask) -> Stored | None:
        """The entries under `mask` alone, as one axis in C order, in the same kind; None where it cannot be cut up.

        A kind that returns one must also read it: its `Plan` is then called with the mask's shape and the mask.
        """
        return None

    def zeroed(self, mask: Mask) -> Stored | None:
        """The whole tensor with exact zeros outside of `mask`, in the same kind; None where it cannot say zero.

        The tensor has the mask's shape, or is one axis of the entries under it.
        """
        return None

    def reshaped(self, shape: tuple[int, ...]) -> Stored | None:
        """The same numbers under another shape, in the same kind; None where they cannot be seen so."""
        return None

    def facts(self) -> dict[str, Any]:
        """What a report says of the tensor: its kind, sparsity and rank."""
        return {"kind": type(self).__name__.lower(), "sparsity": 0.0, "rank": None}

    def cost(self, target: Literal["lil", "onnx"]) -> int:
        """Exact bytes that the tensor adds to a file: its section in "lil"; initialisers and nodes in "onnx".

        Values of an ONNX graph have names of one letter here; a large graph needs a second letter for some.

        Raises:
            ValueError: for another target.
        """
        if target == "lil":
            return self.storage().size_bytes
        if target != "onnx":
            raise ValueError(f"cost: target must be 'lil' or 'onnx', got {target!r}. Choose one of them.")
        writer = Operators(tiny=True)
        self.onnx(writer, "w")
        return writer.size_bytes("w")


Plan: TypeAlias = Callable[["Source", tuple[int, ...], Mask | None], Stored]
"""What reads a tensor's numbers: called with the sections, the shape, and the mask under which they were kept."""


def limits(bits: int, affine: bool) -> tuple[int, int]:
    """The smallest and the largest code of b bits: affine from 0, symmetric around 0.

    Example:
        >>> limits(4, affine=False), limits(4, affine=True)
        ((-7, 7), (0, 15))
    """
    return (0, 2**bits - 1) if affine else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


def smaller(name: str, codes: NDArray[np.uint16], bits: int) -> tuple[str, int, int]:
    """The part for `codes`: b bits each, or all together what the entropy coder takes."""
    coded = coded_bits(codes, bits)
    return (name, codes.size, bits) if codes.size * bits <= coded else (name, 1, coded)


# ------------------------------------------------------------------------------------------------------------ writing


class Head(ByteWriter):
    """The head of a file. `names`: the tensors that have been written, in order, for those that refer to them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def tensor(self, value: Stored, section: Section, native: bool = False) -> None:
        """A tensor: its kind, its shape, what its kind says of it. native: the graph takes it as it is, not as float32.

        The two lowest bits of the kind and `native` lie where format 1 has them, so that its heads stay as long.
        """
        number = self.number_of(value)
        self.number(number & 3 | native << 2 | number >> 2 << 3)
        self.name_of(value)
        self.number(len(value.shape))
        for n in value.shape:
            self.number(n)
        value.write(self, section)

    @staticmethod
    def number_of(value: Stored) -> int:
        """The small number of a kind."""
        return value.tag if isinstance(value.tag, int) else NAMED

    def name_of(self, value: Stored) -> None:
        """The name of a kind that has no number of its own."""
        if isinstance(value.tag, str):
            self.text(value.tag)


class Section:
    """One tensor's bits. counted: they are not kept, where only the head is wanted."""

    def __init__(self, counted: bool = False) -> None:
        self._counted = counted
        self._parts: list[bytes | Bits] = []

    def stream(self, bits: Bits) -> None:
        """Zeros and ones."""
        if not self._counted:
            self._parts.append(bits)

    def numbers(self, numbers: Array, bits: int) -> None:
        """Non-negative integers of `bits` bits each."""
        if self._counted:
            return
        if bits in (8, 16, 32):
            self._parts.append(numbers.astype(f"<u{bits // 8}").tobytes())
        else:
            self._parts.append(to_bits(numbers, bits))

    def floats(self, numbers: Array) -> None:
        """Floats in their own width."""
        if not self._counted:
            self._parts.append(numbers.astype(numbers.dtype.newbyteorder("<")).tobytes())

    def codes(self, codes: Array, bits: int) -> int:
        """Integers of b bits each, or entropy-coded where that is shorter; the bits these take then, else 0."""
        coded = coded_bits(codes, bits)
        if coded < codes.size * bits:
            if not self._counted:
                self._parts.append(encode(codes, bits))
            return coded
        self.numbers(codes, bits)
        return 0

    def data(self) -> bytes:
        """All of it, filled up with zeros to a whole byte."""
        parts = self._parts
        if all(isinstance(part, bytes) for part in parts):  # the most frequent case, and the fastest
            return b"".join(part for part in parts if isinstance(part, bytes))
        bits = [
            np.unpackbits(np.frombuffer(p, np.uint8), bitorder="little") if isinstance(p, bytes) else p for p in parts
        ]
        return np.packbits(np.concatenate(bits), bitorder="little").tobytes()


def section(value: Stored) -> bytes:
    """A tensor's section of a file."""
    head, written = Head(), Section()
    head.names += value.refers
    head.tensor(value, written)
    return written.data()


# ------------------------------------------------------------------------------------------------------------ reading


class HeadReader(ByteReader):
    """The head of a file of format 1 or 2. find: the class of a kind from its tag (`lilliput.stored.kinds.find`)."""

    def __init__(self, data: bytes, version: int, find: Callable[[int | str], type[Stored]]) -> None:
        super().__init__(data)
        self.version, self._find, self._depth = version, find, 0

    def shape(self) -> tuple[int, ...]:
        """A tensor's shape."""
        rank = self.count()
        if rank > 16:
            raise ValueError(f"a tensor has {rank} axes")
        return tuple(self.number() for _ in range(rank))

    def kind(self, number: int) -> type[Stored]:
        """The class of a kind, from the number that was read; its name is read where it has one."""
        if self.version == 1 and number > 3:
            raise ValueError(f"a tensor is of an unknown kind {number}")
        return self._find(self.text() if number == NAMED else number)

    def tensor(self) -> tuple[Callable[[Source], Stored], bool]:
        """What reads a tensor's numbers, and whether the graph takes it as it is."""
        number = self.number()
        kind = self.kind(number & 3 | number >> 3 << 2)
        shape = self.shape()
        self._depth += 1
        if self._depth > DEEPEST:
            raise ValueError(f"tensors lie inside one another more than {DEEPEST} deep")
        plan = kind.read(self, len(shape))
        self._depth -= 1
        return lambda source: plan(source, shape, None), bool(number & 4)


def most_values(file_bytes: int) -> int:
    """How many values a file may decode to: what bounds the memory that a hostile one can take."""
    return max(1 << 24, 512 * file_bytes)


class Source:
    """A file's sections as bits, with what may still be taken out of it.

    Attributes:
        most: the values that any tensor of the file may have, those on the way to one included.
        done: the tensors read so far, in order.
    """

    def __init__(self, data: bytes, at: int) -> None:
        self.data = np.frombuffer(data, np.uint8)
        self.at, self.end = 8 * at, 8 * len(data)
        self.values_left = self.most = most_values(len(data))
        self.done: list[tuple[str, Stored]] = []

    def claim(self, shape: tuple[int, ...]) -> int:
        """The size of a shape, counted against the values that the file may have."""
        count = math.prod(shape)
        self.values_left -= count
        if self.values_left < 0:
            raise ValueError("it has more values than a file of its length can hold")
        return count

    def stream(self, count: int) -> Bits:
        """The next bits."""
        if not 0 <= count <= self.end - self.at:
            raise ValueError("it ends early")
        first, last = self.at // 8, -(-(self.at + count) // 8)
        bits = np.unpackbits(self.data[first:last], bitorder="little")
        start, self.at = self.at % 8, self.at + count
        return bits[start : start + count]

    def numbers(self, count: int, bits: int) -> Array:
        """Non-negative integers of `bits` bits each."""
        if count * bits > self.end - self.at:
            raise ValueError("it ends early")
        if bits == 0:
            return np.zeros(count, np.int64)
        if bits in (8, 16, 32) and self.at % 8 == 0:
            first, self.at = self.at // 8, self.at + count * bits
            return np.frombuffer(self.data.data, f"<u{bits // 8}", count, first)
        return from_bits(self.stream(count * bits), bits)

    def floats(self, count: int, dtype: np.dtype[Any]) -> Array:
        """Floats in their own width."""
        size = dtype.itemsize
        return self.numbers(count, 8 * size).astype(f"<u{size}").view(f"<f{size}").astype(dtype)

    def codes(self, count: int, bits: int, coded: int) -> Array:
        """What `Section.codes` wrote, which returned `coded`."""
        return decode(self.stream(coded), count, bits) if coded else self.numbers(count, bits)

    def align(self) -> None:
        """Go to the next whole byte."""
        rest = -self.at % 8
        if rest and self.stream(rest).any():
            raise ValueError("the bits that fill a section up must be zero")
