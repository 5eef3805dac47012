"""Shape inference: compute the types and shapes of a node's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TypeProto, helper, numpy_helper

from lilliput.engine.facts import Facts, Known, Shape
from lilliput.engine.fold import MOST_FOLDED
from lilliput.engine.graph import Array, Node
from lilliput.errors import NotSupported
from lilliput.onnx.evaluate import evaluate
from lilliput.onnx.file import ONNX_DOMAINS, elements

MOST_COMPUTED = 2**28  # elements of a tensor that is computed
Typed = tuple[Any, Shape]

# Shapes of operators that ONNX has no schema for: f(node, inputs' shapes) -> (dtype, shape) of each output.
INFER: dict[str, Callable[[Node, list[Shape]], list[tuple[str, Shape]]]] = {}


def inferred(facts: Facts, proto: NodeProto, node: Node) -> str:
    """The types and shapes of what a node makes, in every world; a reason where they cannot be known."""
    worlds = (
        1
        if all(len(known.shapes) == 1 and (known.data is None or known.shared) for known in facts.inputs(proto))
        else len(facts.worlds)
    )
    per: list[list[Typed]] = []
    for w in range(worlds):
        held = {name: facts.known[name].at(w) for name in proto.input if name}
        try:
            if node.op in INFER:
                shaped = [held[name][0] if name else () for name in proto.input]
                per.append([(np.dtype(kind), shape) for kind, shape in INFER[node.op](node, shaped)])
            else:
                per.append(_types(facts, proto, held))
        except NotSupported as error:
            return str(error)
        except Exception as error:
            return f"its shapes do not fit ({str(error)[:160]})"
    for i, name in enumerate(proto.output):
        if not name:
            continue
        if i >= len(per[0]):
            return f"its output {i} has no type"
        shapes = [shape for _, shape in (world[i] for world in per)]
        if elements([size or 1 for size in shapes[0]]) > MOST_COMPUTED:
            raise ValueError(f"compile: {name!r} must have at most {MOST_COMPUTED} elements, got {list(shapes[0])}.")
        facts.known[name] = Known(per[0][i][0], shapes if len(set(shapes)) > 1 else shapes[:1])
    return ""


def _types(facts: Facts, proto: NodeProto, held: Mapping[str, tuple[Shape, Array | None]]) -> list[Typed]:
    """The (dtype, shape) of every output of a node, by ONNX's own inference, else by running it on zeros."""
    domain = "" if proto.domain in ONNX_DOMAINS else proto.domain
    if not onnx.defs.has(proto.op_type, domain):
        raise NotSupported("its operator is not one of ONNX's")
    version = min(facts.opset(proto), onnx.defs.onnx_opset_version())
    schema = onnx.defs.get_schema(proto.op_type, version, domain)
    dtypes = {name: facts.known[name].dtype for name in held}
    types, data = {}, {}
    for name, (shape, known) in held.items():
        kind = helper.np_dtype_to_tensor_dtype(dtypes[name])
        types[name] = helper.make_tensor_type_proto(kind, shape)
        if known is not None and known.size <= 1024:
            data[name] = numpy_helper.from_array(known, name)
    inferred = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=facts.imports)
    outputs: list[Typed | None] = [_typed(inferred.get(name)) for name in proto.output]
    if any(name and known is None for name, known in zip(proto.output, outputs, strict=True)):
        if sum(int(np.prod(shape)) for shape, _ in held.values()) > MOST_FOLDED:
            raise NotSupported("its shape is not known before it runs")
        feeds = {
            name: np.zeros(shape, dtypes[name]) if known is None else known for name, (shape, known) in held.items()
        }
        if proto.op_type in ("NonZero", "Unique", "Compress", "NonMaxSuppression"):
            raise NotSupported("its shape depends on the data")
        outputs = [(x.dtype, x.shape) for x in map(np.asarray, evaluate(proto, facts.imports, feeds))]
    return [known or (np.dtype(np.float32), ()) for known in outputs]


def _typed(kind: TypeProto | None) -> Typed | None:
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    if any(not dim.HasField("dim_value") for dim in dims):
        return None
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)), tuple(dim.dim_value for dim in dims)
