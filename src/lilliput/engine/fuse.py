"""Fusion: merge chains of elementwise operators, and join bias, residual and activation to the product before them."""

from __future__ import annotations

import numpy as np

from lilliput.engine.attend import attended
from lilliput.engine.expr import Expr, arg
from lilliput.engine.graph import Graph, Narrow, Node, Value
from lilliput.engine.integer import finished
from lilliput.engine.patterns import absorbed, normalized

MOST_INPUTS, MOST_OPERATORS = 8, 160
PRODUCTS = ("Conv", "ConvTranspose", "MatMul")


def fused(graph: Graph) -> Graph:
    """The graph with fewer nodes that computes the same."""
    for step in (scales, chains, normalized, epilogues, scales, chains, attended, absorbed, finished):
        step(graph)
        graph.prune()
    return graph


def _same(a: Value, b: Value) -> bool:
    return a.shape == b.shape


# ------------------------------------------------------------------------------------------------------------- chains


def chains(graph: Graph) -> None:
    """A Map whose only reader is a Map of the same shape is computed inside it."""
    uses, makers = graph.uses(), graph.makers()
    gone: set[Node] = set()
    for node in graph.nodes:
        if node.op != "Map":
            continue
        while maker := next((m for v in node.inputs if (m := _inside(graph, node, v, uses, makers, gone))), None):
            gone.add(maker)
            for v in maker.inputs:
                if v is not None:
                    uses[v] = [n for n in uses[v] if n is not maker] + ([] if node in uses[v] else [node])
    graph.nodes = [node for node in graph.nodes if node not in gone]


def _inside(
    graph: Graph,
    node: Node,
    value: Value | None,
    uses: dict[Value, list[Node]],
    makers: dict[Value, Node],
    gone: set[Node],
) -> Node | None:
    """Compute one input of a Map inside it, where that is a Map that nothing else reads; the node that made it."""
    maker = makers.get(value) if value is not None else None
    if value is None or maker is None or maker.op != "Map" or maker in gone or value in graph.outputs:
        return None
    if uses[value] != [node] or not _same(value, node.y) or len(maker.outputs) > 1:
        return None
    if len(node.inputs) + len(maker.inputs) - 1 > MOST_INPUTS or maker.attrs["exprs"][0].count() >= MOST_OPERATORS:
        return None
    inputs = [v for v in node.inputs if v is not value]
    inner = []
    for v in maker.inputs:
        if v not in inputs:
            inputs.append(v)
        inner.append(inputs.index(v))
    replaced = maker.attrs["exprs"][0].substitute([arg(j, inputs[j].dtype) for j in inner])  # type: ignore[union-attr]
    places = [
        replaced if v is value else arg(inputs.index(v), v.dtype)  # type: ignore[union-attr]
        for v in node.inputs
    ]
    exprs = tuple(e.substitute(places) for e in node.attrs["exprs"])
    if sum(e.count() for e in exprs) > MOST_OPERATORS:
        return None
    node.inputs, node.attrs = inputs, {**node.attrs, "exprs": exprs}
    return maker


# --------------------------------------------------------------------------------------------------- after a product


def scales(graph: Graph) -> None:
    """y = product * a + b with constants by channel (a batch norm): into the weights and the bias."""
    uses, makers = graph.uses(), graph.makers()
    for node in list(graph.nodes):
        if node.op != "Map":
            continue
        for i, value in enumerate(node.inputs):
            maker = makers.get(value) if value is not None else None
            if value is None or maker is None or maker.op not in PRODUCTS or uses[value] != [node]:
                continue
            if value in graph.outputs or maker.maybe(3) is not None or maker.attrs.get("act") is not None:
                continue
            expr = node.attrs["exprs"][0]
            core, a, b = _affine(expr, arg(i, value.dtype), node, maker)
            if core is None or (a is None and b is None) or len(node.attrs["exprs"]) > 1:
                continue
            if a is not None and not _scale(maker, a):
                continue
            bias = maker.maybe(2)
            if bias is not None and bias.data is None:
                continue
            known = None if bias is None else bias.data
            before = np.zeros(_channels(maker), np.float32) if known is None else known.astype(np.float32)
            after = before if a is None else before * a
            after = after if b is None else after + b
            if bias is not None or b is not None:
                held = Value(f"{maker.name}.bias", np.dtype(np.float32), (len(after),), after.astype(np.float32))
                maker.inputs = [*maker.inputs[:2], held]
            node.attrs = {**node.attrs, "exprs": (_replaced(expr, core, arg(i, value.dtype)),)}
            _drop_unread(node)
            uses, makers = graph.uses(), graph.makers()
            break
    _drop_identities(graph)


def _channels(node: Node) -> int:
    return int(node.y.shape[-1 if node.op == "MatMul" else 1])


def _by_channel(value: Value, node: Node) -> np.ndarray | None:
    """A constant that is one number for each channel of the product's output (or one in all)."""
    data, y = value.data, node.y
    if data is None or data.dtype != np.float32 or data.ndim > y.rank:
        return None
    axis = y.rank - 1 if node.op == "MatMul" else 1
    shape = (1,) * (y.rank - data.ndim) + data.shape
    if any(size != 1 for i, size in enumerate(shape) if i != axis) or shape[axis] not in (1, y.shape[axis]):
        return None
    return np.broadcast_to(data.reshape(-1), (int(y.shape[axis]),))


def _affine(
    root: Expr, start: Expr, node: Node, maker: Node
) -> tuple[Expr | None, np.ndarray | None, np.ndarray | None]:
    """The largest part of an expression that is start * a + b, and a and b by channel."""
    parents = _parents(root)
    core, a, b = start, None, None
    while len(parents.get(core, [])) == 1:
        up = parents[core][0]
        if up.op not in ("add", "mul", "sub") or len(up.args) != 2 or up.args[0] == up.args[1]:
            break
        if up.op == "sub" and up.args[0] != core:
            break
        other = up.args[1] if up.args[0] == core else up.args[0]
        if other.op == "const":
            number = np.broadcast_to(np.float32(other.value), (_channels(maker),))
        elif other.op == "arg":
            held = node.inputs[other.value]
            channels = None if held is None else _by_channel(held, maker)
            if channels is None:
                break
            number = channels
        else:
            break
        if up.op == "mul":
            a = number if a is None else a * number
            b = None if b is None else b * number
        else:
            number = -number if up.op == "sub" else number
            b = number if b is None else b + number
        core = up
    return (core, a, b) if core is not start else (None, None, None)


def _parents(root: Expr) -> dict[Expr, list[Expr]]:
    parents: dict[Expr, list[Expr]] = {}
    for e in root.walk():
        for part in dict.fromkeys(e.args):
            parents.setdefault(part, []).append(e)
    return parents


def _replaced(root: Expr, core: Expr, new: Expr) -> Expr:
    return root.replaced({core: new})


def _scale(node: Node, a: np.ndarray) -> bool:
    """Multiply the weights of a product by one number for each output channel."""
    w = node.input(1)
    if w.data is None or w.data.dtype != np.float32:
        return False
    if node.op == "Conv":
        shape = (-1, *(1,) * (w.rank - 1))
    elif node.op == "ConvTranspose":
        if node.attrs.get("group", 1) != 1:
            return False
        shape = (1, -1, *(1,) * (w.rank - 2))
    else:
        shape = (-1,)
    factor = a.reshape(shape).astype(np.float32)
    narrow = None
    if w.narrow is not None:
        if w.narrow.scale is None:
            narrow = Narrow(
                w.narrow.bits,
                w.narrow.levels,
                factor.reshape(factor.shape if node.op != "MatMul" else (1,) * (w.rank - 1) + (-1,)),
            )
        else:
            narrow = Narrow(w.narrow.bits, w.narrow.levels, w.narrow.scale * factor, w.narrow.zero_point)
    scaled = Value(f"{w.name}.scaled", w.dtype, w.shape, (w.data * factor).astype(np.float32), narrow)
    node.inputs = [node.x, scaled, *node.inputs[2:]]
    return True


def _drop_unread(node: Node) -> None:
    """Keep the inputs of a Map that its expressions read."""
    read = sorted({e.value for root in node.attrs["exprs"] for e in root.walk() if e.op == "arg"})
    places = [arg(0, np.float32)] * len(node.inputs)
    for new, old in enumerate(read):
        places[old] = arg(new, node.input(old).dtype)
    node.attrs = {**node.attrs, "exprs": tuple(e.substitute(places) for e in node.attrs["exprs"])}
    node.inputs = [node.inputs[old] for old in read]


def _drop_identities(graph: Graph) -> None:
    """A Map that does nothing: its maker makes its output."""
    uses, makers = graph.uses(), graph.makers()
    for node in list(graph.nodes):
        if node.op == "Map" and len(node.outputs) == 1 and len(node.inputs) == 1 and node.attrs["exprs"][0].op == "arg":
            x, maker = node.x, makers.get(node.x)
            if maker is not None and uses[x] == [node] and x not in graph.outputs and _same(x, node.y):
                maker.outputs = [node.y if v is x else v for v in maker.outputs]
                graph.nodes.remove(node)
                makers[node.y] = maker


def epilogues(graph: Graph) -> None:
    """Bias, one residual addition and an activation, computed by the product that they follow.

    A fused Conv, ConvTranspose or MatMul computes act(product + bias + residual): bias is input 2 (by channel), the
    residual input 3 (of the output's shape), act the attribute "act", an expression of one argument.
    """
    uses, makers = graph.uses(), graph.makers()
    for node in list(graph.nodes):
        if node.op != "Map" or len(node.attrs["exprs"]) > 1:
            continue
        ranked = sorted(
            (
                (graph.nodes.index(makers[v]), i, v)
                for i, v in enumerate(node.inputs)
                if v is not None and v in makers and makers[v].op in PRODUCTS
            ),
            key=lambda t: -t[0],
        )
        for _, i, value in ranked:
            maker = makers[value]
            if uses[value] != [node] or value in graph.outputs or not _same(value, node.y):
                continue
            if value.dtype != np.float32 or maker.attrs.get("act") is not None:
                continue
            held = [*node.inputs, *maker.inputs]
            if _join(graph, maker, node, i):
                alive = [maker] if maker.outputs == node.outputs else [node, maker]
                for v in dict.fromkeys(v for v in (*held, *node.inputs, *maker.inputs) if v is not None):
                    uses[v] = [
                        *(n for n in uses.get(v, []) if n is not node and n is not maker),
                        *(n for n in alive if v in n.inputs),
                    ]
                makers.update((v, n) for n in alive for v in n.outputs if v is not None)
                break


def _join(graph: Graph, maker: Node, node: Node, i: int) -> bool:
    root, start = node.attrs["exprs"][0], arg(i, np.float32)
    parents, core = _parents(root), start
    bias, residual = maker.maybe(2), maker.maybe(3)
    while len(parents.get(core, [])) == 1 and parents[core][0].op == "add":
        up = parents[core][0]
        other = up.args[1] if up.args[0] == core else up.args[0]
        held = node.inputs[other.value] if other.op == "arg" else None
        if held is None or up.args[0] == up.args[1]:
            break
        flat = _by_channel(held, maker)
        if flat is not None and (bias is None or bias.constant):
            before = 0 if bias is None else bias.data
            bias = Value(f"{maker.name}.bias", np.dtype(np.float32), flat.shape, (flat + before).astype(np.float32))
        elif residual is None and _same(held, node.y) and held.dtype == np.float32 and not held.constant:
            residual = held
        else:
            break
        core = up
    whole = root.dtype == "float32" and _only_core(root, core)
    if not whole and core is start:
        return False
    graph.nodes.remove(maker)
    place = graph.nodes.index(node)
    maker.inputs = [maker.inputs[0], maker.inputs[1], bias, residual]
    if whole:
        rest = _replaced(root, core, arg(0, np.float32))
        maker.attrs = {**maker.attrs, "act": None if rest.op == "arg" else rest}
        maker.outputs = [node.y]
        graph.nodes[place] = maker
    else:
        graph.nodes.insert(place, maker)
        node.attrs = {**node.attrs, "exprs": (_replaced(root, core, start),)}
        _drop_unread(node)
    return True


def _only_core(root: Expr, core: Expr) -> bool:
    """Whether nothing but the core reads an argument."""
    marker = Expr("const", (), core.dtype, 0)
    return not any(e.op == "arg" for e in _replaced(root, core, marker).walk())
