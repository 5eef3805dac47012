"""Write the tensors of a graph as they are stored: narrow, with operators that widen them when the file is loaded."""

from __future__ import annotations

from functools import cache

import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from lilliput.onnx.clean import copied, every_node, opset_of
from lilliput.stored.base import Stored
from lilliput.stored.operators import Operators

TYPE_ONLY = frozenset(
    {"Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "CastLike", "Clip",
     "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Div", "Dropout", "Equal", "Erf", "Exp",
     "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
     "Greater", "GreaterOrEqual", "GRU", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
     "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LSTM", "MatMul", "Max",
     "MaxPool", "Mean", "Min", "Mul", "Neg", "Not", "OneHot", "Or", "Pad", "Pow", "PRelu", "Range", "Reciprocal",
     "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "RNN", "Shape", "Sigmoid", "Sign",
     "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Unsqueeze",
     "Where", "Xor", "Elu", "Selu", "Gelu", "Softplus", "Mish"}
)  # fmt: skip
"""Operators that got a new version between opsets 18 and 21 which only added types."""
COMPUTED = frozenset({"Add", "Equal", "Gather", "GatherElements", "GatherND", "Greater", "Less", "Mul", "Sub", "Where"})
"""Operators that take integers as numbers or places."""
TINY = 21
"""The opset from which a file may hold 4-bit integers."""


def narrow(proto: ModelProto, stored: dict[str, Stored], decoded: list[str] | None = None) -> ModelProto:
    """The float32 model `proto` with its tensors written as they are stored.

    Args:
        proto: the model; float32 initialisers that `stored` does not name are kept as they are.
        stored: how each tensor is stored, by initialiser name.
        decoded: a list to which the tensors are added that no operators compute: they take four bytes a value.
    """
    proto = copied(proto)
    graph = proto.graph
    writer = Operators(tiny(proto))
    waiting, indices = [], _indices(graph)
    for tensor in graph.initializer:
        value = stored.get(tensor.name)
        if tensor.data_type == TensorProto.INT64 and value is None and tensor.name in indices:
            writer.whole(tensor.name, numpy_helper.to_array(tensor))
        elif value is None or tensor.data_type != TensorProto.FLOAT:
            writer.plain(tensor.name, numpy_helper.to_array(tensor))
        elif value.refers:
            waiting.append((tensor.name, value))  # until what it refers to is there
        else:
            value.onnx(writer, tensor.name)
    for name, value in waiting:
        value.onnx(writer, name)
    nodes = [*writer.nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(writer.tensors.values())
    graph.node.extend(nodes)
    if writer.tiny_used and opset_of(proto) < TINY:
        next(o for o in proto.opset_import if o.domain in ("", "ai.onnx")).version = TINY
        proto.ir_version = max(proto.ir_version, 10)
    if decoded is not None:
        decoded += writer.decoded
    return proto


def _indices(graph: onnx.GraphProto) -> set[str]:
    """The values that are only read as places or computed with, never as a shape, which some runtimes want to see."""
    read = [(name, node.op_type) for node in every_node(graph) for name in node.input]
    others = {name for name, op_type in read if op_type not in COMPUTED}
    return {name for name, _ in read} - others


def tiny(proto: ModelProto) -> bool:
    """Whether a file may hold 4-bit integers: whether all of its operators mean in opset 21 what they mean in its own.

    Args:
        proto: the model.
    """
    opset = opset_of(proto)
    return opset >= 18 and all(n.domain == "" and _unchanged(n.op_type, opset) for n in every_node(proto.graph))


@cache
def _unchanged(op_type: str, opset: int) -> bool:
    if op_type in TYPE_ONLY or opset >= TINY:
        return True
    try:
        own, new = (onnx.defs.get_schema(op_type, version, "").since_version for version in (opset, TINY))
    except onnx.defs.SchemaError:
        return False
    return bool(own == new)
