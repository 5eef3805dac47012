"""Quantized activations: keep values as 8-bit integers between layers, and compute products in integer arithmetic.

After lowering such a value is computed as clamp(round(...)) * scale. Where a convolution or a product with 8-bit
weights reads it, the value is stored as the levels alone and that layer becomes a Conv8 or a MatMulInteger; elementwise
operators read levels as numbers again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lilliput.engine.expr import Expr, arg, const
from lilliput.engine.graph import Array, Graph, Node, Value, all_fixed

Border = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Quantized:
    """A value that is (low + level) * scale, level from 0 to 255. core: low + level as an expression."""

    core: Expr
    low: int
    scale: float

    def level(self, core: Expr) -> Expr:
        """The level of a core, as a byte."""
        return (core - float(self.low) if self.low else core).cast("uint8")

    def number(self, level: Expr) -> Expr:
        """The number that a level stands for."""
        x = level.cast("float32")
        return (x + float(self.low) if self.low else x) * const(self.scale, "float32")


def quantized(expr: Expr | None) -> Quantized | None:
    """How the values of an expression can be stored as levels; None where they cannot."""
    if expr is None or expr.op != "mul" or expr.dtype != "float32":
        return None
    core, scale = expr.args if expr.args[1].op == "const" else expr.args[::-1]
    if scale.op != "const":
        return None
    low, high, e = -math.inf, math.inf, core
    while e.op in ("max", "min") and len(e.args) == 2:
        inner, bound = e.args if e.args[1].op == "const" else e.args[::-1]
        if bound.op != "const":
            return None
        if e.op == "max":
            low = max(low, min(float(bound.value), high))
        else:
            high = min(high, max(float(bound.value), low))
        e = inner
    if e.op != "round" or not low.is_integer() or not high.is_integer() or high - low > 255:
        return None
    return Quantized(core, int(low), float(scale.value))


def narrowable(graph: Graph) -> bool:
    """Whether a layer could be integer."""
    return bool(_layers(graph)[1])


def _layers(graph: Graph) -> tuple[dict[Value, Quantized], dict[Node, tuple[Array, Array]]]:
    """The values that can be levels, and the layers that could read them with their weights' levels and scales."""
    by_value = {}
    for node in graph.nodes:
        held = quantized(_expr(node)) if len(node.outputs) == 1 else None
        if held is not None:
            by_value[node.y] = held
    layers = {}
    for node in graph.nodes:
        weights = _weights(node, by_value[node.x]) if node.inputs and node.inputs[0] in by_value else None
        if weights is not None:
            layers[node] = weights
    return by_value, layers


def narrowed(graph: Graph) -> Graph:
    """The graph with levels stored where that makes layers integer."""
    uses, makers = graph.uses(), graph.makers()
    by_value, layers = _layers(graph)
    around: dict[Value, Border] = {}
    for node in layers:
        if node.op == "Conv":
            before = around.get(node.x, ((0, 0),) * 4)
            around[node.x] = tuple(
                (max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(before, border(node), strict=True)
            )
    kept = {node: around.get(node.y, ((0, 0),) * 4) for node in layers}
    narrow: dict[Value, Value] = {}
    for value, held in by_value.items():
        maker, readers = makers[value], uses.get(value, [])
        alone = (
            value not in graph.outputs
            and all(_reads(node, value, layers) for node in readers)
            and (maker in layers or maker.op == "Map")
        )
        if not alone and not any(node in layers and node.x is value for node in readers):
            continue
        narrow[value] = levels = Value(f"{value.name}.levels", np.dtype(np.uint8), value.shape)
        if alone:
            _set(maker, held.level(held.core))
            maker.outputs = [levels]
        else:
            again = (arg(0, "float32") * const(np.float32(1) / np.float32(held.scale), "float32")).of("round")
            node = Node("Map", [value], [levels], {"exprs": (held.level(again),)}, levels.name)
            graph.nodes.insert(graph.nodes.index(maker) + 1, node)
    for node in list(graph.nodes):
        if node in layers:
            _integer(graph, node, layers[node], by_value, narrow, kept[node])
        elif node.op == "Map":
            _widen(node, by_value, narrow)
    graph.prune()
    return graph


def _expr(node: Node) -> Expr | None:
    if node.op == "Map":
        return node.attrs["exprs"][0] if len(node.attrs["exprs"]) == 1 else None
    return node.attrs.get("act") if node.op in ("Conv", "MatMul") else None


def _set(node: Node, expr: Expr) -> None:
    node.attrs = {**node.attrs, **({"exprs": (expr,)} if node.op == "Map" else {"act": expr})}


def _reads(node: Node, value: Value, layers: dict[Node, tuple[Array, Array]]) -> bool:
    """Whether a node can read levels instead of this value."""
    if node.op == "Map":
        return not any(n is None for n in node.inputs)
    return node in layers and all(held is not value or i in (0, 3) for i, held in enumerate(node.inputs))


def _weights(node: Node, held: Quantized) -> tuple[Array, Array] | None:
    """The weights of a layer as signed levels, and one scale for each output; None where it stays as it is."""
    if node.op not in ("Conv", "MatMul") or not all_fixed(node):
        return None
    weight, bias = node.input(1), node.maybe(2)
    narrow = weight.narrow
    if (
        weight.data is None
        or narrow is None
        or narrow.scale is None
        or narrow.bits > 8
        or (bias is not None and bias.data is None)
    ):
        return None
    outs = int(node.y.shape[1 if node.op == "Conv" else -1])
    if node.op == "Conv" and (held.low != 0 or node.x.rank != 4 or node.attrs["group"] != 1 or weight.shape[1] % 4):
        return None
    if node.op == "MatMul" and (weight.rank != 2 or node.x.rank < 2 or not -255 <= held.low <= 0):
        return None
    levels = narrow.levels.astype(np.int32) - (0 if narrow.zero_point is None else narrow.zero_point.astype(np.int32))
    axis = 0 if node.op == "Conv" else weight.rank - 1
    if (
        np.abs(levels).max(initial=0) > 127
        or narrow.scale.size not in (1, outs)
        or (narrow.scale.size == outs and narrow.scale.shape[axis] != outs)
    ):
        return None
    scale = np.broadcast_to(narrow.scale.reshape(-1), (outs,)).astype(np.float32) * np.float32(held.scale)
    return levels.astype(np.int8), scale


def _integer(
    graph: Graph,
    node: Node,
    weights: tuple[Array, Array],
    by_value: dict[Value, Quantized],
    narrow: dict[Value, Value],
    around: Border,
) -> None:
    """The layer on levels: Conv8(x, w, scale, bias, residual) with attrs expr, of the sum times the scale plus the bias
    (argument 0) and the residual (argument 1); or MatMulInteger."""
    held, source = by_value[node.x], narrow[node.x]
    bias, residual = node.maybe(2), node.maybe(3)
    flat = np.zeros(len(weights[1]), np.float32) if bias is None else np.asarray(bias.data, np.float32).reshape(-1)
    flat = np.ascontiguousarray(np.broadcast_to(flat, (len(weights[1]),)))
    total, extras = arg(0, "float32"), []
    if residual is not None:
        levels = narrow.get(residual)
        extras = [levels or residual]
        total = total + (arg(1, "float32") if levels is None else by_value[residual].number(arg(1, "uint8")))
    act = node.attrs.get("act")
    expr = total if act is None else act.substitute([total])

    def constant(name: str, data: Array) -> Value:
        return Value(f"{node.name}.{name}", data.dtype, data.shape, data)

    w, scale, plus = constant("levels", weights[0]), constant("scale", weights[1]), constant("bias", flat)
    if node.op == "Conv":
        attrs = {**{k: v for k, v in node.attrs.items() if k != "act"}, "expr": expr, "border": around}
        new = Node("Conv8", [source, w, scale, plus, *extras], node.outputs, attrs, node.name, node.opset)
    else:
        product = arg(0, "int32").cast("float32") * arg(1, "float32") + arg(2, "float32")
        zero = constant("zero", np.array(-held.low, np.uint8)) if held.low else None
        expr = expr.substitute([product, *(arg(3 + i, v.dtype) for i, v in enumerate(extras))])
        new = Node(
            "MatMulInteger",
            [source, w, zero, None, scale, plus, *extras],
            node.outputs,
            {"expr": expr},
            node.name,
            node.opset,
        )
    graph.nodes[graph.nodes.index(node)] = new


def border(node: Node) -> Border:
    """The zeros around its input that a convolution over planes reads."""
    a, x, y = node.attrs, node.x, node.y
    around = [(0, 0), (0, 0)]
    for d in range(2):
        before = a["pads"][d]
        last = (int(y.shape[2 + d]) - 1) * a["strides"][d] + (a["kernel_shape"][d] - 1) * a["dilations"][d] - before
        around.append((before, max(last - int(x.shape[2 + d]) + 1, 0)))
    return tuple(around)


def _widen(node: Node, by_value: dict[Value, Quantized], narrow: dict[Value, Value]) -> None:
    """An elementwise operator that reads levels."""
    first = node.inputs[0]
    if not any(value in narrow for value in node.inputs) or (first is not None and narrow.get(first) is node.y):
        return  # it reads none, or makes them
    places = []
    for i, value in enumerate(node.inputs):
        assert value is not None
        if value in narrow:
            places.append(by_value[value].number(arg(i, "uint8")))
            node.inputs[i] = narrow[value]
        else:
            places.append(arg(i, value.dtype))
    node.attrs = {**node.attrs, "exprs": tuple(e.substitute(places) for e in node.attrs["exprs"])}
