"""How the non-zeros of a sparse layer are stored: as narrow as the file has them, unpacked once when the layer starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.graph import Array, Narrow

HALF = """
/* float16 to float32: the exponents differ by 112. */
static inline float half_to_float(uint16_t half)
{
    union { uint32_t bits; float value; } u;
    u.bits = (uint32_t)(half & 0x7fff) << 13;
    u.value *= 0x1p112f;
    u.bits |= (uint32_t)(half & 0x8000) << 16;
    return u.value;
}
""".strip("\n") + "\n"


@dataclass(frozen=True)
class Stored:
    """Values as a kernel keeps them.

    constants: its arrays. lines: C that makes `const float *` out of them, named `value_of`. scratch: bytes that takes.
    scale: (out,) factors that the kernel must multiply each sum by, None where the values are whole.
    """

    constants: Mapping[str, Array]
    lines: tuple[str, ...] = ()
    scratch: int = 0
    scale: Array | None = None
    helpers: tuple[str, ...] = field(default=())


def stored(weight: Array, narrow: Narrow | None, places: Array, at: int = 0) -> Stored:
    """How to keep the values of `weight` (out, ...) at flat `places`, in that order (-1 stands for a zero).

    narrow: how the file keeps them. at: the byte of the scratch memory from which unpacked ones may lie.
    """
    count = len(places)

    def taken(array: Array) -> Array:
        flat = np.append(np.broadcast_to(array, weight.shape).reshape(-1), array.dtype.type(0))
        return np.asarray(flat[places])

    whole = Stored({"values": taken(weight).astype(np.float32)}, ("const float *const value_of = values;",))
    if narrow is None or count == 0:
        return whole
    unpack = f"float *const unpacked = (float *)(scratch + {at});"
    end = "const float *const value_of = unpacked;"
    if narrow.scale is None:
        codes = taken(narrow.codes)
        if codes.dtype != np.float16 or not np.isfinite(codes).all():
            return whole
        return Stored({"values": codes}, (unpack, f"for (int i = 0; i < {count}; i++) "
                      "unpacked[i] = half_to_float(values[i]);", end), 4 * count, None, (HALF,))
    scale = _by_output(narrow.scale, weight.shape)
    zero = np.zeros((), np.int32) if narrow.zero_point is None else narrow.zero_point.astype(np.int32)
    codes = narrow.codes.astype(np.int32) - zero
    if scale is None or np.abs(codes).max(initial=0) > 127:
        return whole
    found = taken(codes)
    least, most = int(found.min()), int(found.max())
    if set(np.unique(found)) <= {-1, 1}:
        bits = np.packbits(found < 0, bitorder="little")
        lines = (f"for (int i = 0; i < {count}; i++) unpacked[i] = signs[i >> 3] >> (i & 7) & 1 ? -1.0f : 1.0f;",)
        return Stored({"signs": bits}, (unpack, *lines, end), 4 * count, scale)
    if least >= -8 and most <= 7:
        pairs = np.append(found, [0] * (count % 2)).reshape(-1, 2) + 8
        codes = (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8)
        lines = (f"for (int i = 0; i < {len(codes)}; i++) {{",
                 "    unpacked[2 * i] = (float)((values[i] & 15) - 8);",
                 "    unpacked[2 * i + 1] = (float)((values[i] >> 4) - 8);", "}")
        return Stored({"values": codes}, (unpack, *lines, end), 8 * len(codes), scale)
    return Stored({"values": found.astype(np.int8)},
                  (unpack, f"for (int i = 0; i < {count}; i++) unpacked[i] = (float)values[i];", end), 4 * count, scale)


def _by_output(scale: Array, shape: tuple[int, ...]) -> Array | None:
    """(out,) scales where all values of an output share one, else None."""
    full = np.broadcast_to(scale, (*scale.shape[:1], *[1] * (len(shape) - 1))) if scale.size == scale.shape[0] else None
    if scale.size == 1:
        full = scale.reshape(1)
    if full is None:
        return None
    return np.ascontiguousarray(np.broadcast_to(full.reshape(-1), (shape[0],)), np.float32)
