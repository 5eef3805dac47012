"""Inline the functions of a model, and operators that ONNX defines by other operators."""

from __future__ import annotations

from collections.abc import Callable

import onnx
from onnx import ModelProto, inliner

from lilliput.onnx.file import ONNX_DOMAINS

MOST_NODES = 100_000
Name = tuple[str, str]  # domain, type


def inlined(proto: ModelProto, supported: Callable[[str], bool]) -> ModelProto:
    """Functions of the model, and operators that ONNX defines by others and nothing here compiles, written out."""
    _written_out(proto)
    for _ in range(4):
        local = {(function.domain, function.name) for function in proto.functions}
        wanted = _wanted(proto, local, supported)
        if not wanted:
            break
        new = proto
        for name in sorted(wanted):
            try:
                new = inliner.inline_selected_functions(new, [name], inline_schema_functions=True)
            except Exception as error:
                if name in local:
                    raise ValueError(
                        f"compile: the function {name[1]!r} of the model must be whole, got {str(error)[:160]}."
                    ) from error
        if new.graph.node == proto.graph.node:
            break
        proto = new
    return proto


def _wanted(proto: ModelProto, local: set[Name], supported: Callable[[str], bool]) -> list[Name]:
    """The operators that are functions of the model, or that ONNX defines by others and nothing here compiles."""
    opsets = {o.domain: o.version for o in proto.opset_import}
    wanted = []
    for domain, op_type in {(node.domain, node.op_type) for node in proto.graph.node}:
        if (domain, op_type) in local:
            wanted.append((domain, op_type))
        elif not supported(op_type if domain in ONNX_DOMAINS else f"{domain}.{op_type}"):
            version = opsets.get(domain, opsets.get(domain or "ai.onnx", 1))
            if onnx.defs.has(op_type, domain) and version <= onnx.defs.onnx_opset_version():
                try:
                    schema = onnx.defs.get_schema(op_type, version, domain)
                except onnx.defs.SchemaError:  # not in this version
                    continue
                if schema.has_function or schema.has_context_dependent_function:
                    wanted.append((domain, op_type))
    return wanted


def _written_out(proto: ModelProto) -> None:
    """Functions must not call themselves, nor become more nodes than anything needs."""
    bodies = {(f.domain, f.name): [(n.domain, n.op_type) for n in f.node] for f in proto.functions}
    nodes: dict[Name, int] = {}
    for start in bodies:
        path: list[tuple[Name, int]] = [(start, 0)]
        while path:
            name, at = path.pop()
            called = [call for call in bodies[name] if call in bodies]
            if at < len(called):
                path.append((name, at + 1))
                if called[at] not in nodes:
                    if any(held == called[at] for held, _ in path):
                        raise ValueError(
                            f"compile: the function {called[at][1]!r} must not call itself. The file is damaged."
                        )
                    path.append((called[at], 0))
            else:
                nodes[name] = len(bodies[name]) + sum(nodes[call] for call in called)
    total = len(proto.graph.node) + sum(nodes.get((n.domain, n.op_type), 0) for n in proto.graph.node)
    if total > MOST_NODES:
        raise ValueError(f"compile: a model must have at most {MOST_NODES} nodes, got {total} with its functions.")
