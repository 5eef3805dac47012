"""Lowering: rewrite ONNX's many operators in few, so that each is fused, laid out and computed in one way.

What is left after it: Map (elementwise expressions), View (another way to look at a value), Copy, Reduce, and the
operators that have kernels of their own (Conv, MatMul, Softmax, ...).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from lilliput.engine.expr import Expr, arg
from lilliput.engine.graph import Array, Graph, Node, Value
from lilliput.engine.size import fixed, never_negative, product, shown
from lilliput.errors import NotSupported

Lowering = Callable[[Node, "Build"], None]
LOWERINGS: dict[str, Lowering] = {}


def lower(*ops: str) -> Callable[[Lowering], Lowering]:
    """Register how operators are lowered: a function that adds nodes to a Build, the last making the node's outputs."""

    def register(function: Lowering) -> Lowering:
        for op in ops:
            LOWERINGS[op] = function
        return function

    return register


@cache
def gather() -> dict[str, Lowering]:
    """Every lowering there is: the modules of the folder ops/."""
    from lilliput.engine import ops

    for module in sorted(m.name for m in pkgutil.iter_modules(ops.__path__)):
        importlib.import_module(f"lilliput.engine.ops.{module}")
    return LOWERINGS


def supported(op: str) -> bool:
    """Whether an operator can be compiled."""
    return op in gather()


def lowered(graph: Graph) -> Graph:
    """The graph in the engine's own operators."""
    build = Build(graph)
    table = gather()
    for node in graph.nodes:
        build.source = node
        try:
            table[node.op](node, build)
        except NotSupported:
            raise
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(
                f"compile: {node.name} ({node.op}) must have inputs and attributes as ONNX defines them, "
                f"got {', '.join('none' if v is None else shown(v.shape) for v in node.inputs)} "
                f"({type(error).__name__}: {str(error)[:80]}). The file is damaged."
            ) from error
    graph.nodes = build.nodes
    graph.prune()
    _entries(graph)
    for value in graph.values():
        for size in value.shape:
            build.need(size)
    return graph


def _entries(graph: Graph) -> None:
    """Numbers that follow from the free sizes, and that something reads, are written when the model runs."""
    made: list[Node] = []
    for value in list(graph.values()):
        if value.entries is not None:
            made.append(Node("Entries", [], [value], {"entries": value.entries}))
    graph.nodes[:0] = made


class Build:
    """The nodes of a lowered graph, in order."""

    def __init__(self, graph: Graph | None = None) -> None:
        self.nodes: list[Node] = []
        self.source: Node | None = None
        self.graph = graph or Graph([], [], [])
        self._count = 0
        self.rounds: dict[Value, tuple[Any, ...]] = {}  # levels: (numbers, scale, zero point, least, most)

    def need(self, size: int) -> None:
        """A size that is at least 0 at the maxima must be so for every smaller one: checked when the model runs."""
        if not never_negative(size, self.graph.sizes) and size not in self.graph.needs:
            if fixed(size) or int(size) < 0:
                raise ValueError(
                    f"compile: {self.source.name if self.source else 'a size'} must not have negative "
                    f"sizes, got {size}. The file is damaged."
                )
            self.graph.needs.append(size)

    def value(self, dtype: Any, shape: Sequence[int], like: str = "") -> Value:
        """A new value."""
        self._count += 1
        name = like or (self.source.name if self.source else "v")
        return Value(f"{name}.{self._count}", np.dtype(dtype), tuple(shape))

    def const(self, data: Array) -> Value:
        """A new constant."""
        made = self.value(data.dtype, data.shape)
        made.data = data
        return made

    def add(self, op: str, inputs: Sequence[Value | None], outputs: Sequence[Value | None], **attrs: Any) -> Node:
        """A node that makes `outputs`."""
        name = self.source.name if self.source else ""
        node = Node(op, list(inputs), list(outputs), attrs, name, self.source.opset if self.source else 0)
        self.nodes.append(node)
        return node

    def keep(self, node: Node, op: str = "", **attrs: Any) -> None:
        """The node as it is, for an operator that has kernels of its own."""
        node.op = op or node.op
        node.attrs = {**node.attrs, **attrs}
        self.nodes.append(node)

    def map(
        self, inputs: Sequence[Value], make: Callable[..., Expr], out: Value | None = None, dtype: Any = None
    ) -> Value:
        """Elementwise: make(one Expr for each input) is the element of the output; shapes broadcast."""
        result = make(*(arg(i, value.dtype) for i, value in enumerate(inputs)))
        if out is None:
            out = self.value(dtype or result.dtype, broadcast([value.shape for value in inputs]))
        self.add("Map", inputs, [out], exprs=(result,))
        return out

    def view(self, x: Value, shape: Sequence[int], how: str, out: Value | None = None, **attrs: Any) -> Value:
        """Another way to look at x: how = "reshape"; "transpose" with perm; "slice" with starts and steps (by
        dimension); "expand"."""
        out = out or self.value(x.dtype, shape)
        self.add("View", [x], [out], how=how, **attrs)
        return out

    def reshape(self, x: Value, shape: Sequence[int], out: Value | None = None) -> Value:
        """The same elements, in C order, in another shape."""
        if product(x.shape) != product(shape):
            raise ValueError(
                f"compile: {self.source.name if self.source else x.name} must keep its elements, but "
                f"{shown(x.shape)} becomes {shown(shape)}. A size that is fixed in the file must be "
                "given as it is there."
            )
        return self.view(x, shape, "reshape", out)

    def transpose(self, x: Value, perm: Sequence[int], out: Value | None = None) -> Value:
        """Dimensions in another order."""
        return self.view(x, [x.shape[p] for p in perm], "transpose", out, perm=tuple(perm))

    def slice(
        self,
        x: Value,
        starts: Sequence[int],
        shape: Sequence[int],
        steps: Sequence[int] | None = None,
        out: Value | None = None,
    ) -> Value:
        """Every steps-th element from starts on."""
        return self.view(x, shape, "slice", out, starts=tuple(starts), steps=tuple(steps or [1] * len(starts)))

    def expand(self, x: Value, shape: Sequence[int], out: Value | None = None) -> Value:
        """Broadcast to a shape."""
        return self.view(x, shape, "expand", out)


def broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape that shapes broadcast to, by ONNX's (numpy's) rule."""
    rank = max((len(shape) for shape in shapes), default=0)
    joint: list[int] = []
    for i in range(rank):
        sizes = [shape[i - rank + len(shape)] for shape in shapes if i - rank + len(shape) >= 0]
        wide = [size for size in sizes if size != 1]
        if any(size != wide[0] for size in wide[1:]):
            raise ValueError(f"compile: shapes must broadcast, got {', '.join(shown(s) for s in shapes)}.")
        joint.append(wide[0] if wide else 1)
    return tuple(joint)


def elements(shape: Sequence[int]) -> int:
    """How many elements a shape has."""
    return product(shape)
