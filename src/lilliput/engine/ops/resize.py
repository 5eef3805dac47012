"""Lower Resize: one dimension at a time, since every interpolation that ONNX has is separable."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lilliput.engine.graph import Node, Value
from lilliput.engine.lower import Build, lower
from lilliput.engine.ops.shape import padded, repeated
from lilliput.engine.size import Size, fixed
from lilliput.errors import NotSupported

MOST_POSITIONS = 2**20  # of one dimension: each has a row of a table
MOST_TAPS = 2**24
Floats = np.ndarray[Any, Any]


@lower("Resize", "Upsample")
def resize(node: Node, build: Build) -> None:
    """Nearest, linear or cubic: a table of positions and weights for each dimension that changes."""
    x, y = node.x, node.y
    mode = str(node.attrs.get("mode", "nearest"))
    if mode not in ("nearest", "linear", "cubic"):
        raise NotSupported(f"compile: {node.name} ({node.op}): mode must be nearest, linear or cubic, got {mode!r}.")
    if mode != "nearest" and x.dtype != np.float32:
        raise NotSupported(f"compile: {node.name} ({node.op}): mode {mode} must have float32, got {x.dtype.name}.")
    scales = _scales(node)
    if _repeats(node, mode, scales):
        repeated(x, [int(s) for s in scales], build, y, each=True)
        return
    roi, nearest = _roi(node), str(node.attrs.get("nearest_mode", "round_prefer_floor"))
    outside = float(node.attrs.get("extrapolation_value", 0.0))
    held, cut = x, [(0, 0)] * x.rank
    maps: list[Floats | None] = [None] * x.rank
    for axis in range(x.rank):
        size, new = x.shape[axis], y.shape[axis]
        if size == new and math.isclose(scales[axis], 1.0) and roi[axis] == (0.0, 1.0):
            continue
        _check(node, size, new)
        if int(new) == 0 or int(size) == 0:
            continue
        place = coordinates(node, int(size), int(new), scales[axis], roi[axis])
        if _mode(node) == "tf_crop_and_resize":
            inside = np.flatnonzero((place >= 0) & (place <= int(size) - 1))
            first, last = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
            cut[axis] = (first, int(new) - last)
            place = place[first:last]
        if mode == "nearest":
            maps[axis] = np.clip(rounded(place, nearest, node), 0, int(size) - 1).astype(np.int32)
            continue
        positions, weights = taps(node, mode, place, int(size), scales[axis])
        made = build.value(x.dtype, [len(place) if d == axis else s for d, s in enumerate(held.shape)])
        build.add("Interpolate", [held], [made], axis=axis, positions=positions, weights=weights)
        held = made
    if any(m is not None for m in maps):
        made = build.value(x.dtype, [s if m is None else len(m) for s, m in zip(held.shape, maps, strict=True)])
        build.add("Take", [held], [made], maps=tuple(maps))
        held = made
    if any(a or b for a, b in cut):
        padded(held, [a for a, _ in cut], [b for _, b in cut], build, y, value=build.const(np.array(outside, x.dtype)))
    else:
        _finish(held, y, build)


def _check(node: Node, size: int, new: int) -> None:
    """Raise where a dimension has no table of positions: its sizes are free, or too large."""
    if not fixed(size, new):
        raise NotSupported(f"compile: {node.name} ({node.op}) must have fixed sizes, or be nearest by a whole factor.")
    if int(size) and int(new) > MOST_POSITIONS:
        raise ValueError(
            f"compile: {node.name} ({node.op}) must make at most {MOST_POSITIONS} elements of a dimension, got {new}."
        )


def _finish(held: Value, y: Value, build: Build) -> None:
    maker = build.nodes[-1] if build.nodes else None
    if maker is not None and maker.outputs == [held]:
        maker.outputs = [y]
    else:
        build.reshape(held, y.shape, y)


def _mode(node: Node) -> str:
    old = "asymmetric" if node.op == "Upsample" or node.opset < 11 else "half_pixel"
    return str(node.attrs.get("coordinate_transformation_mode", old))


def _old(node: Node) -> bool:
    return node.op == "Upsample" or node.opset < 11


def _scales(node: Node) -> list[float]:
    """Of every dimension, how much larger the output is: as it was given, or as the sizes say."""
    x, y = node.x, node.y
    axes = [int(a) % x.rank for a in node.attrs.get("axes", range(x.rank))]
    scales = [1.0] * x.rank
    if "scales" in node.attrs:
        given: Any = np.asarray(node.attrs["scales"], np.float32)
    else:
        place = 1 if _old(node) else 2
        value = node.maybe(place)
        given = node.known(place) if value is not None and value.shape != (0,) else None
    if given is not None and given.size:
        if given.size != len(axes) or not np.all(given > 0):
            raise ValueError(
                f"compile: {node.name} ({node.op}) must have a positive scale for each of {len(axes)} dimensions."
            )
        for axis, scale in zip(axes, given.reshape(-1), strict=True):
            scales[axis] = float(scale)
        return scales
    policy = str(node.attrs.get("keep_aspect_ratio_policy", "stretch"))
    for axis in axes:
        size, new = x.shape[axis], y.shape[axis]
        if isinstance(size, Size) and new == size:
            scales[axis] = 1.0
        elif isinstance(size, Size) and fixed(size * 0) and int(size) and new == size * (int(new) // int(size)):
            scales[axis] = float(int(new) // int(size))
        else:
            scales[axis] = int(new) / max(int(size), 1)
    if policy != "stretch":
        sizes = node.ints("sizes", 3)
        if sizes is None or len(sizes) != len(axes) or not fixed(*sizes):
            raise ValueError(f"compile: {node.name} (Resize) must have a size for each of {len(axes)} dimensions.")
        ratios = [size / max(int(x.shape[axis]), 1) for size, axis in zip(sizes, axes, strict=True)]
        scale = min(ratios) if policy == "not_larger" else max(ratios)
        scales = [scale if axis in axes else 1.0 for axis in range(x.rank)]
    return scales


def _roi(node: Node) -> list[tuple[float, float]]:
    """The part of every dimension that is resized, from 0 to 1."""
    rank = node.x.rank
    parts = [(0.0, 1.0)] * rank
    if _mode(node) != "tf_crop_and_resize":
        return parts
    axes = [int(a) % rank for a in node.attrs.get("axes", range(rank))]
    held = node.known(1)
    if held is None or held.size != 2 * len(axes):
        raise ValueError(f"compile: {node.name} (Resize) must have a roi of {2 * len(axes)} numbers.")
    flat = held.reshape(-1).astype(float)
    for i, axis in enumerate(axes):
        parts[axis] = (float(flat[i]), float(flat[len(axes) + i]))
    return parts


def _repeats(node: Node, mode: str, scales: list[float]) -> bool:
    """Whether every element is only repeated a whole number of times, at any size."""
    if mode != "nearest" or any(scale != int(scale) for scale in scales):
        return False
    how, rounding = _mode(node), str(node.attrs.get("nearest_mode", "floor" if _old(node) else "round_prefer_floor"))
    if any(new != size * int(scale) for size, new, scale in zip(node.x.shape, node.y.shape, scales, strict=True)):
        return False
    return (how == "asymmetric" and rounding == "floor") or (
        how in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel")
        and rounding.startswith("round")
        and all(
            scale == 1 or how != "pytorch_half_pixel" or not fixed(new) or new > 1
            for scale, new in zip(scales, node.y.shape, strict=True)
        )
    )


def coordinates(node: Node, size: int, new: int, scale: float, roi: tuple[float, float]) -> Floats:
    """Where each of `new` elements of the output lies among `size` of the input."""
    how, place = _mode(node), np.arange(new, dtype=float)
    width = scale * size  # what the output would measure were it not rounded down
    if how == "asymmetric":
        return place / scale
    if how == "half_pixel":
        return (place + 0.5) / scale - 0.5
    if how == "pytorch_half_pixel":
        return (place + 0.5) / scale - 0.5 if new > 1 else place * 0
    if how == "half_pixel_symmetric":
        return size / 2 * (1 - new / width) + (place + 0.5) / scale - 0.5
    if how == "align_corners":
        return place * (size - 1) / (width - 1) if width != 1 else place * 0
    if how == "tf_half_pixel_for_nn":
        return (place + 0.5) / scale
    if how == "tf_crop_and_resize":
        start, end = roi
        if width == 1:
            return place * 0 + 0.5 * (start + end) * (size - 1)
        return start * (size - 1) + place * (end - start) * (size - 1) / (width - 1)
    raise NotSupported(
        f"compile: {node.name} ({node.op}): coordinate_transformation_mode must be one of ONNX's, got {how!r}."
    )


def rounded(place: Floats, how: str, node: Node) -> Floats:
    """The nearest position."""
    if _old(node) and "nearest_mode" not in node.attrs:
        how = "floor"
    if how == "round_prefer_floor":
        return np.ceil(place - 0.5)
    if how == "round_prefer_ceil":
        return np.floor(place + 0.5)
    if how in ("floor", "ceil"):
        return np.floor(place) if how == "floor" else np.ceil(place)
    raise NotSupported(f"compile: {node.name} ({node.op}): nearest_mode must be one of ONNX's, got {how!r}.")


def taps(node: Node, mode: str, place: Floats, size: int, scale: float) -> tuple[Floats, Floats]:
    """(positions, weights) by output element: which elements of the input it is the weighted sum of."""
    narrow = min(scale, 1.0) if node.attrs.get("antialias") else 1.0
    reach = (1 if mode == "linear" else 2) / narrow
    count = 2 * math.ceil(reach)
    if count * len(place) > MOST_TAPS:
        raise ValueError(
            f"compile: {node.name} ({node.op}) must take fewer elements together, got {count} for each of {len(place)}."
        )
    a = float(node.attrs.get("cubic_coeff_a", -0.75))
    positions = np.floor(place)[:, None] + np.arange(count) - (count // 2 - 1)
    far = np.abs(positions - place[:, None]) * narrow
    if mode == "linear":
        weights = np.clip(1 - far, 0, None)
    else:
        near = ((a + 2) * far - (a + 3)) * far * far + 1
        weights = np.where(far <= 1, near, np.where(far < 2, ((a * far - 5 * a) * far + 8 * a) * far - 4 * a, 0.0))
    if node.attrs.get("exclude_outside"):
        weights = np.where((positions < 0) | (positions >= size), 0.0, weights)
    if node.attrs.get("exclude_outside") or narrow < 1:
        total = weights.sum(1, keepdims=True)
        weights = weights / np.where(total == 0, 1.0, total)
    kept = np.flatnonzero(np.any(weights != 0, 0))
    if len(kept):
        positions, weights = positions[:, kept[0] : kept[-1] + 1], weights[:, kept[0] : kept[-1] + 1]
    return np.clip(positions, 0, size - 1).astype(np.int32), weights.astype(np.float32)
