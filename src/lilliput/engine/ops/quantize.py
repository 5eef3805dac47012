"""Lower QuantizeLinear and DequantizeLinear to elementwise expressions that join what comes before them.

Levels that are turned back at once are never stored: the number is rounded to the nearest that has a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lilliput.engine.expr import Expr, const
from lilliput.engine.graph import Node, Value
from lilliput.engine.lower import Build, lower
from lilliput.engine.ops.network import settings
from lilliput.errors import NotSupported

LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}


@lower("QuantizeLinear")
def quantize(node: Node, build: Build) -> None:
    """clamp(round(x / scale) + zero point), halves to even."""
    x, scale, zero = node.x, node.input(1), node.maybe(2)
    if node.y.dtype.name not in LIMITS:
        raise NotSupported(f"QuantizeLinear {node.name}: levels must be int8 or uint8, got {node.y.dtype.name}.")
    low, high = LIMITS[node.y.dtype.name]
    kind = node.y.dtype.name

    def made(x: Expr, s: Expr, z: Expr) -> Expr:
        return (_divided(x.cast("float32"), s).of("round") + z.cast("float32")).max(low).min(high).cast(kind)

    spread(node, build, x, scale, zero, made, node.y)
    build.rounds[node.y] = (x, scale, zero, low, high)


def _divided(x: Expr, s: Expr) -> Expr:
    """x / s; by a known s as a product with 1 / s, which rounds another way only where x is as near to two levels."""
    if s.op == "const" and float(s.value) != 0:
        return x * const(np.float32(1) / np.float32(s.value), "float32")
    return x / s


@lower("DequantizeLinear")
def dequantize(node: Node, build: Build) -> None:
    """(levels - zero point) scale."""
    x, scale, zero = node.x, node.input(1), node.maybe(2)
    if node.y.dtype != np.float32:
        raise NotSupported(f"DequantizeLinear {node.name}: its output must be float32, got {node.y.dtype.name}.")
    before = build.rounds.get(x)
    if before is not None and before[0].dtype == np.float32 and _alike(before[1], scale) and _alike(before[2], zero):
        source, _, _, low, high = before
        offset = 0 if zero is None or zero.data is None else int(zero.data.reshape(-1)[0])

        def rounded(x: Expr, s: Expr, z: Expr) -> Expr:
            return _divided(x, s).of("round").max(low - offset).min(high - offset) * s

        spread(node, build, source, scale, None, rounded, node.y)
        return

    def made(x: Expr, s: Expr, z: Expr) -> Expr:
        if z.op == "const" and int(z.value) == 0:
            return x.cast("float32") * s
        return (x.cast("int32") - z.cast("int32")).cast("float32") * s

    spread(node, build, x, scale, zero, made, node.y)


def _alike(a: Value | None, b: Value | None) -> bool:
    """Whether two scales or zero points are the same known number."""
    if a is None or b is None:
        held = a if a is not None else b
        return held is None or (held.data is not None and held.data.size == 1 and not held.data.any())
    if a.data is None or b.data is None:
        return False
    return a.data.size == 1 and b.data.size == 1 and bool(a.data.reshape(-1)[0] == b.data.reshape(-1)[0])


def spread(
    node: Node, build: Build, x: Value, scale: Value, zero: Value | None, make: Callable[..., Expr], out: Value
) -> None:
    """Compute make(x, scale, zero point) with one scale for all, for each place along an axis, or for each block."""
    axis, block = int(node.attrs.get("axis", 1)) % max(x.rank, 1), int(node.attrs.get("block_size", 0))
    if scale.size == 1 and (zero is None or zero.size == 1) and not block:
        known = [None if v is None or v.data is None else v.data.reshape(-1)[0] for v in (scale, zero)]
        shape: Sequence[int] = ()
    elif block:
        known, shape = [None, None], []
    else:
        known, shape = [None, None], [-1 if i == axis else 1 for i in range(x.rank)]
    if block:
        if any(size != wanted for size, wanted in zip(scale.shape, x.shape, strict=True)) and (
            x.shape[axis] % block or scale.shape[axis] * block != x.shape[axis]
        ):
            raise NotSupported(f"{node.op} {node.name}: an axis must be whole blocks of {block}, got {x.shape[axis]}.")
        wide = [*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :]]
        narrow = [*x.shape[:axis], x.shape[axis] // block, 1, *x.shape[axis + 1 :]]
        made = build.value(out.dtype, wide)
        _mapped(build, build.reshape(x, wide), [(_shaped(build, v, narrow), None) for v in (scale, zero)], make, made)
        build.reshape(made, out.shape, out)
        return
    parts = [
        (_shaped(build, value, [value.size if s == -1 else s for s in shape]) if value is not None else None, number)
        for value, number in zip((scale, zero), known, strict=True)
    ]
    _mapped(build, x, parts, make, out)


def _shaped(build: Build, value: Value | None, shape: Sequence[int]) -> Value | None:
    if value is None or tuple(value.shape) == tuple(shape):
        return value
    if value.data is not None:
        return build.const(value.data.reshape([int(s) for s in shape]))
    return build.reshape(value, shape)


def _mapped(
    build: Build, x: Value, parts: Sequence[tuple[Value | None, Any]], make: Callable[..., Expr], out: Value
) -> None:
    """A Map over x and those of (scale, zero point) that are not single known numbers."""
    inputs = [x, *(v for v, number in parts if v is not None and number is None)]

    def made(*args: Expr) -> Expr:
        rest = iter(args[1:])
        operands = []
        for (value, number), kind in zip(parts, ("float32", "int32"), strict=True):
            if value is None:
                operands.append(const(1 if kind == "float32" else 0, kind))
            elif number is not None:
                operands.append(const(number, value.dtype.name))
            else:
                operands.append(next(rest))
        return make(args[0], *operands)

    build.map(inputs, made, out)


@lower("ConvInteger")
def conv_integer(node: Node, build: Build) -> None:
    """The int32 convolution of levels less their zero points, which what is padded has as well."""
    zeros = [node.maybe(2), node.maybe(3)]
    if zeros[0] is not None and zeros[0].size != 1:
        raise NotSupported(f"ConvInteger {node.name}: x must have one zero point, got {zeros[0].size}.")
    build.add("ConvInteger", [node.x, node.input(1), *zeros], [node.y], **settings(node))
