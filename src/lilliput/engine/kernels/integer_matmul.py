"""Products of 8-bit integers, exact in int32: four inputs at a time, outputs side by side.

acc[t, o] = sum_k a[t, k] b[k, o] - za sum_k b[k, o]: unsigned a times signed b, the second term computed beforehand up
to the zero point za. Signed a and unsigned b are shifted by 128, which their zero points take up. Where b's zero point
is not taken into its levels, the sum of each row of a is multiplied by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lilliput.engine import loops
from lilliput.engine.expr import arg, needs, statements
from lilliput.engine.graph import Array, Node, Value
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.product import Walk, at, at_value, inside, size_type, times, vector, vector_types, walk
from lilliput.engine.kernels.tiles import macs_ns, registers
from lilliput.engine.size import c, fixed, product
from lilliput.engine.target import Target

# acc[j] += x's four bytes (unsigned) times w[j]'s (signed), in the instructions that machines have for it.
DOT4 = """\
#ifdef __x86_64__
#include <immintrin.h>
#endif
static inline i32x{n} dot4_{n}(i32x{n} acc, uint32_t x, i32x{n} w)
{{
#if {has}
    return (i32x{n}){call};
#elif {pairs}
    const i32x{n} even = (i32x{n}){{}} + (int32_t)(x & 0x00ff00ff);
    const i32x{n} odd = (i32x{n}){{}} + (int32_t)(x >> 8 & 0x00ff00ff);
    const {wide} low = {shift_right}({shift_left}(({wide})w, 8), 8), high = {shift_right}(({wide})w, 8);
    return acc + (i32x{n}){madd}(low, ({wide})even) + (i32x{n}){madd}(high, ({wide})odd);
#else
    for (int i = 0; i < 4; i++) {{
        const i32x{n} level = (i32x{n})((u32x{n})w << (24 - 8 * i)) >> 24;
        acc += (int32_t)(x >> 8 * i & 255) * level;
    }}
    return acc;
#endif
}}"""


def dot4(lanes: int) -> str:
    """C text of dot4_N, for the head of the file."""
    unsigned = f"typedef uint32_t u32x{lanes} __attribute__((vector_size({4 * lanes}), aligned(4), may_alias));\n"
    bits = 32 * lanes
    wide = f"__m{bits}i"
    half = "_mm" if bits == 128 else f"_mm{bits}"
    has = {
        16: "defined(__AVX512VNNI__)",
        8: "defined(__AVX512VNNI__) && defined(__AVX512VL__)",
        4: "defined(__AVX512VNNI__) && defined(__AVX512VL__)",
    }[lanes]
    pairs = {16: "defined(__AVX512BW__)", 8: "defined(__AVX2__)", 4: "defined(__SSE2__)"}[lanes]
    call = f"{half}_dpbusd_epi32(({wide})acc, ({wide})((i32x{lanes}){{}} + (int32_t)x), ({wide})w)"
    return unsigned + DOT4.format(
        n=lanes,
        has=has,
        pairs=pairs,
        call=call,
        wide=wide,
        madd=f"{half}_madd_epi16",
        shift_left=f"{half}_slli_epi16",
        shift_right=f"{half}_srai_epi16",
    )


@dataclass(frozen=True)
class Levels:
    """b of a product as signed levels (in, out), what its zero points then are, and the shift of a."""

    levels: Array = field(repr=False)
    zero: Array  # (out,) int32
    shift: int  # 128 where a is signed


def _levels(node: Node) -> Levels | None:
    a, b, zero = node.input(0), node.input(1), node.maybe(3)
    if b.data is None or b.rank != 2 or a.data is not None or a.dtype.name not in ("int8", "uint8"):
        return None
    if zero is not None and zero.data is None:
        return None
    held = np.zeros(1, np.int32) if zero is None else np.asarray(zero.data).reshape(-1).astype(np.int32)
    zeros = np.broadcast_to(held, (b.data.shape[1],)).astype(np.int32)
    levels = b.data.astype(np.int32) - zeros
    zeros = np.zeros_like(zeros)
    if levels.min(initial=0) < -128 or levels.max(initial=0) > 127:
        shift = 128 if b.dtype == np.uint8 else 0
        levels = b.data.astype(np.int32) - shift
        zeros = np.broadcast_to(held, (b.data.shape[1],)).astype(np.int32) - shift
    return Levels(levels.astype(np.int8), np.ascontiguousarray(zeros), 128 if a.dtype == np.int8 else 0)


@kernel("MatMulInteger")
def integer_rows(node: Node, target: Target) -> Iterator[Kernel]:
    """Constant b."""
    matrix = _levels(node)
    if matrix is None or target.vector_bytes == 0 or node.y.size == 0 or matrix.levels.size == 0:
        return
    ins, outs = matrix.levels.shape
    lanes = target.lanes
    while lanes > 4 and lanes >= 2 * outs:
        lanes //= 2
    count = product(node.y.shape[:-1])
    high, vectors = (8, 2) if registers(target) == 32 else (4, 2)
    if fixed(count) and count < 4:
        high, vectors = int(count), 4
    vectors = min(vectors, -(-outs // lanes))
    wide = lanes * vectors
    rows = -(-ins // 4) * 4
    parts, sums, zeros = [], [], []
    for o in range(0, outs, wide):
        part = matrix.levels[:, o : o + wide]
        held = np.zeros((rows, -(-part.shape[1] // lanes) * lanes), np.int8)
        held[:ins, : part.shape[1]] = part
        parts.append(held.reshape(rows // 4, 4, -1).transpose(0, 2, 1).reshape(-1))
        sums.append(held.astype(np.int32).sum(0))
        zeros.append(np.append(matrix.zero[o : o + wide], [0] * (held.shape[1] - part.shape[1])))
    constants: dict[str, Array] = {"levels": np.concatenate(parts), "sums": np.concatenate(sums).astype(np.int32)}
    if matrix.zero.any():
        constants["zeros"] = np.concatenate(zeros).astype(np.int32)
    a = node.input(0)
    expr = node.attrs.get("expr")
    skips = (1, 3)
    yield Kernel(
        f"8-bit, {high} positions x {wide} outputs", lambda n: _body(n, matrix, lanes, high, vectors),
        (Want(order=tuple(range(a.rank))),), Want(order=tuple(range(node.y.rank))), constants, skips,
        scratch=4 * wide * high, cost_ns=macs_ns(target, ins * outs * int(count)) / 3 + 30,
        helpers=(vector_types(lanes), dot4(lanes), *(texts(*needs([expr])) if expr is not None else ())),
        nonzeros=None, values=matrix.levels.size,
    )  # fmt: skip


def _extras(node: Node) -> list[int]:
    return [i for i in range(4, len(node.inputs)) if node.inputs[i] is not None]


def _body(node: Node, matrix: Levels, lanes: int, high: int, vectors: int) -> str:
    a, y = node.input(0), node.y
    others: list[tuple[str, Value, int | None]] = [("x0", a, a.rank - 1)]
    others += [(f"x{i}", node.input(i), None) for i in _extras(node)]
    way = walk(y, y.rank - 1, others)
    text = [
        "int32_t *const sum = (int32_t *)scratch;",
        f"const int32_t zero = {'(int32_t)*x2' if node.maybe(2) is not None else '0'}"
        f"{f' + {matrix.shift}' if matrix.shift else ''};",
        *way.open,
        f"const uint8_t *const x = (const uint8_t *)({way.base['x0']});",
        f"{y.c_type} *const y = {way.base['y0']};",
    ]
    text += [f"const {node.input(i).c_type} *const e{i} = {way.base[f'x{i}']};" for i in _extras(node)]
    ins, outs = matrix.levels.shape
    wide, rows = lanes * vectors, -(-ins // 4) * 4
    text.append("const int8_t *w = levels;")
    full, rest = outs // wide, outs % wide
    for width, start, loop in ((wide, 0, full), (rest, full * wide, 1)):
        if not width or not loop:
            continue
        use = -(-width // lanes)
        inner = [*_positions(node, matrix, way, lanes, use, width, high), f"w += {rows * use * lanes};"]
        if loop > 1:
            text += [f"for (int o = {start}; o < {start + loop * width}; o += {width}) {{", *inside(inner), "}"]
        else:
            text += at_value("int", "o", start, inner)
    return "\n".join([*text, *way.close])


def _positions(node: Node, matrix: Levels, way: Walk, lanes: int, vectors: int, width: int, high: int) -> list[str]:
    count, kind = way.count, size_type(way.count)

    def tile(some: int) -> list[str]:
        return _tile(node, matrix, way, lanes, vectors, width, some)

    if fixed(count):
        count = int(count)
        high = -(-count // -(-count // high))
        full, rest = count // high, count % high
        text = (
            [f"for ({kind} t = 0; t < {full * high}; t += {high}) {{", *inside(tile(high)), "}"]
            if full > 1
            else (at_value(kind, "t", 0, tile(high)))
        )
        return text + (at_value(kind, "t", full * high, tile(rest)) if rest else [])
    text = [f"{kind} t = 0;", f"for (; t + {high} <= {c(count)}; t += {high}) {{", *inside(tile(high)), "}"]
    return [*text, f"for (; t < {c(count)}; t++) {{", *inside(tile(1)), "}"] if high > 1 else text


def _tile(node: Node, matrix: Levels, way: Walk, lanes: int, vectors: int, width: int, high: int) -> list[str]:
    kind, ins, wide, y = vector(lanes, "i32"), matrix.levels.shape[0], lanes * vectors, node.y
    tx, ty = way.step["x0"], way.step["y0"]
    names = [[f"a{i}_{j}" for j in range(vectors)] for i in range(high)]
    text = [
        f"const uint8_t *r = {at('x', ('t', tx))};",
        "const int8_t *v = w;",
        f"{kind} {', '.join(n for line in names for n in line)};",
    ]
    for j in range(vectors):
        text.append(f"{' = '.join(line[j] for line in names)} = *(const {kind} *)(sums + o + {j * lanes}) * -zero;")

    def step(size: int) -> list[str]:
        lines = [f"const {kind} v{j} = *(const {kind} *)(v + {4 * j * lanes});" for j in range(vectors)]
        for i in range(high):
            place = at("r", (str(i), tx)) if i else "r"
            read = f"uint32_t s{' = 0' if size < 4 else ''}; memcpy(&s, {place}, {size});"
            lines.append(
                f"{{ {read}{' s ^= 0x80808080u;' if matrix.shift else ''} "
                + " ".join(f"{n} = dot4_{lanes}({n}, s, v{j});" for j, n in enumerate(names[i]))
                + " }"
            )
        return lines

    if ins >= 4:
        text += [f"for (int k = 0; k < {ins // 4}; k++, r += 4, v += {4 * wide}) {{", *inside(step(4)), "}"]
    if ins % 4:
        text += ["{", *inside(step(ins % 4)), "}"]
    for i in range(high):
        text.append(" ".join(f"*({kind} *)(sum + {i * wide + j * lanes}) = {n};" for j, n in enumerate(names[i])))
    text += [f"for (int i = 0; i < {high}; i++) {{", f"    {y.c_type} *const z = {at('y', ('t + i', ty), ('o', 1))};"]
    if matrix.zero.any():
        text += [
            "    int32_t row = 0;",
            f"    const uint8_t *const b = {at('x', ('t + i', tx))};",
            f"    for (int k = 0; k < {ins}; k++) row += b[k]{' ^ 0x80' if matrix.shift else ''};",
            f"    row -= {ins} * zero;",
            f"    for (int j = 0; j < {width}; j++) sum[i * {wide} + j] -= row * zeros[o + j];",
        ]
    places = [f"sum[i * {wide} + j]"]
    for e in _extras(node):
        along = way.feature[f"x{e}"]
        place = at(f"e{e}", ("t + i", way.step[f"x{e}"]), ("o", along))
        text.append(f"    const {node.input(e).c_type} *const z{e} = {place};")
        places.append(f"z{e}[{times('j', along)}]")
    expr = node.attrs.get("expr")
    lines, (result,) = statements([expr or arg(0, np.int32)], places)
    return [
        *text,
        f"    for (int j = 0; j < {width}; j++) {{",
        *inside(lines, "        "),
        f"        z[j] = {result};",
        "    }",
        "}",
    ]


@kernel("MatMulInteger")
def plain_integer(node: Node, target: Target) -> Iterator[Kernel]:
    """Any operands."""
    del target
    expr = node.attrs.get("expr")
    yield Kernel(
        "plain",
        _plain,
        cost_ns=1.5 * int(node.y.size) * int(node.x.shape[-1]),
        helpers=texts(*needs([expr])) if expr is not None else (),
    )


def _plain(node: Node) -> str:
    a, b, y = node.input(0), node.input(1), node.y
    rows, columns = a.rank > 1, b.rank > 1
    lead = y.rank - rows - columns
    shapes = (*y.shape[:lead],)

    def inner(names: list[str]) -> list[str]:
        outer, m, n = names[:lead], names[lead] if rows else "", names[-1] if columns else ""
        sa, sb = (loops.strides_of(v, (*shapes, *v.shape[-min(v.rank, 2) :])) for v in (a, b))
        left = loops.index([*outer, *([m] if rows else []), "k"], sa)
        right = loops.index([*outer, "k", *([n] if columns else [])], sb)
        za = " - (int32_t)*x2" if node.maybe(2) is not None else ""
        zero = node.maybe(3)
        zb = "" if zero is None else f" - (int32_t)x3[{n if zero.size != 1 and n else '0'}]"
        lines = [
            "int32_t sum = 0;",
            f"for (int64_t k = 0; k < {c(a.shape[-1])}; k++)",
            f"    sum += ((int32_t)x0[{left}]{za}) * ((int32_t)x1[{right}]{zb});",
        ]
        places = [
            "sum",
            *(f"x{i}[{loops.index(names, loops.strides_of(node.input(i), y.shape))}]" for i in _extras(node)),
        ]
        more, (result,) = statements([node.attrs.get("expr") or arg(0, np.int32)], places)
        return [*lines, *more, f"y0[{loops.index(names, y.strides)}] = {result};"]

    return loops.nest(y.shape, inner)
