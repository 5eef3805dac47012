"""Compute one node of an ONNX graph: what constant folding is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, OperatorSetIdProto, helper
from onnx.reference import ReferenceEvaluator


def evaluate(
    proto: NodeProto, imports: Sequence[OperatorSetIdProto], feeds: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    """Compute a node by ONNX's own reference.

    Args:
        proto: The node.
        imports: The operator sets of its model.
        feeds: Its inputs by name.

    Returns:
        Its outputs in order, an empty array for one that has no name.
    """
    graph = helper.make_graph(
        [proto],
        "fold",
        [onnx.ValueInfoProto(name=name) for name in feeds],
        [onnx.ValueInfoProto(name=name) for name in proto.output if name],
    )
    model = helper.make_model(graph, opset_imports=imports)
    with np.errstate(all="ignore"):
        outputs = iter(ReferenceEvaluator(model).run(None, dict(feeds)))
    return [next(outputs) if name else np.zeros(0) for name in proto.output]
