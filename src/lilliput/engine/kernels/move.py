"""Move elements: concatenation, padding, tables of positions, and integers that follow from free sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lilliput.engine import loops
from lilliput.engine.graph import Node, Value
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.size import c
from lilliput.engine.target import Target


def copied(
    to: str, to_strides: Sequence[int], from_: str, from_strides: Sequence[int], shape: Sequence[int], prefix: str = "i"
) -> str:
    """Loops that copy a box of elements; `to` and `from_` are C expressions of the places of its first element."""
    sizes, (out, into) = loops.collapsed(shape, [tuple(to_strides), tuple(from_strides)])
    return loops.nest(sizes, lambda names: [f"{at(to, names, out)} = {at(from_, names, into)};"], prefix)


def at(base: str, names: Sequence[str], strides: Sequence[int]) -> str:
    """The C expression of the element at counters `names` behind a place such as "y0 + 3"."""
    pointer, _, first = base.partition(" + ")
    place = loops.index(names, strides)
    return f"{pointer}[{place if not first else first if place == '0' else f'{first} + {place}'}]"


def place(base: str, offset: int) -> str:
    """A pointer moved by an offset."""
    return base if offset == 0 else f"{base} + {c(offset)}"


@kernel("Entries")
def entries(node: Node, target: Target) -> Iterator[Kernel]:
    """Small integers that follow from the free sizes. attrs: entries."""

    def body(node: Node) -> str:
        y = node.y
        lines = []
        for number, i in enumerate(np.ndindex(*(int(s) for s in y.shape))):
            offset = sum(int(a) * int(s) for a, s in zip(i, y.strides, strict=True))
            lines.append(f"y0[{offset}] = ({y.c_type}){c(node.attrs['entries'][number])};")
        return "\n".join(lines)

    yield Kernel("entries", body, cost_ns=10.0)


@kernel("Concat")
def concat(node: Node, target: Target) -> Iterator[Kernel]:
    """Inputs one after another. attrs: axis."""
    yield Kernel("copies", _concat, cost_ns=20.0 * len(node.inputs) + 0.2 * int(node.y.size))


def _concat(node: Node) -> str:
    y, axis = node.y, node.attrs["axis"]
    parts, start = [], 0
    for i, x in enumerate(node.inputs):
        assert x is not None
        parts.append(copied(place("y0", start * y.strides[axis]), y.strides, f"x{i}", x.strides, x.shape))
        start = start + x.shape[axis]
    return "\n".join(parts)


@kernel("Pad")
def pad(node: Node, target: Target) -> Iterator[Kernel]:
    """A constant around the data: x, value. attrs: before, after (none negative)."""
    yield Kernel("copies", _pad, cost_ns=40.0 + 0.2 * int(node.y.size))


def _pad(node: Node) -> str:
    x, y = node.x, node.y
    before, after = node.attrs["before"], node.attrs["after"]
    lines = [f"const {y.c_type} around = x1[0];"]
    inner: int = 0
    for d in range(y.rank):
        inner = inner + before[d] * y.strides[d]
    for d in range(y.rank):
        # Ends of dimension d, inside of what is before it and over the whole of what is behind it.
        shift: int = 0
        for k in range(d):
            shift = shift + before[k] * y.strides[k]
        for start, size in ((0, before[d]), (before[d] + x.shape[d], after[d])):
            if size == 0:
                continue
            shape = [x.shape[k] if k < d else size if k == d else y.shape[k] for k in range(y.rank)]
            sizes, (steps,) = loops.collapsed(shape, [tuple(y.strides)])
            first = place("y0", shift + start * y.strides[d])
            lines.append(loops.nest(sizes, lambda names, f=first, s=steps: [f"{at(f, names, s)} = around;"]))  # type: ignore
    lines.append(copied(place("y0", inner), y.strides, "x0", x.strides, x.shape))
    return "\n".join(lines)


@kernel("Take")
def take(node: Node, target: Target) -> Iterator[Kernel]:
    """y[i, j] = x[maps[0][i], maps[1][j]]. attrs: maps (positions in x by dimension, None where all stay)."""
    tables = {f"map{d}": np.asarray(m, np.int32) for d, m in enumerate(node.attrs["maps"]) if m is not None}
    yield Kernel("table", _take, constants=tables, cost_ns=20.0 + 0.8 * int(node.y.size))


def _take(node: Node) -> str:
    x, y, maps = node.x, node.y, node.attrs["maps"]
    tables = [d for d, m in enumerate(maps) if m is not None]
    order = sorted((d for d in range(y.rank) if y.shape[d] != 1 or d in tables), key=lambda d: -abs(int(y.strides[d])))
    # Dimensions without a table that lie innermost are one copy; the others are walked through one by one.
    tail: list[int] = []
    while order and order[-1] not in tables:
        tail.insert(0, order.pop())

    def inner(names: list[str]) -> list[str]:
        lines = []
        for name, d in zip(names, order, strict=True):
            if d in tables:
                lines.append(f"const int64_t p{d} = {c(x.strides[d])} * (int64_t)map{d}[{name}];")
        source = (
            " + ".join(
                f"p{d}" if d in tables else f"{c(x.strides[d])}*{name}" for name, d in zip(names, order, strict=True)
            )
            or "0"
        )
        goal = loops.index(names, [y.strides[d] for d in order])
        if not tail:
            return [*lines, f"y0[{goal}] = x0[{source}];"]
        lines += [f"const {x.c_type} *from = x0 + {source};", f"{y.c_type} *to = y0 + {goal};"]
        return [
            *lines,
            *copied(
                "to",
                [y.strides[d] for d in tail],
                "from",
                [x.strides[d] for d in tail],
                [y.shape[d] for d in tail],
                "k",
            ).splitlines(),
        ]

    return loops.nest([y.shape[d] for d in order], inner)


@kernel("Mirror")
def mirror(node: Node, target: Target) -> Iterator[Kernel]:
    """Padding whose sizes are free by what reflects, repeats or wraps. attrs: before, after, mode."""
    yield Kernel("loops", _mirror, cost_ns=20.0 + 2.0 * int(node.y.size))


def _mirror(node: Node) -> str:
    x, y, mode = node.x, node.y, node.attrs["mode"]
    padded = [not (b == 0 and a == 0) for b, a in zip(node.attrs["before"], node.attrs["after"], strict=True)]

    def inner(names: list[str]) -> list[str]:
        lines = []
        for d, name in enumerate(names):
            if not padded[d]:
                continue
            size = c(x.shape[d])
            lines.append(f"int64_t p{d} = (int64_t){name} - {c(node.attrs['before'][d])};")
            if mode == "edge":
                lines.append(f"p{d} = p{d} < 0 ? 0 : p{d} >= {size} ? {size} - 1 : p{d};")
            elif mode == "wrap":
                lines.append(f"p{d} = ((p{d} % {size}) + {size}) % {size};")
            else:
                lines += [
                    f"const int64_t period{d} = {size} > 1 ? 2*({size} - 1) : 1;",
                    f"p{d} = ((p{d} % period{d}) + period{d}) % period{d};",
                    f"if (p{d} >= {size}) p{d} = period{d} - p{d};",
                ]
        source = loops.index([f"p{d}" if padded[d] else n for d, n in enumerate(names)], x.strides)
        return [*lines, f"y0[{loops.index(names, y.strides)}] = x0[{source}];"]

    return loops.nest(y.shape, inner)


def fits_in_place(x: Value, y: Value) -> bool:
    """Whether x already lies where y is written."""
    return x.buffer is y.buffer and x.offset == y.offset and tuple(x.strides) == tuple(y.strides)
