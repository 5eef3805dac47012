"""Sparse convolution over planes: every output plane runs through its non-zeros, each a number times shifted rows.

Loads that start anywhere in a cache line take twice as long as aligned ones. So the rows are never read shifted: all
non-zeros of one column of the kernel are summed up first, over rows as they lie, and their sum is shifted once:

    y[r, c] = sum_s A_s[r, c + s],   A_s[r, c] = sum_(i, k) w[i, k, s] x[i, r + k, c]

A stride along the columns separates the columns into copies that need no shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.convolution import (
    Finish,
    Geometry,
    batches,
    geometry,
    helpers,
    indented,
    lane_widths,
    registers,
    shuffled,
    strides,
)
from lilliput.engine.kernels.narrow import Stored, stored
from lilliput.engine.kernels.product import vector
from lilliput.engine.size import c
from lilliput.engine.target import Target

MOST_FILLED = 0.7  # of the weights; where more are not zero, dense kernels do better


@kernel("Conv")
def sparse_conv(node: Node, target: Target) -> Iterator[Kernel]:
    """Convolutions over planes or lines of which enough weights are zero."""
    g = geometry(node)
    if g is None or target.lanes < 4 or (g.ins == 1 and g.groups > 1):
        return
    weight = node.input(1).data
    assert weight is not None
    if np.count_nonzero(weight) > MOST_FILLED * weight.size:
        return
    for lanes in lane_widths(target, g.made[1]):
        made = shifting(g, lanes, registers(target)) or copying(g, lanes, registers(target))
        yield made.kernel(node)


@dataclass(frozen=True)
class Packed:
    """Where the non-zeros of a layer are.

    counts: how many, by output and part. places: `Sparse.packed` says what they are. indices: the flat index of each
    one's weight, -1 where there is none and only a step is made.
    """

    counts: Array
    places: Array
    indices: Array


@dataclass(frozen=True)
class Sparse:
    """A sparse convolution in tiles of `rows` rows of `vectors` vectors, from column `start` on for each of `starts`.

    shifts: by column of the kernel, how far its sum is shifted; with `copied`, each has a copy of the planes that is
    shifted already, and all are summed as one. wide: vectors of a row that is read.
    """

    g: Geometry
    lanes: int
    rows: int
    vectors: int
    wide: int
    shifts: tuple[int, ...]
    copied: bool
    starts: tuple[int, ...] = (0,)

    # what is stored --------------------------------------------------------------------------------------------------

    @property
    def row_bits(self) -> int:
        """Bits of a place that say the kernel's row; the others count planes from the place before."""
        return max(self.g.kernel[0] - 1, 0).bit_length()

    @property
    def parts(self) -> list[list[int]]:
        """The columns of the kernel that are summed together, in the order in which they are run through."""
        columns = range(self.g.kernel[1])
        if self.copied:
            return [list(columns)]
        return [[k] for k in sorted(columns, key=lambda k: (self.shifts[k] == 0, k))]

    @property
    def copies(self) -> int:
        """Planes that are made of each one that is read."""
        return self.g.kernel[1] if self.copied else 1

    def ordered(self, weight: Array) -> tuple[Array, Array]:
        """(where each non-zero is read, the flat index of its weight), in the order in which they are run through.

        Where: rows of the kernel, in all planes of all parts of all outputs, counted one after the other.
        """
        g = self.g
        flat = np.arange(weight.size).reshape(g.outs, g.ins, *g.kernel)
        # By output, part, channel, column within the part, row.
        order = np.stack([flat[:, :, :, part].transpose(0, 1, 3, 2) for part in self.parts], 1).reshape(-1)
        where = np.flatnonzero(weight.reshape(-1)[order])
        return where, order[where]

    def packed(self, weight: Array) -> Packed:
        """A byte for each non-zero: planes from the one before, through all runs, and the kernel's row."""
        g, bits = self.g, self.row_bits
        most, places, indices, planes, at = 255 >> bits, [], [], [], 0
        for where, index in zip(*(x.tolist() for x in self.ordered(weight)), strict=True):
            plane, row = divmod(where, g.kernel[0])
            while plane - at > most:
                places.append(most << bits)
                indices.append(-1)
                at += most
                planes.append(at)
            places.append((plane - at) << bits | row)
            indices.append(index)
            planes.append(plane)
            at = plane
        return Packed(self._counts(planes), np.array(places, np.uint8), np.array(indices, np.int64))

    def _counts(self, planes: Sequence[int] | Array) -> Array:
        """How many places there are in each run, given the plane of each, counted through all runs."""
        runs = np.asarray(planes, np.int64) // (self.g.ins * self.copies)
        return _small(np.bincount(runs, minlength=self.g.outs * len(self.parts)))

    # the kernel ------------------------------------------------------------------------------------------------------

    def kernel(self, node: Node) -> Kernel:
        """It, for a node with this geometry."""
        g, w = self.g, node.input(1)
        assert w.data is not None
        held = self.packed(w.data)
        kept = stored(w.data, w.narrow, held.indices, self._copy_bytes)
        # The steps are known when layouts are: `body` sets them, so that layers that differ in them share a function.
        steps = np.zeros(4, np.int32)
        constants = {**kept.constants, "places": held.places, "counts": held.counts, "steps": steps}
        if kept.scale is not None:
            constants["scale"] = kept.scale
        border = ((0, 0), (0, 0), (g.before[0], g.after[0]), (0, 0)) if node.x.rank == 4 else ()
        rows = Want(border=border, pitch=self.lanes, slack=self.wide * self.lanes - g.size[1])
        copied = Want(slack=max(self.loaded * self.lanes - g.size[1], 0))
        wants = (copied if self.copied else rows, None, None, None if node.maybe(3) is None else Want())
        name = "sparse copies" if self.copied else "sparse shifts"
        tiles = -(-g.made[0] // self.rows) * len(self.starts)
        per = self.rows * self.vectors * max(self.lanes / 16, 0.25)
        ns = tiles * (len(held.indices) * (per * 0.3 + 0.15) + g.outs * (8 + per * len(self.shifts) * 0.6)) + 100
        if self.copied:
            ns += 0.1 * self._copy_floats() + 100
        batch = int(node.x.shape[0])
        return Kernel(
            f"{name} {self.lanes}x{self.rows * self.vectors}",
            lambda n: self.body(n, kept, held, steps),
            wants,
            None,
            constants,
            skips=(1,),
            scratch=self._copy_bytes + kept.scratch,
            cost_ns=ns * batch,
            helpers=(*helpers(node, self.lanes), *kept.helpers),
            nonzeros=int(np.count_nonzero(w.data)),
            values=int(w.data.size),
        )

    @property
    def _copy_bytes(self) -> int:
        return -(-4 * self._copy_floats() // 64) * 64 if self.copied else 0

    def _copy_rows(self) -> int:
        g = self.g
        return g.made[0] if g.kernel[0] == 1 else (g.made[0] - 1) * g.stride[0] + (g.kernel[0] - 1) * g.dilation[0] + 1

    def _copy_floats(self) -> int:
        return self.g.channels * self.g.kernel[1] * self._copy_rows() * self.wide * self.lanes

    def body(self, node: Node, kept: Stored, held: Packed, steps: Array) -> str:
        """The C statements."""
        g, kind = self.g, vector(self.lanes)
        xn, xc, xr, _ = strides(node.x)
        yn, *to = strides(node.y)
        more = node.maybe(3)
        mn, *on = strides(more) if more is not None else (0, 0, 0, 0)
        steps[:] = to[0], to[1], on[0], on[1]
        n, opened = batches(node)
        image = f" + {c(xn)} * {n}" if n != "0" else ""
        lines = []
        if self.copied:
            lines += self._copies(node, image)
            pitch = self.wide * self.lanes
            plane, step, tap = self._copy_rows() * pitch, pitch, g.dilation[0] * pitch
            if g.kernel[0] > 1:
                step *= g.stride[0]
            base, first = "copies", 0
            group = g.ins * g.kernel[1] * plane
        else:
            plane, step, tap = xc, g.stride[0] * xr, g.dilation[0] * xr
            base, first = f"x0{image}", -g.before[0] * xr
            group = g.ins * plane
        outer = []
        rows, tall = g.made[0], self.rows
        if rows > tall:
            outer.append(f"for (int tile = 0; tile < {rows}; tile += {tall}) {{")
            row = "tile" if rows % tall == 0 else f"(tile < {rows - tall} ? tile : {rows - tall})"
            if rows % tall:
                outer.append(f"    const int row = {row};")
                row = "row"
        else:
            row = "0"
        if len(self.starts) > 1:
            outer.append("    " * bool(outer) + f"for (int block = 0; block < {len(self.starts)}; block++) {{")
            last, wide = self.starts[-1], self.vectors * self.lanes
            column = (
                f"block * {wide}"
                if last == (len(self.starts) - 1) * wide
                else (f"(block < {len(self.starts) - 1} ? block * {wide} : {last})")
            )
            outer.append("    " * len([o for o in outer if o.endswith("{")]) + f"const int column = {column};")
        deep = len([o for o in outer if o.endswith("{")])
        shift = "" if len(self.starts) == 1 else " + column"
        inner = [
            f"const float *value = value_of, *const from = {_at(base, row, step, first)}{shift};",
            "const uint8_t *place = places;",
            "int64_t at = 0;",
            f"const {_count_type(held.counts)} *count = counts;",
            f"float *out = y0{f' + {c(yn)} * {n}' if n != '0' else ''}{_times(row, 'out_row')}{shift};",
        ]
        if more is not None:
            inner.append(
                f"const float *more = x3{f' + {c(mn)} * {n}' if n != '0' else ''}{_times(row, 'more_row')}{shift};"
            )
        start = "from" if g.groups == 1 else f"from + o / {g.outs // g.groups} * {group}"
        inner += [
            f"for (int o = 0; o < {g.outs}; o++) {{",
            *indented(self._output(node, kind, start, plane, tap, step, kept)),
            "    out += out_plane;",
            *(["    more += more_plane;"] if more is not None else []),
            "}",
        ]
        lines += [*outer, *indented(inner, deep), *("    " * (deep - 1 - i) + "}" for i in range(deep))]
        text = "\n".join([*opened, *indented(lines, len(opened)), *["}"] * len(opened)])
        names = [
            f"{name} = steps[{i}]"
            for i, name in enumerate(("out_plane", "out_row", "more_plane", "more_row"))
            if re.search(rf"\b{name}\b", text)
        ]
        return "\n".join([*kept.lines, f"const int {', '.join(names)};", text])

    def _output(self, node: Node, kind: str, start: str, plane: int, tap: int, step: int, kept: Stored) -> list[str]:
        """C lines for one output plane of a tile."""
        g = self.g
        high, lanes = self.rows, self.lanes
        total = high * (self.vectors if self.copied else self.wide)
        bias = "x2[o]" if node.maybe(2) is not None else ""
        parts = self.parts
        finish = Finish(node, high, min(g.made[1], self.vectors * lanes), lanes, out_row="out_row", more_row="more_row")

        def run(number: int, sums: str, width: int) -> list[str]:
            bits = self.row_bits
            lines = ["for (int left = *count++; left > 0; left--) {"]
            lines += [
                "    const unsigned here = *place++;",
                f"    at += {f'(here >> {bits})' if bits else '(int64_t)here'} * {plane};",
                f"    const float *const x = {start} + at{f' + (here & {(1 << bits) - 1}) * {tap}' if bits else ''};",
            ]
            lines.append(f"    const {kind} w = *value++ - ({kind}){{0}};")
            lines += [
                f"    {sums}{r * width + v} += w * *(const {kind} *)(x + {r * step + v * lanes});"
                for r in range(high)
                for v in range(width)
            ]
            return [*lines, "}", f"at -= {g.ins * self.copies * plane};"]

        zero = f"({kind}){{0}}"
        if len(parts) == 1 and (self.copied or self.shifts == (0,)):
            first = f"{bias} - {zero}" if bias and kept.scale is None else zero
            lines = [f"{kind} {', '.join(f'a{k} = {first}' for k in range(total))};", *run(0, "a", self.vectors)]
            return [*lines, *self._scaled("a", total, bias, kept), *finish.lines([f"a{k}" for k in range(total)])]
        made = high * self.vectors
        lines = [f"{kind} {', '.join(f'a{k} = {zero}' for k in range(total))};"]
        masks, border = "", node.x.border[-1][1] if node.x.border else 0
        filled = g.size[1] - (self.wide - 1) * lanes  # columns of the last vector of a row
        if filled < lanes and border < lanes - filled and max(self.shifts) + g.made[1] > g.size[1]:
            masks = f"(i32x{lanes}){{{', '.join('-1' if i < filled else '0' for i in range(lanes))}}}"
        for number, part in enumerate(parts):
            shift = self.shifts[part[0]]
            if shift == 0 and number > 0:
                if self.wide == self.vectors and g.made[1] <= g.size[1]:
                    lines += run(number, "b", self.vectors)
                else:
                    lines += [f"a{k} = {zero};" for k in range(total)] + run(number, "a", self.wide)
                    lines += self._masked(masks if g.made[1] > g.size[1] else "", kind)
                    lines += self._shift(0, zero, "b")
                continue
            if number:
                lines += [f"a{k} = {zero};" for k in range(total)]
            lines += run(number, "a", self.wide)
            lines += self._masked(masks if shift + g.made[1] > g.size[1] else "", kind)
            if number:
                lines += self._shift(shift, zero, "b")
            else:
                text = self._shift(shift, zero, "b", first=bias if kept.scale is None else "")
                lines += [f"{kind} {text[0]}", *(f"{kind} {t}" for t in text[1:])]
        return [*lines, *self._scaled("b", made, bias, kept), *finish.lines([f"b{k}" for k in range(made)])]

    def _scaled(self, sums: str, count: int, bias: str, kept: Stored) -> list[str]:
        if kept.scale is None:
            return []
        more = f" + {bias}" if bias else ""
        return [f"{sums}{k} = {sums}{k} * scale[o]{more};" for k in range(count)]

    def _masked(self, mask: str, kind: str) -> list[str]:
        """C lines that set the sums behind the last column to zero."""
        last = [f"a{(r + 1) * self.wide - 1}" for r in range(self.rows)] if mask else []
        return [f"{a} = ({kind})((i32x{self.lanes}){a} & {mask});" for a in last]

    def _shift(self, shift: int, zero: str, to: str, first: str | None = None) -> list[str]:
        """C lines that add the sums a0 ..., shifted, to b0 ...; with `first` they set them, to that much more."""
        lines = []
        for r in range(self.rows):
            for v in range(self.vectors):
                start, rest = divmod(v * self.lanes + shift, self.lanes)
                two = [f"a{r * self.wide + s}" if 0 <= s < self.wide else zero for s in (start, start + 1)]
                name = f"{to}{r * self.vectors + v}"
                if (rest == 0 and two[0] == zero) or two == [zero, zero]:
                    if first is not None:
                        lines.append(f"{name} = {first + ' - ' if first else ''}{zero};")
                    continue
                text = shuffled(two[0], two[1], rest, self.lanes)
                lines.append(f"{name} {'=' if first is not None else '+='} {text}{' + ' + first if first else ''};")
        return lines

    def _copies(self, node: Node, image: str) -> list[str]:
        """C lines that copy the planes, once for each column of the kernel, as the outputs stand over them."""
        g = self.g
        _, xc, xr, xk = strides(node.x)
        pitch, rows = self.wide * self.lanes, self._copy_rows()
        lines = ["float *const copies = (float *)scratch;", f"for (int i = 0; i < {g.channels}; i++)"]
        # Row r of a copy is row `r * every - before` of the plane.
        every = g.stride[0] if g.kernel[0] == 1 else 1
        low = -(-g.before[0] // every)
        high = min(rows, (g.size[0] - 1 + g.before[0]) // every + 1)
        inner = self._vectors(rows * pitch) if self.loaded and xk == 1 else self._elements(rows * pitch, c(xk))
        zero = [f"for (int j = 0; j < {pitch}; j++) (to + {k * rows * pitch})[j] = 0;" for k in range(len(self.shifts))]
        body = [f"float *const to = copies + (i * {rows * len(self.shifts)} + r) * {pitch};"]
        inside = [f"const float *const x = x0{image} + i * {xc} + (r * {every} - {g.before[0]}) * {xr};", *inner]
        if low > 0 or high < rows:
            body += [f"if (r < {low} || r >= {high}) {{", *indented(zero), "} else {", *indented(inside), "}"]
        else:
            body += inside
        return [*lines, f"    for (int r = 0; r < {rows}; r++) {{", *indented(body, 2), "    }"]

    @property
    def loaded(self) -> int:
        """Vectors that are loaded of a row that is copied, 0 where it is copied by elements."""
        g = self.g
        count = -(-g.size[1] // (self.lanes * g.stride[1])) * g.stride[1]
        return count if g.stride[1] in (1, 2) and count <= 16 else 0

    def _elements(self, plane: int, step: str) -> list[str]:
        """C lines that copy a row x to the rows `to`, element by element."""
        g, pitch, lines = self.g, self.wide * self.lanes, []
        for k, shift in enumerate(self.shifts):
            low = min(max(-(shift // g.stride[1]), 0), g.made[1])
            high = min(max((g.size[1] - 1 - shift) // g.stride[1] + 1, low), g.made[1])
            to = f"to[{k * plane} + j]"
            if low:
                lines.append(f"for (int j = 0; j < {low}; j++) {to} = 0;")
            if high > low:
                lines.append(f"for (int j = {low}; j < {high}; j++) {to} = x[({g.stride[1]} * j + {shift}) * {step}];")
            if high < pitch:
                lines.append(f"for (int j = {high}; j < {pitch}; j++) {to} = 0;")
        return lines

    def _vectors(self, plane: int) -> list[str]:
        """C lines that copy a row x to the rows `to` by vectors; with a stride of 2 even and odd columns part first."""
        g, lanes, kind, two = self.g, self.lanes, vector(self.lanes), self.g.stride[1] == 2
        zero, names, lines = f"({kind}){{0}}", [], []
        for v in range(self.loaded):
            left = g.size[1] - v * lanes
            text = f"*(const {kind} *)(x + {v * lanes})" if left > 0 else zero
            if 0 < left < lanes:
                mask = ", ".join("-1" if i < left else "0" for i in range(lanes))
                text = f"({kind})((i32x{lanes}){text} & (i32x{lanes}){{{mask}}})"
            lines.append(f"const {kind} x{v} = {text};")
            names.append(f"x{v}")
        phases = [names]
        if two:
            phases = []
            for p, letter in enumerate("eo"):
                order = ", ".join(str(2 * i + p) for i in range(lanes))
                phases.append([f"{letter}{v}" for v in range(self.loaded // 2)])
                lines += [
                    f"const {kind} {letter}{v} = __builtin_shufflevector(x{2 * v}, x{2 * v + 1}, {order});"
                    for v in range(self.loaded // 2)
                ]
        for k, shift in enumerate(self.shifts):
            ahead, phase = divmod(shift, g.stride[1])
            held = phases[phase]
            for v in range(self.wide):
                start, rest = divmod(v * lanes + ahead, lanes)
                pair = [held[i] if 0 <= i < len(held) else zero for i in (start, start + 1)]
                text = zero if pair == [zero, zero] else shuffled(pair[0], pair[1], rest, lanes)
                lines.append(f"*({kind} *)(to + {k * plane + v * lanes}) = {text};")
        used = "\n".join(lines)
        return [line for line in lines if " = " not in line or line.startswith("*") or used.count(line.split()[2]) > 1]


def _small(numbers: Array) -> Array:
    """Whole numbers in the narrowest type that holds them."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))


def _count_type(counts: Array) -> str:
    return {"uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t"}[counts.dtype.name]


def _times(row: str, step: str) -> str:
    return "" if row == "0" else f" + {row} * {step}"


def _at(base: str, row: str, step: int, first: int) -> str:
    """base + row * step + first as C."""
    text = base if row == "0" or step == 0 else f"{base} + {row} * {step}"
    return text if first == 0 else f"{text} + {first}" if first > 0 else f"{text} - {-first}"


def _high(rows: int, vectors: int, most: int) -> int:
    """Rows of a tile of at most `most` vectors: those with which all rows take the least."""
    highest = max(min(most // vectors, rows), 1)
    return min(range(highest, 0, -1), key=lambda high: -(-rows // high) * (high * vectors + 1.5))


def shifting(g: Geometry, lanes: int, held: int) -> Sparse | None:
    """The convolution whose sums are shifted, where whole rows fit the registers; None where they do not."""
    if g.stride[1] != 1:
        return None
    wide, vectors = -(-g.size[1] // lanes), -(-g.made[1] // lanes)
    shifts = tuple(k * g.dilation[1] - g.before[1] for k in range(g.kernel[1]))
    alone = shifts == (0,) and wide == vectors
    most = (held - 4) // (1 if alone else 2)
    if max(wide, vectors) > most:
        return None
    high = _high(g.made[0], max(wide, vectors), min(most, 16 if alone else 10))
    if high * max(wide, vectors) < 4 and high < g.made[0]:
        return None
    return Sparse(g, lanes, high, vectors, wide, shifts, copied=False)


def copying(g: Geometry, lanes: int, held: int) -> Sparse:
    """The convolution over shifted copies of the planes."""
    shifts = tuple(k * g.dilation[1] - g.before[1] for k in range(g.kernel[1]))
    most = min(held - 4, 16)
    vectors = -(-g.made[1] // lanes)
    if vectors <= most:
        return Sparse(g, lanes, _high(g.made[0], vectors, most), vectors, vectors, shifts, copied=True)
    step, last = most * lanes, g.made[1] - most * lanes
    return Sparse(g, lanes, 1, most, vectors, shifts, True, (*range(0, last, step), last))
