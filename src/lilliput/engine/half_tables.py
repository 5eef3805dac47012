"""Convert float16 lookup tables to float32 at compile time, before the lookup."""

from __future__ import annotations

from onnx import ModelProto, NodeProto, TensorProto, helper


def widened(proto: ModelProto) -> ModelProto:
    """The model with Cast(Gather(table, i)) as Gather(Cast(table), i) where the table is a constant of float16."""
    graph = proto.graph
    half = {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT16}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            readers.setdefault(name, []).append(node)
    outputs = {value.name for value in graph.output}
    lookups = [
        node
        for node in graph.node
        if node.op_type == "Gather"
        and not node.domain
        and node.input
        and node.output
        and node.input[0] in half
        and node.output[0] not in outputs
        and readers.get(node.output[0])
        and all(_to_float(reader) for reader in readers[node.output[0]])
    ]
    if not lookups:
        return proto
    copy = ModelProto()
    copy.CopyFrom(proto)
    names = {node.output[0] for node in lookups}
    nodes, made = [], set[str]()
    for node in copy.graph.node:
        if node.op_type == "Gather" and node.output[0] in names:
            table = node.input[0]
            if table not in made:
                nodes.append(helper.make_node("Cast", [table], [table + "/wide"], to=TensorProto.FLOAT))
                made.add(table)
            node.input[0] = table + "/wide"
        nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def _to_float(node: NodeProto) -> bool:
    return node.op_type == "Cast" and any(a.name == "to" and a.i == TensorProto.FLOAT for a in node.attribute)
