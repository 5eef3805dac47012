"""Fuse into an integer product what follows it: its scale, a bias, an activation, a rounding."""

from __future__ import annotations

from lilliput.engine.expr import arg
from lilliput.engine.graph import Graph


def finished(graph: Graph) -> None:
    """Let a MatMulInteger compute the elementwise operators behind it.

    MatMulInteger(a, b, zero point of a, of b, further inputs): attrs expr: the output as an expression of the product
    (argument 0, int32) and the further inputs (argument i is input 3 + i), broadcast to the product's shape; none where
    the output is the product.
    """
    uses, makers = graph.uses(), graph.makers()
    for node in list(graph.nodes):
        if node.op != "Map" or len(node.attrs["exprs"]) > 1 or len(node.outputs) > 1:
            continue
        for value in node.inputs:
            maker = makers.get(value) if value is not None else None
            if value is None or maker is None or maker.op != "MatMulInteger" or uses[value] != [node]:
                continue
            if value in graph.outputs or value.shape != node.y.shape or "expr" in maker.attrs:
                continue
            rest = [v for v in node.inputs if v is not value and v is not None]
            places = [
                arg(0, value.dtype) if v is value else arg(1 + rest.index(v), v.dtype)
                for v in node.inputs
                if v is not None
            ]
            maker.inputs = [*[*maker.inputs, None, None][:4], *rest]
            maker.attrs = {**maker.attrs, "expr": node.attrs["exprs"][0].substitute(places)}
            maker.outputs = [node.y]
            graph.nodes.remove(maker)
            graph.nodes[graph.nodes.index(node)] = maker
            uses, makers = graph.uses(), graph.makers()
            break
