"""Elementwise expressions and copies: one loop nest over all operands, in the order of the output's strides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lilliput.engine import expr, loops
from lilliput.engine.graph import Node, Value
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.transpose_tiles import TILE, turned
from lilliput.engine.kernels.transpose_tiles import helpers as turning
from lilliput.engine.kernels.walk import pieces
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

# What an operator costs beside an addition.
DEAR = {"exp": 14, "sigmoid": 20, "tanh": 16, "erf": 18, "log": 20, "softplus": 40, "div": 4, "sqrt": 4, "pow": 60}


def work(exprs: tuple[expr.Expr, ...]) -> float:
    """Vector instructions for an element, roughly."""
    return 1.0 + sum(DEAR.get(e.op, 1) for root in exprs for e in root.walk() if e.op not in ("arg", "const"))


@kernel("Map", "Copy")
def strided(node: Node, target: Target) -> Iterator[Kernel]:
    """Any strides, any types; the innermost loop is the compiler's to vectorise."""
    if node.attrs.get("tags"):
        return
    exprs = node.attrs["exprs"]
    reuses = tuple(i for i, v in enumerate(node.inputs) if v is not None and v.shape == node.y.shape)
    cost = 0.25 * int(node.y.size) * (work(exprs) + 1) / target.lanes + 20
    yield Kernel(
        "loops",
        lambda n: body(n, target),
        cost_ns=cost,
        helpers=lambda n: texts(*expr.needs(exprs)) + (turning(target) if _Operands(n).turned else ()),
        reuses=reuses if len(node.outputs) == 1 and node.op == "Map" else (),
    )


def _in_place(x: Value, y: Value) -> bool:
    """Whether an input is the memory that the output is written to, element by element."""
    return (
        x.buffer is y.buffer
        and x.dtype == y.dtype
        and x.shape == y.shape
        and x.offset == y.offset
        and x.strides == y.strides
    )


class _Operands:
    """The fewest loops over a laid out node's elements, and how each operand is walked in them."""

    def __init__(self, node: Node) -> None:
        self.outputs = [v for v in node.outputs if v is not None]
        # An input that is overwritten is read through the output's name, so that no other pointer meets it.
        self.inputs = [
            ("y0" if len(self.outputs) == 1 and _in_place(v, node.y) else f"x{i}", v)
            for i, v in enumerate(node.inputs)
            if v is not None
        ]
        values = [*self.outputs, *(v for _, v in self.inputs)]
        self.sizes, self.strides = loops.collapsed(node.y.shape, [loops.strides_of(v, node.y.shape) for v in values])
        moved = turned(self.sizes, self.strides, len(self.outputs))
        self.turned = (
            moved
            if moved
            and all(values[i].dtype == "float32" for i in moved[1])
            and not any(v.buffer is y.buffer for v in (values[i] for i in moved[1]) for y in self.outputs)
            else None
        )

    def assigned(self, exprs: Sequence[expr.Expr], names: list[str], read: Mapping[int, str]) -> list[str]:
        """The statements of one element; read: what stands for some inputs."""
        places = [loops.index(names, s) for s in self.strides]
        count = len(self.outputs)
        given = [read.get(count + i, f"{key}[{places[count + i]}]") for i, (key, _) in enumerate(self.inputs)]
        lines, results = expr.statements(exprs, given)
        return [*lines, *(f"y{i}[{places[i]}] = {result};" for i, result in enumerate(results))]


def body(node: Node, target: Target) -> str:
    """The nest of loops; what does not change in the innermost is read before it."""
    at = _Operands(node)
    if at.turned:
        return _tiles(node, at)
    exprs, count = node.attrs["exprs"], len(at.outputs)
    if not at.sizes:
        return "\n".join(at.assigned(exprs, [], {}))
    steady = [
        count + i for i in range(len(at.inputs)) if fixed(at.strides[count + i][-1]) and at.strides[count + i][-1] == 0
    ]

    def outer(names: list[str]) -> list[str]:
        held = []
        for i in steady:
            key, value = at.inputs[i - count]
            held.append(f"const {value.c_type} {key}_ = {key}[{loops.index(names, at.strides[i][:-1])}];")
        read = {i: f"{at.inputs[i - count][0]}_" for i in steady}
        last = f"i{len(names)}"
        kind = "int" if fixed(at.sizes[-1]) and at.sizes[-1] < 2**31 else "int64_t"
        return [
            *held,
            f"for ({kind} {last} = 0; {last} < {c(at.sizes[-1])}; {last}++) {{",
            *(f"    {line}" for line in at.assigned(exprs, [*names, last], read)),
            "}",
        ]

    return loops.nest(at.sizes[:-1], outer)


def _tiles(node: Node, at: _Operands) -> str:
    """Tiles of two loops: the inputs that lie across the innermost are turned first, or straight into the output."""
    assert at.turned is not None
    loop, across = at.turned
    exprs, count = node.attrs["exprs"], len(at.outputs)
    copies = len(exprs) == 1 and exprs[0].op == "arg" and exprs[0].value == across[0] - count and len(across) == 1
    rest = [d for d in range(len(at.sizes) - 1) if d != loop]

    def outer(names: list[str]) -> list[str]:
        lines = []
        for head, a, columns in pieces(at.sizes[loop], TILE, "a"):
            lines.append(head)
            for inner, b, rows in pieces(at.sizes[-1], TILE, "b"):
                lines += [f"    {inner}", *(f"        {line}" for line in tile(names, a, columns, b, rows)), "    }"]
            lines.append("}")
        return lines

    def tile(names: list[str], a: str, columns: str, b: str, rows: str) -> list[str]:
        def counters(first: str, second: str) -> list[str]:
            places = dict(zip(rest, names, strict=True)) | {loop: first, len(at.sizes) - 1: second}
            return [places[d] for d in range(len(at.sizes))]

        start = counters(a, b)
        lines, read = [], {}
        for i in across:
            key = at.inputs[i - count][0]
            source = f"&{key}[{loops.index(start, at.strides[i])}], {c(at.strides[i][-1])}, {rows}, {columns}"
            if copies:
                to = f"&y0[{loops.index(start, at.strides[0])}], {c(at.strides[0][loop])}"
                return [f"turn({to}, {source});"]
            lines += [f"float {key}_tile[{TILE * TILE}];", f"turn({key}_tile, {TILE}, {source});"]
            read[i] = f"{key}_tile[{TILE}*p + q]"
        here = counters(*(f"({s} + {k})" if s != "0" else k for s, k in ((a, "p"), (b, "q"))))
        return [
            *lines,
            f"for (int p = 0; p < {columns}; p++) {{",
            f"    for (int q = 0; q < {rows}; q++) {{",
            *(f"        {line}" for line in at.assigned(exprs, here, read)),
            "    }",
            "}",
        ]

    return loops.nest([at.sizes[d] for d in rest], outer)
