"""Planning: choose a kernel for each node, a layout for each value, and the arena for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lilliput.engine.arena import arena, share_buffers
from lilliput.engine.expr import arg
from lilliput.engine.graph import Buffer, Graph, Node, Value, row_major
from lilliput.engine.kernel import Kernel, Want, constant, dense
from lilliput.engine.views import seen
from lilliput.errors import NotSupported

Ranked = Callable[[Node], list[Kernel]]  # a node's candidates, the fastest first; cost_ns is measured or estimated


@dataclass
class Plan:
    """What is written: the nodes in order, each with its kernel, and the arena's and the largest live set's bytes."""

    graph: Graph
    arena_bytes: int = 0
    live_bytes: int = 0

    @property
    def cost_ns(self) -> float:
        """What the chosen kernels take, as measured or estimated."""
        return float(sum(node.kernel.cost_ns for node in self.graph.nodes))


def planned(graph: Graph, ranked: Ranked) -> Plan:
    """Choose kernels, lay out every value (copying where layouts differ), plan the arena."""
    _Planner(graph, ranked).run()
    share_buffers(graph)
    plan = Plan(graph)
    plan.arena_bytes, plan.live_bytes = arena(graph)
    return plan


class _Planner:
    def __init__(self, graph: Graph, ranked: Ranked) -> None:
        self.graph, self.ranked = graph, ranked
        self.nodes: list[Node] = []
        self.uses = graph.uses()
        self.lists: dict[Node, list[Kernel]] = {}
        self.copies: dict[tuple[Value, Want], Value] = {}

    def run(self) -> None:
        """Every node in order."""
        graph = self.graph
        for value in graph.values():
            if value.constant:
                constant(value)
        for value in graph.inputs:
            dense(value, Buffer(value.dtype, value.size, "input", name=value.name))
        self.outputs: dict[Value, Buffer] = {}
        self._outputs()
        for node in graph.nodes:
            if node.op == "View":
                self._view(node)
            else:
                self._compute(node)
        graph.nodes = self.nodes

    def _outputs(self) -> None:
        """Buffers of the outputs, also of one that is a constant, an input or a plain reshape of a value."""
        graph, makers = self.graph, self.graph.makers()
        seen: set[Value] = set()
        for i, value in enumerate(graph.outputs):
            if value in makers and value not in seen:
                self.outputs[value] = Buffer(value.dtype, value.size, "output", name=value.name)
            else:  # nothing makes it, or it is given twice: a copy is the output
                graph.outputs[i] = copy = Value(f"{value.name}.out", value.dtype, value.shape)
                self.outputs[copy] = Buffer(value.dtype, value.size, "output", name=value.name)
                graph.nodes.append(copying(value, copy))
                self.uses.setdefault(value, []).append(graph.nodes[-1])
            seen.add(graph.outputs[i])
        for node in reversed(graph.nodes):
            x = node.maybe(0)
            reshapes = node.op == "View" and node.attrs["how"] == "reshape" and node.y in self.outputs
            if reshapes and x in makers and x not in self.outputs and makers[x].op != "View":
                self.outputs[x] = self.outputs[node.y]

    # views -------------------------------------------------------------------------------------------------------

    def _view(self, node: Node) -> None:
        x, y = node.x, node.y
        if x.tag:
            x = self._copied(x, Want())
        placed = seen(node, x)
        if placed is None:
            x = self._copied(x, Want(exact=True))
            placed = seen(node, x)
            assert placed is not None
        wanted = self.outputs.get(y)
        if wanted is not None and x.buffer is not wanted:
            inner = Value(f"{y.name}.view", y.dtype, y.shape)
            inner.buffer, (inner.offset, inner.strides) = x.buffer, placed
            self._compute(copying(inner, y, node.name))
            return
        y.buffer, (y.offset, y.strides) = x.buffer, placed
        if y.shape == x.shape and node.attrs["how"] == "reshape":
            y.border = x.border

    # kernels -----------------------------------------------------------------------------------------------------

    def _candidates(self, node: Node) -> list[Kernel]:
        if node not in self.lists:
            self.lists[node] = self.ranked(node)
        return self.lists[node]

    def _compute(self, node: Node) -> None:
        options = self._candidates(node)
        if not options:
            raise NotSupported(
                f"compile: {node.name} ({node.op}) must have a kernel for "
                f"{', '.join(v.dtype.name for v in node.inputs if v is not None)}, and has none."
            )
        kernel = min(options, key=lambda k: k.cost_ns + self._moving(node, k))
        node.kernel = kernel
        self.lists[node] = [kernel]
        for i, value in enumerate(node.inputs):
            want = kernel.want(i)
            if value is None or want is None or i in kernel.skips:
                if value is not None and value.tag and i not in kernel.skips:
                    node.inputs[i] = self._copied(value, Want())
                continue
            if not want.fits(value):
                node.inputs[i] = self._copied(value, want)
        after = []
        for i, value in enumerate(node.outputs):
            if value is None:
                node.outputs[i] = value = Value(f"{node.name}.unused{i}", node.y.dtype, (1,))
                dense(value)
                continue
            gives = kernel.gives[i] if isinstance(kernel.gives, tuple) else kernel.gives
            buffer = self.outputs.get(value)
            if buffer is not None:
                if gives is None and kernel.follows and self._followed(node, value) is not None:
                    gives = self._chosen(node, value)
                if gives is None or (
                    gives.strides(value.shape)[:2] == (row_major(value.shape), 0) and not (gives.tag or gives.slack)
                ):
                    dense(value, buffer)
                else:
                    inner = Value(f"{value.name}.made", value.dtype, value.shape)
                    gives.place(inner)
                    node.outputs[i] = inner
                    after.append(copying(inner, value, node.name))
                continue
            (gives or self._chosen(node, value)).place(value)
        self.nodes.append(node)
        for copy in after:
            self._compute(copy)

    def _moving(self, node: Node, kernel: Kernel) -> float:
        """What copies into the layouts that a kernel asks for would cost, in ns."""
        total = 0.0
        for i, value in enumerate(node.inputs):
            want = kernel.want(i)
            if value is None or want is None or i in kernel.skips or value.buffer is None:
                continue
            if not want.fits(value) and (value, want) not in self.copies:
                total += 300 + 0.25 * value.size
        return total

    def _chosen(self, node: Node, value: Value) -> Want:
        """The layout of a value that its kernel can lay out in any way: what its readers ask for."""
        order: tuple[int, ...] | None = None
        border = [(0, 0)] * value.rank
        pitch, plane, slack = 1, 1, 0
        asked = node.kernel.follows
        if asked:
            order = self._followed(node, value)
        for reader in self.uses.get(value, []):
            if reader.op == "View":
                continue
            options = self._candidates(reader)
            if not options:
                continue
            best = options[0]
            for i, held in enumerate(reader.inputs):
                want = best.want(i)
                if held is not value or want is None or want.tag or i in best.skips:
                    continue
                wanted = None if want.order == tuple(range(value.rank)) else want.order
                if asked and wanted != order:
                    continue
                asked, order = True, wanted
                if want.border and not want.exact:
                    border = [(max(b[0], w[0]), max(b[1], w[1])) for b, w in zip(border, want.border, strict=True)]
                pitch, plane, slack = max(pitch, want.pitch), max(plane, want.plane), max(slack, want.slack)
        if not asked:
            order = self._followed(node, value)
        return Want(order, tuple(border) if any(any(b) for b in border) else (), pitch, plane, slack)

    def _followed(self, node: Node, value: Value) -> tuple[int, ...] | None:
        """The order of the first input of the same shape, so that both are walked through alike."""
        for held in node.inputs:
            if (
                held is not None
                and not held.constant
                and held.shape == value.shape
                and not held.tag
                and all(int(s) >= 0 for s in held.strides)
            ):
                order = sorted(range(value.rank), key=lambda d: (-int(held.strides[d]), d))
                unit = [d for d in range(value.rank) if value.shape[d] != 1]
                if [d for d in order if d in unit] == unit:
                    return None
                return tuple(order)
        return None

    def _copied(self, value: Value, want: Want) -> Value:
        """The value in another layout, copied once for all that ask for it."""
        for (known, _), copy in self.copies.items():
            if known is value and want.fits(copy):
                return copy
        copy = Value(f"{value.name}.copy{len(self.copies)}", value.dtype, value.shape)
        node = copying(value, copy)
        if value.tag or want.tag:
            node.attrs["tags"] = (value.tag, want.tag)
        node.kernel = self.ranked(node)[0]
        want.place(copy)
        self.nodes.append(node)
        self.copies[value, want] = copy
        return copy


def copying(x: Value, y: Value, name: str = "") -> Node:
    """A node that copies x to y."""
    return Node("Copy", [x], [y], {"exprs": (arg(0, x.dtype),)}, name or y.name)
