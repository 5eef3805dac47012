"""Fuse attention: replace softmax(f(Q K)) V in a graph by one node whose scores stay in the cache."""

from __future__ import annotations

from lilliput.engine.expr import Expr, arg
from lilliput.engine.graph import Graph, Node, Value


def attended(graph: Graph) -> None:
    """Turn MatMul, elementwise operators, Softmax over the last dimension and MatMul into Attend.

    Attend(Q, K, V, further inputs): K has the columns that Q's rows are multiplied by; attrs expr: the score as an
    expression of the product (argument 0) and element i - 1 of the further inputs (argument i), broadcast to the
    product's shape.
    """
    uses, makers = graph.uses(), graph.makers()
    for last in list(graph.nodes):
        if last.op != "MatMul" or not _bare(last):
            continue
        weights, v = last.input(0), last.input(1)
        soft = makers.get(weights)
        if soft is None or soft.op != "Softmax" or soft.attrs.get("log") or soft.attrs["axis"] != weights.rank - 1:
            continue
        if uses[weights] != [last] or weights in graph.outputs or weights is v or v.rank < 2 or weights.rank < 2:
            continue
        scored = _scores(graph, soft, uses, makers)
        if scored is None:
            continue
        product, gone, expr, extras = scored
        q, k = product.input(0), product.input(1)
        if {value.dtype.name for value in (q, k, v, *extras)} - {"float32", "bool"} or len(extras) > 4:
            continue
        if min(q.rank, k.rank) < 2 or product.y.shape[:-2] != last.y.shape[:-2] or q.size * v.size * k.size == 0:
            continue
        node = Node("Attend", [q, k, v, *extras], [last.y], {"expr": expr}, last.name, last.opset)
        graph.nodes = [n for n in graph.nodes if n not in (product, soft, *gone)]
        graph.nodes[graph.nodes.index(last)] = node
        uses, makers = graph.uses(), graph.makers()


def _bare(node: Node) -> bool:
    return node.maybe(2) is None and node.maybe(3) is None and node.attrs.get("act") is None


def _scores(
    graph: Graph, soft: Node, uses: dict[Value, list[Node]], makers: dict[Value, Node]
) -> tuple[Node, list[Node], Expr, list[Value]] | None:
    """The product behind a softmax, the nodes between, and the scores as an expression."""
    expr: Expr = soft.attrs.get("pre") or arg(0, "float32")
    inputs = [value for value in soft.inputs if value is not None]
    gone: list[Node] = []
    for _ in range(3):
        wide = [
            i
            for i, value in enumerate(inputs)
            if value.shape == soft.y.shape
            and value in makers
            and makers[value].op in ("MatMul", "Map")
            and value not in graph.outputs
            and uses[value] == [gone[-1] if gone else soft]
        ]
        if not wide:
            return None
        i = next((i for i in wide if makers[inputs[i]].op == "MatMul"), wide[0])
        maker = makers[inputs[i]]
        rest = [value for j, value in enumerate(inputs) if j != i]
        if maker.op == "MatMul":
            places = [arg(0, "float32")] * len(inputs)
            for j, value in enumerate(rest, 1):
                places[inputs.index(value)] = arg(j, value.dtype)
            if not _bare(maker):
                inner, more = arg(0, "float32"), []
                for number in (2, 3):
                    held = maker.maybe(number)
                    if held is not None:
                        more.append(held)
                        inner = inner + arg(len(rest) + len(more), "float32")
                act = maker.attrs.get("act")
                places[i] = inner if act is None else act.substitute([inner])
                rest += more
            return maker, gone, expr.substitute(places), rest
        if len(maker.attrs["exprs"]) > 1 or len(maker.outputs) > 1:
            return None
        held_inputs = [value for value in maker.inputs if value is not None]
        merged = list(dict.fromkeys([*rest, *held_inputs]))
        inner = maker.attrs["exprs"][0].substitute([arg(merged.index(v), v.dtype) for v in held_inputs])
        expr = expr.substitute([inner if j == i else arg(merged.index(v), v.dtype) for j, v in enumerate(inputs)])
        inputs = merged
        gone.append(maker)
    return None
