"""Store the non-zeros of a sparse layer in as few bits as the file does, and unpack them when the layer starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.graph import Array, Narrow

# C that unpacks `count` numbers (bytes, where several are in one): once in a file, not in every layer.
HALF = """\
/* float16 to float32: the exponents differ by 112. */
static inline float half_to_float(uint16_t half)
{
    union { uint32_t bits; float value; } u;
    u.bits = (uint32_t)(half & 0x7fff) << 13;
    u.value *= 0x1p112f;
    u.bits |= (uint32_t)(half & 0x8000) << 16;
    return u.value;
}
"""
HALVES = """
LAYER_FUNCTION void unpack_halves(float *restrict to, const uint16_t *restrict from, int count)
{
    for (int i = 0; i < count; i++) to[i] = half_to_float(from[i]);
}
"""
BYTES = """
LAYER_FUNCTION void unpack_bytes(float *restrict to, const int8_t *restrict from, int count)
{
    for (int i = 0; i < count; i++) to[i] = (float)from[i];
}
"""
NIBBLES = """
LAYER_FUNCTION void unpack_nibbles(float *restrict to, const uint8_t *restrict from, int count)
{
    for (int i = 0; i < count; i++) {
        to[2 * i] = (float)((from[i] & 15) - 8);
        to[2 * i + 1] = (float)((from[i] >> 4) - 8);
    }
}
"""
SIGNS = """
LAYER_FUNCTION void unpack_signs(float *restrict to, const uint8_t *restrict from, int count)
{
    for (int i = 0; i < 8 * count; i++) to[i] = (float)(1 - 2 * (from[i >> 3] >> (i & 7) & 1));
}
"""


@dataclass(frozen=True)
class Stored:
    """Values as a kernel keeps them.

    Args:
        constants: Its arrays.
        lines: C that makes `const float *` out of them, named `value_of`.
        scratch: Bytes that takes.
        scale: (out,) factors that the kernel must multiply each sum by, None where the values are whole.
    """

    constants: Mapping[str, Array]
    lines: tuple[str, ...] = ()
    scratch: int = 0
    scale: Array | None = None
    helpers: tuple[str, ...] = field(default=())


def stored(weight: Array, narrow: Narrow | None, places: Array, at: int = 0) -> Stored:
    """How to keep the values of `weight` (out, ...) at flat `places`, in that order (-1 stands for a zero).

    Args:
        narrow: How the file keeps them.
        at: The byte of the scratch memory from which unpacked ones may lie.
    """
    count = len(places)

    def taken(array: Array) -> Array:
        flat = np.append(np.broadcast_to(array, weight.shape).reshape(-1), array.dtype.type(0))
        return np.asarray(flat[places])

    whole = Stored({"values": taken(weight).astype(np.float32)}, ("const float *const value_of = values;",))
    scale = None if narrow is None or narrow.scale is None else _by_output(narrow.scale, weight.shape)
    if narrow is None or count == 0 or (narrow.scale is not None and scale is None):
        return whole

    def unpacked(values: Array, helper: str, each: int = 1) -> Stored:
        """Values that a helper unpacks, `each` of them from one number."""
        name = helper.split("(")[0].split()[-1]
        lines = (f"float *const value_of = (float *)(scratch + {at});", f"{name}(value_of, values, many[0]);")
        constants = {"values": values, "many": np.array([len(values)], np.int32)}
        before = (HALF,) if helper == HALVES else ()
        return Stored(constants, lines, 4 * each * len(values), scale, (*before, helper.lstrip("\n")))

    if narrow.levels.dtype == np.float16:
        halves = taken(narrow.levels)
        return whole if narrow.zero_point is not None or not np.isfinite(halves).all() else unpacked(halves, HALVES)
    zero = np.zeros((), np.int32) if narrow.zero_point is None else narrow.zero_point.astype(np.int32)
    levels = narrow.levels.astype(np.int32) - zero
    if np.abs(levels).max(initial=0) > 127 or scale is None:
        return whole
    kept_levels = taken(levels)
    if set(np.unique(kept_levels)) <= {-1, 1}:
        return unpacked(np.packbits(kept_levels < 0, bitorder="little"), SIGNS, 8)
    if kept_levels.min() >= -8 and kept_levels.max() <= 7:
        pairs = np.append(kept_levels, np.zeros(count % 2, np.int32)).reshape(-1, 2) + 8
        return unpacked((pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8), NIBBLES, 2)
    return unpacked(kept_levels.astype(np.int8), BYTES)


def _by_output(scale: Array, shape: tuple[int, ...]) -> Array | None:
    """(out,) scales where all values of an output share one, else None."""
    full = np.broadcast_to(scale, (*scale.shape[:1], *[1] * (len(shape) - 1))) if scale.size == scale.shape[0] else None
    if scale.size == 1:
        full = scale.reshape(1)
    if full is None:
        return None
    return np.ascontiguousarray(np.broadcast_to(full.reshape(-1), (shape[0],)), np.float32)
