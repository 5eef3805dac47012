"""Gather and scatter at positions that are computed when the model runs: each is checked before it is used."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import loops
from lilliput.engine.graph import Node, Value
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.move import at, copied, fits_in_place
from lilliput.engine.ops.index import OUT_OF_RANGE
from lilliput.engine.size import c
from lilliput.engine.target import Target


def checked(name: str, read: str, size: int) -> list[str]:
    """C statements that read a position, counted from the end where negative, and `return 1` where it is outside."""
    return [
        f"int64_t {name} = {read};",
        f"if ({name} < 0) {name} += {c(size)};",
        f"if ({name} < 0 || {name} >= {c(size)}) return 1;",
    ]


@kernel("Gather")
def gather(node: Node, target: Target) -> Iterator[Kernel]:
    """y[..., i..., ...] = x[..., indices[i...], ...]. attrs: axis."""
    yield Kernel(
        "rows", _gather, cost_ns=20.0 + 2.0 * int(node.input(1).size) + 0.25 * int(node.y.size), fails=OUT_OF_RANGE
    )


def _gather(node: Node) -> str:
    x, indices, y, axis = node.x, node.input(1), node.y, node.attrs["axis"]
    inside = y.strides[axis : axis + indices.rank]
    others = [d for d in range(x.rank) if d != axis]
    shape = [x.shape[d] for d in others]
    goal = [y.strides[d if d < axis else d + indices.rank - 1] for d in others]

    def row(names: list[str]) -> list[str]:
        lines = checked("p", f"x1[{loops.index(names, indices.strides)}]", x.shape[axis])
        lines += [
            f"const {x.c_type} *from = x0 + {c(x.strides[axis])}*p;",
            f"{y.c_type} *to = y0 + {loops.index(names, inside)};",
        ]
        return [*lines, *copied("to", goal, "from", [x.strides[d] for d in others], shape, "k").splitlines()]

    return loops.nest(indices.shape, row) + "\nreturn 0;"


@kernel("GatherElements")
def gather_elements(node: Node, target: Target) -> Iterator[Kernel]:
    """y[i, j, k] = x[i, indices[i, j, k], k]. attrs: axis."""

    def body(node: Node) -> str:
        x, indices, y, axis = node.x, node.input(1), node.y, node.attrs["axis"]

        def element(names: list[str]) -> list[str]:
            source = loops.index([("p" if d == axis else n) for d, n in enumerate(names)], x.strides)
            return [
                *checked("p", f"x1[{loops.index(names, indices.strides)}]", x.shape[axis]),
                f"y0[{loops.index(names, y.strides)}] = x0[{source}];",
            ]

        return loops.nest(y.shape, element) + "\nreturn 0;"

    yield Kernel("elements", body, cost_ns=20.0 + 2.0 * int(node.y.size), fails=OUT_OF_RANGE)


@kernel("GatherND")
def gather_nd(node: Node, target: Target) -> Iterator[Kernel]:
    """y[b..., i...] = x[b..., indices[b..., i...]...]. attrs: batch (dimensions in common), depth (of a position)."""

    def body(node: Node) -> str:
        x, indices, y = node.x, node.input(1), node.y
        batch, depth = node.attrs["batch"], node.attrs["depth"]
        lead = indices.rank - 1
        rest = list(range(batch + depth, x.rank))

        def row(names: list[str]) -> list[str]:
            lines = _position(names, indices, x, depth, batch)
            start = loops.index(names[:batch], x.strides[:batch])
            lines += [
                f"const {x.c_type} *from = x0 + {start} + place;",
                f"{y.c_type} *to = y0 + {loops.index(names, y.strides[:lead])};",
            ]
            return [
                *lines,
                *copied(
                    "to", y.strides[lead:], "from", [x.strides[d] for d in rest], [x.shape[d] for d in rest], "k"
                ).splitlines(),
            ]

        return loops.nest(indices.shape[:-1], row) + "\nreturn 0;"

    yield Kernel(
        "rows", body, cost_ns=20.0 + 2.0 * int(node.input(1).size) + 0.25 * int(node.y.size), fails=OUT_OF_RANGE
    )


def _position(names: list[str], indices: Value, x: Value, depth: int, first: int = 0) -> list[str]:
    """C statements that set `place` to where a position of `depth` numbers lies in x, from dimension `first` on."""
    lines = []
    for k in range(depth):
        lines += checked(f"p{k}", f"x1[{loops.index([*names, str(k)], indices.strides)}]", x.shape[first + k])
    names = [f"p{k}" for k in range(depth)]
    return [*lines, f"const int64_t place = {loops.index(names, x.strides[first : first + depth])};"]


def _changed(how: str, target: str, update: str, value: Value) -> str:
    """C statement that puts an update into its place."""
    if how == "none":
        return f"{target} = {update};"
    if how in ("min", "max"):
        return f"if ({update} {'<' if how == 'min' else '>'} {target}) {target} = {update};"
    sign = "+" if how == "add" else "*"
    if value.dtype.kind == "f":
        return f"{target} {sign}= {update};"
    return f"{target} = ({value.c_type})((uint64_t){target} {sign} (uint64_t){update});"


@kernel("ScatterND")
def scatter_nd(node: Node, target: Target) -> Iterator[Kernel]:
    """y = x, then y[indices[i...]...] is changed by updates[i...]. attrs: depth (of a position), how."""

    def body(node: Node) -> str:
        x, indices, updates, y = node.x, node.input(1), node.input(2), node.y
        depth, how = node.attrs["depth"], node.attrs["how"]
        lead = indices.rank - 1

        def row(names: list[str]) -> list[str]:
            lines = _position(names, indices, y, depth)
            lines += [
                f"{y.c_type} *to = y0 + place;",
                f"const {updates.c_type} *from = x2 + {loops.index(names, updates.strides[:lead])};",
            ]
            sizes, (goal, source) = loops.collapsed(y.shape[depth:], [y.strides[depth:], updates.strides[lead:]])
            return [
                *lines,
                *loops.nest(
                    sizes, lambda k: [_changed(how, at("to", k, goal), at("from", k, source), y)], "k"
                ).splitlines(),
            ]

        return f"{_start(x, y)}{loops.nest(indices.shape[:-1], row)}\nreturn 0;"

    yield Kernel(
        "rows",
        body,
        cost_ns=20.0 + 0.2 * int(node.y.size) + 2.0 * int(node.input(2).size),
        reuses=(0,),
        fails=OUT_OF_RANGE,
    )


def _start(x: Value, y: Value) -> str:
    return "" if fits_in_place(x, y) else copied("y0", y.strides, "x0", x.strides, y.shape) + "\n"


@kernel("ScatterElements")
def scatter_elements(node: Node, target: Target) -> Iterator[Kernel]:
    """y = x, then y[i, indices[i, j, k], k] is changed by updates[i, j, k]. attrs: axis, how."""

    def body(node: Node) -> str:
        x, indices, updates, y = node.x, node.input(1), node.input(2), node.y
        axis, how = node.attrs["axis"], node.attrs["how"]

        def element(names: list[str]) -> list[str]:
            goal = loops.index([("p" if d == axis else n) for d, n in enumerate(names)], y.strides)
            return [
                *checked("p", f"x1[{loops.index(names, indices.strides)}]", x.shape[axis]),
                _changed(how, f"y0[{goal}]", f"x2[{loops.index(names, updates.strides)}]", y),
            ]

        return f"{_start(x, y)}{loops.nest(indices.shape, element)}\nreturn 0;"

    yield Kernel(
        "elements",
        body,
        cost_ns=20.0 + 0.2 * int(node.y.size) + 3.0 * int(node.input(2).size),
        reuses=(0,),
        fails=OUT_OF_RANGE,
    )


@kernel("ReverseSequence")
def reverse_sequence(node: Node, target: Target) -> Iterator[Kernel]:
    """Of each example the first so many steps backwards: x, lengths. attrs: time (the axis of steps, 0 or 1)."""

    def body(node: Node) -> str:
        x, lengths, y, time = node.x, node.input(1), node.y, node.attrs["time"]
        batch = 1 - time

        def row(names: list[str]) -> list[str]:
            b, t = names
            lines = [
                f"const int64_t many = x1[{loops.index([b], lengths.strides)}];",
                f"if (many < 0 || many > {c(x.shape[time])}) return 1;",
                f"const int64_t p = {t} < many ? many - 1 - {t} : {t};",
                f"const {x.c_type} *from = x0 + {loops.index([b, 'p'], [x.strides[batch], x.strides[time]])};",
                f"{y.c_type} *to = y0 + {loops.index([b, t], [y.strides[batch], y.strides[time]])};",
            ]
            return [*lines, *copied("to", y.strides[2:], "from", x.strides[2:], x.shape[2:], "k").splitlines()]

        return loops.nest([x.shape[batch], x.shape[time]], row) + "\nreturn 0;"

    yield Kernel("rows", body, cost_ns=20.0 + 0.3 * int(node.y.size), fails="a sequence is longer than its input")
