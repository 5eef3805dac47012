"""The graph that a model is compiled from: nodes, values, and the memory layout of each value."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lilliput.engine.size import Size, fixed, product

Array = NDArray[Any]

C_TYPES = {"float32": "float", "float64": "double", "float16": "uint16_t", "int8": "int8_t", "uint8": "uint8_t",
           "int16": "int16_t", "uint16": "uint16_t", "int32": "int32_t", "uint32": "uint32_t", "int64": "int64_t",
           "uint64": "uint64_t", "bool": "uint8_t"}  # fmt: skip
RUNS = ("float32", "int8", "uint8", "int32", "int64", "bool")  # what a value that is computed can be


@dataclass
class Narrow:
    """How the file stores a constant: float32 data = (levels - zero_point) * scale, both broadcast over the levels.

    Args:
        bits: 16 (float16: levels is a float16 array), 8, 4 or 2. levels has the shape of the data; scale and
            zero_point have as many dimensions, 1 where shared (with a block size above 1 they are already
            repeated).
    """

    bits: int
    levels: Array
    scale: Array | None = None
    zero_point: Array | None = None

    def moved(self, change: Any) -> Narrow | None:
        """The same after a transpose or reshape `change` of the data, where the scales can follow; else None."""
        try:
            levels = change(self.levels)
            if self.scale is None:
                return Narrow(self.bits, levels)
            full = np.broadcast_to(self.scale, self.levels.shape)
            zero = None if self.zero_point is None else np.broadcast_to(self.zero_point, self.levels.shape)
            return Narrow(self.bits, levels, _short(change(full)), None if zero is None else _short(change(zero)))
        except ValueError:
            return None


def _short(array: Array) -> Array:
    """The array with size 1 along every axis on which it does not change."""
    for axis in range(array.ndim):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return np.ascontiguousarray(array)


@dataclass(eq=False)
class Buffer:
    """Memory that one or more values lie in: a piece of the arena, an input, an output or a constant.

    Args:
        count: Elements.
        place: "arena", "input", "output" or "constant" (then data holds it).
        at: Byte offset in the arena.
    """

    dtype: np.dtype[Any]
    count: int
    place: str = "arena"
    at: int = 0
    name: str = ""
    data: Array | None = None

    @property
    def size_bytes(self) -> int:
        """At the compiled maximum."""
        return int(self.count) * self.dtype.itemsize


@dataclass(eq=False)
class Value:
    """A tensor of the graph.

    `buffer`, `offset` and `strides` (in elements) say where it lies; the layout sets them.

    Args:
        shape: Ints at the compiled maximum (a Size where free).
        data: The numbers, of a constant.
        narrow: How the file stores them.
        border: Zeros that its producer keeps around it, (before, after) for each dimension.
        tag: Names a layout that strides cannot describe.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    data: Array | None = None
    narrow: Narrow | None = None
    buffer: Buffer | None = None
    offset: int = 0
    strides: tuple[int, ...] = ()
    border: tuple[tuple[int, int], ...] = ()
    tag: str = ""
    entries: tuple[int, ...] | None = None  # of small integers that follow from the free sizes: then data is None

    @property
    def size(self) -> int:
        """Elements."""
        return product(self.shape)

    @property
    def rank(self) -> int:
        """Dimensions."""
        return len(self.shape)

    @property
    def constant(self) -> bool:
        """Whether it is known now."""
        return self.data is not None

    @property
    def c_type(self) -> str:
        """Its elements' type in C."""
        return C_TYPES[self.dtype.name]

    @property
    def contiguous(self) -> bool:
        """Whether it lies in C order without gaps."""
        return not self.tag and same(self.shape, self.strides, row_major(self.shape))


@dataclass(eq=False)
class Node:
    """An operator: of ONNX while the graph is read and simplified, then one of the engine's own too.

    Args:
        op: Its type, with the domain where it is not ONNX's ("com.microsoft.MatMulNBits").
        inputs: None where optional and absent.
        opset: The version of the operator set of its domain.
        kernel: What was chosen to compute it.
    """

    op: str
    inputs: list[Value | None]
    outputs: list[Value | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    opset: int = 0
    kernel: Any = None

    def __post_init__(self) -> None:
        if not self.name:
            self.name = next((value.name for value in self.outputs if value is not None), self.op)

    @property
    def x(self) -> Value:
        """The first input."""
        return self.input(0)

    @property
    def y(self) -> Value:
        """The first output."""
        value = self.outputs[0]
        assert value is not None
        return value

    def input(self, i: int) -> Value:
        """Input i, which must be there."""
        value = self.inputs[i] if i < len(self.inputs) else None
        if value is None:
            raise ValueError(f"{self.op} {self.name}: input {i} must be given, got none. The file is damaged.")
        return value

    def maybe(self, i: int) -> Value | None:
        """Input i, or None where it is absent."""
        return self.inputs[i] if i < len(self.inputs) else None

    def known(self, i: int) -> Array | None:
        """The numbers of a constant input i; None where it is absent.

        Raises:
            NotSupported: Where it is only known when the model runs.
        """
        from lilliput.errors import NotSupported

        value = self.maybe(i)
        if value is not None and value.data is None:
            raise NotSupported(
                f"{self.op} {self.name}: input {i} ({value.name}) must be known when compiling. Bind it "
                "with compile(constants={...})."
            )
        return None if value is None else value.data

    def ints(self, attribute: str, i: int) -> list[int] | None:
        """A list of integers that is an attribute in old files and constant input i in new ones; None where absent."""
        if attribute in self.attrs:
            held = self.attrs[attribute]
            return [int(x) for x in (held if isinstance(held, list | tuple | np.ndarray) else [held])]
        value = self.maybe(i)
        if value is not None and value.entries is not None:
            return list(value.entries)
        data = self.known(i)
        return None if data is None else [int(x) for x in np.asarray(data).reshape(-1)]

    def axes(self, rank: int, i: int = 1, attribute: str = "axes") -> list[int] | None:
        """Like `ints`, counted from the front; None where absent."""
        listed = self.ints(attribute, i)
        return None if listed is None else [axis % rank if rank else 0 for axis in listed]


@dataclass(eq=False)
class Graph:
    """Nodes in an order in which they can run, and what goes in and comes out."""

    inputs: list[Value]
    outputs: list[Value]
    nodes: list[Node]
    sizes: dict[str, int] = field(default_factory=dict)  # free sizes and their maxima
    needs: list[int] = field(default_factory=list)  # free sizes that must not be negative when the model runs

    def uses(self) -> dict[Value, list[Node]]:
        """The nodes that read each value."""
        readers: dict[Value, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(node.inputs):
                if value is not None:
                    readers.setdefault(value, []).append(node)
        return readers

    def makers(self) -> dict[Value, Node]:
        """The node that makes each value."""
        return {value: node for node in self.nodes for value in node.outputs if value is not None}

    def values(self) -> Iterator[Value]:
        """Every value once: inputs, then what nodes read and make."""
        seen: set[Value] = set()
        for value in [*self.inputs, *(v for n in self.nodes for v in (*n.inputs, *n.outputs)), *self.outputs]:
            if value is not None and value not in seen:
                seen.add(value)
                yield value

    def prune(self) -> None:
        """Drop the nodes that nothing reads."""
        wanted, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if any(value in wanted for value in node.outputs):
                kept.append(node)
                wanted.update(value for value in node.inputs if value is not None)
        self.nodes = kept[::-1]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a dense tensor in C order."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step = step * size
    return tuple(reversed(strides))


def same(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two strides reach the same elements: those of dimensions of size 1 do not matter."""
    return all(s == t for size, s, t in zip(shape, a, b, strict=True) if isinstance(size, Size) or size != 1)


def all_fixed(node: Node) -> bool:
    """Whether no shape of a node is free until the model runs."""
    return all(fixed(*value.shape) for value in (*node.inputs, *node.outputs) if value is not None)
