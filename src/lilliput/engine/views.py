"""Views: compute where the elements of a transposed, sliced or expanded value lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from lilliput.engine.graph import Node, Value, row_major, same


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
    steps: list[int] = []
    i = 0
    targets = list(new)
    j = 0
    while j < len(targets):
        if targets[j] == 1:
            steps.append(0)
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
        steps += reversed(part)
        j = k
    return tuple(steps) if i == len(dims) else None


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
