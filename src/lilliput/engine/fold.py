"""Constant folding: compute the nodes that depend on constants or shapes alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto

from lilliput.engine.facts import Facts, Known, Shape
from lilliput.engine.graph import Array, Narrow, Node
from lilliput.errors import NotSupported
from lilliput.onnx.evaluate import evaluate
from lilliput.onnx.file import MOST_ELEMENTS, elements

MOST_FOLDED = 2**24  # elements of a constant that folding may make larger than what it is made of
LEVELS = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}  # bits by numpy's name
GROWING = frozenset(
    {"ConstantOfShape", "Range", "Tile", "Expand", "Resize", "Pad", "OneHot", "Upsample", "CenterCropPad", "EyeLike",
     "HannWindow", "HammingWindow", "BlackmanWindow", "MelWeightMatrix", "Unique", "Compress", "NonZero"}
)  # fmt: skip
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)


def folded(facts: Facts, proto: NodeProto, node: Node) -> bool:
    """Compute a node whose inputs are known, or that only asks for a shape."""
    op = node.op
    inputs = facts.inputs(proto)
    if op == "Constant":
        facts.constant(proto.output[0], _constant_of(node))
        return True
    if op in ("Shape", "Size") and inputs:
        values = [_shape_of(inputs[0].at(w)[0], op, node) for w in range(len(inputs[0].shapes))]
        facts.known[proto.output[0]] = Known(np.int64, [values[0].shape], values)
        return True
    if op in RANDOM or any(x.data is None for x in inputs):
        return False
    if op == "DequantizeLinear":
        _dequantize(facts, proto, node)
        return True
    worlds = 1 if all(x.shared for x in inputs) else len(facts.worlds)
    results = []
    for w in range(worlds):
        feeds = {name: facts.known[name].at(w)[1] for name in proto.input if name}
        if not _small(node, feeds):
            return False
        try:
            results.append(evaluate(proto, facts.imports, feeds))  # type: ignore[arg-type]
        except Exception:  # a damaged node, or one that the reference lacks: it is judged as those that run
            return False
    for i, name in enumerate(proto.output):
        if name:
            per = [np.asarray(result[i]) for result in results]
            alike = all(p.shape == per[0].shape and np.array_equal(p, per[0]) for p in per[1:])
            per = per[:1] if alike else per
            facts.known[name] = Known(per[0].dtype, [p.shape for p in per], per)
    _keep_narrow(facts, proto, node)
    return True


def _shape_of(shape: Shape, op: str, node: Node) -> Array:
    if op == "Size":
        return np.array(int(np.prod(shape)), np.int64)
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(shape))
    return np.array(shape[slice(start, end)], np.int64)


def _small(node: Node, feeds: Mapping[str, Array | None]) -> bool:
    """Whether folding cannot make much more than there is: a damaged file must not fill the memory."""
    held = sum(0 if x is None else x.size for x in feeds.values())
    if node.op in GROWING:
        try:
            made = _grown(node, list(feeds.values()))
        except (TypeError, ValueError, IndexError, OverflowError, ZeroDivisionError):
            return False
        return made <= max(MOST_FOLDED, 4 * held)
    return held <= MOST_ELEMENTS


def _dequantize(facts: Facts, proto: NodeProto, node: Node) -> None:
    """Compute the numbers, and keep the integers and scales that kernels of narrow weights read."""
    parts = [facts.known[name].at(0)[1] if name else None for name in proto.input]
    levels, scale = parts[0], parts[1]
    zero = parts[2] if len(parts) > 2 else None
    if levels is None or scale is None:
        raise ValueError(f"compile: {node.name} (DequantizeLinear) must have levels and a scale. The file is damaged.")
    axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
    bits = LEVELS.get(levels.dtype.name, 32)
    whole = levels.astype(np.int32)

    def spread(x: Array) -> Array:
        if x.ndim == 0 or x.size == 1:
            return x.reshape((1,) * levels.ndim)
        if block:
            return np.repeat(x, block, axis).take(np.arange(levels.shape[axis]), axis)
        return x.reshape([-1 if i == axis % levels.ndim else 1 for i in range(levels.ndim)])

    try:
        scales = spread(scale.astype(np.float32))
        zeros = None if zero is None or not np.any(zero.astype(np.int32)) else spread(zero.astype(np.int32))
        data = ((whole - (0 if zeros is None else zeros)) * scales).astype(np.float32)
        if data.shape != levels.shape:
            raise ValueError(f"scales of shape {scale.shape} for {levels.shape}")
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise ValueError(
            f"compile: {node.name} (DequantizeLinear) must have a scale for its levels, got {error}."
        ) from error
    name = proto.output[0]
    facts.constant(name, data)
    if bits <= 8:
        facts.narrow[name] = Narrow(
            bits, whole.astype(np.int16 if levels.dtype.name == "uint8" else np.int8), scales, zeros
        )


def _keep_narrow(facts: Facts, proto: NodeProto, node: Node) -> None:
    """How a constant is stored, carried through what only moves, shifts or scales it."""
    source, name = proto.input[0] if proto.input else "", proto.output[0]
    data = facts.known[name].data if source and name else None
    if data is None:
        return
    was = facts.known[source].data
    if node.op == "Cast" and was is not None and was[0].dtype == np.float16 and data[0].dtype == np.float32:
        facts.narrow[name] = Narrow(16, was[0])
    if node.op == "Cast" and was is not None and was[0].dtype.name in LEVELS and data[0].dtype == np.float32:
        levels = was[0].astype(np.int16 if was[0].dtype.name == "uint8" else np.int8)
        facts.narrow[name] = Narrow(LEVELS[was[0].dtype.name], levels, np.ones((1,) * levels.ndim, np.float32))
    if node.op == "Mul" and source not in facts.narrow:
        source = proto.input[1]
    held = facts.narrow.get(source)
    if held is None:
        return
    if node.op == "Identity":
        facts.narrow[name] = held
    elif node.op in ("Mul", "Sub") and held.scale is not None and held.levels.shape == data[0].shape:
        other = facts.known[proto.input[1] if proto.input[0] == source else proto.input[0]].data
        assert other is not None
        number = other[0].reshape((1,) * (held.levels.ndim - other[0].ndim) + other[0].shape)
        if node.op == "Mul":
            facts.narrow[name] = Narrow(
                held.bits, held.levels, (held.scale * number).astype(np.float32), held.zero_point
            )
        elif held.zero_point is None and np.all(held.scale == 1) and np.array_equal(number, np.rint(number)):
            facts.narrow[name] = Narrow(held.bits, held.levels, held.scale, number.astype(np.int32))
    elif node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"):
        perm = node.attrs.get("perm")
        moved = held.moved(lambda x: np.transpose(x, perm) if node.op == "Transpose" else x.reshape(data[0].shape))
        if moved is not None:
            facts.narrow[name] = moved


def _constant_of(node: Node) -> Array:
    for key, held in node.attrs.items():
        if key == "value":
            return np.asarray(held)
        if key in ("value_float", "value_floats"):
            return np.asarray(held, np.float32)
        if key in ("value_int", "value_ints"):
            return np.asarray(held, np.int64)
    raise NotSupported(f"compile: {node.name} (Constant) must hold a tensor of numbers.")


def _grown(node: Node, feeds: list[Array | None]) -> int:
    """About how many elements a node makes."""
    first = feeds[0]
    assert first is not None
    rest = [np.asarray(x) for x in feeds[1:] if x is not None]
    if node.op == "ConstantOfShape":
        return elements([int(x) for x in first])
    if node.op == "Range":
        return int(np.ceil((float(rest[0]) - float(first)) / float(rest[1])))
    if node.op == "Tile":
        return int(first.size * np.prod([float(x) for x in rest[0]]))
    if node.op == "Expand":
        return int(max(first.size, 1) * np.prod([float(x) for x in rest[0]]))
    if node.op in ("Resize", "Upsample"):
        sizes = rest[-1]
        many = float(np.prod(sizes.astype(float))) if sizes.size else 1.0
        return int(many * (first.size if sizes.dtype.kind == "f" else 1))
    if node.op == "Pad":
        pads = np.asarray(node.attrs.get("pads", rest[0] if rest else []), float)
        half = len(pads) // 2
        return int(np.prod([s + pads[i] + pads[half + i] for i, s in enumerate(first.shape)])) if half else first.size
    if node.op == "OneHot":
        return int(first.size * float(rest[0].reshape(-1)[0]))
    return MOST_FOLDED + 1 if first.size > MOST_FOLDED else first.size
