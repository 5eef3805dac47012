"""Lower products of 8-bit integers, and of weights in few bits."""

from __future__ import annotations

import numpy as np

from lilliput.engine.expr import Expr, const, where
from lilliput.engine.graph import Narrow, Node, Value
from lilliput.engine.infer import INFER
from lilliput.engine.lower import Build, lower
from lilliput.errors import NotSupported


@lower("DynamicQuantizeLinear")
def dynamic_quantize(node: Node, build: Build) -> None:
    """uint8 levels of x, the step and the zero point: the range of x with zero in it becomes 0 to 255."""
    x = node.x
    low, high = (build.value(x.dtype, [1] * x.rank) for _ in range(2))
    for value, kind in ((low, "min"), (high, "max")):
        build.add("Reduce", [x], [value], axes=tuple(range(x.rank)), kind=kind, keep=True, pre=None, post=None)
    step = build.map([low, high], lambda a, b: _step(a, b))
    zero = build.map([low, step], lambda a, s: (-(a.min(0.0) / s)).max(0.0).min(255.0).of("round"))
    levels, steps, zeros = [*node.outputs, None, None][:3]
    if levels is not None:
        build.map([x, step, zero], lambda x, s, z: ((x / s).of("round") + z).max(0.0).min(255.0).cast("uint8"), levels)
    for made, out in ((step, steps), (build.map([zero], lambda z: z.cast("uint8")), zeros)):
        if out is not None:
            build.reshape(made, out.shape, out)


def _step(low: Expr, high: Expr) -> Expr:
    span = high.max(0.0) - low.min(0.0)
    return where(span.of("eq", const(0.0, "float32"), dtype="bool"), const(1.0, "float32"), span / 255.0)


@lower("MatMulInteger")
def matmul_integer(node: Node, build: Build) -> None:
    """The int32 product of levels less their zero points: inputs a, b and, or None, the zero points."""
    node.inputs = [*node.inputs, None, None][:4]
    _zero_points(node)
    build.keep(node)


def _zero_points(node: Node) -> None:
    a, b = node.maybe(2), node.maybe(3)
    if (a is not None and a.size != 1) or (b is not None and b.size not in (1, node.input(1).shape[-1])):
        raise NotSupported(
            f"{node.op} {node.name}: a zero point must be one for all of a, and one for all of b or for "
            "each column, got others."
        )


@lower("QLinearMatMul")
def qlinear_matmul(node: Node, build: Build) -> None:
    """Levels of the product: round(product of levels * sa sb / sy) + zy."""
    a, sa, za, b, sb, zb, sy, zy = (node.input(i) for i in range(8))
    out = node.y
    if sa.size != 1 or sy.size != 1 or zy.size != 1:
        raise NotSupported(f"{node.op} {node.name}: a and y must have one scale each.")
    product = build.value(np.int32, out.shape)
    made = build.add("MatMulInteger", [a, b, za, zb], [product])
    _zero_points(made)
    scales = [_flat(build, value) for value in (sa, sb, sy)]
    if all(value.data is not None for value in scales):
        held = scales[0].data * scales[1].data / scales[2].data  # type: ignore[operator]
        scale = build.const(held.astype(np.float32))
    else:
        scale = build.map(scales, lambda a, b, y: a * b / y)
    low, high = (0.0, 255.0) if out.dtype == np.uint8 else (-128.0, 127.0)
    build.map(
        [product, scale, _flat(build, zy)],
        lambda p, s, z: (
            ((p.cast("float32") * s).of("round") + z.cast("float32")).max(low).min(high).cast(out.dtype.name)
        ),
        out,
    )


def _flat(build: Build, value: Value) -> Value:
    """A scalar or a row of numbers, as one dimension."""
    if value.data is not None:
        return build.const(value.data.reshape(-1))
    return build.reshape(value, [value.size])


def _nbits_shape(node: Node, shapes: list[tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [("float32", (*shapes[0][:-1], int(node.attrs["N"])))]


INFER["com.microsoft.MatMulNBits"] = _nbits_shape


@lower("com.microsoft.MatMulNBits")
def matmul_nbits(node: Node, build: Build) -> None:
    """x W + bias, W in blocks of `block_size` inputs of 4 or 8 bits, each with a scale and a zero point."""
    ins, outs = int(node.attrs["K"]), int(node.attrs["N"])
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
    if bits not in (2, 4, 8) or node.maybe(4) is not None:
        raise NotSupported(f"{node.op} {node.name}: 2, 4 or 8 bits in the order of the inputs are computed.")
    packed, scale, zero = node.known(1), node.known(2), node.known(3)
    assert packed is not None and scale is not None
    blocks = -(-ins // block)
    per = 8 // bits

    def unpacked(data: np.ndarray, count: int) -> np.ndarray:
        rows = data.reshape(outs, -1).view(np.uint8)
        wide = np.stack([(rows >> (bits * i)) & ((1 << bits) - 1) for i in range(per)], -1)
        return wide.reshape(outs, -1)[:, :count]

    try:
        levels = unpacked(packed, blocks * block)[:, :ins].astype(np.int16)
        scales = np.repeat(scale.astype(np.float32).reshape(outs, blocks), block, 1)[:, :ins]
        if zero is None:
            zeros = np.full((outs, blocks), 1 << (bits - 1), np.int16)
        elif zero.dtype == np.uint8:
            zeros = unpacked(zero, blocks).astype(np.int16)
        else:
            zeros = zero.reshape(outs, blocks).astype(np.float32)
        wide = np.repeat(zeros, block, 1)[:, :ins]
        data = (levels.astype(np.float32) - wide) * scales
    except ValueError as error:
        raise ValueError(
            f"{node.op} {node.name}: its tensors must fit K, N, bits and block_size, got {error}."
        ) from error
    weight = build.const(np.ascontiguousarray(data.T.astype(np.float32)))
    weight.name = node.input(1).name
    if wide.dtype != np.float32:
        weight.narrow = Narrow(
            bits, np.ascontiguousarray(levels.T), np.ascontiguousarray(scales.T), np.ascontiguousarray(wide.T)
        )
    bias = node.maybe(5)
    product = node.y if bias is None else build.value(node.y.dtype, node.y.shape)
    build.add("MatMul", [node.x, weight], [product])
    if bias is not None:
        build.map([product, bias], lambda y, b: y + b, node.y)
