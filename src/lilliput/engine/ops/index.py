"""Lower gather and scatter: as views and tables where positions are constant, else as operators with kernels."""

from __future__ import annotations

import numpy as np

from lilliput.engine.graph import Node
from lilliput.engine.lower import Build, lower
from lilliput.engine.size import fixed
from lilliput.errors import NotSupported

OUT_OF_RANGE = "an index is out of range"


@lower("Gather")
def gather(node: Node, build: Build) -> None:
    """y[..., i..., ...] = x[..., indices[i...], ...]."""
    x, indices = node.x, node.input(1)
    axis = int(node.attrs.get("axis", 0)) % max(x.rank, 1)
    size = x.shape[axis]
    if indices.entries is not None and len(indices.entries) == 1:  # such as the last token, len - 1
        at = indices.entries[0]
        at = at + size if int(at) < 0 else at
        build.need(at)
        build.need(size - 1 - at)
        _one(node, build, axis, at)
        return
    known = indices.data
    if known is None:
        build.add("Gather", [x, indices], [node.y], axis=axis)
        return
    flat = known.reshape(-1).astype(np.int64)
    if flat.size and (flat.min() < -int(size) or flat.max() >= int(size)):
        raise ValueError(
            f"compile: {node.name} (Gather): indices must be below {size}, got {flat.min()} to {flat.max()}."
        )
    if not fixed(size):
        if flat.size == 1:
            at = int(flat[0]) + size if flat[0] < 0 else int(flat[0])
            build.need(at)
            build.need(size - 1 - at)
            _one(node, build, axis, at)
        else:
            build.add("Gather", [x, indices], [node.y], axis=axis)
        return
    flat = flat % max(int(size), 1)
    steps = np.diff(flat)
    if flat.size == 0 or (known.ndim < 2 and (flat.size == 1 or np.all(steps == steps[0]))):
        step = int(steps[0]) if steps.size else 1
        first = int(flat[0]) if flat.size else 0
        starts = [first if d == axis else 0 for d in range(x.rank)]
        shape = [len(flat) if d == axis else s for d, s in enumerate(x.shape)]
        kept = build.slice(x, starts, shape, [step if d == axis else 1 for d in range(x.rank)])
        build.reshape(kept, node.y.shape, node.y)
        return
    plain = known.ndim == 1
    shape = [len(flat) if d == axis else s for d, s in enumerate(x.shape)]
    made = node.y if plain else build.value(x.dtype, shape)
    build.add("Take", [x], [made], maps=tuple(flat if d == axis else None for d in range(x.rank)))
    if not plain:
        build.reshape(made, node.y.shape, node.y)


def _one(node: Node, build: Build, axis: int, at: int) -> None:
    x = node.x
    shape = [1 if d == axis else s for d, s in enumerate(x.shape)]
    kept = build.slice(x, [at if d == axis else 0 for d in range(x.rank)], shape)
    build.reshape(kept, node.y.shape, node.y)


@lower("GatherElements")
def gather_elements(node: Node, build: Build) -> None:
    """y[i, j, k] = x[i, indices[i, j, k], k] for axis 1."""
    x = node.x
    axis = int(node.attrs.get("axis", 0)) % max(x.rank, 1)
    if node.input(1).rank != x.rank or any(
        int(a) > int(b) for d, (a, b) in enumerate(zip(node.input(1).shape, x.shape, strict=True)) if d != axis
    ):
        raise ValueError(
            f"compile: {node.name} (GatherElements): indices must have no more elements than the data, "
            f"got shapes {list(node.input(1).shape)} and {list(x.shape)}."
        )
    build.add("GatherElements", [x, node.input(1)], [node.y], axis=axis)


@lower("GatherND")
def gather_nd(node: Node, build: Build) -> None:
    """y[i...] = x[indices[i...]], where the last dimension of the indices holds positions."""
    x, indices, batch = node.x, node.input(1), int(node.attrs.get("batch_dims", 0))
    depth = indices.shape[-1] if indices.rank else 0
    if not indices.rank or not fixed(depth) or not 1 <= int(depth) <= x.rank - batch:
        raise ValueError(
            f"compile: {node.name} (GatherND): the last dimension of indices must be 1 to "
            f"{x.rank - batch}, got shape {list(indices.shape)}."
        )
    build.add("GatherND", [x, indices], [node.y], batch=batch, depth=int(depth))


@lower("ScatterND")
def scatter_nd(node: Node, build: Build) -> None:
    """x with updates at positions, which replace what is there or are added, multiplied, compared."""
    x, indices, updates = node.x, node.input(1), node.input(2)
    depth = indices.shape[-1] if indices.rank else 0
    if not indices.rank or not fixed(depth) or not 1 <= int(depth) <= x.rank:
        raise ValueError(
            f"compile: {node.name} (ScatterND): the last dimension of indices must be 1 to {x.rank}, got "
            f"shape {list(indices.shape)}."
        )
    if tuple(updates.shape) != (*indices.shape[:-1], *x.shape[int(depth) :]):
        raise ValueError(
            f"compile: {node.name} (ScatterND): updates must have shape "
            f"{[*indices.shape[:-1], *x.shape[int(depth) :]]}, got {list(updates.shape)}."
        )
    build.add("ScatterND", [x, indices, updates], [node.y], depth=int(depth), how=_reduction(node))


@lower("ScatterElements", "Scatter")
def scatter_elements(node: Node, build: Build) -> None:
    """x with x[i, indices[i, j, k], k] = updates[i, j, k] for axis 1."""
    x, indices, updates = node.x, node.input(1), node.input(2)
    axis = int(node.attrs.get("axis", 0)) % max(x.rank, 1)
    if (
        indices.shape != updates.shape
        or indices.rank != x.rank
        or any(int(a) > int(b) for d, (a, b) in enumerate(zip(indices.shape, x.shape, strict=True)) if d != axis)
    ):
        raise ValueError(
            f"compile: {node.name} ({node.op}): indices and updates must have one shape, within the "
            f"data's, got {list(indices.shape)}, {list(updates.shape)} and {list(x.shape)}."
        )
    build.add("ScatterElements", [x, indices, updates], [node.y], axis=axis, how=_reduction(node))


def _reduction(node: Node) -> str:
    how = str(node.attrs.get("reduction", "none"))
    if how not in ("none", "add", "mul", "min", "max"):
        raise NotSupported(f"compile: {node.name} ({node.op}): reduction must be one of ONNX's, got {how!r}.")
    return how


@lower("ReverseSequence")
def reverse_sequence(node: Node, build: Build) -> None:
    """Of each example in the batch the first so many steps backwards."""
    time, batch = int(node.attrs.get("time_axis", 0)), int(node.attrs.get("batch_axis", 1))
    if {time, batch} != {0, 1} or node.x.rank < 2:
        raise ValueError(f"compile: {node.name} (ReverseSequence): its axes must be 0 and 1, got {time} and {batch}.")
    build.add("ReverseSequence", [node.x, node.input(1)], [node.y], time=time)
