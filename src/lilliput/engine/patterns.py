"""Find normalizations that a graph spells out, and join elementwise work to the reduction that it follows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lilliput.engine.expr import Expr, arg
from lilliput.engine.graph import Graph, Node, Value

MOST_INPUTS = 8


def normalized(graph: Graph) -> None:
    """Layer normalisation, its form without the mean, and softmax, written as reductions and Maps, become one node."""
    around = _around(graph)
    for node in list(graph.nodes):
        if (
            node.op == "Map"
            and len(node.outputs) == 1
            and node.y.dtype == np.float32
            and around.makers.get(node.y) is node
            and (_softmax(graph, node, around) or _deviation(graph, node, around))
        ):
            around = _around(graph)
    graph.prune()


@dataclass
class _Around:
    """Who makes each value, and who reads it."""

    makers: dict[Value, Node]
    uses: dict[Value, list[Node]]

    def reduction(self, value: Value | None, kind: str) -> Node | None:
        """The Reduce of a kind that makes a value and keeps its dimensions."""
        node = self.makers.get(value) if value is not None else None
        if node is None or node.op != "Reduce" or node.attrs["kind"] != kind or node.attrs.get("post") is not None:
            return None
        return node if node.attrs["keep"] and len(node.inputs) == 1 else None

    def map(self, value: Value | None) -> tuple[Node, Expr] | None:
        """The Map with one expression that makes a value."""
        node = self.makers.get(value) if value is not None else None
        if node is None or node.op != "Map" or len(node.outputs) > 1:
            return None
        return node, node.attrs["exprs"][0]


def _around(graph: Graph) -> _Around:
    return _Around(graph.makers(), graph.uses())


# ------------------------------------------------------------------------------------------------------------ softmax


def _softmax(graph: Graph, last: Node, around: _Around) -> bool:
    """e / sum(e) where e = exp(x) or exp(x - max(x))."""
    root = last.attrs["exprs"][0]
    if root.op != "div" or any(a.op != "arg" for a in root.args) or root.args[0] == root.args[1]:
        return False
    e, total = (last.input(a.value) for a in root.args)
    summed, grown = around.reduction(total, "sum"), around.map(e)
    if summed is None or grown is None or summed.x is not e or summed.attrs.get("pre") is not None:
        return False
    axes = summed.attrs["axes"]
    node, expr = grown
    if len(axes) != 1 or expr.op != "exp" or e.shape != last.y.shape:
        return False
    inner = expr.args[0]
    if inner.op == "sub" and all(a.op == "arg" for a in inner.args):
        top = around.reduction(node.input(inner.args[1].value), "max")
        x = node.input(inner.args[0].value)
        if top is not None and top.x is x and top.attrs["axes"] == axes and top.attrs.get("pre") is None:
            inner = inner.args[0]
    if inner.op != "arg":
        return False
    x = node.input(inner.value)
    if x.shape != last.y.shape or x.dtype != np.float32:
        return False
    _replace(graph, last, Node("Softmax", [x], [last.y], {"axis": axes[0], "log": False, "pre": None}, last.name))
    return True


# ----------------------------------------------------------------------------------------------------- normalisations


def _deviation(graph: Graph, last: Node, around: _Around) -> bool:
    """(x - mean) / sqrt(variance + epsilon), inside any expression; then a scale and a bias."""
    root = last.attrs["exprs"][0]
    for e in root.walk():
        if e.op not in ("div", "mul") or len(e.args) != 2:
            continue
        for top, below in (e.args, e.args[::-1]) if e.op == "mul" else (e.args,):
            matched = _normal(around, last, top, below, e.op == "mul")
            if matched is None:
                continue
            x, axes, epsilon, center = matched
            if x.shape != last.y.shape or x.dtype != np.float32:
                continue
            made = Value(f"{last.name}.normal", np.dtype(np.float32), x.shape)
            inputs = [*last.inputs, made]
            rest = _with(root, e, arg(len(inputs) - 1, np.float32))
            scale, bias, done = _scaled(rest, inputs, len(inputs) - 1)
            attrs = {"axes": axes, "epsilon": epsilon, "center": center, "stats": False, "pre": None}
            if done:
                _replace(graph, last, Node("Normalize", [x, scale, bias], [last.y], attrs, last.name))
                return True
            normal = Node("Normalize", [x, None, None], [made], attrs, last.name)
            read = sorted({part.value for part in rest.walk() if part.op == "arg"})
            places = [
                arg(read.index(i) if i in read else 0, v.dtype if v is not None else np.float32)
                for i, v in enumerate(inputs)
            ]
            _replace(
                graph,
                last,
                normal,
                Node("Map", [inputs[i] for i in read], [last.y], {"exprs": (rest.substitute(places),)}, last.name),
            )
            return True
    return False


def _normal(
    around: _Around, node: Node, top: Expr, below: Expr, inverse: bool
) -> tuple[Value, tuple[int, ...], float, bool] | None:
    """(x, axes, epsilon, whether the mean is subtracted) where top / below (top * below) is a normalisation."""
    if below.op != "arg":
        return None
    spread = around.map(node.inputs[below.value])
    if spread is None:
        return None
    held, expr = spread
    root = _root(expr, inverse)
    if root is None or root[0].op != "arg":
        return None
    variance = around.reduction(held.inputs[root[0].value], "mean")
    if variance is None:
        return None
    axes = variance.attrs["axes"]
    squared = _squared(around, variance)
    if squared is None:
        return None
    owner, inner = squared
    x = _centered(around, owner, inner, axes)
    if x is not None and x is _centered(around, node, top, axes):
        return x, axes, root[1], True
    if inner.op == "arg" and top.op == "arg" and owner.inputs[inner.value] is node.inputs[top.value]:
        plain = owner.inputs[inner.value]
        return None if plain is None else (plain, axes, root[1], False)
    return None


def _root(e: Expr, inverse: bool) -> tuple[Expr, float] | None:
    """(v, epsilon) where the expression is sqrt(v + epsilon), or one over it."""
    if inverse and e.op == "div" and e.args[0].op == "const" and e.args[0].value == 1:
        return _root(e.args[1], False)
    power = e.args[1].value if e.op == "pow" and e.args[1].op == "const" else 0.5 if e.op == "sqrt" else None
    if power == (-0.5 if inverse else 0.5):
        v = e.args[0]
        if v.op == "add":
            a, b = v.args
            if a.op == "const":
                a, b = b, a
            if b.op == "const":
                return a, float(b.value)
        return v, 0.0
    return None


def _squared(around: _Around, reduction: Node) -> tuple[Node, Expr] | None:
    """(the node whose inputs it reads, d) where what is reduced is d squared."""
    pre = reduction.attrs.get("pre")
    owner = reduction
    if pre is None:
        mapped = around.map(reduction.x)
        if mapped is None:
            return None
        owner, pre = mapped
    if pre.op == "mul" and pre.args[0] == pre.args[1]:
        return owner, pre.args[0]
    if pre.op == "pow" and pre.args[1].op == "const" and pre.args[1].value == 2:
        return owner, pre.args[0]
    return None


def _centered(around: _Around, node: Node, e: Expr, axes: tuple[int, ...]) -> Value | None:
    """x where the expression is x minus its mean over axes."""
    if e.op == "arg":
        mapped = around.map(node.inputs[e.value])
        if mapped is None:
            return None
        node, e = mapped
    if e.op != "sub" or any(a.op != "arg" for a in e.args):
        return None
    x, mean = node.inputs[e.args[0].value], around.reduction(node.inputs[e.args[1].value], "mean")
    if mean is None or mean.x is not x or mean.attrs["axes"] != axes or mean.attrs.get("pre") is not None:
        return None
    return x


def _scaled(e: Expr, inputs: list[Value | None], normal: int) -> tuple[Value | None, Value | None, bool]:
    """(scale, bias, whether that is all) of an expression that is normal * scale + bias."""

    def other(whole: Expr) -> tuple[Expr, Value | None]:
        for a, b in (whole.args, whole.args[::-1]):
            if b.op == "arg" and b.value != normal:
                value = inputs[b.value]
                if value is not None and value.dtype == np.float32:
                    return a, value
        return whole, None

    bias = scale = None
    if e.op == "add":
        e, bias = other(e)
    if e.op == "mul":
        e, scale = other(e)
    return scale, bias, e.op == "arg" and e.value == normal


def _with(root: Expr, part: Expr, new: Expr) -> Expr:
    known: dict[Expr, Expr] = {part: new}

    def walk(e: Expr) -> Expr:
        if e not in known:
            known[e] = e if not e.args else Expr(e.op, tuple(walk(a) for a in e.args), e.dtype, e.value)
        return known[e]

    return walk(root)


def _replace(graph: Graph, old: Node, *new: Node) -> None:
    place = graph.nodes.index(old)
    graph.nodes[place : place + 1] = list(new)


# ---------------------------------------------------------------------------------------------------------- absorbing


def absorbed(graph: Graph) -> None:
    """A Map that only a Softmax, Normalize or Reduce reads is computed in its first pass: its attribute pre."""
    uses, makers = graph.uses(), graph.makers()
    for node in list(graph.nodes):
        if node.op not in ("Softmax", "Normalize", "Reduce") or node.attrs.get("pre") is not None:
            continue
        value = node.x
        maker = makers.get(value)
        if maker is None or maker.op != "Map" or len(maker.outputs) > 1 or uses[value] != [node]:
            continue
        if value in graph.outputs or value in node.inputs[1:] or value.dtype != np.float32:
            continue
        held = [v for v in maker.inputs if v is not None]
        wide = [v for v in held if v.shape == value.shape and not v.constant]
        if not wide or len(held) + len(node.inputs) > MOST_INPUTS:
            continue
        inputs: list[Value | None] = [wide[0], *node.inputs[1:], *(v for v in held if v is not wide[0])]
        first = len(node.inputs)
        places = [arg(0 if v is wide[0] else inputs.index(v, first), v.dtype) for v in held]
        node.attrs = {**node.attrs, "pre": maker.attrs["exprs"][0].substitute(places)}
        node.inputs = inputs
        graph.nodes.remove(maker)
