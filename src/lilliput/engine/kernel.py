"""Kernel: one way to compute a node, with the layouts it needs, the constants it keeps and the C it writes."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from lilliput.engine.graph import Array, Buffer, Node, Value, row_major, same
from lilliput.engine.size import fixed, product
from lilliput.engine.target import Target


@dataclass(frozen=True)
class Want:
    """A layout that a kernel asks of an input, or gives to its output.

    Args:
        order: The dimensions from the outermost (largest stride) to the innermost (stride 1); None is row-major.
        border: Zeros (before, after) each dimension, which its producer keeps zero.
        pitch: The stride of the second innermost dimension is a multiple of this.
        plane: So is that of the third innermost.
        slack: Elements behind the last one that may be read and overwritten (so a value with slack lies in the
            arena).
        exact: No more border and gaps than this.
        tag: A layout of its own, which only kernels that name it read and write.
        count: Its elements.
    """

    order: tuple[int, ...] | None = None
    border: tuple[tuple[int, int], ...] = ()
    pitch: int = 1
    plane: int = 1
    slack: int = 0
    exact: bool = False
    tag: str = ""
    count: int = 0

    def strides(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
        """(strides, offset, elements of the buffer) of a new value of this shape."""
        rank = len(shape)
        order = self.order or tuple(range(rank))
        border = self.border or ((0, 0),) * rank
        strides, step = [0] * rank, 1
        for place, dim in enumerate(reversed(order)):
            strides[dim] = step
            step = step * (shape[dim] + sum(border[dim]))
            multiple = self.pitch if place == 0 else self.plane if place == 1 else 1
            if multiple > 1 and fixed(step):
                step = -(-int(step) // multiple) * multiple
        offset = 0
        for dim in range(rank):
            offset = offset + strides[dim] * border[dim][0]
        return tuple(strides), offset, step + self.slack

    def place(self, value: Value, buffer: Buffer | None = None) -> None:
        """Lay the value out like this, in a new buffer of the arena or in `buffer`."""
        if self.tag:
            value.tag, value.strides, value.offset, count = self.tag, (), 0, self.count + self.slack
        else:
            value.strides, value.offset, count = self.strides(value.shape)
            value.border = self.border if any(any(b) for b in self.border) else ()
        value.buffer = buffer or Buffer(value.dtype, count, name=value.name)
        value.buffer.count = max(value.buffer.count, count)

    def fits(self, value: Value) -> bool:
        """Whether a value that lies somewhere can be read as it is."""
        if self.tag or value.tag:
            return self.tag == value.tag
        assert value.buffer is not None
        rank = value.rank
        order = self.order or tuple(range(rank))
        if self.slack and value.buffer.place != "arena":
            return False
        if self.exact:
            strides, _, _ = self.strides(value.shape)
            held = value.border or ((0, 0),) * rank
            wanted = self.border or ((0, 0),) * rank
            return same(value.shape, value.strides, strides) and (held == wanted or not any(any(b) for b in wanted))
        step = 1
        for place, dim in enumerate(reversed(order)):
            if value.shape[dim] == 1:
                continue
            stride = value.strides[dim]
            if (place == 0 or step == 1) and stride != step:
                return False
            if int(stride) < int(step):
                return False
            if (place == 1 and int(stride) % self.pitch) or (place == 2 and int(stride) % self.plane):
                return False
            step = stride * value.shape[dim]
        if self.border and any(any(b) for b in self.border):
            held = value.border or ((0, 0),) * rank
            return all(h[0] >= w[0] and h[1] >= w[1] for h, w in zip(held, self.border, strict=True))
        return True


ROWS = Want(exact=True)  # dense, in C order


@dataclass(frozen=True)
class Kernel:
    """One way to compute a node.

    Args:
        name: What the manifest and the generated comment call it.
        body: The C statements, written after layouts are set; in them x0, x1, ... point to the first element of
            each input, y0, ... of each output, every key of `constants` to its array, `scratch` to that many bytes
            (aligned to 64), and free sizes have their names (int64_t). What differs from layer to layer (non-zeros,
            positions) belongs into constants: functions with equal text are written once.
        wants: By input, None for any strides (missing ones too).
        gives: The output's layout, by output where a tuple; None when any strides are written.
        skips: Inputs that are not passed since `constants` hold them.
        cost_ns: Estimate for the whole call.
        helpers: C text that stands once in the file before the functions, in this order, or what says it once
            layouts are set.
        fails: What went wrong where the body says `return 1;` (then it must end in `return 0;`).
        reuses: Inputs over which the output may be written.
        follows: Where gives is None, the output keeps the order of the input's dimensions whatever its readers ask
            for.
    """

    name: str
    body: Callable[[Node], str]
    wants: tuple[Want | None, ...] = ()
    gives: Want | None = None
    constants: Mapping[str, Array] = field(default_factory=dict)
    skips: tuple[int, ...] = ()
    scratch: int = 0
    cost_ns: float = 0.0
    helpers: tuple[str, ...] | Callable[[Node], tuple[str, ...]] = ()
    fails: str = ""
    reuses: tuple[int, ...] = ()
    follows: bool = False
    nonzeros: int | None = None  # of how many weights are read, for the manifest
    values: int | None = None
    active: float | None = None  # the fraction of inputs that are not zero, for which it was made

    def heads(self, node: Node) -> tuple[str, ...]:
        """The C text that stands before the function of a node that is laid out."""
        return self.helpers(node) if callable(self.helpers) else self.helpers

    def want(self, i: int) -> Want | None:
        """What is asked of input i."""
        return self.wants[i] if i < len(self.wants) else None


Maker = Callable[[Node, Target], Iterable[Kernel]]
KERNELS: dict[str, list[Maker]] = {}


def kernel(*ops: str) -> Callable[[Maker], Maker]:
    """Register a function that yields the kernels it has for a node of one of these operators."""

    def register(maker: Maker) -> Maker:
        for op in ops:
            KERNELS.setdefault(op, []).append(maker)
        return maker

    return register


@cache
def gather() -> dict[str, list[Maker]]:
    """Every kernel there is, by operator: the modules of the folder kernels/."""
    from lilliput.engine import kernels

    for module in sorted(m.name for m in pkgutil.iter_modules(kernels.__path__)):
        importlib.import_module(f"lilliput.engine.kernels.{module}")
    return KERNELS


def candidates(node: Node, target: Target) -> list[Kernel]:
    """Every kernel for a node, the cheapest by its own estimate first."""
    kernels = [k for maker in gather().get(node.op, ()) for k in maker(node, target)]
    return sorted(kernels, key=lambda k: k.cost_ns)


def dense(value: Value, buffer: Buffer | None = None) -> None:
    """Lay a value out in C order."""
    Want().place(value, buffer)


def constant(value: Value) -> None:
    """Lay out a constant as it is stored: in C order."""
    assert value.data is not None
    value.strides, value.offset = row_major(value.shape), 0
    data = value.data
    value.buffer = Buffer(np.dtype(data.dtype), product(value.shape), "constant", name=value.name, data=data)
