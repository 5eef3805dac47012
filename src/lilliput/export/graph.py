"""The graph in the head of a packed file: nodes, values and attributes as numbers.

Operators and attributes are numbers of a list that only grows (lilliput.export.names). A value is named by how far back
it was made, 1 the last one; a tensor by its place, or by "the next one".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, NodeProto

from lilliput.errors import ExportError
from lilliput.export.names import ATTRIBUTES, OPERATORS
from lilliput.stored.bits import ByteReader, ByteWriter

# How a node refers to a value: nothing, the next tensor that none has used, else twice a distance or twice a place + 3.
NOTHING, NEXT, FIRST = 0, 1, 3


def write_values(values: Sequence[Any], out: ByteWriter) -> None:
    """The inputs or the outputs of a graph: name, type, and shape with 0 for a free axis."""
    out.number(len(values))
    for value in values:
        kind = value.type.tensor_type
        out.text(value.name)
        out.number(kind.elem_type)
        out.number(len(kind.shape.dim))
        for d in kind.shape.dim:
            out.number(d.dim_value if d.WhichOneof("value") == "dim_value" else 0)


def read_values(head: ByteReader, shape: Callable[[], tuple[int, ...]]) -> list[Any]:
    """What `write_values` wrote; a free first axis is the batch. shape: reads one."""
    infos = []
    for _ in range(head.count()):
        name, kind = head.text(), head.number()
        dims = [d or ("batch" if not i else None) for i, d in enumerate(shape())]
        infos.append(onnx.helper.make_tensor_value_info(name, kind, dims))
    return infos


def write_nodes(graph: GraphProto, inputs: Sequence[Any], tensors: Sequence[str], out: ByteWriter) -> None:
    """Each node: operator, inputs, outputs, attributes; then what the outputs of the graph are.

    Raises:
        ExportError: for a subgraph, or a value that is read before it is made.
    """
    tensor_at = {name: i for i, name in enumerate(tensors)}
    made = {value.name: i for i, value in enumerate(inputs)}
    waiting, count = 0, len(inputs)

    def refer(name: str) -> None:
        nonlocal waiting
        if not name:
            out.number(NOTHING)
        elif name in tensor_at:
            following = tensor_at[name] == waiting
            waiting += following
            out.number(NEXT if following else 2 * tensor_at[name] + FIRST)
        elif name in made:
            out.number(2 * (count - made[name]))
        else:
            raise ExportError(f"pack: the graph reads {name!r}, which nothing before it makes. Sort its nodes.")

    out.number(len(graph.node))
    for node in graph.node:
        _write_operator(node, out)
        flags = (len(node.output) != 1 or not node.output[0]) * 2 + bool(node.attribute)
        out.number(len(node.input) << 2 | flags)
        for name in node.input:
            refer(name)
        if flags & 2:
            out.number(len(node.output))
            out.raw(bytes(bool(name) for name in node.output))
        for name in filter(None, node.output):
            made[name] = count
            count += 1
        if flags & 1:
            out.number(len(node.attribute))
            for attribute in sorted(node.attribute, key=lambda a: a.name):
                write_attribute(attribute, out)
    for value in graph.output:
        refer(value.name)


def _write_operator(node: NodeProto, out: ByteWriter) -> None:
    """An operator by its number in OPERATORS, or 0 and its names."""
    if node.domain in ("", "ai.onnx") and node.op_type in OPERATORS:
        out.number(OPERATORS.index(node.op_type) + 1)
    else:
        out.number(0)
        out.text(node.domain)
        out.text(node.op_type)


def read_nodes(head: ByteReader, inputs: Sequence[Any], outputs: Sequence[Any], tensors: Sequence[str]) -> list[Any]:
    """The nodes that `write_nodes` wrote, with names of our own for the values between them."""
    made = [value.name for value in inputs]
    waiting, free = 0, 0
    taken = {*made, *tensors, *(value.name for value in outputs)}

    def referred() -> str:
        nonlocal waiting
        number = head.number()
        if number == NOTHING:
            return ""
        if number == NEXT:
            waiting += 1
            return tensors[waiting - 1]
        if number % 2:
            return tensors[(number - FIRST) // 2]
        if number // 2 > len(made):
            raise ValueError("a node reads a value that is not made yet")
        return str(made[-(number // 2)])

    nodes = []
    for _ in range(head.count()):
        code = head.number()
        domain = "" if code else head.text()
        op_type = OPERATORS[code - 1] if code else head.text()
        count = head.number()
        if count >> 2 > len(head.data):
            raise ValueError(f"a node has {count >> 2} inputs")
        read = [referred() for _ in range(count >> 2)]
        present = list(head.raw(head.count())) if count & 2 else [1]
        written = []
        for here in present:
            if here:
                while f"v{free}" in taken:
                    free += 1
                made.append(f"v{free}")
                free += 1
            written.append(made[-1] if here else "")
        node = onnx.helper.make_node(op_type, read, written, domain=domain)
        if count & 1:
            node.attribute.extend(read_attribute(head) for _ in range(head.count()))
        nodes.append(node)
    return _with_outputs(nodes, {value.name: referred() for value in outputs}, {*tensors, *(v.name for v in inputs)})


def _with_outputs(nodes: list[Any], sources: dict[str, str], fixed: set[str]) -> list[Any]:
    """The nodes with the graph's outputs named; one that is an input, a tensor or another output is copied."""
    rename: dict[str, str] = {}
    copies = []
    for name, source in sources.items():
        if source in fixed or source in rename:
            copies.append(onnx.helper.make_node("Identity", [source], [name]))
        else:
            rename[source] = name
    for node in (*nodes, *copies):
        node.input[:] = [rename.get(name, name) for name in node.input]
    for node in nodes:
        node.output[:] = [rename.get(name, name) for name in node.output]
    return [*nodes, *copies]


def write_attribute(attribute: AttributeProto, out: ByteWriter) -> None:
    """Name and type in one number, then the value.

    Raises:
        ExportError: for a subgraph.
    """
    kind, value = attribute.type, onnx.helper.get_attribute_value(attribute)
    known = attribute.name in ATTRIBUTES
    out.number((ATTRIBUTES.index(attribute.name) + 1 if known else 0) << 3 | kind % 8)
    if not known:
        out.text(attribute.name)
    if kind == AttributeProto.FLOAT:
        out.raw(struct.pack("<f", value))
    elif kind == AttributeProto.INT:
        out.signed(value)
    elif kind == AttributeProto.STRING:
        out.text(value)
    elif kind == AttributeProto.TENSOR:
        out.text(value.SerializeToString())
    elif kind == AttributeProto.FLOATS:
        out.number(len(value))
        out.raw(struct.pack(f"<{len(value)}f", *value))
    elif kind == AttributeProto.INTS:
        out.number(len(value))
        for number in value:
            out.signed(number)
    elif kind == AttributeProto.STRINGS:
        out.number(len(value))
        for text in value:
            out.text(text)
    else:
        raise ExportError(f"pack: the attribute {attribute.name!r} holds a subgraph. Use model.onnx instead.")


def read_attribute(head: ByteReader) -> AttributeProto:
    """What `write_attribute` wrote."""
    code = head.number()
    name = ATTRIBUTES[(code >> 3) - 1] if code >> 3 else head.text()
    kind = code % 8 or AttributeProto.STRINGS
    value: Any
    if kind == AttributeProto.FLOAT:
        value = struct.unpack("<f", head.raw(4))[0]
    elif kind == AttributeProto.INT:
        value = head.signed()
    elif kind == AttributeProto.STRING:
        value = head.raw(head.number())
    elif kind == AttributeProto.TENSOR:
        value = onnx.TensorProto.FromString(head.raw(head.number()))
        if value.external_data:
            raise ValueError("a tensor refers to another file")
    elif kind == AttributeProto.FLOATS:
        value = list(struct.unpack(f"<{(n := head.count())}f", head.raw(4 * n)))
    elif kind == AttributeProto.INTS:
        value = [head.signed() for _ in range(head.count())]
    elif kind == AttributeProto.STRINGS:
        value = [head.raw(head.number()) for _ in range(head.count())]
    else:
        raise ValueError(f"attribute {name!r} is of an unknown kind {kind}")
    return onnx.helper.make_attribute(name, value, attr_type=kind)
