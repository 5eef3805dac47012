"""Names in ONNX files: those of the network's tensors and of who wrote the file, or none but a caller's."""

from collections import Counter
from importlib.metadata import version

from onnx import ModelProto

from lilliput.onnx.clean import copied, renamed
from lilliput.stored.operators import letters, uses


def signed(proto: ModelProto) -> ModelProto:
    """The model with the name and the version of this package as its producer.

    Args:
        proto: the model; it stays as it is.
    """
    proto = copied(proto)
    proto.producer_name, proto.producer_version = "lilliput", version("lilliput")
    return proto


def stripped(proto: ModelProto) -> ModelProto:
    """The model without a producer, with names of one or two letters, the shortest for the most frequent.

    Inputs and outputs keep their names, and so does everything in a file with subgraphs, whose names shadow others.

    Args:
        proto: the model; it stays as it is.
    """
    graph = proto.graph
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}
    ranked = []
    if not any(a.type == a.GRAPH for n in graph.node for a in n.attribute):
        counted = Counter(uses(graph))
        ranked = sorted((name for name in counted if name not in fixed), key=lambda name: -counted[name])
    short = (name for name in letters() if name not in fixed)
    proto = renamed(proto, dict(zip(ranked, short, strict=False)))
    for note in ("producer_name", "producer_version"):
        proto.ClearField(note)
    return proto
