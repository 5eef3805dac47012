"""Lower elementwise operators: one expression each, by ONNX's definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np

from lilliput.engine.expr import Expr, const, where
from lilliput.engine.graph import Node, Value
from lilliput.engine.infer import INFER
from lilliput.engine.lower import Build, lower
from lilliput.errors import NotSupported


def _of(name: str) -> Callable[[Node, Expr], Expr]:
    return lambda n, x: x.of(name)


def _both(name: str) -> Callable[[Expr, Expr], Expr]:
    return lambda a, b: a.of(name, b)


def _number(node: Node, name: str, default: float) -> float:
    return float(node.attrs.get(name, default))


def _elu(x: Expr, alpha: float, scale: float = 1.0) -> Expr:
    grown = x.of("exp") * (alpha * scale) - alpha * scale
    return where(x < 0, grown, x if scale == 1 else x * scale)


def _gelu(n: Node, x: Expr) -> Expr:
    if n.attrs.get("approximate", "none") == "tanh":
        inner = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return x * 0.5 * (inner.of("tanh") + 1)
    return x * 0.5 * ((x * math.sqrt(0.5)).of("erf") + 1)


def _mish(n: Node, x: Expr) -> Expr:
    """x tanh(ln(1 + e^x)) = x (e^2 + 2 e) / (e^2 + 2 e + 2) with e = e^x, which is x from 20 on."""
    e = x.min(20).of("exp")
    top = e * (e + 2)
    return x * (top / (top + 2))


def _celu(n: Node, x: Expr) -> Expr:
    alpha = _number(n, "alpha", 1.0)
    return x.max(0) + ((x * (1 / alpha)).of("exp") * alpha - alpha).min(0)


def _isinf(n: Node, x: Expr) -> Expr:
    plus, minus = n.attrs.get("detect_positive", 1), n.attrs.get("detect_negative", 1)
    infinite = x.of("isinf", dtype="bool")
    if plus and minus:
        return infinite
    return infinite.of("and", x > 0 if plus else x < 0) if plus or minus else infinite.of("xor", infinite)


def _shrink(n: Node, x: Expr) -> Expr:
    bias, lambd = _number(n, "bias", 0.0), _number(n, "lambd", 0.5)
    return where(x < -lambd, x + bias, where(x > lambd, x - bias, const(0, x.dtype)))


def _swish(n: Node, x: Expr) -> Expr:
    alpha = _number(n, "alpha", 1.0)
    return x * (x if alpha == 1 else x * alpha).of("sigmoid")


UNARY: dict[str, Callable[[Node, Expr], Expr]] = {
    "Relu": lambda n, x: x.max(0),
    "LeakyRelu": lambda n, x: where(x < 0, x * _number(n, "alpha", 0.01), x),
    "ThresholdedRelu": lambda n, x: where(x > _number(n, "alpha", 1.0), x, const(0, x.dtype)),
    "HardSigmoid": lambda n, x: (x * _number(n, "alpha", 0.2) + _number(n, "beta", 0.5)).max(0).min(1),
    "HardSwish": lambda n, x: x * (x * (1 / 6) + 0.5).max(0).min(1),
    "Elu": lambda n, x: _elu(x, _number(n, "alpha", 1.0)),
    "Selu": lambda n, x: _elu(
        x, _number(n, "alpha", 1.67326319217681884765625), _number(n, "gamma", 1.05070102214813232421875)
    ),
    "Celu": _celu,
    "Gelu": _gelu,
    "com.microsoft.Gelu": _gelu,
    "Mish": _mish,
    "Swish": _swish,
    "com.microsoft.QuickGelu": lambda n, x: x * (x * _number(n, "alpha", 1.702)).of("sigmoid"),
    "Softsign": lambda n, x: x / (x.of("abs") + 1),
    "Shrink": _shrink,
    "Neg": lambda n, x: -x,
    "Reciprocal": lambda n, x: 1 / x,
    "Not": lambda n, x: x.of("not"),
    "IsNaN": lambda n, x: x.of("isnan", dtype="bool"),
    "IsInf": _isinf,
    "BitwiseNot": _of("invert"),
    **{
        name: _of(name.lower())
        for name in (
            "Sigmoid",
            "Tanh",
            "Exp",
            "Log",
            "Sqrt",
            "Erf",
            "Abs",
            "Softplus",
            "Sign",
            "Floor",
            "Ceil",
            "Round",
            "Sin",
            "Cos",
            "Tan",
            "Asin",
            "Acos",
            "Atan",
            "Sinh",
            "Cosh",
            "Asinh",
            "Acosh",
            "Atanh",
        )
    },
}
BINARY: dict[str, Callable[[Expr, Expr], Expr]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Equal": lambda a, b: a.of("eq", b, dtype="bool"),
    "Less": lambda a, b: a < b,
    "LessOrEqual": lambda a, b: a <= b,
    "Greater": lambda a, b: a > b,
    "GreaterOrEqual": lambda a, b: a >= b,
    **{
        name: _both(name.removeprefix("Bitwise").lower())
        for name in ("And", "Or", "Xor", "BitwiseAnd", "BitwiseOr", "BitwiseXor")
    },
    "PRelu": lambda x, slope: where(x < 0, x * slope, x),
}
VARIADIC: dict[str, Callable[[Expr, Expr], Expr]] = {
    "Max": lambda a, b: a.max(b),
    "Min": lambda a, b: a.min(b),
    "Sum": lambda a, b: a + b,
    "Mean": lambda a, b: a + b,
}


for _op in ("Gelu", "QuickGelu"):
    INFER[f"com.microsoft.{_op}"] = lambda node, shapes: [("float32", shapes[0])]


def scalar(value: Value | None) -> Any:
    """The number of a constant that holds only one; None of any other value."""
    if value is None or value.data is None or value.data.size != 1:
        return None
    return np.asarray(value.data).reshape(-1)[0]


@lower(*UNARY)
def unary(node: Node, build: Build) -> None:
    """One input."""
    build.map([node.x], lambda x: UNARY[node.op](node, x), node.y)


@lower(*BINARY)
def binary(node: Node, build: Build) -> None:
    """Two inputs that broadcast; a number that is known stands in the expression."""
    _two(node, build, BINARY[node.op])


def _two(node: Node, build: Build, make: Callable[[Expr, Expr], Expr]) -> None:
    a, b = node.x, node.input(1)
    left, right = scalar(a), scalar(b)
    if a is b:
        build.map([a], lambda x: make(x, x), node.y)
    elif right is not None and a.shape == node.y.shape:
        build.map([a], lambda x: make(x, const(right, b.dtype)), node.y)
    elif left is not None and b.shape == node.y.shape:
        build.map([b], lambda x: make(const(left, a.dtype), x), node.y)
    else:
        build.map([a, b], make, node.y)


@lower("Div")
def div(node: Node, build: Build) -> None:
    """a / b; by a known number it is a multiplication."""

    def quotient(a: Expr, b: Expr) -> Expr:
        if b.op == "const" and b.dtype == "float32" and 1e-30 < abs(b.value) < 1e30:
            return a * (1 / float(b.value))
        return a / b

    _two(node, build, quotient)


@lower("Pow")
def power(node: Node, build: Build) -> None:
    """a^b, in the type of a."""

    def raised(a: Expr, b: Expr) -> Expr:
        return a.of("pow", b.cast(a.dtype) if a.dtype == "float32" and b.op != "const" else b)

    _two(node, build, raised)


@lower("Mod")
def mod(node: Node, build: Build) -> None:
    """The remainder, with the sign of b (fmod = 0) or of a."""
    _two(node, build, lambda a, b: a.of("fmod" if node.attrs.get("fmod", 0) else "mod", b))


@lower("BitShift")
def bit_shift(node: Node, build: Build) -> None:
    """Unsigned numbers times or over powers of two."""
    op = "shift_left" if node.attrs.get("direction") == "LEFT" else "shift_right"
    _two(node, build, lambda a, b: a.of(op, b))


@lower(*VARIADIC)
def variadic(node: Node, build: Build) -> None:
    """Any number of inputs that broadcast."""
    inputs = [value for value in node.inputs if value is not None]

    def all_of(*xs: Expr) -> Expr:
        result = reduce(VARIADIC[node.op], xs)
        return result * (1 / len(xs)) if node.op == "Mean" and len(xs) > 1 else result

    build.map(inputs, all_of, node.y)


@lower("Clip")
def clip(node: Node, build: Build) -> None:
    """min(max(x, low), high)."""
    bounds: list[tuple[str, Any]] = [("max", node.attrs.get("min")), ("min", node.attrs.get("max"))]
    inputs = [node.x]
    if node.opset >= 11:
        bounds = []
        for op, i in (("max", 1), ("min", 2)):
            value = node.maybe(i)
            if value is not None:
                bounds.append((op, scalar(value) if value.constant else len(inputs)))
                inputs += [] if value.constant else [value]

    def bounded(x: Expr, *given: Expr) -> Expr:
        for op, bound in bounds:
            if bound is not None:
                x = x.of(op, given[bound - 1] if isinstance(bound, int) and node.opset >= 11 else const(bound, x.dtype))
        return x

    build.map(inputs, bounded, node.y)


@lower("Where")
def choose(node: Node, build: Build) -> None:
    """b where the condition holds, else c."""
    yes, no = scalar(node.input(1)), scalar(node.input(2))
    dtype = node.y.dtype
    inputs = [node.x, *(v for v, known in ((node.input(1), yes), (node.input(2), no)) if known is None)]
    if any(known is not None for known in (yes, no)):
        from lilliput.engine.lower import broadcast

        if broadcast([v.shape for v in inputs]) != node.y.shape:
            yes = no = None
            inputs = [node.input(i) for i in range(3)]

    def chosen(condition: Expr, *given: Expr) -> Expr:
        rest = list(given)
        a, b = (rest.pop(0) if known is None else const(known, dtype) for known in (yes, no))
        return where(condition, a, b)

    build.map(inputs, chosen, node.y)


@lower("Cast", "CastLike")
def cast(node: Node, build: Build) -> None:
    """Another type, towards zero from floats to integers."""
    if node.x.dtype == node.y.dtype:
        build.reshape(node.x, node.y.shape, node.y)
        return
    if node.y.dtype.name not in ("float32", "int8", "uint8", "int32", "int64", "bool"):
        raise NotSupported(f"{node.op} {node.name}: to {node.y.dtype.name} is not computed.")
    build.map([node.x], lambda x: x.cast(node.y.dtype.name), node.y)
