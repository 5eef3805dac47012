"""Rewrite an ONNX network: products in int8 arithmetic, lookup tables in 8 bits, folded constants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lilliput.errors import NotSupported
from lilliput.onnx.evaluate import evaluate
from lilliput.quant.int8 import Arithmetic, channel_levels, pair_levels, row_balance
from lilliput.quant.products import Array, Floats, Group, Observed, inner

PURE = {"Cast", "Concat", "Constant", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub",
        "Transpose", "Unsqueeze"}  # fmt: skip
SMALLEST = 1024  # values; below, a tensor's levels and nodes are not worth their bytes


class Writer:
    """Nodes and initialisers as they come."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}

    def constant(self, name: str, value: Array) -> str:
        """The initialiser `name`: the one that is there if it is equal (a weight that is read twice)."""
        tensor = numpy_helper.from_array(np.array(value, order="C"), name)
        while self.tensors.setdefault(tensor.name, tensor) != tensor:
            tensor.name += "'"
        return str(tensor.name)

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def model(self, proto: ModelProto) -> ModelProto:
        """`proto` with these nodes instead of its own, and the initialisers that they need."""
        small = ModelProto()
        small.CopyFrom(proto)
        arrays = {tensor.name: tensor for tensor in proto.graph.initializer} | self.tensors
        del small.graph.node[:], small.graph.initializer[:], small.graph.value_info[:]
        small.graph.node.extend(self.nodes)
        small.graph.initializer.extend(_used(small.graph, arrays))
        return small

    def extreme(self, op_type: str, x: str, output: str) -> str:
        """ReduceMax or ReduceMin over the last axis, which became an input in opset 18."""
        if self.opset < 18:
            return self.node(op_type, [x], output, axes=[-1], keepdims=1)
        return self.node(op_type, [x, self.constant("/last_axis", np.array([-1], np.int64))], output, keepdims=1)


def write(
    proto: ModelProto,
    groups: Sequence[Group],
    seen: Mapping[str, Observed],
    scales: Mapping[str, Floats],
    choice: Mapping[str, Arithmetic],
) -> ModelProto:
    """The graph rewritten: each group's input quantized once, before the first of its products."""
    graph, writer = proto.graph, Writer(opset(proto))
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    product = {node: (g, weight) for g in groups for node, weight in zip(g.nodes, g.weights, strict=True)}
    equalised = {
        g.norm: g for g in groups if choice[g.input] in ("tensor", "row") and g.norm and (scales[g.input] != 1).any()
    }
    levels: dict[str, _Levels] = {}
    plain: dict[str, str] = {}  # what was equalised, as it was
    for node in graph.node:
        group, weight = product.get(node.name, (None, None))
        if group is not None and weight is not None:
            how, e = choice[group.input], scales[group.input]
            if group.norm in equalised:
                weight = weight * e[:, None]
            else:
                e = np.ones_like(e)
            if how in ("tensor", "row"):
                if group.input not in levels:
                    levels[group.input] = _quantize(writer, group.input, how, seen[group.input].sample / e)
                _integer_product(writer, node, weight, levels[group.input])
            elif how == "narrow" and weight.size >= SMALLEST:
                _narrow_product(writer, node, weight)
            else:
                writer.nodes.append(node)
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [plain.get(name, name) for name in node.input]
        writer.nodes.append(copy)
        if node.name in equalised:
            (out,), e = node.output, scales[node.output[0]]
            for i, name in enumerate(node.input[1:], 1):
                copy.input[i] = name and writer.constant(name + "/equalised", numpy_helper.to_array(arrays[name]) / e)
            if any(out in other.input for other in graph.node if other.name not in equalised[node.name].nodes):
                plain[out] = writer.node("Mul", [out, writer.constant(out + "/equaliser", e)], out + "/plain")
    return writer.model(proto)


def _used(graph: Any, tensors: Mapping[str, TensorProto]) -> list[TensorProto]:
    names = {name for node in graph.node for name in node.input} | {v.name for v in graph.output} | inner(graph)
    return [tensor for name, tensor in tensors.items() if name in names]


@dataclass(frozen=True)
class _Levels:
    """Names of a quantized input's levels, step, zero point and rows' range ("" where there is one step)."""

    levels: str
    step: str
    zero: str
    span: str


def _quantize(writer: Writer, x: str, how: Arithmetic, sample: Floats) -> _Levels:
    """Nodes that quantize the activations x, of which `sample` holds rows."""
    span, source = "", x
    if how == "row":
        balance = writer.constant(x + "/balance", np.array(-row_balance(sample), np.float32))
        tiny = writer.constant("/tiny", np.array(1e-20, np.float32))  # a row of zeros stays one
        depth = writer.node("Mul", [writer.extreme("ReduceMin", x, x + "/low"), balance], x + "/depth")
        span = writer.node("Max", [writer.extreme("ReduceMax", x, x + "/high"), depth, tiny], x + "/span")
        source = writer.node("Div", [x, span], x + "/unit")
    names = _Levels(x + "/codes", x + "/step", x + "/zero", span)
    quantize = helper.make_node(
        "DynamicQuantizeLinear", [source], [names.levels, names.step, names.zero], name=names.levels
    )
    writer.nodes.append(quantize)
    return names


def _integer_product(writer: Writer, node: NodeProto, weight: Floats, x: _Levels) -> None:
    (_, name, *rest), (out,) = node.input, node.output
    bias = rest[0] if rest else ""
    levels, step = pair_levels(weight)
    stored = writer.constant(name + "/codes", levels)
    value = writer.node("MatMulInteger", [x.levels, stored, x.zero], out + "/sum")
    value = writer.node("Cast", [value], out + "/float", to=TensorProto.FLOAT)
    both = writer.node("Mul", [x.step, writer.constant(name + "/step", step)], out + "/scale")
    value = writer.node("Mul", [value, both], out + "/scaled" if x.span or bias else out)
    if x.span:
        value = writer.node("Mul", [value, x.span], out + "/spanned" if bias else out)
    if bias:
        writer.node("Add", [value, bias], out)


def _narrow_product(writer: Writer, node: NodeProto, weight: Floats) -> None:
    (_, name, *rest), (out,) = node.input, node.output
    levels, step = channel_levels(weight)
    wide = writer.node("Cast", [writer.constant(name + "/codes", levels)], out + "/wide", to=TensorProto.FLOAT)
    wide = writer.node("Mul", [wide, writer.constant(name + "/step", step)], out + "/widened")
    bias = rest[0] if rest else ""
    value = writer.node("MatMul", [node.input[0], wide], out + "/unbiased" if bias else out)
    if bias:
        writer.node("Add", [value, bias], out)


def with_narrow_tables(proto: ModelProto) -> ModelProto:
    """Looked-up rows come as levels and are widened then, so that the whole table never is."""
    arrays, writer = {tensor.name: tensor for tensor in proto.graph.initializer}, Writer(opset(proto))
    for node in proto.graph.node:
        tensor = arrays.get(node.input[0]) if node.op_type == "Gather" else None
        by_row = all(a.i == 0 for a in node.attribute if a.name == "axis")
        large = tensor is not None and len(tensor.dims) == 2 and math.prod(tensor.dims) >= SMALLEST
        if tensor is None or not large or not by_row or tensor.data_type != TensorProto.FLOAT:
            writer.nodes.append(node)
            continue
        (name, index), (out,), table = node.input, node.output, numpy_helper.to_array(tensor)
        step = channel_levels(table, axis=1)[1].astype(np.float16)[:, None]
        step[step == 0] = 1
        levels = np.clip(np.rint(table / step.astype(np.float32)), -127, 127).astype(np.int8)
        rows = writer.node("Gather", [writer.constant(name + "/rows", levels), index], out + "/rows")
        rows = writer.node("Cast", [rows], out + "/wide", to=TensorProto.FLOAT)
        steps = writer.node("Gather", [writer.constant(name + "/row_step", step), index], out + "/half")
        steps = writer.node("Cast", [steps], out + "/row_step", to=TensorProto.FLOAT)
        writer.node("Mul", [rows, steps], out)
    return writer.model(proto)


def opset(proto: ModelProto) -> int:
    """The version of the standard operators."""
    return next(int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx"))


def folded(proto: ModelProto, who: str = "dynamic", least: int = 13) -> ModelProto:
    """A copy whose nodes have unique names, with what depends on constants alone computed (unless it would grow)."""
    if opset(proto) < least:
        raise NotSupported(f"{who}: the opset must be at least {least}, got {opset(proto)}. Export the network again.")
    copy = ModelProto()
    copy.CopyFrom(proto)
    arrays = {t.name: t for t in copy.graph.initializer}
    nodes = []
    for i, node in enumerate(copy.graph.node):
        inputs = [name for name in node.input if name]
        if node.domain == "" and len(node.output) == 1 and all(name in arrays for name in inputs) and _pure(node):
            known = {name: numpy_helper.to_array(arrays[name]) for name in inputs}
            value = np.asarray(evaluate(node, proto.opset_import, known)[0])
            if value.nbytes <= max(4096, sum(a.nbytes for a in known.values()) * 4):
                arrays[node.output[0]] = numpy_helper.from_array(value, node.output[0])
                continue
        node.name = f"{i}_{node.op_type}"
        nodes.append(node)
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(_used(copy.graph, arrays))
    return copy


def _pure(node: NodeProto) -> bool:
    """Whether the node is one of those that exporters leave between stored tensors and their readers."""
    return node.op_type in PURE
