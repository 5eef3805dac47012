"""Sparse products, vectorized over positions: each non-zero is a broadcast times a row of positions in L1.

The activations of a block of positions (32 or 64) are copied to a buffer, as many inputs at a time as the first-level
cache holds. Then, for a few outputs at once, their non-zeros are run through: accumulators stay in registers, an index
is the place of the input's row in the buffer (in steps of 8 bytes), values and indices of the outputs lie side by side.
Outputs are sorted by how many non-zeros they have, so those computed together have equally many and the loop's length
can be predicted. Outputs in blocks that share their zeros share their indices too, and the loads of the activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lilliput.engine.graph import Node
from lilliput.engine.kernel import Kernel, Want, kernel
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
from lilliput.engine.kernels.sparse_format import Format, blocked, formatted
from lilliput.engine.kernels.tiles import macs_ns, registers
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


@kernel("MatMul")
def sparse_columns(node: Node, target: Target) -> Iterator[Kernel]:
    """Positions innermost."""
    layer = linear(node)
    if layer is None or target.vector_bytes == 0:
        return
    filled = np.count_nonzero(layer.weight) / layer.weight.size
    if filled > DENSEST or layer.outs >= 2**31:
        return
    count = int(layer.positions)
    if count < 4 and fixed(layer.positions):
        return
    lanes = target.lanes
    while lanes > 4 and lanes >= 2 * count:
        lanes //= 2
    options: list[tuple[int, int, int, bool]] = []  # columns, rows, unroll, shared
    many = registers(target) == 32
    if blocked(layer.weight, 4):
        options += [(4 * lanes, 4, 1, True)] if many else [(2 * lanes, 4, 1, True)]
        if blocked(layer.weight, 8) and many:
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
            yield _sparse(layer, target, lanes, columns, rows, unroll, shared)


def _sparse(layer: Linear, target: Target, lanes: int, columns: int, rows: int, unroll: int, shared: bool) -> Kernel:
    tail = tail_of(layer.node, layer.feature_y)
    most = max(CACHE_BYTES // (4 * columns), 64)
    tiles = -(-layer.ins // most)
    depth = min(math.ceil(math.ceil(layer.ins / tiles) / 8) * 8, layer.ins)
    form = formatted(layer.weight, rows, unroll, depth, columns // 2, shared)
    kept = stored(layer.weight, layer.narrow, form.places, 4 * depth * columns)
    want_x, want_y = layer.inner(positions_inside=True)
    constants = {**kept.constants, "index": form.index, "steps": form.steps, "order": form.order}
    if tail.bias is not None:
        constants["bias"] = tail.bias
    if kept.scale is not None:
        constants["scale"] = kept.scale
    wants: list[Want | None] = [None] * 4
    wants[layer.x] = want_x
    skips = (1 - layer.x, *((2,) if tail.bias is not None else ()))
    count = int(layer.positions)
    padded = -(-count // lanes) * lanes
    work = macs_ns(target, form.places.size * padded)
    share: float = 0.92 if shared else 0.72 if columns > 16 else 0.55
    copied = layer.ins * padded / 16.0
    scratch = 4 * depth * columns + kept.scratch
    name = f"sparse blocks of {rows}" if shared else "sparse"
    helpers = [vector_types(lanes), FETCH, *([QUADS] if lanes == 16 else [])]
    if tail.clamp is not None:
        helpers.append(pick(lanes))
    bits = f", {layer.narrow.bits} bits" if kept.scratch and layer.narrow else ""
    return Kernel(
        f"{name}{bits}, {rows} outputs x {columns} positions{f', {unroll} at once' if unroll > 1 else ''}",
        lambda n: _body(n, layer, tail, kept, form, lanes, columns),
        tuple(wants), want_y, constants, skips, scratch=scratch, cost_ns=work / share + copied + 60,
        helpers=(*helpers, *kept.helpers, *tail.helpers), nonzeros=int(np.count_nonzero(layer.weight)),
        values=layer.weight.size,
    )  # fmt: skip


def _body(node: Node, layer: Linear, tail: Tail, kept: Stored, form: Format, lanes: int, columns: int) -> str:
    x, y = node.input(layer.x), node.y
    name = f"x{layer.x}"
    way = walk(y, layer.feature_y, [(name, x, layer.feature_x), *tail.others(node)])
    text = ["float *const buffer = (float *)scratch;"]
    text += kept.lines
    text += [*way.open, f"const float *const x = {way.base[name]};", f"float *const y = {way.base['y0']};"]
    text += [f"const float *const e{i} = {way.base[f'x{i}']};" for i in tail.extras]
    count, kind = way.count, size_type(way.count)

    def block(vectors: int, width: int | str) -> list[str]:
        return _Block(layer, tail, kept, form, way, lanes, columns, vectors, width).lines(name)

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


@dataclass(frozen=True)
class _Block:
    """All outputs at positions t .. t + width - 1, in `vectors` vectors: the C lines that compute them.

    Sums are accumulators a0_0, a0_1, ...: of output o[0] of a group in the first vector of positions, the second, ...
    """

    layer: Linear
    tail: Tail
    kept: Stored
    form: Format
    way: Walk
    lanes: int
    columns: int
    vectors: int
    width: int | str

    @property
    def kind(self) -> str:
        """The C type of a vector of positions."""
        return vector(self.lanes)

    @property
    def zero(self) -> str:
        """A vector of zeros."""
        return f"({self.kind}){{}}"

    @property
    def deep(self) -> bool:
        """Whether inputs are taken in several tiles, so that sums are carried on from what is in the output."""
        return self.form.depth < self.layer.ins

    @property
    def whole(self) -> bool:
        """Whether every vector is full."""
        return self.width == self.vectors * self.lanes

    @property
    def full(self) -> int:
        """Vectors that are known to be full."""
        return self.vectors if self.whole else int(self.width) // self.lanes if isinstance(self.width, int) else 0

    @property
    def left(self) -> int | str:
        """Positions in the vector behind the full ones."""
        return int(self.width) - self.full * self.lanes if isinstance(self.width, int) else self.width

    @property
    def sums(self) -> list[list[str]]:
        """The accumulators, by output of a group."""
        return [[f"a{i}_{j}" for j in range(self.vectors)] for i in range(self.form.rows)]

    @property
    def last(self) -> str:
        """Whether the last tile of inputs is being summed, in C."""
        return f"k0 + {self.form.depth} >= {self.layer.ins}"

    def lines(self, name: str) -> list[str]:
        """The copy of the activations x (called `name` by the walk), then group after group of outputs."""
        ins, depth = self.layer.ins, self.form.depth
        order = {np.dtype(np.uint16): "uint16_t", np.dtype(np.uint32): "uint32_t"}[self.form.order.dtype]
        text = ["const float *v = value_of;", "const uint16_t *at = index, *n = steps;", f"const {order} *o = order;"]
        groups = len(self.form.steps) // -(-ins // depth)
        inner = [
            *self._copied(name),
            f"for (int g = 0; g < {groups}; g++, o += {self.form.rows}) {{",
            *inside(self._group()),
            "}",
        ]
        if not self.deep:
            return [*text, *inner]
        if ins % depth:
            inner.insert(0, f"const int ks = {ins} - k0 < {depth} ? {ins} - k0 : {depth};")
        return [*text, f"for (int k0 = 0; k0 < {ins}; k0 += {depth}) {{", *inside(inner), "}"]

    def _copied(self, name: str) -> list[str]:
        """A tile of inputs at these positions, copied to the buffer."""
        sx, kind = self.way.feature[name], self.kind
        row = at("from", ("k", sx))
        rows = "ks" if self.deep and self.layer.ins % self.form.depth else str(self.form.depth)
        text = [
            f"const float *const from = {at('x', ('k0' if self.deep else '0', sx), ('t', 1))};",
            f"for (int k = 0; k < {rows}; k++) {{",
        ]
        if self.whole:
            text += [
                f"    *({kind} *)(buffer + k * {self.columns} + {j * self.lanes}) = "
                f"*(const {kind} *)({at('from', ('k', sx), (str(j * self.lanes), 1))});"
                for j in range(self.vectors)
            ]
        else:
            text += [
                f"    float *const to = buffer + k * {self.columns};",
                f"    for (int j = 0; j < {self.width}; j++) to[j] = ({row})[j];",
                f"    for (int j = {self.width}; j < {self.vectors * self.lanes}; j++) to[j] = 0;",
            ]
        return [*text, "}"]

    def _group(self) -> list[str]:
        """The outputs that are computed together."""
        sy, flat = self.way.feature["y0"], [n for line in self.sums for n in line]
        text = [f"float *const y{i}_ = {at('y', (f'o[{i}]', sy), ('t', 1))};" for i in range(self.form.rows)]
        text.append(f"{self.kind} {', '.join(flat)};")
        if self.kept.scale is not None:
            text += [f"{' = '.join(flat)} = {self.zero};"]
        else:
            first = [" ".join(f"{n} = {self._bias(i)};" for n in line) for i, line in enumerate(self.sums)]
            text += self._started(first, self._earlier("="))
        text += [*self._fetched(), *self._products()]
        if self.kept.scale is not None:
            text += self._scaled()
        if self.tail.clamp is not None:
            lines = [" ".join(clamped(n, self.lanes, self.tail.clamp)) for n in flat]
            text += [f"if ({self.last}) {{", *inside(lines), "}"] if self.deep else lines
        # One output after the other: the last group may hold an output twice.
        for i in range(self.form.rows):
            text += self._written(i)
        return text

    def _bias(self, i: int) -> str:
        return f"{self.zero} + bias[o[{i}]]" if self.tail.bias is not None else self.zero

    def _started(self, first: list[str], again: list[str]) -> list[str]:
        """Lines for the first tile of inputs, and for the others."""
        return ["if (k0 == 0) {", *inside(first), "} else {", *inside(again), "}"] if self.deep else first

    def _earlier(self, how: str) -> list[str]:
        """Lines that set the sums ("=") to what earlier tiles left in the output, or add that ("+=")."""
        lines = []
        for i, line in enumerate(self.sums):
            places = [f"y{i}_ + {j * self.lanes}" if j else f"y{i}_" for j in range(self.full)]
            old = [f"*(const {self.kind} *){f'({place})' if ' ' in place else place}" for place in places]
            lines.append(" ".join(f"{n} {how} {place};" for n, place in zip(line, old, strict=False)))
            if self.full < self.vectors:
                n = line[self.full]
                start = f"{n} = {self.zero}; " if how == "=" else ""
                loop = f"for (int j = 0; j < {self.left}; j++) {n}[j] {how} y{i}_[{self.full * self.lanes} + j];"
                lines.append(start + loop)
        return [line for line in lines if line]

    def _fetched(self) -> list[str]:
        """The outputs come in no order that the machine foresees: what the next group touches is asked for now."""
        way, text = self.way, []
        others = [(f"e{e}", way.feature[f"x{e}"], way.step[f"x{e}"]) for e in self.tail.extras]
        for i in range(self.form.rows):
            for base, step, along in (("y", way.feature["y0"], 1), *others):
                if step != 0 and along == 1:
                    place = at(base, (f"o[{self.form.rows + i}]", step), ("t", 1))
                    starts = range(0, self.vectors * self.lanes, 16)
                    text.append(" ".join(f"FETCH({place}{f' + {j}' if j else ''});" for j in starts))
        return text

    def _products(self) -> list[str]:
        """The loop over the non-zeros."""
        form, kind = self.form, self.kind
        together = form.rows * form.unroll
        quads = self.lanes == 16 and together % 4 == 0
        text = ["for (int s = *n++; s > 0; s--) {"]
        text += [f"    QUAD(q{e}, v + {4 * e});" for e in range(together // 4)] if quads else []

        def spread(e: int) -> str:
            return f"SPREAD(q{e // 4}, {e % 4})" if quads else f"{self.zero} + v[{e}]"

        def place(index: int) -> str:
            return f"const char *const p = (const char *)buffer + 8 * (size_t)at[{index}];"

        def input_at(j: int) -> str:
            return f"*(const {kind} *)(p + {j * self.lanes * 4})"

        for e in range(0, together, form.rows) if form.shared else ():
            text.append(f"    {{ {place(e // form.rows)}")
            text += [f"      const {kind} u{j} = {input_at(j)};" for j in range(self.vectors)]
            for r, line in enumerate(self.sums):
                sums = " ".join(f"{n} += s_ * u{j};" for j, n in enumerate(line))
                text.append(f"      {{ const {kind} s_ = {spread(e + r)}; {sums} }}")
            text.append("    }")
        for e in () if form.shared else range(together):
            sums = " ".join(f"{n} += s_ * {input_at(j)};" for j, n in enumerate(self.sums[e % form.rows]))
            text += [f"    {{ {place(e)} const {kind} s_ = {spread(e)};", f"      {sums} }}"]
        return [*text, f"    v += {together}; at += {form.unroll if form.shared else together};", "}"]

    def _scaled(self) -> list[str]:
        """Sums of integers times each output's scale, then what is added to them."""
        first, again = [], []
        for i, line in enumerate(self.sums):
            more = f" + ({self._bias(i)})" if self.tail.bias is not None else ""
            first.append(" ".join(f"{n} = {n} * scale[o[{i}]]{more};" for n in line))
            again.append(" ".join(f"{n} = {n} * scale[o[{i}]];" for n in line))
        return self._started(first, [*again, *self._earlier("+=")] if self.deep else again)

    def _written(self, i: int) -> list[str]:
        """One output of a group, and what follows the sum."""
        way, tail, text = self.way, self.tail, []
        stored = [f"*({self.kind} *)(y{i}_ + {j * self.lanes}) = {self.sums[i][j]};" for j in range(self.full)]
        text += [" ".join(stored)] if stored else []
        if not self.whole:
            start, rest = self.full * self.lanes, self.sums[i][self.full]
            text.append(f"for (int j = 0; j < {self.left}; j++) y{i}_[{start} + j] = {rest}[j];")
        if tail.expr is not None:
            loop = []
            for e in tail.extras:
                place = at(f"e{e}", (f"o[{i}]", way.feature[f"x{e}"]), ("t", way.step[f"x{e}"]))
                loop.append(f"const float *const z{e} = {place};")
            places = [f"z{e}[{times('j', way.step[f'x{e}'])}]" for e in tail.extras]
            loop += [f"for (int j = 0; j < {self.width}; j++) {{", *inside(tail.text(f"y{i}_[j]", places)), "}"]
            text += [f"if ({self.last}) {{" if self.deep else "{", *inside(loop), "}"]
        return text
