"""Check single ONNX nodes before ONNX's own shape inference, which is not safe for invalid nodes."""

from __future__ import annotations

import re

import onnx
from onnx import NodeProto

from lilliput.engine.facts import Facts
from lilliput.onnx.file import ONNX_DOMAINS


def checked(facts: Facts, proto: NodeProto, label: str) -> None:
    """Raise ValueError for a node that ONNX does not define so: what computes its shapes is not safe from such."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = 10
    context.opset_imports = facts.opsets
    if proto.domain not in ONNX_DOMAINS and not onnx.defs.has(proto.op_type, proto.domain):
        return
    try:
        onnx.checker.check_node(proto, context)
    except onnx.checker.ValidationError as error:
        raise ValueError(
            f"compile: {label} must be as ONNX defines it, got "
            f"{' '.join(str(error).split())[:160]}. The file is damaged."
        ) from error
    held = {a.name: a for a in proto.attribute}
    if len(held) < len(proto.attribute):
        raise ValueError(f"compile: {label} must have each attribute once. The file is damaged.")
    first = facts.known[proto.input[0]] if proto.input and proto.input[0] else None
    if first is not None and proto.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        rank, many = len(first.shapes[0]), 0
        named = [held["axis"].i] if "axis" in held else []
        if "axes" in held:
            named, many = list(held["axes"].ints), len(held["axes"].ints)
        more = proto.op_type in ("Flatten", "OneHot", "Unsqueeze")
        low, high = -max(rank, 1) - more - many * more, max(rank, 1) + more + many * more
        if any(not low <= axis < high for axis in named):
            raise ValueError(f"compile: {label} must name dimensions of its input, which has {rank}, got {named[:8]}.")
    if proto.op_type == "Split" and "num_outputs" in held and held["num_outputs"].i != len(proto.output):
        raise ValueError(f"compile: {label} must have {held['num_outputs'].i} outputs, got {len(proto.output)}.")
    if proto.op_type == "Einsum" and not re.fullmatch(rb"[A-Za-z.,\s]*(->[A-Za-z.\s]*)?", held["equation"].s):
        raise ValueError(f"compile: {label}: its equation must be letters, got {held['equation'].s!r:.80}.")
