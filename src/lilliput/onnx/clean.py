"""The same network in fewer bytes: what an exporter leaves behind is taken out of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from lilliput.stored.operators import CONSTANT, rename

EMPTY_BY_KIND = {"pads": 0, "strides": 1, "dilations": 1}


def clean(proto: ModelProto) -> ModelProto:
    """The same network in fewer bytes: no names of nodes, no notes, no attribute at its default, no constant twice."""
    proto = copied(proto)
    _simplify(proto)
    _plain_lookups(proto)
    graph, shapes = proto.graph, {}
    for value in graph.value_info:
        shapes[value.name] = value
    del graph.value_info[:], proto.metadata_props[:], graph.metadata_props[:], graph.quantization_annotation[:]
    for note in ("producer_name", "producer_version", "doc_string", "domain", "model_version"):
        proto.ClearField(note)
    graph.ClearField("doc_string")
    graph.name = "g"
    for value in (*graph.input, *graph.output):
        value.ClearField("doc_string")
        del value.metadata_props[:]
    opset = opset_of(proto)
    for node in every_node(graph):
        for note in ("name", "doc_string", "metadata_props"):
            node.ClearField(note)
        _drop_defaults(node, opset)
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        del tensor.metadata_props[:]
    used = {domain for node in every_node(graph) for domain in [node.domain]} | {f.domain for f in proto.functions}
    for i in reversed([i for i, o in enumerate(proto.opset_import) if o.domain not in used | {""}]):
        del proto.opset_import[i]
    return _share(proto)


def opset_of(proto: ModelProto) -> int:
    """The version of the standard operators."""
    return int(next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1))


def every_node(graph: Any) -> Iterator[NodeProto]:
    """The nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g)


def _drop_defaults(node: NodeProto, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return
    windowed = node.op_type in ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")
    kept = []
    for attribute in node.attribute:
        default = schema.attributes[attribute.name].default_value if attribute.name in schema.attributes else None
        value = onnx.helper.get_attribute_value(attribute)
        same = default is not None and default.name and onnx.helper.get_attribute_value(default) == value
        if windowed and attribute.name in EMPTY_BY_KIND:
            same = set(value) <= {EMPTY_BY_KIND[attribute.name]}
        if windowed and attribute.name == "kernel_shape" and node.op_type in ("Conv", "ConvTranspose"):
            same = True  # the weight's own
        if not same:
            kept.append(attribute)
    del node.attribute[:]
    node.attribute.extend(kept)


def _simplify(proto: ModelProto) -> None:
    """Flatten for a reshape to (batch, rest), global pooling for a mean over the image: no channel numbers are left."""
    graph = proto.graph
    known = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT64}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.input, *graph.output)}
    for node in graph.node:
        if node.op_type not in ("Reshape", "ReduceMean") or len(node.input) < 2 or node.input[1] not in known:
            continue
        numbers = numpy_helper.to_array(known[node.input[1]]).ravel().tolist()
        source, target = shapes.get(node.input[0]), shapes.get(node.output[0])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Reshape" and source and target:
            batch, first = source[0].dim_param, target[0].dim_param
            if batch and batch == first and len(target) == 2 and len(source) >= 2:
                _become(node, "Flatten")
            elif (batch and batch == first and numbers[0] in (-1, 0)) or 0 not in numbers:
                _drop_zero(node, numbers)
        elif node.op_type == "ReduceMean" and source and len(source) == 4 and attributes.get("keepdims", 1) == 1:
            spatial = sorted(n % 4 for n in numbers) == [2, 3]
            if spatial:
                _become(node, "GlobalAveragePool")


def _plain_lookups(proto: ModelProto) -> None:
    """Gather for a GatherND whose places are numbers with an axis of their own, as exporters write `table[ids]`."""
    graph = proto.graph
    known = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT64}
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.value_info, *graph.input)}
    made = {node.output[0]: node for node in graph.node if node.op_type == "Unsqueeze" and len(node.input) == 2}
    for node in graph.node:
        places = (
            made.get(node.input[1]) if node.op_type == "GatherND" and not any(a.i for a in node.attribute) else None
        )
        if places is None or places.input[1] not in known:
            continue
        axes = numpy_helper.to_array(known[places.input[1]]).ravel().tolist()
        if axes in ([-1], [ranks.get(places.input[0])]):
            node.op_type, node.input[1] = "Gather", places.input[0]
            del node.attribute[:]
    _without_unread(graph, "Unsqueeze")


def _without_unread(graph: onnx.GraphProto, op_type: str) -> None:
    """Take out operators of a kind whose outputs nothing reads."""
    read = {name for node in every_node(graph) for name in node.input} | {value.name for value in graph.output}
    kept = [node for node in graph.node if node.op_type != op_type or read & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)


def _become(node: NodeProto, op_type: str) -> None:
    node.op_type = op_type
    del node.input[1:], node.attribute[:]


def _drop_zero(node: NodeProto, numbers: list[int]) -> None:
    if 0 not in numbers:
        del node.attribute[:]


def _share(proto: ModelProto) -> ModelProto:
    """One initialiser for each distinct constant, none that nothing reads."""
    first: dict[Any, str] = {}
    rename = {}
    outputs = {value.name for value in proto.graph.output}
    for tensor in proto.graph.initializer:
        if tensor.name.startswith(CONSTANT) and tensor.name not in outputs:
            array = numpy_helper.to_array(tensor)
            rename[tensor.name] = first.setdefault((array.dtype.str, array.shape, array.tobytes()), tensor.name)
    proto = renamed(proto, {old: new for old, new in rename.items() if old != new})
    read = {name for node in every_node(proto.graph) for name in node.input} | outputs
    seen: set[str] = set()
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name in read and tensor.name not in seen:
            kept.append(tensor)
            seen.add(tensor.name)
    kept = [_raw(tensor) for tensor in kept]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def _raw(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(np.array(numpy_helper.to_array(tensor)), tensor.name)


def renamed(proto: ModelProto, names: dict[str, str]) -> ModelProto:
    """The model with its values renamed, subgraphs included."""
    proto = copied(proto)
    rename(proto.graph, names)
    return proto


def copied(proto: ModelProto) -> ModelProto:
    """A copy of a model."""
    new = ModelProto()
    new.CopyFrom(proto)
    return new
