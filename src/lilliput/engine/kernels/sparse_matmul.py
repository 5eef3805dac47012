"""Sparse products over columns of positions: each non-zero is a broadcast times a row of positions that lies in L1.

The activations of a block of positions (32 or 64) are copied to a buffer, as many inputs at a time as the first-level
cache holds. Then, for a few outputs at once, their non-zeros are run through: accumulators stay in registers, an index
is the place of the input's row in the buffer (in steps of 8 bytes), values and indices of the outputs lie side by side.
Outputs are sorted by how many non-zeros they have, so those computed together have equally many and the loop's length
can be predicted. Outputs in blocks that share their zeros share their indices too, and the loads of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.dense_matmul import macs_ns, registers
from lilliput.engine.kernels.narrow import Stored, stored
from lilliput.engine.kernels.product import (
    Linear,
    Tail,
    Walk,
    at,
    clamped,
    inside,
    linear,
    pick,
    size_type,
    tail_of,
    times,
    vector,
    vector_types,
    walk,
)
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

DENSEST = 0.75  # non-zeros above which only dense kernels are offered
CACHE_BYTES = 48 * 1024  # of the buffer of activations: rows that are not in L1 come from L2 soon enough

QUADS = """\
/* Four neighbouring numbers are loaded at once, each then spread over a vector. */
#ifdef __AVX512F__
#include <immintrin.h>
#define QUAD(name, at) const __m512 name = _mm512_broadcast_f32x4(_mm_loadu_ps(at))
#define SPREAD(name, i) (f32x16)_mm512_permute_ps(name, (i) * 0x55)
#else
#define QUAD(name, at) const float *const name = (at)
#define SPREAD(name, i) ((f32x16){} + name[i])
#endif"""


FETCH = """\
#ifdef __GNUC__
#define FETCH(at) __builtin_prefetch(at, 1)
#else
#define FETCH(at)
#endif"""


@dataclass(frozen=True)
class Format:
    """The non-zeros of (out, in) weights in the order they are read.

    For each tile of `depth` inputs and each group of `rows` outputs (`order` says which): `steps` rounds of `unroll` x
    rows values, each with an index in units of 8 bytes (one index for all rows where `shared`). places: which weight
    each value is, counted in C order; -1 where it is padding.
    """

    rows: int
    unroll: int
    depth: int
    shared: bool
    places: Array = field(repr=False)
    index: Array = field(repr=False)
    steps: Array = field(repr=False)
    order: Array = field(repr=False)


def formatted(weight: Array, rows: int, unroll: int, depth: int, scale: int, shared: bool) -> Format:
    """Weights (out, in) in a Format; scale: a row of the buffer in units of 8 bytes."""
    outs, ins = weight.shape
    places, index, steps, order = [], [], [], []
    for k in range(0, ins, depth):
        part = weight[:, k : k + depth]
        if shared:
            groups = [np.minimum(np.arange(o, o + rows), outs - 1) for o in range(0, outs, rows)]
            columns = [np.flatnonzero((part[g] != 0).any(0)) for g in groups]
            for place in np.argsort([-len(used) for used in columns], kind="stable"):
                used, group = columns[place], groups[place]
                count = -(-len(used) // unroll) * unroll
                held = np.full((count, rows), -1)
                held[: len(used)] = group * ins + k + used[:, None]
                where = np.zeros(count, np.uint16)
                where[: len(used)] = used * scale
                places.append(held.reshape(-1))
                index.append(where)
                steps.append(count // unroll)
                order.append(group)
            continue
        nonzeros = (part != 0).sum(1)
        ranked = np.argsort(-nonzeros, kind="stable")
        ranked = np.concatenate([ranked, np.repeat(ranked[-1:], -outs % rows)])
        for g in range(0, len(ranked), rows):
            group = ranked[g : g + rows]
            count = -(-int(nonzeros[group].max()) // unroll) * unroll
            held, where = np.full((count, rows), -1), np.zeros((count, rows), np.uint16)
            for place, o in enumerate(group):
                used = np.flatnonzero(part[o])
                held[: len(used), place] = o * ins + k + used
                where[: len(used), place] = used * scale
            places.append(held.reshape(-1))
            index.append(where.reshape(-1))
            steps.append(count // unroll)
            order.append(group)
    kind = np.uint16 if outs < 2**16 else np.uint32
    order.append(np.zeros(rows, np.int64))  # what the last group asks for beforehand
    return Format(
        rows,
        unroll,
        depth,
        shared,
        np.concatenate(places),
        np.concatenate(index),
        np.array(steps, np.uint16),
        np.concatenate(order).astype(kind),
    )


def blocked(weight: Array, rows: int) -> bool:
    """Whether blocks of `rows` outputs (nearly) share their zeros."""
    outs = weight.shape[0] // rows * rows
    if outs < weight.shape[0] or not outs:
        return False
    held = (weight.reshape(-1, rows, weight.shape[1]) != 0).any(1).sum() * rows
    return bool(held <= 1.15 * max(int(np.count_nonzero(weight)), 1))


@kernel("MatMul")
def sparse_columns(node: Node, target: Target) -> Iterator[Kernel]:
    """Positions innermost."""
    found = linear(node)
    if found is None or target.vector_bytes == 0:
        return
    filled = np.count_nonzero(found.weight) / found.weight.size
    if filled > DENSEST or found.outs >= 2**31:
        return
    count = int(found.positions)
    if count < 4 and fixed(found.positions):
        return
    lanes = target.lanes
    while lanes > 4 and lanes >= 2 * count:
        lanes //= 2
    options: list[tuple[int, int, int, bool]] = []  # columns, rows, unroll, shared
    many = registers(target) == 32
    if blocked(found.weight, 4):
        options += [(4 * lanes, 4, 1, True)] if many else [(2 * lanes, 4, 1, True)]
        if blocked(found.weight, 8) and many:
            options.append((2 * lanes, 8, 1, True))
    elif lanes == 16:
        options += [(32, 4, 1, False), (32, 2, 2, False), (64, 2, 2, False)]
    elif lanes == 8:
        options += [(32, 2, 1, False), (16, 4, 1, False)]
    else:
        options += [(16, 2, 1, False), (32, 1, 1, False)]
    done = set()
    for columns, rows, unroll, shared in options:
        columns = min(columns, max(-(-count // lanes) * lanes, lanes))
        if (columns, rows, unroll, shared) not in done:
            done.add((columns, rows, unroll, shared))
            yield _sparse(found, target, lanes, columns, rows, unroll, shared)


def _sparse(found: Linear, target: Target, lanes: int, columns: int, rows: int, unroll: int, shared: bool) -> Kernel:
    tail = tail_of(found.node, found.feature_y)
    most = max(CACHE_BYTES // (4 * columns), 64)
    tiles = -(-found.ins // most)
    depth = min(math.ceil(math.ceil(found.ins / tiles) / 8) * 8, found.ins)
    form = formatted(found.weight, rows, unroll, depth, columns // 2, shared)
    kept = stored(found.weight, found.narrow, form.places, 4 * depth * columns)
    want_x, want_y = found.inner(positions_inside=True)
    constants = {**kept.constants, "index": form.index, "steps": form.steps, "order": form.order}
    if tail.bias is not None:
        constants["bias"] = tail.bias
    if kept.scale is not None:
        constants["scale"] = kept.scale
    wants: list[Want | None] = [None] * 4
    wants[found.x] = want_x
    skips = (1 - found.x, *((2,) if tail.bias is not None else ()))
    count = int(found.positions)
    padded = -(-count // lanes) * lanes
    work = macs_ns(target, form.places.size * padded)
    share: float = 0.92 if shared else 0.72 if columns > 16 else 0.55
    copied = found.ins * padded / 16.0
    scratch = 4 * depth * columns + kept.scratch
    name = f"sparse blocks of {rows}" if shared else "sparse"
    helpers = [vector_types(lanes), FETCH, *([QUADS] if lanes == 16 else [])]
    if tail.clamp is not None:
        helpers.append(pick(lanes))
    bits = f", {found.narrow.bits} bits" if kept.scratch and found.narrow else ""
    return Kernel(
        f"{name}{bits}, {rows} outputs x {columns} positions{f', {unroll} at once' if unroll > 1 else ''}",
        lambda n: _body(n, found, tail, kept, form, lanes, columns),
        tuple(wants), want_y, constants, skips, scratch=scratch, cost_ns=work / share + copied + 60,
        helpers=(*helpers, *kept.helpers, *tail.helpers), nonzeros=int(np.count_nonzero(found.weight)),
        values=found.weight.size,
    )  # fmt: skip


def _body(node: Node, found: Linear, tail: Tail, kept: Stored, form: Format, lanes: int, columns: int) -> str:
    x, y = node.input(found.x), node.y
    name = f"x{found.x}"
    way = walk(y, found.feature_y, [(name, x, found.feature_x), *tail.others(node)])
    text = ["float *const buffer = (float *)scratch;"]
    text += kept.lines
    text += [*way.open, f"const float *const x = {way.base[name]};", f"float *const y = {way.base['y0']};"]
    text += [f"const float *const e{i} = {way.base[f'x{i}']};" for i in tail.extras]
    count, kind = way.count, size_type(way.count)

    def block(vectors: int, width: int | str) -> list[str]:
        return _block(found, tail, kept, form, way, lanes, columns, vectors, width, name)

    if fixed(count):
        count = int(count)
        full, rest = count // columns, count % columns
        if full:
            text += [
                f"for ({kind} t = 0; t < {full * columns}; t += {columns}) {{",
                *inside(block(columns // lanes, columns)),
                "}",
            ]
        if rest:
            text += ["{", f"    const {kind} t = {full * columns};", *inside(block(-(-rest // lanes), rest)), "}"]
    else:
        text += [
            f"{kind} t = 0;",
            f"for (; t + {columns} <= {c(count)}; t += {columns}) {{",
            *inside(block(columns // lanes, columns)),
            "}",
            f"for (; t < {c(count)}; t += {lanes}) {{",
            f"    const int width = {c(count)} - t < {lanes} ? (int)({c(count)} - t) : {lanes};",
            *inside(block(1, "width")),
            "}",
        ]
    return "\n".join([*text, *way.close])


def _block(
    found: Linear,
    tail: Tail,
    kept: Stored,
    form: Format,
    way: Walk,
    lanes: int,
    columns: int,
    vectors: int,
    width: int | str,
    name: str,
) -> list[str]:
    """All outputs at positions t .. t + width - 1, in `vectors` vectors."""
    ins, depth, sx = found.ins, form.depth, way.feature[name]
    index = "uint16_t"
    order = {np.dtype(np.uint16): "uint16_t", np.dtype(np.uint32): "uint32_t"}[form.order.dtype]
    text = ["const float *v = value_of;", f"const {index} *at = index, *n = steps;", f"const {order} *o = order;"]
    deep = depth < ins
    rows = f"{ins} - k0 < {depth} ? {ins} - k0 : {depth}" if deep and ins % depth else str(depth)
    groups = len(form.steps) // -(-ins // depth)
    inner = [
        f"const float *const from = {at('x', ('k0' if deep else '0', sx), ('t', 1))};",
        f"for (int k = 0; k < {'ks' if deep and ins % depth else rows}; k++) {{",
    ]
    if width == vectors * lanes:
        kind = vector(lanes)
        inner += [
            f"    *({kind} *)(buffer + k * {columns} + {j * lanes}) = "
            f"*(const {kind} *)({at('from', ('k', sx), (str(j * lanes), 1))});"
            for j in range(vectors)
        ]
    else:
        inner += [
            f"    float *const to = buffer + k * {columns};",
            f"    for (int j = 0; j < {width}; j++) to[j] = {at('from', ('k', sx))}[j];".replace(
                f"{at('from', ('k', sx))}[j]", f"({at('from', ('k', sx))})[j]"
            ),
            f"    for (int j = {width}; j < {vectors * lanes}; j++) to[j] = 0;",
        ]
    inner.append("}")
    inner += [
        f"for (int g = 0; g < {groups}; g++, o += {form.rows}) {{",
        *inside(_group(found, tail, kept, form, way, lanes, columns, vectors, width)),
        "}",
    ]
    if not deep:
        return [*text, *inner]
    if ins % depth:
        inner.insert(0, f"const int ks = {rows};")
    return [*text, f"for (int k0 = 0; k0 < {ins}; k0 += {depth}) {{", *inside(inner), "}"]


def _group(
    found: Linear,
    tail: Tail,
    kept: Stored,
    form: Format,
    way: Walk,
    lanes: int,
    columns: int,
    vectors: int,
    width: int | str,
) -> list[str]:
    kind, rows, sy = vector(lanes), form.rows, way.feature["y0"]
    deep = form.depth < found.ins
    whole = width == vectors * lanes
    names = [[f"a{i}_{j}" for j in range(vectors)] for i in range(rows)]
    flat = [n for line in names for n in line]
    text = [f"float *const y{i}_ = {at('y', (f'o[{i}]', sy), ('t', 1))};" for i in range(rows)]
    text.append(f"{kind} {', '.join(flat)};")
    scaled = kept.scale is not None
    zero = f"({kind}){{}}"

    def biased(i: int) -> str:
        return f"{zero} + bias[o[{i}]]" if tail.bias is not None else zero

    full = vectors if whole else int(width) // lanes if isinstance(width, int) else 0

    def old(i: int, j: int) -> str:
        return f"*(const {kind} *)(y{i}_ + {j * lanes})" if j else f"*(const {kind} *)y{i}_"

    def start(lines_first: list[str], lines_again: list[str]) -> list[str]:
        return ["if (k0 == 0) {", *inside(lines_first), "} else {", *inside(lines_again), "}"] if deep else lines_first

    if scaled:
        text += [f"{' = '.join(flat)} = {zero};"]
    else:
        text += start(
            [" ".join(f"{n} = {biased(i)};" for n in names[i]) for i in range(rows)],
            _loaded(names, full, vectors, lanes, width, kind, rows, old),
        )
    # The outputs come in no order that the machine foresees: what the next group touches is asked for now.
    for i in range(rows):
        o = f"o[{rows + i}]"
        others = [(f"e{e}", way.feature[f"x{e}"], way.step[f"x{e}"]) for e in tail.extras]
        for base, step, along in (("y", sy, 1), *others):
            if step != 0 and along == 1:
                text.append(
                    " ".join(
                        f"FETCH({at(base, (o, step), ('t', 1))}{f' + {j}' if j else ''});"
                        for j in range(0, vectors * lanes, 16)
                    )
                )
    text.append("for (int s = *n++; s > 0; s--) {")
    together = rows * form.unroll
    quads = lanes == 16 and together % 4 == 0
    if quads:
        text += [f"    QUAD(q{e}, v + {4 * e});" for e in range(together // 4)]

    def spread(e: int) -> str:
        return f"SPREAD(q{e // 4}, {e % 4})" if quads else f"{zero} + v[{e}]"

    for e in range(together):
        i = e % rows
        if form.shared and i:
            continue
        used = e // rows if form.shared else e
        place = f"const char *const p = (const char *)buffer + 8 * (size_t)at[{used}];"
        if form.shared:
            text.append(f"    {{ {place}")
            text += [f"      const {kind} u{j} = *(const {kind} *)(p + {j * lanes * 4});" for j in range(vectors)]
            for r in range(rows):
                text.append(
                    f"      {{ const {kind} s_ = {spread(e + r)}; "
                    + " ".join(f"a{r}_{j} += s_ * u{j};" for j in range(vectors))
                    + " }"
                )
            text.append("    }")
        else:
            text.append(f"    {{ {place} const {kind} s_ = {spread(e)};")
            text.append(
                "      "
                + " ".join(f"a{i}_{j} += s_ * *(const {kind} *)(p + {j * lanes * 4});" for j in range(vectors))
                + " }"
            )
    text += [f"    v += {together}; at += {form.unroll if form.shared else together};", "}"]
    if scaled:
        lines_first, lines_again = [], []
        for i in range(rows):
            lines_first.append(
                " ".join(
                    f"{n} = {n} * scale[o[{i}]] + ({biased(i)});"
                    if tail.bias is not None
                    else f"{n} = {n} * scale[o[{i}]];"
                    for n in names[i]
                )
            )
            lines_again.append(" ".join(f"{n} = {n} * scale[o[{i}]];" for n in names[i]))
        if deep:
            lines_again += _added(names, full, vectors, lanes, width, kind, rows, old)
        text += start(lines_first, lines_again)
    last = f"k0 + {form.depth} >= {found.ins}"
    if tail.clamp is not None:
        lines = [" ".join(clamped(n, lanes, tail.clamp)) for n in flat]
        text += [f"if ({last}) {{", *inside(lines), "}"] if deep else lines
    # One output after the other: the last group may hold an output twice.
    for i in range(rows):
        text += [" ".join(f"*({kind} *)(y{i}_ + {j * lanes}) = {names[i][j]};" for j in range(full))] if full else []
        if not whole:
            left = int(width) - full * lanes if isinstance(width, int) else width
            text.append(f"for (int j = 0; j < {left}; j++) y{i}_[{full * lanes} + j] = {names[i][full]}[j];")
        if tail.expr is not None:
            loop = []
            for e in tail.extras:
                place = at(f"e{e}", (f"o[{i}]", way.feature[f"x{e}"]), ("t", way.step[f"x{e}"]))
                loop.append(f"const float *const z{e} = {place};")
            places = [f"z{e}[{times('j', way.step[f'x{e}'])}]" for e in tail.extras]
            loop += [f"for (int j = 0; j < {width}; j++) {{", *inside(tail.text(f"y{i}_[j]", places)), "}"]
            text += [f"if ({last}) {{" if deep else "{", *inside(loop), "}"]
    return text


def _loaded(
    names: list[list[str]], full: int, vectors: int, lanes: int, width: int | str, kind: str, rows: int, old: object
) -> list[str]:
    """Lines that start the accumulators with what earlier tiles left in the output."""
    lines = []
    for i in range(rows):
        lines.append(" ".join(f"{names[i][j]} = {old(i, j)};" for j in range(full)))  # type: ignore[operator]
        if full < vectors:
            left = int(width) - full * lanes if isinstance(width, int) else width
            lines.append(
                f"{names[i][full]} = ({kind}){{}}; for (int j = 0; j < {left}; j++) "
                f"{names[i][full]}[j] = y{i}_[{full * lanes} + j];"
            )
    return [line for line in lines if line]


def _added(
    names: list[list[str]], full: int, vectors: int, lanes: int, width: int | str, kind: str, rows: int, old: object
) -> list[str]:
    """Lines that add what earlier tiles left in the output."""
    lines = []
    for i in range(rows):
        lines.append(" ".join(f"{names[i][j]} += {old(i, j)};" for j in range(full)))  # type: ignore[operator]
        if full < vectors:
            left = int(width) - full * lanes if isinstance(width, int) else width
            lines.append(f"for (int j = 0; j < {left}; j++) {names[i][full]}[j] += y{i}_[{full * lanes} + j];")
    return [line for line in lines if line]
