"""Read an ONNX model into a graph in which every shape is known and everything that is constant is folded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, helper

from lilliput.engine.check import checked
from lilliput.engine.facts import Facts
from lilliput.engine.fold import LEVELS, folded
from lilliput.engine.graph import C_TYPES, RUNS, Graph, Node, Value
from lilliput.engine.half_tables import widened
from lilliput.engine.infer import inferred
from lilliput.engine.inline import inlined
from lilliput.engine.inputs import Constants, Shapes, given, opened
from lilliput.engine.qlinear import spelled
from lilliput.engine.size import Size
from lilliput.errors import NotSupported
from lilliput.onnx.file import array_of, load, op_name

Step = tuple[NodeProto, Node]


def read(
    model: str | Path | bytes | ModelProto,
    shapes: Shapes | None = None,
    constants: Constants | None = None,
    supported: Callable[[str], bool] = lambda op: True,
) -> Graph:
    """The graph of an ONNX model.

    Args:
        model: a path, the file's bytes or a ModelProto.
        shapes: the largest sizes of an input that has free ones; a leading free size that is not named becomes 1.
        constants: inputs that are bound to these numbers now.
        supported: whether an operator ("Conv", "com.microsoft.MatMulNBits") can be compiled.

    Returns:
        Nodes of ONNX's operators, none of which depends on constants alone.

    Raises:
        ValueError: for a file that is damaged, or shapes and constants that do not fit its inputs.
        NotSupported: naming every node that cannot be compiled.
    """
    proto = inlined(widened(spelled(load(model))), supported)
    facts = opened(proto, shapes or {}, constants or {})
    steps, wrong = _stepped(facts, supported)
    kept, more = _needed(facts, steps, supported)
    if wrong := wrong + more:
        raise NotSupported("compile: every node must be one that the engine knows, got " + "; ".join(wrong) + ".")
    return _graph(facts, kept)


def _stepped(facts: Facts, supported: Callable[[str], bool]) -> tuple[list[tuple[NodeProto, Node, bool]], list[str]]:
    """(every node with whether it was folded, what cannot be compiled), while facts learn what each makes."""
    steps: list[tuple[NodeProto, Node, bool]] = []
    wrong: list[str] = []
    for number, proto in enumerate(facts.proto.graph.node):
        op = op_name(proto)
        label = f"{proto.name or next(iter(proto.output), '') or number} ({op})"
        missing = [name for name in proto.input if name and name not in facts.known]
        if missing and not wrong:
            raise ValueError(
                f"compile: the input {missing[0]!r} of {label} must be made before it. The file is damaged."
            )
        if missing:
            wrong += [] if supported(op) else [label]  # what it reads is not known: only its type is judged
            continue
        if any(a.HasField("g") or a.graphs for a in proto.attribute):
            wrong.append(f"{label}: it has a graph of its own")
            continue
        checked(facts, proto, label)
        node = _node(facts, proto, op)
        if folded(facts, proto, node):
            steps.append((proto, node, True))
        elif not supported(op):
            wrong.append(label)
        elif reason := inferred(facts, proto, node):
            wrong.append(f"{label}: {reason}")
        else:
            steps.append((proto, node, False))
    return steps, wrong


def _node(facts: Facts, proto: NodeProto, op: str) -> Node:
    """A node with its attributes, not yet with its values."""
    attrs = {}
    for attribute in proto.attribute:
        try:
            held = helper.get_attribute_value(attribute)
        except ValueError as error:
            raise ValueError(
                f"compile: attribute {attribute.name!r} of {proto.name!r} must have a value. The file is damaged."
            ) from error
        if isinstance(held, TensorProto):
            held = array_of(held)
        elif isinstance(held, bytes):
            held = held.decode(errors="replace")
        elif isinstance(held, list) and held and isinstance(held[0], bytes):
            held = [text.decode(errors="replace") for text in held]
        attrs[attribute.name] = held
    return Node(op, [], [], attrs, proto.name or next((n for n in proto.output if n), op), facts.opset(proto))


def _needed(
    facts: Facts, steps: Sequence[tuple[NodeProto, Node, bool]], supported: Callable[[str], bool]
) -> tuple[list[Step], list[str]]:
    """The nodes that run: those not folded, and those folded to numbers that depend on free sizes and are read."""
    wanted = {value.name for value in facts.proto.graph.output}
    kept: list[Step] = []
    wrong = []
    for proto, node, constant in reversed(steps):
        if constant:
            if not any(name in wanted and _varies(facts, name) for name in proto.output):
                continue
            if not supported(node.op):
                wrong.append(f"{node.name} ({node.op}): what it makes depends on the free sizes")
                continue
        kept.append((proto, node))
        wanted.update(name for name in proto.input if name)
    return kept[::-1], wrong[::-1]


def _varies(facts: Facts, name: str) -> bool:
    """Whether a known value depends on the free sizes in a way that `_entries` cannot say."""
    known = facts.known.get(name)
    return known is not None and known.data is not None and len(known.data) > 1 and _entries(facts, name) is None


def _entries(facts: Facts, name: str) -> tuple[int, ...] | None:
    """The numbers of a value that depend on the free sizes, as polynomials; None where they are not such."""
    data = facts.known[name].data
    assert data is not None
    flat = [d.reshape(-1) for d in data]
    if any(d.shape != data[0].shape for d in data) or data[0].dtype.kind not in "iu" or len(flat[0]) > 256:
        return None
    fitted = [facts.worlds.fit([int(d[i]) for d in flat]) for i in range(len(flat[0]))]
    return None if None in fitted else tuple(size for size in fitted if size is not None)


def _graph(facts: Facts, kept: Sequence[Step]) -> Graph:
    """The graph of the nodes that run, with every size fitted over the worlds."""
    values: dict[str, Value] = {}

    def value(name: str) -> Value:
        if name not in values:
            values[name] = _value(facts, name)
        return values[name]

    outputs = []
    for output in facts.proto.graph.output:
        if output.name not in facts.known:
            raise ValueError(f"compile: the output {output.name!r} must be made by a node. The file is damaged.")
        outputs.append(value(output.name))
    inputs = [value(each.name) for each in given(facts.proto) if facts.known[each.name].data is None]
    nodes = []
    for proto, node in kept:
        node.inputs = [value(name) if name else None for name in proto.input]
        node.outputs = [value(name) if name else None for name in proto.output]
        nodes.append(node)
    read_or_made = (v for n in nodes for v in (*n.inputs, *n.outputs) if v is not None)
    odd = sorted(
        {
            f"{v.name} ({v.dtype.name})"
            for v in (*inputs, *outputs, *read_or_made)
            if v.dtype.name not in ((*C_TYPES, *LEVELS) if v.constant and v not in outputs else RUNS)
        }
    )
    if odd:
        raise NotSupported(f"compile: values must be one of {', '.join(RUNS)}, got {', '.join(odd[:20])}.")
    graph = Graph(inputs, outputs, nodes, dict(facts.worlds.most))
    graph.prune()
    return graph


def _value(facts: Facts, name: str) -> Value:
    """The value of a name, with its sizes fitted over the worlds."""
    known = facts.known[name]
    shape: list[int | None] = [None]
    if len({len(shape) for shape in known.shapes}) == 1:
        shape = [facts.worlds.fit([s[axis] for s in known.shapes]) for axis in range(len(known.shapes[0]))]
    if any(size is None for size in shape):
        raise NotSupported(
            f"compile: the shape of {name!r} must follow from the free sizes by sums and "
            "products. Fix the sizes in the file."
        )
    sizes = (size for size in shape if size is not None)
    value = Value(name, known.dtype, tuple(size if isinstance(size, Size) else int(size) for size in sizes))
    if known.data is not None and len(known.data) == 1:
        value.data, value.narrow = known.data[0], facts.narrow.get(name)
    elif known.data is not None:
        value.entries = _entries(facts, name)
    return value
