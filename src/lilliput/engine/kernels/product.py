"""Helpers that all matrix products share: the summed dimension, the loops over positions, what follows the sum.

A product with constant weights is y[t, o] = tail(sum_k x[t, k] W[o, k] + bias[o]): t runs over the positions (tokens,
pixels, rows of a batch), o over the outputs. Positions may be several dimensions; those whose strides allow it are
walked as one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.expr import Expr, arg, clamp_of, literal, needs, statements
from lilliput.engine.graph import Array, Narrow, Node, Value
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Want
from lilliput.engine.size import Size, c, fixed, product


@dataclass(frozen=True)
class Linear:
    """A product with constant weights.

    Args:
        weight: (out, in).
        narrow: How the file stores it, turned the same way.
        x: Which input holds the activations.
        feature_x: The dimension of x that is summed over, and that of y which counts the outputs.
        feature_y: As `feature_x`.
    """

    node: Node
    weight: Array = field(repr=False)
    narrow: Narrow | None
    x: int
    feature_x: int
    feature_y: int

    @property
    def outs(self) -> int:
        """Outputs at one position."""
        return int(self.weight.shape[0])

    @property
    def ins(self) -> int:
        """Values that are summed over."""
        return int(self.weight.shape[1])

    @property
    def positions(self) -> int:
        """How many positions there are; a Size where free."""
        return product([size for i, size in enumerate(self.node.y.shape) if i != self.feature_y])

    def inner(self, positions_inside: bool) -> tuple[Want, Want]:
        """Layouts of x and y with the positions innermost (and in order), or the features."""
        wants = []
        for value, feature in ((self.node.input(self.x), self.feature_x), (self.node.y, self.feature_y)):
            rest = [i for i in range(value.rank) if i != feature]
            wants.append(Want(order=tuple([feature, *rest] if positions_inside else [*rest, feature])))
        return wants[0], wants[1]


def linear(node: Node) -> Linear | None:
    """A float32 product with weights that are known now, or None."""
    a, b = node.input(0), node.input(1)
    if b.data is not None and b.rank == 2 and a.data is None:
        weight, narrow, x = b.data.T, b.narrow.moved(np.transpose) if b.narrow else None, 0
        feature_x, feature_y = a.rank - 1, node.y.rank - 1
    elif a.data is not None and a.rank == 2 and b.data is None and b.rank >= 2:
        weight, narrow, x, feature_x, feature_y = a.data, a.narrow, 1, b.rank - 2, node.y.rank - 2
    else:
        return None
    if node.y.size == 0 or 0 in weight.shape:
        return None
    return Linear(node, np.ascontiguousarray(weight), narrow, x, feature_x, feature_y)


# -------------------------------------------------------------------------------------------------------------- tail


@dataclass(frozen=True)
class Tail:
    """What follows the sum: bias (out,) is added first, then comes a clamp, or an expression, or nothing.

    Args:
        expr: Over the sum (argument 0) and further inputs of the node (argument i is input extras[i - 1]).
    """

    bias: Array | None
    clamp: tuple[float, float] | None = None
    expr: Expr | None = None
    extras: tuple[int, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether nothing is done but adding the bias."""
        return self.clamp is None and self.expr is None

    def others(self, node: Node) -> list[tuple[str, Value, int | None]]:
        """The further inputs, as `walk` takes them."""
        return [(f"x{i}", node.input(i), None) for i in self.extras]

    def text(self, sum_: str, places: Sequence[str]) -> list[str]:
        """C lines that put what becomes of one sum (a C expression that can be written to) in its place."""
        if self.clamp is not None:
            expr = arg(0, "float32")
            if not math.isinf(self.clamp[0]):
                expr = expr.max(self.clamp[0])
            if not math.isinf(self.clamp[1]):
                expr = expr.min(self.clamp[1])
        elif self.expr is not None:
            expr = self.expr
        else:
            return []
        lines, (result,) = statements([expr], [sum_, *places])
        return [*lines, f"{sum_} = {result};"]

    def outputs(self, sums: str, outs: int, feature: dict[str, int], place: Callable[[str], str]) -> list[str]:
        """C lines that finish all outputs of one position from an array of sums: `sums` is "y" where they lie in it."""
        lines = [f"{sums}[o] += bias[o];"] if self.bias is not None else []
        lines += self.text(f"{sums}[o]", [f"({place(f'x{i}')})[{times('o', feature[f'x{i}'])}]" for i in self.extras])
        if sums != "y":
            lines.append(f"y[{times('o', feature['y0'])}] = {sums}[o];")
        return [f"for (int o = 0; o < {outs}; o++) {{", *inside(lines), "}"] if lines else []

    @property
    def helpers(self) -> tuple[str, ...]:
        """C text that the lines need."""
        return () if self.expr is None else texts(*needs([self.expr]))


def tail_of(node: Node, feature_y: int) -> Tail:
    """What the node does after its sum: act(sum + bias + residual), inputs 2 and 3 and the attribute "act"."""
    bias, residual, act = node.maybe(2), node.maybe(3), node.attrs.get("act")
    held, expr, extras = None, arg(0, "float32"), []
    if bias is not None:
        if bias.data is not None and feature_y == node.y.rank - 1:
            held = np.ascontiguousarray(np.broadcast_to(bias.data.reshape(-1), (int(node.y.shape[-1]),)), np.float32)
        else:
            extras.append(2)
            expr = expr + arg(len(extras), "float32")
    if residual is not None:
        extras.append(3)
        expr = expr + arg(len(extras), "float32")
    if act is not None:
        expr = act.substitute([expr])
    if expr.op == "arg":
        return Tail(held)
    clamp = None if extras else clamp_of(expr)
    return Tail(held, clamp) if clamp else Tail(held, None, expr, tuple(extras))


# ------------------------------------------------------------------------------------------------------------- walks


@dataclass
class Walk:
    """How positions are walked once layouts are set: loops around, one inner run of `count` positions.

    Args:
        open: C lines of the loops around.
        close: As `open`.
        count: Of the inner run.
        step: Strides of each named value along the run and along its features.
        feature: As `step`.
        base: C expression of each value's pointer inside the loops.
    """

    open: list[str]
    close: list[str]
    count: int
    step: dict[str, int]
    feature: dict[str, int]
    base: dict[str, str]


def walk(y: Value, feature_y: int, others: Sequence[tuple[str, Value, int | None]], name: str = "y0") -> Walk:
    """Walk the positions of y, and with them those of others: (C name, value, feature dimension).

    Where the feature dimension is given, the value's other dimensions are y's positions in order (an x); where it is
    None it is broadcast to y's shape.
    """
    dims = [i for i in range(y.rank) if i != feature_y]
    strides: dict[str, list[int]] = {name: [y.strides[i] for i in dims]}
    feature: dict[str, int] = {name: y.strides[feature_y] if y.rank else 0}
    for other, value, at in others:
        if at is None:
            wide = broadcast_strides(value, y)
            strides[other], feature[other] = [wide[i] for i in dims], wide[feature_y] if y.rank else 0
        else:
            rest = [
                value.strides[i] if value.shape[i] != 1 or fixed(value.shape[i]) is False else 0
                for i in range(value.rank)
                if i != at
            ]
            strides[other] = [0] * (len(dims) - len(rest)) + rest
            feature[other] = value.strides[at]
    runs: list[tuple[int, dict[str, int]]] = []
    for place, dim in enumerate(dims):
        size, here = y.shape[dim], {key: s[place] for key, s in strides.items()}
        if size == 1 and fixed(size):
            continue
        if runs and all(runs[-1][1][key] == here[key] * size for key in here):
            runs[-1] = (runs[-1][0] * size, here)
        else:
            runs.append((size, here))
    around, (count, step) = (runs[:-1], runs[-1]) if runs else ([], (1, dict.fromkeys(strides, 0)))
    opened, closed, base = [], [], {key: key for key in strides}
    for number, (size, here) in enumerate(around):
        kind = "int" if fixed(size) else "int64_t"
        opened.append(f"for ({kind} b{number} = 0; b{number} < {c(size)}; b{number}++) {{")
        closed.append("}")
        for key, stride in here.items():
            if stride != 0:
                base[key] += f" + b{number} * {c(stride)}"
    return Walk(opened, closed, count, step, feature, base)


def broadcast_strides(value: Value, y: Value) -> list[int]:
    """The strides of a value broadcast to y's shape."""
    missing = y.rank - value.rank
    return [0] * missing + [
        0 if fixed(size) and size == 1 else stride for size, stride in zip(value.shape, value.strides, strict=True)
    ]


def at(base: str, *terms: tuple[str, int]) -> str:
    """The C expression of a pointer plus index * stride for each term; strides of 0 and indices of "0" vanish."""
    parts = []
    for index, stride in terms:
        if stride == 0 or index == "0":
            continue
        wide = f"({index})" if " " in index and not (index.startswith("(") and index.endswith(")")) else index
        parts.append(index if stride == 1 and fixed(stride) else f"{wide} * {c(stride)}")
    return " + ".join([base, *parts])


# -------------------------------------------------------------------------------------------------------------- text


def inside(lines: Sequence[str], by: str = "    ") -> list[str]:
    """Lines moved to the right."""
    return [by + line if line else line for line in lines]


def at_value(kind: str, name: str, value: int, lines: Sequence[str]) -> list[str]:
    """The lines in a block where a counter has a fixed value, if they read it."""
    read = any(re.search(rf"\b{name}\b", line) for line in lines)
    return ["{", *([f"    const {kind} {name} = {value};"] if read else []), *inside(lines), "}"]


def times(index: str, stride: int) -> str:
    """The C expression index * stride."""
    return "0" if stride == 0 else index if stride == 1 and fixed(stride) else f"{index} * {c(stride)}"


def vector(lanes: int, kind: str = "f32") -> str:
    """The C name of a vector of `lanes` float32 (or i32) values; a scalar's where there is one."""
    if lanes == 1:
        return {"f32": "float", "i32": "int32_t", "u8": "uint8_t", "i8": "int8_t"}[kind]
    return f"{kind}x{lanes}"


def vector_types(lanes: int) -> str:
    """C text that declares them, for the head of the file."""
    size = 4 * lanes
    return (
        f"typedef float f32x{lanes} __attribute__((vector_size({size}), aligned(4), may_alias));\n"
        f"typedef int32_t i32x{lanes} __attribute__((vector_size({size}), aligned(4), may_alias));"
    )


def clamped(name: str, lanes: int, clamp: tuple[float, float]) -> list[str]:
    """C lines that clamp a vector variable in place."""
    lines = []
    for bound, sign in ((clamp[0], ">"), (clamp[1], "<")):
        if math.isinf(bound):
            continue
        text = literal(bound, "float32")
        if lanes == 1:
            lines.append(f"{name} = {name} {sign} {text} ? {name} : {text};")
        else:
            f, i = vector(lanes), vector(lanes, "i32")
            if bound == 0 and sign == ">":
                lines.append(f"{name} = ({f})(({i}){name} & ({name} > 0));")
            else:
                lines.append(f"{name} = pick_{f}({name} {sign} {text}, {name}, {text} - ({f}){{}});")
    return lines


def pick(lanes: int) -> str:
    """C text of pick_f32xN(mask, yes, no), for the head of the file."""
    f, i = vector(lanes), vector(lanes, "i32")
    return (
        f"static inline {f} pick_{f}({i} mask, {f} yes, {f} no) {{\n"
        f"    return ({f})(((({i})yes) & mask) | ((({i})no) & ~mask));\n}}"
    )


def split(total: int, lanes: int, most: int) -> list[tuple[int, int]]:
    """Blocks that cover a fixed number of columns: (start, columns), all of `most` vectors but the last ones."""
    wide, blocks, start = lanes * most, [], 0
    while total - start >= wide:
        blocks.append((start, wide))
        start += wide
    if start < total:
        blocks.append((start, total - start))
    return blocks


def size_type(size: int) -> str:
    """The C type that counts up to a size."""
    return "int64_t" if isinstance(size, Size) else "int"
