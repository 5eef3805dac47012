"""Counted cost: values, bytes and multiply-accumulates, exact and the same whichever framework the model came from.

The kinds of cost never mix: `Counted` is exact, `Measured` belongs to a machine. Adding two of different kinds raises
TypeError.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto
from torch import nn

from lilliput.errors import ExportError
from lilliput.onnx.session import Inputs, Session, arrays
from lilliput.onnx.trace import trace

Shape = tuple[int, ...]
WEIGHTS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8,
           TensorProto.UINT8, TensorProto.INT16, TensorProto.UINT16, TensorProto.DOUBLE)  # fmt: skip
GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


class Cost:
    """Share what all kinds of cost have in common: they add up only with their own kind."""

    def __add__(self, other: object) -> Any:
        raise TypeError(
            f"Cost: {type(self).__name__} and {type(other).__name__} must not be added. Compare costs of one kind."
        )

    __radd__ = __add__


@dataclass(frozen=True)
class Counted(Cost):
    """Hold exact counts of one example.

    Args:
        values: Numbers kept.
        bytes: Bytes of the file.
        macs: Multiply-accumulates.

    Example:
        >>> Counted(1, 4, 10) + Counted(2, 8, 0)
        Counted(values=3, bytes=12, macs=10)
    """

    values: int
    bytes: int
    macs: int

    def __add__(self, other: object) -> Counted:
        if not isinstance(other, Counted):
            return Cost.__add__(self, other)  # type: ignore[no-any-return]
        return Counted(self.values + other.values, self.bytes + other.bytes, self.macs + other.macs)


def count(model: nn.Module | ModelProto, example: Inputs, values: int | None = None) -> Counted:
    """Count values, bytes of the ONNX file and MACs for one example.

    Counted are convolutions, matrix products (those of two activations too) and recurrent cells; zeros in a dense
    tensor count as values and in MACs, because a dense file and a dense runtime pay for them.

    Args:
        model: An ONNX model, or a module, which is exported first.
        example: At least one example of inputs.
        values: How many are kept, where that is known better than from the file (a sparse or packed one).

    Returns:
        The counts.

    Raises:
        ValueError: If the example is of another shape than the model's inputs.
        ExportError: If a shape can neither be inferred nor found by running the example.

    Example:
        >>> import torch
        >>> count(nn.Linear(4, 3), torch.zeros(1, 4)).macs
        12
    """
    proto = trace(model, example).proto if isinstance(model, nn.Module) else model
    known = shapes(proto, example)
    macs = sum(node_macs(node, known) for node in computed(proto))
    return Counted(stored_values(proto) if values is None else values, proto.ByteSize(), macs)


def computed(proto: ModelProto) -> list[NodeProto]:
    """The nodes that run for each example: not those that read constants alone, which a runtime folds when it loads.

    A model without inputs computes all of them.
    """
    held = {tensor.name for tensor in proto.graph.initializer}
    varies = {value.name for value in proto.graph.input} - held
    nodes = []
    for node in proto.graph.node:
        inner = any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)  # its subgraph may read anything
        if not varies or inner or any(name in varies for name in node.input):
            varies.update(node.output)
            nodes.append(node)
    return nodes


def stored_values(proto: ModelProto) -> int:
    """Count the weights in a file: floats and narrow integers, without the scales and zero points that widen them."""
    made = {name: node for node in proto.graph.node for name in node.output}

    def widened(name: str) -> bool:
        node = made.get(name)
        return node is not None and (
            (node.op_type == "Cast" and node.input[0] in narrow) or (node.op_type == "Sub" and widened(node.input[0]))
        )

    kinds = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
    narrow = {name for name, kind in kinds.items() if kind in WEIGHTS and kind not in floats}
    helpers = set()
    for node in proto.graph.node:
        if node.op_type in ("Mul", "Sub") and len(node.input) == 2 and widened(node.input[0]):
            source = made.get(node.input[1])
            helpers.add(source.input[0] if source is not None and source.op_type == "Cast" else node.input[1])
    return sum(
        math.prod(tensor.dims)
        for tensor in proto.graph.initializer
        if tensor.data_type in WEIGHTS and tensor.name not in helpers
    )


def shapes(proto: ModelProto, example: Inputs) -> dict[str, Shape]:
    """Find every value's shape for a batch of one: inferred, or read off a run of the example where that does not do.

    Raises:
        ExportError: If neither gives the shapes that MACs are counted from.
    """
    names = [value.name for value in proto.graph.input]
    one = {name: x[:1] for name, x in arrays(example, names).items()}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        wanted = [d.dim_value or d.dim_param or "?" for d in dims]
        got = one[value.name].shape
        if len(got) != len(dims) or any(d.dim_value not in (0, n) for d, n in list(zip(dims, got, strict=True))[1:]):
            raise ValueError(
                f"count: {value.name} must have the shape ({', '.join(map(str, wanted))}), got {got}. Give one example."
            )
    light = ModelProto()
    light.CopyFrom(proto)
    for value in light.graph.input:
        _fix(value, one[value.name].shape)
    for value in light.graph.output:
        value.type.tensor_type.ClearField("shape")
    _hide_weights(light)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
        known = {}
        for value in (*inferred.value_info, *inferred.output, *inferred.input):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(d.WhichOneof("value") == "dim_value" for d in dims):
                known[value.name] = tuple(d.dim_value for d in dims)
    except Exception:  # an operator that onnx does not know: the run below decides
        known = {}
    known.update((tensor.name, tuple(tensor.dims)) for tensor in proto.graph.initializer)
    if all(name in known for node in proto.graph.node if node.op_type in COUNTED for name in _needed(node)):
        return known
    return known | _run(proto, one)


def _needed(node: NodeProto) -> list[str]:
    return [name for name in (*node.input[:3], node.output[0]) if name]


def _fix(value: Any, shape: Shape) -> None:
    dims = value.type.tensor_type.shape.dim
    del dims[:]
    for n in shape:
        dims.add().dim_value = n


def _hide_weights(proto: ModelProto) -> None:
    """Large initialisers as inputs of their shape: inference needs no more, and copies no megabytes."""
    kept = []
    for tensor in proto.graph.initializer:
        if math.prod(tensor.dims) > 256:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
        else:
            kept.append(tensor)
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)


def _run(proto: ModelProto, one: dict[str, Any]) -> dict[str, Shape]:
    whole = ModelProto()
    whole.CopyFrom(proto)
    have = {value.name for value in whole.graph.output}
    wanted = [name for node in proto.graph.node if node.op_type in COUNTED for name in _needed(node)]
    made = {name for node in proto.graph.node for name in node.output}
    names = [name for name in dict.fromkeys(wanted) if name in made]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in have)
    try:
        session = Session(whole)
        results = session.all(one)
    except Exception as error:
        raise ExportError(f"count: the example must run through the model: {str(error)[:200]}") from error
    return {value.name: tuple(np.shape(x)) for value, x in zip(whole.graph.output, results, strict=True)}


def _convolution(node: NodeProto, shapes: dict[str, Shape], weight: int) -> int:
    shape = shapes[node.input[weight]]
    image = shapes[node.input[0]] if node.op_type == "ConvTranspose" else shapes[node.output[0]]
    return math.prod(image) * math.prod(shape[1:])


def node_macs(node: NodeProto, shapes: dict[str, Shape]) -> int:
    """Count the multiply-accumulates of one node, 0 for what is neither a product nor a recurrent cell."""
    op_type = node.op_type
    if op_type in ("Conv", "ConvTranspose", "ConvInteger"):
        return _convolution(node, shapes, 1)
    if op_type == "QLinearConv":
        return _convolution(node, shapes, 3)
    if op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]
    if op_type in ("MatMul", "MatMulInteger", "QLinearMatMul", "MatMulNBits"):
        return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]
    if op_type in GATES:
        steps, batch = shapes[node.input[0]][:2]
        directions, rows, features = shapes[node.input[1]]
        return steps * batch * directions * rows * (features + rows // GATES[op_type])
    return 0


COUNTED = frozenset(
    {"Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul",
     "MatMulNBits", *GATES}
)  # fmt: skip
