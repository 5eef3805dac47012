"""Elementwise expressions and copies: one nest of loops over all operands, in the order of the output's strides."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import expr, loops
from lilliput.engine.graph import Node
from lilliput.engine.helpers import HELPERS
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.target import Target


@kernel("Map", "Copy")
def strided(node: Node, target: Target) -> Iterator[Kernel]:
    """Any strides, any types; the innermost loop is the compiler's to vectorise."""
    if node.attrs.get("tags"):
        return
    exprs = node.attrs["exprs"]
    reuses = tuple(i for i, v in enumerate(node.inputs) if v is not None and v.shape == node.y.shape)
    work = 0.1 * int(node.y.size) * max(1, sum(e.count() for e in exprs))
    yield Kernel("loops", body, cost_ns=work + 20, helpers=tuple(HELPERS[n] for n in expr.needs(exprs)),
                 reuses=reuses if len(node.outputs) == 1 and node.op == "Map" else ())


def body(node: Node) -> str:
    """The nest of loops."""
    shape = node.y.shape
    inputs = [v for v in node.inputs if v is not None]
    outputs = [v for v in node.outputs if v is not None]
    operands = [loops.strides_of(v, shape) for v in (*outputs, *inputs)]
    sizes, strides = loops.collapsed(shape, operands)

    def inner(names: list[str]) -> list[str]:
        places = [loops.index(names, s) for s in strides]
        read = [f"x{i}[{place}]" for i, place in enumerate(places[len(outputs):])]
        lines, results = expr.statements(node.attrs["exprs"], read)
        return [*lines, *(f"y{i}[{place}] = {result};" for i, (place, result) in
                          enumerate(zip(places[:len(outputs)], results, strict=True)))]

    return loops.nest(sizes, inner)
