"""Find the operators of an ONNX network that a runtime computes in 8-bit integers, and those that may lie between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lilliput.quant.products import Floats, inner

JOINS = {"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu"}
"""Operators that runtimes compute on levels, with levels of their own for what comes out."""
KEEPS = {"MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}
"""Operators whose values are among those of their input, so that its levels stay."""


@dataclass(frozen=True)
class Site:
    """An operator with stored weights: a convolution, or a product (Gemm, MatMul).

    Args:
        name: of the node, which must be unique.
        x: the activations that it reads.
        weight: the name of its weights.
        bias: the name of its bias, or "".
        y: what comes out, behind the activations that rounding it does.
        over: the nodes between it and `y` (Relu, Clip), whose work rounding to levels of their range does.
        axis: which one of the weights holds the outputs.
        conv: whether it is a convolution.
    """

    name: str
    x: str
    weight: str
    bias: str
    y: str
    over: tuple[str, ...]
    axis: int
    conv: bool


@dataclass(frozen=True)
class Graph:
    """What is known of a network's nodes.

    Args:
        nodes: by name, in the order of the graph.
        maker: the name of the node that makes a value.
        sites: the operators with stored weights.
        joins: for each node that may be computed on levels without weights: what comes out behind the activations that
            rounding does, and these.
    """

    nodes: Mapping[str, NodeProto]
    maker: Mapping[str, str]
    sites: tuple[Site, ...]
    joins: Mapping[str, tuple[str, tuple[str, ...]]]


def graph(proto: ModelProto) -> Graph:
    """Look at a network whose nodes have unique names and whose constants are folded (`rewrite.folded`)."""
    held = {t.name: t for t in proto.graph.initializer}
    nodes = {node.name: node for node in proto.graph.node}
    maker = {name: node.name for node in proto.graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    fixed = {value.name for value in proto.graph.output} | inner(proto.graph)

    def behind(value: str) -> tuple[str, tuple[str, ...]]:
        """The value behind the activations that rounding to its range does, and these."""
        over: list[str] = []
        while value not in fixed and len(readers.get(value, [])) == 1:
            (reader,) = readers[value]
            if not _clips(reader, held):
                break
            over.append(reader.name)
            (value,) = reader.output
        return value, tuple(over)

    sites = [site for node in proto.graph.node if (site := _site(node, held, fixed, behind)) is not None]
    joins = {
        node.name: behind(node.output[0]) if node.op_type in JOINS else (node.output[0], ())
        for node in proto.graph.node
        if node.domain == "" and node.op_type in JOINS | KEEPS and len(node.output) == 1
        if all(name not in held for name in data(node)) and not _odd(node)
    }
    return Graph(nodes, maker, tuple(sites), joins)


def data(node: NodeProto) -> list[str]:
    """The inputs of an operator that are activations."""
    return [name for name in (node.input if node.op_type in JOINS else node.input[:1]) if name]


def _site(node: NodeProto, held: Mapping[str, TensorProto], fixed: set[str], behind: Any) -> Site | None:
    """The site that a node is, or None."""
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.domain or node.op_type not in ("Conv", "Gemm", "MatMul") or len(node.input) < 2:
        return None
    x, weight, *rest = node.input
    bias = rest[0] if rest else ""
    stored = held.get(weight)
    if stored is None or stored.data_type != TensorProto.FLOAT or x in held or (bias and bias not in held):
        return None
    if {weight, bias} & fixed or (bias and len(held[bias].dims) != 1):
        return None
    if node.op_type == "Conv":
        if len(stored.dims) < 3:
            return None
        axis = 0
    else:
        if len(stored.dims) != 2 or settings.get("transA") or settings.get("alpha", 1.0) != 1.0:
            return None
        if bias and settings.get("beta", 1.0) != 1.0:
            return None
        axis = 0 if settings.get("transB") else 1
    if not np.isfinite(numpy_helper.to_array(stored)).all():
        return None
    y, over = behind(node.output[0])
    return Site(node.name, x, weight, bias, y, over, axis, node.op_type == "Conv")


def _clips(node: NodeProto, held: Mapping[str, TensorProto]) -> bool:
    """Whether a node only cuts its input to a range that holds zero."""
    if node.domain:
        return False
    if node.op_type == "Relu":
        return True
    if node.op_type != "Clip" or len(node.input) < 2:
        return False
    ends = [numpy_helper.to_array(held[name]) if name in held else None for name in node.input[1:] if name]
    if any(end is None or end.size != 1 for end in ends):
        return False
    low = float(ends[0]) if node.input[1] and ends[0] is not None else -np.inf
    high = float(ends[-1]) if len(node.input) > 2 and node.input[2] and ends[-1] is not None else np.inf
    return low <= 0 <= high


def _odd(node: NodeProto) -> bool:
    """Whether a runtime computes this use of the operator in float32 only."""
    settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return bool(settings.get("ceil_mode") or settings.get("storage_order"))


def rows(weight: Floats, axis: int, conv: bool) -> Floats:
    """Weights as (outputs, values of one), neighbours being those that a runtime multiplies one after the other.

    Convolutions are computed with the channels last.
    """
    if not conv:
        return np.array(weight if axis == 0 else weight.T, order="C")
    return np.array(np.moveaxis(weight, 1, -1), order="C").reshape(len(weight), -1)


def unrows(values: Any, shape: tuple[int, ...], axis: int, conv: bool) -> Any:
    """What `rows` was given, from (outputs, values of one)."""
    if not conv:
        return values if axis == 0 else np.ascontiguousarray(values.T)
    first, channels, *kernel = shape
    return np.ascontiguousarray(np.moveaxis(values.reshape(first, *kernel, channels), -1, 1))
