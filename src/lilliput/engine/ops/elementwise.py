"""Elementwise operators: one expression each, which is all that ONNX's definition says of an element."""

from __future__ import annotations

from collections.abc import Callable

from lilliput.engine.expr import Expr, const
from lilliput.engine.graph import Node
from lilliput.engine.lower import Build, lower

UNARY: dict[str, Callable[[Node, Expr], Expr]] = {
    "Relu": lambda n, x: x.max(0),
    "Neg": lambda n, x: -x,
    "Sigmoid": lambda n, x: x.of("sigmoid"),
    "Tanh": lambda n, x: x.of("tanh"),
    "Exp": lambda n, x: x.of("exp"),
    "Sqrt": lambda n, x: x.of("sqrt"),
    "Erf": lambda n, x: x.of("erf"),
    "Abs": lambda n, x: x.of("abs"),
}
BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
}


@lower(*UNARY)
def unary(node: Node, build: Build) -> None:
    """One input."""
    build.map([node.x], lambda x: UNARY[node.op](node, x), node.y)


@lower(*BINARY)
def binary(node: Node, build: Build) -> None:
    """Two inputs that broadcast."""
    build.map([node.x, node.input(1)], BINARY[node.op], node.y)


@lower("Clip")
def clip(node: Node, build: Build) -> None:
    """min(max(x, low), high)."""
    low = node.attrs.get("min") if node.opset < 11 else node.known(1)
    high = node.attrs.get("max") if node.opset < 11 else node.known(2)

    def bounded(x: Expr) -> Expr:
        x = x if low is None else x.max(const(low, x.dtype))
        return x if high is None else x.min(const(high, x.dtype))

    build.map([node.x], bounded, node.y)
