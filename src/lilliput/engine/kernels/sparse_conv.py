"""Sparse convolution over planes: each output plane sums shifted rows, one for each non-zero weight.

Loads that start anywhere in a cache line take twice as long as aligned ones. So the rows are never read shifted: all
non-zeros of one column of the kernel are summed up first, over rows as they lie, and their sum is shifted once:

    y[r, c] = sum_s A_s[r, c + s],   A_s[r, c] = sum_(i, k) w[i, k, s] x[i, r + k, c]

A stride along the columns separates the columns into copies that need no shift.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.convolution import (
    Finish,
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
from lilliput.engine.kernels.sparse_planes import Packed, Sparse, copying, shifting
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
        conv = shifting(g, lanes, registers(target)) or copying(g, lanes, registers(target))
        yield _kernel(conv, node)


def _kernel(conv: Sparse, node: Node) -> Kernel:
    """The kernel of a node with this geometry."""
    g, w = conv.g, node.input(1)
    assert w.data is not None
    held = conv.packed(w.data)
    kept = stored(w.data, w.narrow, held.indices, conv.copy_bytes)
    # The steps are known when layouts are: `body` sets them, so that layers that differ in them share a function.
    steps = np.zeros(4, np.int32)
    constants = {**kept.constants, "places": held.places, "counts": held.counts, "steps": steps}
    if kept.scale is not None:
        constants["scale"] = kept.scale
    border = ((0, 0), (0, 0), (g.before[0], g.after[0]), (0, 0)) if node.x.rank == 4 else ()
    rows = Want(border=border, pitch=conv.lanes, slack=conv.wide * conv.lanes - g.size[1])
    copied = Want(slack=max(conv.loaded * conv.lanes - g.size[1], 0))
    wants = (copied if conv.copied else rows, None, None, None if node.maybe(3) is None else Want())
    name = "sparse copies" if conv.copied else "sparse shifts"
    tiles = -(-g.made[0] // conv.rows) * len(conv.starts)
    per = conv.rows * conv.vectors * max(conv.lanes / 16, 0.25)
    ns = tiles * (len(held.indices) * (per * 0.3 + 0.15) + g.outs * (8 + per * len(conv.shifts) * 0.6)) + 100
    if conv.copied:
        ns += 0.1 * conv.copy_floats() + 100
    batch = int(node.x.shape[0])
    return Kernel(
        f"{name} {conv.lanes}x{conv.rows * conv.vectors}",
        lambda n: _body(conv, n, kept, held, steps),
        wants,
        None,
        constants,
        skips=(1,),
        scratch=conv.copy_bytes + kept.scratch,
        cost_ns=ns * batch,
        helpers=(*helpers(node, conv.lanes), *kept.helpers),
        nonzeros=int(np.count_nonzero(w.data)),
        values=int(w.data.size),
    )


def _body(conv: Sparse, node: Node, kept: Stored, held: Packed, steps: Array) -> str:
    """The C statements."""
    g, kind = conv.g, vector(conv.lanes)
    xn, xc, xr, _ = strides(node.x)
    yn, *to = strides(node.y)
    more = node.maybe(3)
    mn, *on = strides(more) if more is not None else (0, 0, 0, 0)
    steps[:] = to[0], to[1], on[0], on[1]
    n, opened = batches(node)
    image = f" + {c(xn)} * {n}" if n != "0" else ""
    lines = []
    if conv.copied:
        lines += _copies(conv, node, image)
        pitch = conv.wide * conv.lanes
        plane, step, tap = conv.copy_rows() * pitch, pitch, g.dilation[0] * pitch
        if g.kernel[0] > 1:
            step *= g.stride[0]
        base, first = "copies", 0
        group = g.ins * g.kernel[1] * plane
    else:
        plane, step, tap = xc, g.stride[0] * xr, g.dilation[0] * xr
        base, first = f"x0{image}", -g.before[0] * xr
        group = g.ins * plane
    outer = []
    rows, tall = g.made[0], conv.rows
    if rows > tall:
        outer.append(f"for (int tile = 0; tile < {rows}; tile += {tall}) {{")
        row = "tile" if rows % tall == 0 else f"(tile < {rows - tall} ? tile : {rows - tall})"
        if rows % tall:
            outer.append(f"    const int row = {row};")
            row = "row"
    else:
        row = "0"
    if len(conv.starts) > 1:
        outer.append("    " * bool(outer) + f"for (int block = 0; block < {len(conv.starts)}; block++) {{")
        last, wide = conv.starts[-1], conv.vectors * conv.lanes
        column = (
            f"block * {wide}"
            if last == (len(conv.starts) - 1) * wide
            else (f"(block < {len(conv.starts) - 1} ? block * {wide} : {last})")
        )
        outer.append("    " * len([o for o in outer if o.endswith("{")]) + f"const int column = {column};")
    deep = len([o for o in outer if o.endswith("{")])
    shift = "" if len(conv.starts) == 1 else " + column"
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
        *indented(_output(conv, node, kind, start, plane, tap, step, kept)),
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


def _output(
    conv: Sparse, node: Node, kind: str, start: str, plane: int, tap: int, step: int, kept: Stored
) -> list[str]:
    """C lines for one output plane of a tile."""
    g = conv.g
    high, lanes = conv.rows, conv.lanes
    total = high * (conv.vectors if conv.copied else conv.wide)
    bias = "x2[o]" if node.maybe(2) is not None else ""
    parts = conv.parts
    finish = Finish(node, high, min(g.made[1], conv.vectors * lanes), lanes, out_row="out_row", more_row="more_row")

    def run(number: int, sums: str, width: int) -> list[str]:
        bits = conv.row_bits
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
        return [*lines, "}", f"at -= {g.ins * conv.copies * plane};"]

    zero = f"({kind}){{0}}"
    if len(parts) == 1 and (conv.copied or conv.shifts == (0,)):
        first = f"{bias} - {zero}" if bias and kept.scale is None else zero
        lines = [f"{kind} {', '.join(f'a{k} = {first}' for k in range(total))};", *run(0, "a", conv.vectors)]
        return [*lines, *_scaled("a", total, bias, kept), *finish.lines([f"a{k}" for k in range(total)])]
    sums = high * conv.vectors
    lines = [f"{kind} {', '.join(f'a{k} = {zero}' for k in range(total))};"]
    masks, border = "", node.x.border[-1][1] if node.x.border else 0
    filled = g.size[1] - (conv.wide - 1) * lanes  # columns of the last vector of a row
    if filled < lanes and border < lanes - filled and max(conv.shifts) + g.made[1] > g.size[1]:
        masks = f"(i32x{lanes}){{{', '.join('-1' if i < filled else '0' for i in range(lanes))}}}"
    for number, part in enumerate(parts):
        shift = conv.shifts[part[0]]
        if shift == 0 and number > 0:
            if conv.wide == conv.vectors and g.made[1] <= g.size[1]:
                lines += run(number, "b", conv.vectors)
            else:
                lines += [f"a{k} = {zero};" for k in range(total)] + run(number, "a", conv.wide)
                lines += _masked(conv, masks if g.made[1] > g.size[1] else "", kind)
                lines += _shift(conv, 0, zero, "b")
            continue
        if number:
            lines += [f"a{k} = {zero};" for k in range(total)]
        lines += run(number, "a", conv.wide)
        lines += _masked(conv, masks if shift + g.made[1] > g.size[1] else "", kind)
        if number:
            lines += _shift(conv, shift, zero, "b")
        else:
            text = _shift(conv, shift, zero, "b", first=bias if kept.scale is None else "")
            lines += [f"{kind} {text[0]}", *(f"{kind} {t}" for t in text[1:])]
    return [*lines, *_scaled("b", sums, bias, kept), *finish.lines([f"b{k}" for k in range(sums)])]


def _scaled(sums: str, count: int, bias: str, kept: Stored) -> list[str]:
    if kept.scale is None:
        return []
    more = f" + {bias}" if bias else ""
    return [f"{sums}{k} = {sums}{k} * scale[o]{more};" for k in range(count)]


def _masked(conv: Sparse, mask: str, kind: str) -> list[str]:
    """C lines that set the sums behind the last column to zero."""
    last = [f"a{(r + 1) * conv.wide - 1}" for r in range(conv.rows)] if mask else []
    return [f"{a} = ({kind})((i32x{conv.lanes}){a} & {mask});" for a in last]


def _shift(conv: Sparse, shift: int, zero: str, to: str, first: str | None = None) -> list[str]:
    """C lines that add the sums a0 ..., shifted, to b0 ...; with `first` they set them, to that much more."""
    lines = []
    for r in range(conv.rows):
        for v in range(conv.vectors):
            start, rest = divmod(v * conv.lanes + shift, conv.lanes)
            two = [f"a{r * conv.wide + s}" if 0 <= s < conv.wide else zero for s in (start, start + 1)]
            name = f"{to}{r * conv.vectors + v}"
            if (rest == 0 and two[0] == zero) or two == [zero, zero]:
                if first is not None:
                    lines.append(f"{name} = {first + ' - ' if first else ''}{zero};")
                continue
            text = shuffled(two[0], two[1], rest, conv.lanes)
            lines.append(f"{name} {'=' if first is not None else '+='} {text}{' + ' + first if first else ''};")
    return lines


def _copies(conv: Sparse, node: Node, image: str) -> list[str]:
    """C lines that copy the planes, once for each column of the kernel, as the outputs stand over them."""
    g = conv.g
    _, xc, xr, xk = strides(node.x)
    pitch, rows = conv.wide * conv.lanes, conv.copy_rows()
    lines = ["float *const copies = (float *)scratch;", f"for (int i = 0; i < {g.channels}; i++)"]
    # Row r of a copy is row `r * every - before` of the plane.
    every = g.stride[0] if g.kernel[0] == 1 else 1
    low = -(-g.before[0] // every)
    high = min(rows, (g.size[0] - 1 + g.before[0]) // every + 1)
    inner = _vectors(conv, rows * pitch) if conv.loaded and xk == 1 else _elements(conv, rows * pitch, c(xk))
    zero = [f"for (int j = 0; j < {pitch}; j++) (to + {k * rows * pitch})[j] = 0;" for k in range(len(conv.shifts))]
    body = [f"float *const to = copies + (i * {rows * len(conv.shifts)} + r) * {pitch};"]
    inside = [f"const float *const x = x0{image} + i * {xc} + (r * {every} - {g.before[0]}) * {xr};", *inner]
    if low > 0 or high < rows:
        body += [f"if (r < {low} || r >= {high}) {{", *indented(zero), "} else {", *indented(inside), "}"]
    else:
        body += inside
    return [*lines, f"    for (int r = 0; r < {rows}; r++) {{", *indented(body, 2), "    }"]


def _elements(conv: Sparse, plane: int, step: str) -> list[str]:
    """C lines that copy a row x to the rows `to`, element by element."""
    g, pitch, lines = conv.g, conv.wide * conv.lanes, []
    for k, shift in enumerate(conv.shifts):
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


def _vectors(conv: Sparse, plane: int) -> list[str]:
    """C lines that copy a row x to the rows `to` by vectors; with a stride of 2 even and odd columns part first."""
    g, lanes, kind, two = conv.g, conv.lanes, vector(conv.lanes), conv.g.stride[1] == 2
    zero, names, lines = f"({kind}){{0}}", [], []
    for v in range(conv.loaded):
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
            phases.append([f"{letter}{v}" for v in range(conv.loaded // 2)])
            lines += [
                f"const {kind} {letter}{v} = __builtin_shufflevector(x{2 * v}, x{2 * v + 1}, {order});"
                for v in range(conv.loaded // 2)
            ]
    for k, shift in enumerate(conv.shifts):
        ahead, phase = divmod(shift, g.stride[1])
        held = phases[phase]
        for v in range(conv.wide):
            start, rest = divmod(v * lanes + ahead, lanes)
            pair = [held[i] if 0 <= i < len(held) else zero for i in (start, start + 1)]
            text = zero if pair == [zero, zero] else shuffled(pair[0], pair[1], rest, lanes)
            lines.append(f"*({kind} *)(to + {k * plane + v * lanes}) = {text};")
    used = "\n".join(lines)
    return [line for line in lines if " = " not in line or line.startswith("*") or used.count(line.split()[2]) > 1]


def _count_type(counts: Array) -> str:
    return {"uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t"}[counts.dtype.name]


def _times(row: str, step: str) -> str:
    return "" if row == "0" else f" + {row} * {step}"


def _at(base: str, row: str, step: int, first: int) -> str:
    """base + row * step + first as C."""
    text = base if row == "0" or step == 0 else f"{base} + {row} * {step}"
    return text if first == 0 else f"{text} + {first}" if first > 0 else f"{text} - {-first}"
