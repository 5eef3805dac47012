"""Plan the arena: one block of memory with an offset for every value that lives while the model runs."""

from __future__ import annotations

import itertools

import numpy as np

from lilliput.engine.graph import Buffer, Graph, Node, Value

ALIGN = 64


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
