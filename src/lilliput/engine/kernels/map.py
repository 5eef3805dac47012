"""Elementwise expressions and copies: one nest of loops over all operands, in the order of the output's strides."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import expr, loops
from lilliput.engine.graph import Node, Value
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.size import fixed
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
    yield Kernel("loops", body, cost_ns=0.25 * int(node.y.size) * (work(exprs) + 1) / target.lanes + 20,
                 helpers=texts(*expr.needs(exprs)),
                 reuses=reuses if len(node.outputs) == 1 and node.op == "Map" else ())


def _in_place(x: Value, y: Value) -> bool:
    """Whether an input is the memory that the output is written to, element by element."""
    return (x.buffer is y.buffer and x.dtype == y.dtype and x.shape == y.shape and x.offset == y.offset
            and x.strides == y.strides)


def body(node: Node) -> str:
    """The nest of loops; what does not change in the innermost is read before it."""
    shape = node.y.shape
    outputs = [v for v in node.outputs if v is not None]
    # An input that is overwritten is read through the output's name, so that no other pointer meets it.
    inputs = [("y0" if len(outputs) == 1 and _in_place(v, node.y) else f"x{i}", v)
              for i, v in enumerate(node.inputs) if v is not None]
    operands = [loops.strides_of(v, shape) for v in (*outputs, *(v for _, v in inputs))]
    sizes, strides = loops.collapsed(shape, operands)
    steady = [bool(sizes) and fixed(s[-1]) and s[-1] == 0 for s in strides[len(outputs):]]

    def inner(names: list[str]) -> list[str]:
        places = [loops.index(names, s) for s in strides]
        read = [f"{key}_" if still else f"{key}[{place}]"
                for (key, _), place, still in zip(inputs, places[len(outputs):], steady, strict=True)]
        lines, results = expr.statements(node.attrs["exprs"], read)
        return [*lines, *(f"y{i}[{place}] = {result};" for i, (place, result) in
                          enumerate(zip(places[:len(outputs)], results, strict=True)))]

    def outer(names: list[str]) -> list[str]:
        places = [loops.index(names, s[:-1]) for s in strides[len(outputs):]]
        held = [f"const {value.c_type} {key}_ = {key}[{place}];"
                for (key, value), place, still in zip(inputs, places, steady, strict=True) if still]
        last = f"i{len(sizes) - 1}"
        return [*held, *loops.nest(sizes[-1:], lambda _: inner([*names, last]), "last").replace(
            "last0", last).splitlines()]

    return loops.nest(sizes[:-1], outer) if sizes else "\n".join(inner([]))
