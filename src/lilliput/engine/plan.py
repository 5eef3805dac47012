"""The plan: which kernel computes each node, where every value lies, and one arena for all that lives while running."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from lilliput.engine.expr import arg
from lilliput.engine.graph import Buffer, Graph, Node, Value, row_major, same
from lilliput.engine.kernel import Kernel, Want, constant, dense
from lilliput.engine.size import Size, c
from lilliput.errors import NotSupported

ALIGN = 64
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
        found = seen(node, x)
        if found is None:
            x = self._copied(x, Want(exact=True))
            found = seen(node, x)
            assert found is not None
        wanted = self.outputs.get(y)
        if wanted is not None and x.buffer is not wanted:
            inner = Value(f"{y.name}.view", y.dtype, y.shape)
            inner.buffer, (inner.offset, inner.strides) = x.buffer, found
            self._compute(copying(inner, y, node.name))
            return
        y.buffer, (y.offset, y.strides) = x.buffer, found
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


# -------------------------------------------------------------------------------------------------------------- views


def seen(node: Node, x: Value) -> tuple[int, tuple[int, ...]] | None:
    """(offset, strides) of a View's output in the buffer of x; None where strides cannot say it."""
    how, shape = node.attrs["how"], node.y.shape
    if how == "transpose":
        return x.offset, tuple(x.strides[p] for p in node.attrs["perm"])
    if how == "slice":
        offset = x.offset
        for start, stride in zip(node.attrs["starts"], x.strides, strict=True):
            offset = offset + start * stride
        return offset, tuple(s * k for s, k in zip(x.strides, node.attrs["steps"], strict=True))
    if how == "expand":
        lead = len(shape) - x.rank
        return x.offset, tuple(
            0 if i < lead or (x.shape[i - lead] == 1 and size != 1) else x.strides[i - lead]
            for i, size in enumerate(shape)
        )
    strides = reshaped(x.shape, x.strides, shape)
    return None if strides is None else (x.offset, strides)


def reshaped(old: Sequence[int], strides: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
    """Strides of the same elements in a new shape; None where there are none."""
    if tuple(old) == tuple(new):
        return tuple(strides)
    if 0 in new or same(old, strides, row_major(old)):
        return row_major(new)
    # Runs of old dimensions that are walked through as one, each split into some of the new ones.
    dims = [(size, stride) for size, stride in zip(old, strides, strict=True) if size != 1]
    found: list[int] = []
    i = 0
    targets = list(new)
    j = 0
    while j < len(targets):
        if targets[j] == 1:
            found.append(0)
            j += 1
            continue
        if i >= len(dims):
            return None
        ends = _run(dims, i, targets, j)
        if ends is None:
            return None
        step = dims[ends[0] - 1][1]
        i, k = ends
        part: list[int] = []
        for t in reversed(targets[j:k]):
            part.append(step if t != 1 else 0)
            step = step * t
        found += reversed(part)
        j = k
    return tuple(found) if i == len(dims) else None


def _run(dims: Sequence[tuple[int, int]], i: int, targets: Sequence[int], j: int) -> tuple[int, int] | None:
    """Where the old dimensions from i on, walked through as one, and the new ones from j on hold as many elements.

    None where they never do, or where the old ones are not one run in memory. dims: (size, stride).
    """
    size, made, first, k = dims[i][0], targets[j], i, j + 1
    i += 1
    while size != made:
        if int(size) < int(made) or (int(size) == int(made) and i < len(dims)):
            if i >= len(dims):
                return None
            size = size * dims[i][0]
            i += 1
        else:
            if k >= len(targets):
                return None
            made = made * targets[k]
            k += 1
    if any(outer != inner * inner_size for (_, outer), (inner_size, inner) in pairwise(dims[first:i])):
        return None
    return i, k


# -------------------------------------------------------------------------------------------------------------- arena


def share_buffers(graph: Graph) -> None:
    """Where a kernel may write over an input that nobody reads again, the output takes its memory."""
    last: dict[Buffer, int] = {}
    for i, node in enumerate(graph.nodes):
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.buffer is not None:
                last[value.buffer] = i
    members: dict[Buffer, list[Value]] = {}
    for value in _placed(graph):
        assert value.buffer is not None
        members.setdefault(value.buffer, []).append(value)
    for i, node in enumerate(graph.nodes):
        y = node.y
        assert y.buffer is not None
        if y.buffer.place != "arena" or y.tag:
            continue
        for j in node.kernel.reuses:
            x = node.maybe(j)
            if x is None or x.buffer is None or last[x.buffer] != i or not _overlays(node, x, members):
                continue
            old, new = y.buffer, x.buffer
            for value in members.pop(old):
                value.buffer = new
                members[new].append(value)
            last[new] = last.pop(old)
            break


def _overlays(node: Node, x: Value, members: dict[Buffer, list[Value]]) -> bool:
    """Whether a node's output fits exactly over an input of which no other input shows a part."""
    y = node.y
    if x.buffer is None or y.buffer is None or x.buffer.place != "arena" or x.buffer is y.buffer:
        return False
    if (x.dtype.itemsize, x.shape, x.strides, x.offset) != (y.dtype.itemsize, y.shape, y.strides, y.offset):
        return False
    return x.buffer.count >= y.buffer.count and not any(v is not x and v in node.inputs for v in members[x.buffer])


def _placed(graph: Graph) -> list[Value]:
    return [value for value in graph.values() if value.buffer is not None]


def arena(graph: Graph) -> tuple[int, int]:
    """Give every buffer its place in the arena; (bytes of the arena, bytes of the largest live set).

    The largest buffers first, each at the lowest place where it meets none that lives at the same time.
    """
    life: dict[Buffer, list[int]] = {}
    for i, node in enumerate(graph.nodes):
        for value in (*node.inputs, *node.outputs):
            if value is not None and value.buffer is not None and value.buffer.place == "arena":
                life.setdefault(value.buffer, [i, i])[1] = i
        if node.kernel.scratch:
            scratch = Buffer(np.dtype(np.uint8), node.kernel.scratch, name=f"{node.name}.scratch")
            node.attrs["scratch"] = scratch
            life[scratch] = [i, i]
    size = {buffer: -(-(buffer.size_bytes) // ALIGN) * ALIGN for buffer in life}
    placed: list[Buffer] = []
    for buffer in sorted(life, key=lambda b: (-size[b], life[b])):
        first, last = life[buffer]
        meets = sorted(
            (other.at, other.at + size[other]) for other in placed if life[other][0] <= last and first <= life[other][1]
        )
        at = 0
        for start, end in meets:
            if start - at >= size[buffer]:
                break
            at = max(at, end)
        buffer.at = at
        placed.append(buffer)
    change = [0] * (len(graph.nodes) + 1)
    for buffer, (first, last) in life.items():
        change[first] += size[buffer]
        change[last + 1] -= size[buffer]
    live = max(itertools.accumulate(change))
    # What a kernel may read behind the end of an input lies in the arena, also for the last buffer in it.
    behind = max(
        (
            want.slack * value.dtype.itemsize
            for node in graph.nodes
            for i, value in enumerate(node.inputs)
            if value is not None and (want := node.kernel.want(i)) is not None
        ),
        default=0,
    )
    total = max((buffer.at + size[buffer] for buffer in placed), default=0)
    return total + -(-behind // ALIGN) * ALIGN, live


def shape_text(shape: Sequence[int]) -> str:
    """A shape for people: 16x32x32."""
    return "x".join(c(size).strip("()") if isinstance(size, Size) else str(size) for size in shape) or "scalar"
