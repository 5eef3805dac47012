"""Multiply a sparse matrix by a vector, skipping zeros by element, by 16 outputs at once, or by block of outputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array
from lilliput.engine.kernels.matvec_way import GHZ, MatVec, made, padded, read_ns, up
from lilliput.engine.kernels.product import vector, vector_types
from lilliput.engine.target import Target

MOST_STEPS = 1500  # of code without loops
SIZES = (64, 32, 16, 8)  # of blocks


def sparse(weight: Array, filled: float, target: Target) -> Iterator[MatVec]:
    """The ways that skip zeros, where few enough weights are filled."""
    if filled <= 0.6:
        yield _rows(weight)
        if target.lanes == 16 and "AVX512F" in target.features:
            yield from _picked(weight)
    if target.lanes > 1 and filled <= 0.8:
        yield from _blocks(weight, target)


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
    return made("sparse, by outputs", weight, constants, text, (), len(rows) * 1.1 / GHZ + 4 * m / GHZ, k, m)


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
    outs, ins = up(m, 16), up(k, 32)
    held = padded(weight, outs, ins)
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
            yield made(
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
    yield made(
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
    numbers = np.array(packed, np.uint32).view(np.float32) if packed else np.zeros((1, 16), np.float32)
    read = [f"    const f32x16 h{g} = *(const f32x16 *)(x + {16 * g});" for g in sorted(used)]
    return numbers, [*(read or ["    (void)x;", "    (void)w;"]), *lines], len(packed)


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
        yield made(
            f"sparse, blocks of {size} outputs",
            weight,
            constants,
            "\n".join([*lines, "    }", "}"]),
            (vector_types(lanes),),
            max(read_ns(4 * size * int(held.sum())), held.sum() * vectors / GHZ) + 3 * m / size,
            k,
            m,
        )
