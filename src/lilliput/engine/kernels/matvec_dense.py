"""Multiply a dense matrix by a vector: outputs in the lanes of vectors, weights of 32, 16 or 24 bits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Narrow
from lilliput.engine.kernels.matvec_way import GHZ, L1_BYTES, MatVec, made, padded, read_ns, up
from lilliput.engine.kernels.narrow import HALF
from lilliput.engine.kernels.product import vector, vector_types
from lilliput.engine.target import Target


def dense(weight: Array, narrow: Narrow | None, target: Target) -> Iterator[MatVec]:
    """The ways that read every weight."""
    lanes, (m, k) = target.lanes, weight.shape
    if lanes == 1:
        text = "\n".join(
            [
                "static void FUNCTION(float *restrict y, const float *restrict x, const float *restrict w)",
                "{",
                f"    for (int o = 0; o < {m}; o++, w += {k}) {{",
                "        float a = 0, b = 0;",
                "        int k = 0;",
                f"        for (; k + 1 < {k}; k += 2) {{",
                "            a += w[k] * x[k];",
                "            b += w[k + 1] * x[k + 1];",
                "        }",
                f"        if (k < {k}) a += w[k] * x[k];",
                "        y[o] = a + b;",
                "    }",
                "}",
            ]
        )
        yield made("dense", weight, {"w": weight}, text, (), m * k * 1.0, k, m)
        return
    outs = up(m, lanes)
    wide = 4 if lanes == 16 else 8
    many = [wide] * (outs // lanes // wide)
    if rest := outs // lanes % wide:
        many.append(rest)
    wide_weight = padded(weight, outs)
    half = narrow is not None and narrow.bits == 16 and narrow.levels.dtype == np.float16
    if half and lanes == 16 and "AVX512F" in target.features:
        packed = _columns(np.asarray(wide_weight, np.float16), [n * lanes for n in many])
        yield made(
            "dense, 16-bit",
            weight,
            {"w": packed},
            _dense_text(k, lanes, many, True),
            (vector_types(lanes), HALF, WIDE_HALF),
            outs * k / 8 / GHZ + 20,
            k,
            outs,
        )
    packed = _columns(wide_weight, [n * lanes for n in many])
    yield made(
        "dense",
        weight,
        {"w": packed},
        _dense_text(k, lanes, many, False),
        (vector_types(lanes),),
        max(read_ns(packed.nbytes), outs * k / lanes / GHZ) + 20,
        k,
        outs,
    )
    if lanes == 16 and "AVX512VBMI" in target.features and outs % 64 == 0 and weight.nbytes > L1_BYTES:
        packed = _short(wide_weight)
        yield made(
            "dense, 24-bit",
            weight,
            {"w": packed},
            SHORT.replace("OUTS", str(outs)).replace("INS", str(k)),
            (vector_types(16), SHORT_MASKS),
            max(read_ns(packed.nbytes), outs * k / 16 / GHZ) + 20,
            k,
            outs,
        )


def _columns(weight: Array, blocks: list[int]) -> Array:
    """The matrix in the order it is read: for each block of outputs, one input after another."""
    panels, start = [], 0
    for size in blocks:
        panels.append(weight[start : start + size].T.reshape(-1))
        start += size
    return np.concatenate(panels)


def _dense_text(ins: int, lanes: int, many: list[int], half: bool) -> str:
    kind = vector(lanes)
    load = "wide_half(w + {})" if half else f"*(const {kind} *)(w + {{}})"
    lines = [
        f"static void FUNCTION(float *restrict y, const float *restrict x, const {'uint16_t' if half else 'float'} "
        "*restrict w)",
        "{",
    ]
    start = 0
    for count, size in dict.fromkeys((many.count(n), n) for n in many):
        names = [f"a{j}" for j in range(size)]
        lines += [
            f"    for (int o = {start}; o < {start + count * size * lanes}; o += {size * lanes}) {{",
            f"        {kind} {', '.join(f'{n} = {{0}}' for n in names)};",
            f"        for (int k = 0; k < {ins}; k++, w += {size * lanes}) {{",
            f"            const {kind} s = ({kind}){{0}} + x[k];",
        ]
        lines += [f"            {n} += s * {load.format(j * lanes)};" for j, n in enumerate(names)]
        lines += [
            "        }",
            *(f"        *({kind} *)(y + o + {j * lanes}) = {n};" for j, n in enumerate(names)),
            "    }",
        ]
        start += count * size * lanes
    return "\n".join([*lines, "}"])


WIDE_HALF = (
    """
#ifdef __AVX512F__
#include <immintrin.h>
static inline f32x16 wide_half(const uint16_t *p)
{
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}
#else
static inline f32x16 wide_half(const uint16_t *p)
{
    f32x16 wide;
    for (int j = 0; j < 16; j++)
        wide[j] = half_to_float(p[j]);
    return wide;
}
#endif
""".strip("\n")
    + "\n"
)


def _short(weight: Array) -> Array:
    """Pack four 24-bit floats into three 32-bit words, each of which holds one of them as it is.

    The fourth float's upper three bytes are the lowest byte of each of the three, which are chosen as near to what
    they should be as that allows: all four are off by at most 2^-16 of themselves.
    """
    bits = np.ascontiguousarray(weight).view(np.uint32).astype(np.int64)
    blocks = bits.reshape(-1, 4, 16, weight.shape[1]).transpose(0, 3, 1, 2)  # blocks, in, 4, lanes
    fourth = np.minimum(blocks[:, :, 3] + 128, 0xFFFFFFFF) >> 8
    numbers = []
    for place, shift in ((0, 16), (1, 8), (2, 0)):
        low = fourth >> shift & 255
        here = blocks[:, :, place]
        base = here & ~255
        off = low - (here & 255)
        base = base + np.where(off > 128, -256, np.where(off < -128, 256, 0)) * (base >= 256)
        numbers.append(np.where(here & 0x7FFFFFFF < 0x00800000, here & 0x80000000, base) | low)
    return np.stack(numbers, 2).astype(np.uint32).view(np.float32).reshape(-1)


SHORT_MASKS = (
    """
/* Four vectors of floats from three of words: the upper bytes of the fourth are the lowest bytes of the three. */
#ifdef __AVX512VBMI__
#include <immintrin.h>
#define SHORT4(l) 0, 0, 64 + 4 * (l), 4 * (l), 0, 0, 68 + 4 * (l), 4 + 4 * (l)
#define SHORT16(l) SHORT4(l), SHORT4(l + 2), SHORT4(l + 4), SHORT4(l + 6)
static const uint8_t short_first[64] = {SHORT16(0), SHORT16(8)};
#undef SHORT4
#define SHORT4(l) 4 * (l), 64 + 4 * (l), 2 + 4 * (l), 3 + 4 * (l), 4 + 4 * (l), 68 + 4 * (l), 6 + 4 * (l), 7 + 4 * (l)
static const uint8_t short_second[64] = {SHORT16(0), SHORT16(8)};
#undef SHORT4
#undef SHORT16
#endif
""".strip("\n")
    + "\n"
)
SHORT = """
static void FUNCTION(float *restrict y, const float *restrict x, const float *restrict w)
{
#ifdef __AVX512VBMI__
    const __m512i first = _mm512_loadu_si512(short_first), second = _mm512_loadu_si512(short_second);
#endif
    for (int o = 0; o < OUTS; o += 64) {
        f32x16 a = {0}, b = {0}, c = {0}, d = {0};
        for (int k = 0; k < INS; k++, w += 48) {
#ifdef __AVX512VBMI__
            const f32x16 s = (f32x16)_mm512_set1_ps(x[k]);
            __m512i p = _mm512_loadu_si512(w), q = _mm512_loadu_si512(w + 16), r = _mm512_loadu_si512(w + 32);
            __asm__("" : "+v"(p), "+v"(q), "+v"(r)); /* read each once: reading is what limits this loop */
            const __m512i t = _mm512_permutex2var_epi8(_mm512_permutex2var_epi8(p, first, q), second, r);
#else
            const f32x16 s = (f32x16){0} + x[k];
            const i32x16 p = *(const i32x16 *)w, q = *(const i32x16 *)(w + 16), r = *(const i32x16 *)(w + 32);
            const i32x16 t = (p << 24) | ((q & 255) << 16) | ((r & 255) << 8);
#endif
            a += s * (f32x16)p;
            b += s * (f32x16)q;
            c += s * (f32x16)r;
            d += s * (f32x16)t;
        }
        *(f32x16 *)(y + o) = a;
        *(f32x16 *)(y + o + 16) = b;
        *(f32x16 *)(y + o + 32) = c;
        *(f32x16 *)(y + o + 48) = d;
    }
}
""".strip("\n")
