"""Rewrite operators on 8-bit integers as dequantize, operator, quantize.

ONNX's QLinearConv and ONNX Runtime's own QLinear operators become DequantizeLinear, the operator of floats and
QuantizeLinear, the form that quantized files have otherwise, so that one way of compiling serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from onnx import AttributeProto, ModelProto, NodeProto, helper

MICROSOFT = "com.microsoft"
Names = list[str]


class _Written:
    """The nodes that one node becomes."""

    def __init__(self, node: NodeProto, number: int, opset: int, ranks: dict[str, int]) -> None:
        self.opset, self.ranks = opset, ranks
        self.node, self.number, self.count = node, number, 0
        self.nodes: list[NodeProto] = []

    def at(self, i: int) -> str:
        """Input i; "" where it is absent."""
        return str(self.node.input[i]) if i < len(self.node.input) else ""

    def add(self, op: str, inputs: Names, output: str = "", **attrs: Any) -> str:
        """A node of ONNX; the name of its output."""
        self.count += 1
        base = self.node.name or self.node.output[0]
        output = output or f"{base}.{self.number}.{self.count}"
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        self.nodes.append(helper.make_node(op, inputs, [output], name=base if self.count == 1 else output, **attrs))
        return output

    def numbers(self, levels: str, scale: str, zero: str, axis: int = 1) -> str:
        """DequantizeLinear."""
        if axis == 1 or self.ranks.get(levels) == 1 or self.ranks.get(scale) == 0:
            return self.add("DequantizeLinear", [levels, scale, zero])
        if self.opset >= 13:
            return self.add("DequantizeLinear", [levels, scale, zero], axis=axis)
        # Before opset 13 the scales can only lie along the second dimension.
        turn = [1, 0, *range(2, self.ranks.get(levels, 2))]
        turned = self.add("DequantizeLinear", [self.add("Transpose", [levels], perm=turn), scale, zero])
        return self.add("Transpose", [turned], perm=turn)

    def part(self, i: int) -> str:
        """The numbers of inputs i (levels), i + 1 (scale) and i + 2 (zero point)."""
        return self.numbers(self.at(i), self.at(i + 1), self.at(i + 2))

    def levels(self, x: str, scale: str, zero: str) -> None:
        """QuantizeLinear, to the output of the node."""
        self.add("QuantizeLinear", [x, scale, zero], self.node.output[0])

    def attrs(self, *left_out: str) -> dict[str, Any]:
        """The attributes of the node."""
        return {
            a.name: helper.get_attribute_value(a)
            for a in self.node.attribute
            if a.name not in left_out and a.type != AttributeProto.GRAPH
        }

    def flag(self, name: str, default: int = 0) -> int:
        """An attribute that is an integer."""
        return next((int(a.i) for a in self.node.attribute if a.name == name), default)


def _convolution(w: _Written) -> None:
    x, weight = w.part(0), w.numbers(w.at(3), w.at(4), w.at(5), axis=0)
    bias = ""
    if w.at(8):
        bias = w.numbers(w.at(8), w.add("Mul", [w.at(1), w.at(4)]), "", axis=0)
    channels_last = w.flag("channels_last")
    if channels_last:
        x = w.add("Transpose", [x], perm=[0, 3, 1, 2])
    y = w.add("Conv", [x, weight, bias], **w.attrs("channels_last"))
    w.levels(w.add("Transpose", [y], perm=[0, 2, 3, 1]) if channels_last else y, w.at(6), w.at(7))


def _two(op: str) -> Callable[[_Written], None]:
    def write(w: _Written) -> None:
        a, b = w.part(0), w.part(3)
        w.levels(w.add(op, [a, b]), w.at(6), w.at(7))

    return write


def _one(op: str, *left_out: str) -> Callable[[_Written], None]:
    def write(w: _Written) -> None:
        x = w.part(0)
        w.levels(w.add(op, [x], **w.attrs("channels_last", *left_out)), w.at(3), w.at(4))

    return write


def _pool(op: str) -> Callable[[_Written], None]:
    def write(w: _Written) -> None:
        if w.flag("channels_last"):
            x = w.add("Transpose", [w.part(0)], perm=[0, 3, 1, 2])
            y = w.add(op, [x], **w.attrs("channels_last"))
            w.levels(w.add("Transpose", [y], perm=[0, 2, 3, 1]), w.at(3), w.at(4))
        else:
            _one(op)(w)

    return write


def _concat(w: _Written) -> None:
    parts = [w.part(i) for i in range(2, len(w.node.input), 3)]
    w.levels(w.add("Concat", parts, **w.attrs()), w.at(0), w.at(1))


def _where(w: _Written) -> None:
    a, b = w.part(1), w.part(4)
    w.levels(w.add("Where", [w.at(0), a, b]), w.at(7), w.at(8))


def _gemm(w: _Written) -> None:
    a, b = (w.part(0), w.numbers(w.at(3), w.at(4), w.at(5), axis=0 if w.flag("transB") else 1))
    bias = w.numbers(w.at(6), w.add("Mul", [w.at(1), w.at(4)]), "", axis=0) if w.at(6) else ""
    if w.at(7):
        w.levels(w.add("Gemm", [a, b, bias], **w.attrs()), w.at(7), w.at(8))
    else:
        w.add("Gemm", [a, b, bias], w.node.output[0], **w.attrs())


WRITTEN: dict[tuple[str, str], Callable[[_Written], None]] = {
    ("", "QLinearConv"): _convolution,
    (MICROSOFT, "QLinearConv"): _convolution,
    (MICROSOFT, "QLinearAdd"): _two("Add"),
    (MICROSOFT, "QLinearMul"): _two("Mul"),
    (MICROSOFT, "QLinearSigmoid"): _one("Sigmoid"),
    (MICROSOFT, "QLinearLeakyRelu"): _one("LeakyRelu"),
    (MICROSOFT, "QLinearSoftmax"): _one("Softmax", "opset"),
    (MICROSOFT, "QLinearAveragePool"): _pool("AveragePool"),
    (MICROSOFT, "QLinearGlobalAveragePool"): _pool("GlobalAveragePool"),
    (MICROSOFT, "QLinearConcat"): _concat,
    (MICROSOFT, "QLinearWhere"): _where,
    (MICROSOFT, "QGemm"): _gemm,
}


def spelled(proto: ModelProto) -> ModelProto:
    """The model without these operators."""
    keys = [("" if n.domain == "ai.onnx" else n.domain, n.op_type) for n in proto.graph.node]
    if not any(key in WRITTEN for key in keys):
        return proto
    new = ModelProto()
    new.CopyFrom(proto)
    del new.graph.node[:]
    new.graph.node.extend(_nodes(proto, keys))
    return new


def _nodes(proto: ModelProto, keys: list[tuple[str, str]]) -> Iterator[NodeProto]:
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1)
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*proto.graph.value_info, *proto.graph.input)
        if value.type.tensor_type.HasField("shape")
    }
    ranks.update((tensor.name, len(tensor.dims)) for tensor in proto.graph.initializer)
    for number, (node, key) in enumerate(zip(proto.graph.node, keys, strict=True)):
        if key in WRITTEN:
            written = _Written(node, number, opset, ranks)
            WRITTEN[key](written)
            yield from written.nodes
        else:
            yield node
