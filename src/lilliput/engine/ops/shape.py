"""Lower operators that move elements and compute none: views where strides can express them, else one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lilliput.engine.expr import const, where
from lilliput.engine.graph import Node, Value
from lilliput.engine.lower import Build, lower
from lilliput.engine.size import Size, fixed
from lilliput.errors import NotSupported

MOST_POSITIONS = 2**22


@lower("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, build: Build) -> None:
    """The same elements in another shape."""
    build.reshape(node.x, node.y.shape, node.y)


@lower("Dropout")
def dropout(node: Node, build: Build) -> None:
    """The identity, since nothing is dropped in inference; the mask is true everywhere."""
    training, ratio = node.maybe(2), node.maybe(1)
    if (
        training is not None
        and (training.data is None or np.any(training.data))
        and (ratio is None or ratio.data is None or np.any(ratio.data))
    ):
        raise NotSupported(
            f"compile: Dropout {node.name} must not train, got training_mode true: what it drops is "
            "random. Export the model for inference."
        )
    if node.outputs[0] is not None:
        build.reshape(node.x, node.y.shape, node.y)
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None:
        build.expand(build.const(np.array(1, mask.dtype)), mask.shape, mask)


@lower("Transpose")
def transpose(node: Node, build: Build) -> None:
    """Dimensions in another order; reversed by default."""
    rank = node.x.rank
    perm = [int(p) % max(rank, 1) for p in node.attrs.get("perm", range(rank)[::-1])]
    if sorted(perm) != list(range(rank)):
        raise ValueError(f"compile: {node.name} (Transpose): perm must name every dimension once, got {perm}.")
    build.transpose(node.x, perm, node.y)


@lower("Expand")
def expand(node: Node, build: Build) -> None:
    """Broadcast to a shape."""
    build.expand(node.x, node.y.shape, node.y)


@lower("ConstantOfShape")
def constant_of_shape(node: Node, build: Build) -> None:
    """One number everywhere, in a shape that follows from the free sizes."""
    number = np.asarray(node.attrs.get("value", np.zeros(1, np.float32))).reshape(())
    build.expand(build.const(number.astype(node.y.dtype)), node.y.shape, node.y)


# ------------------------------------------------------------------------------------------------- pieces and together


@lower("Slice")
def slice_(node: Node, build: Build) -> None:
    """Every step-th element from start to end along some dimensions: a view."""
    x = node.x
    starts, ends = node.ints("starts", 1), node.ints("ends", 2)
    if starts is None or ends is None:
        raise ValueError(f"compile: {node.name} (Slice) must have starts and ends.")
    axes = node.axes(x.rank, 3)
    axes = list(range(len(starts))) if axes is None else axes
    steps = node.ints("steps", 4) or [1] * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or any(step == 0 for step in steps):
        raise ValueError(f"compile: {node.name} (Slice): starts, ends, axes and steps must be as many, steps not 0.")
    first, by = [0] * x.rank, [1] * x.rank
    for start, axis, step in zip(starts, axes, steps, strict=True):
        size, many = x.shape[axis], node.y.shape[axis]
        by[axis] = int(step)
        if int(many) == 0:
            continue
        at = start + size if int(start) < 0 else start
        # What is beyond an end is cut off; which case it is was decided at the largest sizes, and must hold for all.
        if int(step) > 0:
            at = _within(build, at, 0, size)
        else:
            at = _within(build, at, 0, size - 1)
        first[axis] = at
        build.need(at)
        last = at + (many - 1) * int(step)
        build.need(last)
        build.need(size - 1 - (last if int(step) > 0 else at))
    build.slice(x, first, node.y.shape, by, node.y)


def _within(build: Build, at: int, low: int, high: int) -> int:
    if int(at) < int(low):
        build.need(low - at)
        return low
    if int(at) > int(high):
        build.need(at - high)
        return high
    return at


@lower("Split")
def split(node: Node, build: Build) -> None:
    """Neighbouring pieces along a dimension: views."""
    x = node.x
    axis = int(node.attrs.get("axis", 0)) % max(x.rank, 1)
    start: int = 0
    sizes = node.ints("split", 1)
    for i, y in enumerate(node.outputs):
        if y is not None:
            build.slice(x, [start if d == axis else 0 for d in range(x.rank)], y.shape, out=y)
            start = start + y.shape[axis]
        elif sizes is not None and i < len(sizes):
            start = start + sizes[i]
        else:
            raise NotSupported(f"compile: {node.name} (Split) must name the outputs between others.")
    build.need(x.shape[axis] - start)


@lower("Concat")
def concat(node: Node, build: Build) -> None:
    """Inputs one after another along a dimension."""
    axis = int(node.attrs.get("axis", 1)) % max(node.y.rank, 1)
    parts = [v for v in node.inputs if v is not None and (int(v.shape[axis]) != 0)]
    if len(parts) == 1:
        build.reshape(parts[0], node.y.shape, node.y)
        return
    build.add("Concat", parts, [node.y], axis=axis)


@lower("Tile")
def tile(node: Node, build: Build) -> None:
    """The tensor repeated along each dimension."""
    x = node.x
    repeats = node.ints("repeats", 1)
    if node.opset < 6:
        tiles, axis = node.known(1), node.known(2)
        assert tiles is not None and axis is not None
        repeats = [int(tiles.reshape(-1)[0]) if d == int(axis.reshape(-1)[0]) else 1 for d in range(x.rank)]
    if repeats is None or len(repeats) != x.rank:
        raise ValueError(f"compile: {node.name} (Tile) must have a repeat for each of {x.rank} dimensions.")
    repeated(x, repeats, build, node.y)


def repeated(x: Value, repeats: Sequence[int], build: Build, out: Value, each: bool = False) -> None:
    """x repeated along each dimension: as a whole, or (each) every element by itself."""
    split_: list[int] = []
    wide: list[int] = []
    for size, repeat in zip(x.shape, repeats, strict=True):
        if repeat == 1:
            split_, wide = [*split_, size], [*wide, size]
        elif each:
            split_, wide = [*split_, size, 1], [*wide, size, repeat]
        else:
            split_, wide = [*split_, 1, size], [*wide, repeat, size]
    build.reshape(build.expand(build.reshape(x, split_), wide), out.shape, out)


@lower("DepthToSpace")
def depth_to_space(node: Node, build: Build) -> None:
    """Blocks of channels become blocks of pixels."""
    n, channels, h, w = node.x.shape
    b = _block(node)
    kept, rest = divmod(int(channels), b * b)
    if rest or not fixed(channels):
        raise ValueError(
            f"compile: {node.name} (DepthToSpace): channels must be a multiple of {b * b}, got {channels}."
        )
    if node.attrs.get("mode", "DCR") == "CRD":
        x = build.transpose(build.reshape(node.x, [n, kept, b, b, h, w]), (0, 1, 4, 2, 5, 3))
    else:
        x = build.transpose(build.reshape(node.x, [n, b, b, kept, h, w]), (0, 3, 4, 1, 5, 2))
    build.reshape(x, node.y.shape, node.y)


@lower("SpaceToDepth")
def space_to_depth(node: Node, build: Build) -> None:
    """Blocks of pixels become blocks of channels."""
    n, channels, _, _ = node.x.shape
    b = _block(node)
    h, w = node.y.shape[2:]
    perm = (0, 1, 3, 5, 2, 4) if node.attrs.get("mode", "DCR") == "CRD" else (0, 3, 5, 1, 2, 4)
    x = build.transpose(build.reshape(node.x, [n, channels, h, b, w, b]), perm)
    build.reshape(x, node.y.shape, node.y)


def _block(node: Node) -> int:
    size = int(node.attrs.get("blocksize", 0))
    if size < 1 or node.x.rank != 4:
        raise ValueError(f"compile: {node.name} ({node.op}) must have a blocksize and 4 dimensions.")
    return size


# ------------------------------------------------------------------------------------------------------------- padding


@lower("Pad")
def pad(node: Node, build: Build) -> None:
    """More elements at the ends (or fewer, where a pad is negative): a constant, or what reflects, repeats or wraps."""
    x, mode = node.x, node.attrs.get("mode", "constant") or "constant"
    pads = node.ints("pads" if "pads" in node.attrs else "paddings", 1)
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise NotSupported(f"compile: {node.name} (Pad): mode must be one of ONNX's, got {mode!r}.")
    axes = node.axes(x.rank, 3)
    axes = list(range(x.rank)) if axes is None else axes
    if pads is None or len(pads) != 2 * len(axes):
        raise ValueError(f"compile: {node.name} (Pad) must have two pads for each dimension that it pads.")
    before, after = [0] * x.rank, [0] * x.rank
    for i, axis in enumerate(axes):
        before[axis], after[axis] = pads[i], pads[len(axes) + i]
    value = node.maybe(2)
    if value is None:
        value = build.const(np.array(node.attrs.get("value", 0)).astype(x.dtype))
    padded(x, before, after, build, node.y, mode, value)


def padded(
    x: Value,
    before: Sequence[int],
    after: Sequence[int],
    build: Build,
    out: Value,
    mode: str = "constant",
    value: Value | None = None,
) -> None:
    """x with elements before and after each dimension (fewer where negative)."""
    if value is None:
        value = build.const(np.array(0, x.dtype))
    # What a negative pad takes away is taken away first.
    cut = [-p if int(p) < 0 else 0 for p in before]
    shape = [
        s + (b if int(b) < 0 else 0) + (a if int(a) < 0 else 0) for s, b, a in zip(x.shape, before, after, strict=True)
    ]
    for size, start in zip(shape, cut, strict=True):
        build.need(size)
        build.need(start)
    if list(shape) != list(x.shape):
        x = build.slice(x, cut, [max(s, 0) if fixed(s) else s for s in shape])
    before, after = ([p if int(p) > 0 else 0 for p in side] for side in (before, after))
    if all(b == 0 and a == 0 for b, a in zip(before, after, strict=True)):
        build.reshape(x, out.shape, out)
        return
    if mode == "constant":
        if value.rank:
            value = build.reshape(value, [])
        build.add("Pad", [x, value], [out], before=tuple(before), after=tuple(after))
        return
    if int(x.size) == 0:
        raise ValueError(f"compile: {out.name} (Pad): what is {mode}ed must have elements, got {list(x.shape)}.")
    if fixed(*x.shape, *before, *after):
        maps = [
            None if b == a == 0 else table(size, b, a, mode)
            for size, b, a in zip(map(int, x.shape), map(int, before), map(int, after), strict=True)
        ]
        build.add("Take", [x], [out], maps=tuple(maps))
    else:
        build.add("Mirror", [x], [out], before=tuple(before), after=tuple(after), mode=mode)


def table(size: int, before: int, after: int, mode: str) -> np.ndarray[Any, Any]:
    """Which of `size` elements stands at each place of a padded dimension."""
    place = np.arange(-before, size + after)
    if mode == "edge":
        return np.clip(place, 0, size - 1)
    if mode == "wrap":
        return place % size
    period = max(2 * (size - 1), 1)
    place = place % period
    return np.where(place < size, place, period - place) if size > 1 else place * 0


@lower("CenterCropPad")
def center_crop_pad(node: Node, build: Build) -> None:
    """The middle of a tensor, or the tensor in the middle of zeros."""
    before, after = [], []
    for size, new in zip(node.x.shape, node.y.shape, strict=True):
        more = new - size
        if not fixed(more):
            raise NotSupported(f"compile: {node.name} (CenterCropPad) must not depend on free sizes.")
        half = abs(int(more)) // 2
        before.append(half if more >= 0 else -half)
        after.append(int(more) - before[-1])
    padded(node.x, before, after, build, node.y)


# ---------------------------------------------------------------------------------------------------------- by position


def positions(build: Build, size: int, dtype: Any = np.int64) -> Value:
    """The numbers 0, 1, ... size - 1, where size may be free."""
    if int(size) > MOST_POSITIONS:
        raise ValueError(
            f"compile: a dimension that is numbered must have at most {MOST_POSITIONS} elements, got {size}."
        )
    whole = build.const(np.arange(int(size)).astype(dtype))
    return build.slice(whole, [0], [size]) if isinstance(size, Size) else whole


@lower("Range")
def range_(node: Node, build: Build) -> None:
    """start, start + delta, ... below limit, whose number follows from the free sizes."""
    start, delta = node.input(0), node.input(2)
    if start.rank:
        start = build.reshape(start, [])
    if delta.rank:
        delta = build.reshape(delta, [])
    place = positions(build, node.y.shape[0], node.y.dtype)
    build.map([place, start, delta], lambda i, s, d: s + i * d, node.y)


@lower("EyeLike")
def eye_like(node: Node, build: Build) -> None:
    """Ones on one diagonal."""
    rows, columns = node.y.shape
    down = build.reshape(positions(build, rows), [rows, 1])
    shift = int(node.attrs.get("k", 0))
    dtype = node.y.dtype.name
    build.map([down, positions(build, columns)], lambda i, j: (j - i).of("eq", shift, dtype="bool").cast(dtype), node.y)


@lower("Trilu")
def trilu(node: Node, build: Build) -> None:
    """What is above (upper) or below a diagonal; zeros elsewhere."""
    x, k = node.x, node.maybe(1)
    if x.rank < 2:
        raise ValueError(f"compile: {node.name} (Trilu) must have a matrix, got shape {list(x.shape)}.")
    down = build.reshape(positions(build, x.shape[-2]), [x.shape[-2], 1])
    along = positions(build, x.shape[-1])
    zero = const(0, x.dtype)
    upper = bool(node.attrs.get("upper", 1))
    shift = k if k is not None else build.const(np.array(0, np.int64))
    if shift.rank:
        shift = build.reshape(shift, [])
    build.map(
        [x, down, along, shift], lambda v, i, j, s: where((j - i) >= s if upper else (j - i) <= s, v, zero), node.y
    )


@lower("OneHot")
def one_hot(node: Node, build: Build) -> None:
    """values[1] where the position along a new dimension is the index, values[0] elsewhere."""
    indices, values, y = node.x, node.input(2), node.y
    axis = int(node.attrs.get("axis", -1)) % y.rank
    depth = y.shape[axis]
    kind = "float32" if indices.dtype == np.float32 else "int64"
    place = build.reshape(positions(build, depth, kind), [depth if d == axis else 1 for d in range(y.rank)])
    spread = build.reshape(indices, [*y.shape[:axis], 1, *y.shape[axis + 1 :]])
    off, on = (build.reshape(build.slice(values, [i], [1]), []) for i in (0, 1))
    many = build.reshape(_number(build, depth, kind), [])

    def hot(i: Any, p: Any, n: Any, a: Any, b: Any) -> Any:
        i = i.cast(kind)
        return where(where(i < 0, i + n, i).of("eq", p, dtype="bool"), b, a)

    build.map([spread, place, many, off, on], hot, y)


def _number(build: Build, size: int, dtype: Any) -> Value:
    value = build.const(np.array([int(size)]).astype(dtype))
    if isinstance(size, Size):
        if dtype != "int64":
            raise NotSupported("compile: OneHot of a free depth must have integer indices.")
        value.data, value.entries = None, (size,)
    return value
