"""Matrix times vector, y = W x, with W known: the inner loop of recurrent networks, several ways to store W.

Outputs are the lanes of a vector, so that nothing is summed across lanes. A dense matrix is read once for each
product, and what limits it is how fast the second-level cache gives it out; so one way keeps it as floats of 24 bits.
Zeros are skipped by elements, or by blocks of neighbouring outputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.graph import Array, Narrow
from lilliput.engine.kernels.narrow import HALF
from lilliput.engine.kernels.product import vector, vector_types
from lilliput.engine.target import Target

L1_BYTES, L2_BYTES_A_NS, GHZ = 28 * 1024, 110.0, 3.5
MOST_STEPS = 1500  # of code without loops
SIZES = (64, 32, 16, 8)  # of blocks


@dataclass(frozen=True)
class MatVec:
    """One way to compute y = W x.

    ins, outs: floats that x (zeros behind its own) and y must have room for. constants: arrays by key. call: a C
    statement with {y} and {x} for the pointers, {key} for a constant's. helpers: C text. ns: estimated.
    """

    name: str
    ins: int
    outs: int
    constants: Mapping[str, Array] = field(repr=False)
    call: str = ""
    helpers: tuple[str, ...] = field(default=(), repr=False)
    ns: float = 0.0
    nonzeros: int = 0
    values: int = 0


def ways(weight: Array, narrow: Narrow | None, target: Target) -> Iterator[MatVec]:
    """The ways for a matrix (out, in)."""
    weight = np.ascontiguousarray(weight, np.float32)
    yield from _dense(weight, narrow, target)
    filled = np.count_nonzero(weight) / max(weight.size, 1)
    if filled <= 0.6:
        yield _rows(weight)
        if target.lanes == 16 and "AVX512F" in target.features:
            yield from _picked(weight)
    if target.lanes > 1 and filled <= 0.8:
        yield from _blocks(weight, target)


def _made(
    name: str,
    weight: Array,
    constants: Mapping[str, Array],
    text: str,
    helpers: tuple[str, ...],
    ns: float,
    ins: int,
    outs: int,
) -> MatVec:
    """A way whose function `text` (with FUNCTION for its name) takes y, x and the constants."""
    function = f"times_{weight.shape[0]}x{weight.shape[1]}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    call = f"{function}({{y}}, {{x}}, {', '.join(f'{{{key}}}' for key in constants)});"
    return MatVec(
        name,
        ins,
        outs,
        constants,
        call,
        (*helpers, text.replace("FUNCTION", function)),
        ns,
        int(np.count_nonzero(weight)),
        weight.size,
    )


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _padded(weight: Array, outs: int, ins: int = 0) -> Array:
    return np.pad(weight, ((0, outs - weight.shape[0]), (0, max(ins - weight.shape[1], 0))))


def _read_ns(size_bytes: int) -> float:
    """How long reading takes at least, from the first or the second cache."""
    return size_bytes / (2 * L2_BYTES_A_NS if size_bytes <= L1_BYTES else L2_BYTES_A_NS)


# ------------------------------------------------------------------------------------------------------------- dense


def _dense(weight: Array, narrow: Narrow | None, target: Target) -> Iterator[MatVec]:
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
        yield _made("dense", weight, {"w": weight}, text, (), m * k * 1.0, k, m)
        return
    outs = _up(m, lanes)
    wide = 4 if lanes == 16 else 8
    many = [wide] * (outs // lanes // wide)
    if rest := outs // lanes % wide:
        many.append(rest)
    wide_weight = _padded(weight, outs)
    half = narrow is not None and narrow.bits == 16 and narrow.codes.dtype == np.float16
    if half and lanes == 16 and "AVX512F" in target.features:
        packed = _columns(np.asarray(wide_weight, np.float16), [n * lanes for n in many])
        yield _made(
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
    yield _made(
        "dense",
        weight,
        {"w": packed},
        _dense_text(k, lanes, many, False),
        (vector_types(lanes),),
        max(_read_ns(packed.nbytes), outs * k / lanes / GHZ) + 20,
        k,
        outs,
    )
    if lanes == 16 and "AVX512VBMI" in target.features and outs % 64 == 0 and weight.nbytes > L1_BYTES:
        packed = _short(wide_weight)
        yield _made(
            "dense, 24-bit",
            weight,
            {"w": packed},
            SHORT.replace("OUTS", str(outs)).replace("INS", str(k)),
            (vector_types(16), SHORT_MASKS),
            max(_read_ns(packed.nbytes), outs * k / 16 / GHZ) + 20,
            k,
            outs,
        )


def _columns(weight: Array, blocks: list[int]) -> Array:
    """The matrix in the order it is read: for each block of outputs, one input after another."""
    found, start = [], 0
    for size in blocks:
        found.append(weight[start : start + size].T.reshape(-1))
        start += size
    return np.concatenate(found)


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
    """Four floats in the room of three, as words of which each holds one.

    The fourth float's upper three bytes are the lowest byte of each of the three, which are chosen as near to what
    they should be as that allows: all four are off by at most 2^-16 of themselves.
    """
    bits = np.ascontiguousarray(weight).view(np.uint32).astype(np.int64)
    blocks = bits.reshape(-1, 4, 16, weight.shape[1]).transpose(0, 3, 1, 2)  # blocks, in, 4, lanes
    fourth = np.minimum(blocks[:, :, 3] + 128, 0xFFFFFFFF) >> 8
    found = []
    for place, shift in ((0, 16), (1, 8), (2, 0)):
        low = fourth >> shift & 255
        here = blocks[:, :, place]
        base = here & ~255
        off = low - (here & 255)
        base = base + np.where(off > 128, -256, np.where(off < -128, 256, 0)) * (base >= 256)
        found.append(np.where(here & 0x7FFFFFFF < 0x00800000, here & 0x80000000, base) | low)
    return np.stack(found, 2).astype(np.uint32).view(np.float32).reshape(-1)


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


# ------------------------------------------------------------------------------------------------------------ sparse


def _rows(weight: Array) -> MatVec:
    """The non-zeros of one output after another: what any machine does."""
    m, k = weight.shape
    rows, columns = np.nonzero(weight)
    counts = np.bincount(rows, minlength=m)
    text = "\n".join(
        [
            "static void FUNCTION(float *restrict y, const float *restrict x, const float *restrict w, const uint16_t "
            "*restrict index,",
            "                     const uint16_t *restrict counts)",
            "{",
            f"    for (int o = 0; o < {m}; o++) {{",
            "        float a = 0, b = 0;",
            "        int n = counts[o];",
            "        for (; n > 1; n -= 2, w += 2, index += 2) {",
            "            a += w[0] * x[index[0]];",
            "            b += w[1] * x[index[1]];",
            "        }",
            "        if (n) a += *w++ * x[*index++];",
            "        y[o] = a + b;",
            "    }",
            "}",
        ]
    )
    constants = {"w": weight[rows, columns], "index": columns.astype(np.uint16), "counts": counts.astype(np.uint16)}
    return _made("sparse, by outputs", weight, constants, text, (), len(rows) * 1.1 / GHZ + 4 * m / GHZ, k, m)


CHOSEN = (
    """
/* a + w * x, a different one of 32 elements (lo, hi) for each lane: the lowest 5 bits of a weight say which. */
#ifdef __AVX512F__
#include <immintrin.h>
static inline f32x16 chosen(f32x16 a, f32x16 lo, f32x16 hi, const float *w)
{
    const __m512 held = _mm512_loadu_ps(w);
    return (f32x16)_mm512_fmadd_ps(held, _mm512_permutex2var_ps((__m512)lo, _mm512_castps_si512(held), (__m512)hi),
                                   (__m512)a);
}
#else
static inline f32x16 chosen(f32x16 a, f32x16 lo, f32x16 hi, const float *w)
{
    const f32x16 held = *(const f32x16 *)w;
    const i32x16 bits = (i32x16)held;
    for (int j = 0; j < 16; j++)
        a[j] += held[j] * (bits[j] & 16 ? hi[bits[j] & 15] : lo[bits[j] & 15]);
    return a;
}
#endif
""".strip("\n")
    + "\n"
)


def _picked(weight: Array) -> Iterator[MatVec]:
    """16 outputs at once, each with an input of its own from two registers: off by at most 2^-19 of a weight."""
    m, k = weight.shape
    outs, ins = _up(m, 16), _up(k, 32)
    held = _padded(weight, outs, ins)
    if k <= 192:
        packed, lines, steps = _scheduled(held)
        if steps <= MOST_STEPS:
            text = "\n".join(
                [
                    "static void FUNCTION(float *restrict y, const float *restrict x, const float *restrict w)",
                    "{",
                    *lines,
                    "}",
                ]
            )
            yield _made(
                "sparse, 16 outputs, no loops",
                weight,
                {"w": packed},
                text,
                (vector_types(16), CHOSEN),
                steps * 2.2 / GHZ + outs * 0.05,
                ins,
                outs,
            )
    nonzero = held != 0
    counts = nonzero.reshape(outs // 16, 16, ins // 32, 32).sum(3).max(1)
    total = int(counts.sum())
    packed = np.zeros((total, 16), np.uint32)
    place = 0
    for block in range(outs // 16):
        for chunk in range(ins // 32):
            for lane in range(16):
                row = held[16 * block + lane, 32 * chunk : 32 * chunk + 32]
                columns = np.flatnonzero(row)
                packed[place : place + len(columns), lane] = _marked(row[columns], columns)
                packed[place + len(columns) : place + counts[block, chunk], lane] = _marked(
                    np.zeros(1), np.zeros(1, int)
                )
            place += int(counts[block, chunk])
    text = "\n".join(
        [
            "static void FUNCTION(float *restrict y, const float *restrict x, const float *restrict w,",
            "                     const uint8_t *restrict counts)",
            "{",
            f"    for (int o = 0; o < {outs}; o += 16) {{",
            "        f32x16 a = {0};",
            f"        for (int k = 0; k < {ins}; k += 32) {{",
            "            const f32x16 lo = *(const f32x16 *)(x + k), hi = *(const f32x16 *)(x + k + 16);",
            "            for (int n = *counts++; n > 0; n--, w += 16)",
            "                a = chosen(a, lo, hi, w);",
            "        }",
            "        *(f32x16 *)(y + o) = a;",
            "    }",
            "}",
        ]
    )
    yield _made(
        "sparse, 16 outputs",
        weight,
        {"w": packed.view(np.float32), "counts": counts.astype(np.uint8)},
        text,
        (vector_types(16), CHOSEN),
        total * 2.7 / GHZ + outs * ins / 512 * 1.5,
        ins,
        outs,
    )


def _marked(values: Array, index: Array) -> Array:
    """The bits of the floats nearest to values whose lowest 5 bits are an index; of 0, the least normal number's."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.int64)
    base, off = bits & ~31, index - (bits & 31)
    base = base + np.where(off > 16, -32, np.where(off < -16, 32, 0)) * (base >= 32)
    return (np.where(bits & 0x7FFFFFFF == 0, 0x00800000, base) | index).astype(np.uint32)


def _scheduled(weight: Array) -> tuple[Array, list[str], int]:
    """Code that runs through the non-zeros: in each step the two registers that serve most lanes, the fullest first."""
    groups = weight.shape[1] // 16
    pairs = [(a, b) for a in range(groups) for b in range(a + 1, groups)]
    first, second = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    lines: list[str] = []
    used: set[int] = set()
    packed: list[Array] = []
    for start in range(0, weight.shape[0], 16):
        lists = [
            [list(16 * g + np.flatnonzero(weight[start + lane, 16 * g : 16 * g + 16])) for g in range(groups)]
            for lane in range(16)
        ]
        left = np.array([[len(part) for part in lane] for lane in lists])
        calls: list[str] = []
        while left.any():
            full = left.sum(1).astype(float) ** 3
            served = (left[:, first] > 0) | (left[:, second] > 0)
            best = int((served * full[:, None]).sum(0).argmax())
            a, b = pairs[best]
            used |= {a, b}
            values, index = np.zeros(16), np.zeros(16, np.int64)
            for lane in range(16):
                group = a if left[lane, a] >= left[lane, b] else b
                if left[lane, group]:
                    column = int(lists[lane][group].pop())
                    left[lane, group] -= 1
                    values[lane] = weight[start + lane, column]
                    index[lane] = column - 16 * group + (16 if group == b else 0)
            sum_ = "abcd"[len(calls) % 4]
            calls.append(f"{sum_} = chosen({sum_}, h{a}, h{b}, w + {16 * len(packed)});")
            packed.append(_marked(values, index))
        lines += [
            "    {",
            "        f32x16 a = {0}, b = {0}, c = {0}, d = {0};",
            *("        " + " ".join(calls[i : i + 3]) for i in range(0, len(calls), 3)),
            f"        *(f32x16 *)(y + {start}) = (a + b) + (c + d);",
            "    }",
        ]
    found = np.array(packed, np.uint32).view(np.float32) if packed else np.zeros((1, 16), np.float32)
    read = [f"    const f32x16 h{g} = *(const f32x16 *)(x + {16 * g});" for g in sorted(used)]
    return found, [*(read or ["    (void)x;", "    (void)w;"]), *lines], len(packed)


def _blocks(weight: Array, target: Target) -> Iterator[MatVec]:
    """Blocks of neighbouring outputs that share their zeros: one index for each."""
    m, k = weight.shape
    nonzeros = np.count_nonzero(weight)
    for size in SIZES:
        if m % size:
            continue
        held = (weight.reshape(-1, size, k) != 0).any(1)
        if held.mean() > 0.7 or held.sum() * size > 1.1 * nonzeros:
            continue
        lanes = min(target.lanes, size)
        kind, vectors = vector(lanes), size // lanes
        where, inputs = np.nonzero(held)
        number = np.uint8 if k <= 256 else np.uint16
        sums = max(4 // vectors, 1)
        names = [[f"a{u}_{j}" for j in range(vectors)] for u in range(sums)]
        lines = [
            f"static void FUNCTION(float *restrict y, const float *restrict x, const float *restrict w, const "
            f"{np.dtype(number).name}_t *restrict index,",
            "                     const uint16_t *restrict counts)",
            "{",
            f"    for (int o = 0; o < {m}; o += {size}) {{",
            f"        {kind} {', '.join(f'{n} = {{0}}' for row in names for n in row)};",
            "        int n = *counts++;",
        ]
        one = [
            [
                f"const {kind} s{u} = ({kind}){{0}} + x[index[{u}]];",
                *(f"{n} += s{u} * *(const {kind} *)(w + {u * size + j * lanes});" for j, n in enumerate(row)),
            ]
            for u, row in enumerate(names)
        ]
        if sums > 1:
            lines += [
                f"        for (; n >= {sums}; n -= {sums}, w += {sums * size}, index += {sums}) {{",
                *(f"            {' '.join(part)}" for part in one),
                "        }",
            ]
        lines += [
            f"        for (; n > 0; n--, w += {size}, index++) {{",
            f"            {' '.join(one[0])}",
            "        }",
        ]
        for j in range(vectors):
            lines.append(f"        *({kind} *)(y + o + {j * lanes}) = {' + '.join(row[j] for row in names)};")
        constants = {
            "w": weight.reshape(-1, size, k).transpose(0, 2, 1)[where, inputs],
            "index": inputs.astype(number),
            "counts": held.sum(1).astype(np.uint16),
        }
        yield _made(
            f"sparse, blocks of {size} outputs",
            weight,
            constants,
            "\n".join([*lines, "    }", "}"]),
            (vector_types(lanes),),
            max(_read_ns(4 * size * int(held.sum())), held.sum() * vectors / GHZ) + 3 * m / size,
            k,
            m,
        )
