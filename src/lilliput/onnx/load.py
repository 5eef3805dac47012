"""Open an ONNX file of someone else, with its constants and batch norm folded."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from lilliput.errors import ExportError
from lilliput.onnx.clean import copied, every_node, renamed
from lilliput.onnx.file import load
from lilliput.onnx.session import quiet
from lilliput.stored.operators import CONSTANT


def load_onnx(path: str | Path) -> ModelProto:
    """An ONNX file with its external tensors, which must lie in its own folder.

    Raises:
        ExportError: if it is no valid ONNX model, or refers to a file outside of its folder.
        FileNotFoundError: if it is not there.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_onnx: the model must be an ONNX file that exists, got {path}.")
    try:
        return load(path, "load_onnx")
    except ValueError as error:
        raise ExportError(str(error)) from error


def free_batch(proto: ModelProto) -> ModelProto:
    """The model with the first axis of every input and output free, whatever the exporter wrote there; in place."""
    held = {tensor.name for tensor in proto.graph.initializer}
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name not in held and len(value.type.tensor_type.shape.dim):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del proto.graph.value_info[:]  # the shapes of another batch
    return proto


def folded(proto: ModelProto) -> ModelProto:
    """Constants folded into initialisers; batch norm after a convolution or Gemm folded into its weight and bias."""
    import onnx_ir
    from onnxscript import optimizer

    proto = copied(proto)
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto = _fold_batchnorm(proto)
    with quiet():
        model = onnx_ir.from_proto(proto)
        with contextlib.suppress(Exception):  # an unoptimised graph is right all the same
            (getattr(optimizer, "optimize_ir", None) or optimizer.optimize)(model)
        proto = onnx_ir.to_proto(model)
    rename = {}
    for number, tensor in enumerate(proto.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) <= 1:
            rename[tensor.name] = f"{CONSTANT}{number}"
    return renamed(proto, rename)


def _fold_batchnorm(proto: ModelProto) -> ModelProto:
    graph = proto.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.output}
    uses = Counter(name for node in every_node(graph) for name in node.input)
    uses.update(value.name for value in graph.output)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        before = made.get(norm.input[0])
        if before is None or before.op_type not in ("Conv", "Gemm") or uses[norm.input[0]] != 1:
            continue
        parts = [*norm.input[1:5], *before.input[1:]]
        if not all(name in known for name in parts) or uses[before.input[1]] != 1 or len(norm.output) > 1:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in before.attribute}
        if before.op_type == "Gemm" and (attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1):
            continue
        moments = (numpy_helper.to_array(known[name]).astype(np.float64) for name in norm.input[1:5])
        gamma, beta, mean, variance = moments
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        weight = numpy_helper.to_array(known[before.input[1]]).astype(np.float64)
        rows = before.op_type == "Conv" or attributes.get("transB", 0)
        weight = weight * (factor.reshape(-1, *[1] * (weight.ndim - 1)) if rows else factor)
        bias = numpy_helper.to_array(known[before.input[2]]) if len(before.input) > 2 and before.input[2] else 0.0
        name = before.input[1] + ".bias" if len(before.input) < 3 or not before.input[2] else before.input[2]
        if uses[name] > 1 or (name in known and len(before.input) < 3):
            continue
        known[before.input[1]].CopyFrom(numpy_helper.from_array(weight.astype(np.float32), before.input[1]))
        folded = numpy_helper.from_array((beta + (bias - mean) * factor).astype(np.float32), name)
        if name in known:
            known[name].CopyFrom(folded)
        else:
            graph.initializer.append(folded)
        before.input[:] = [before.input[0], before.input[1], name]
        before.output[0] = norm.output[0]
        graph.node.remove(norm)
    return proto
