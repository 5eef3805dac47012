"""Convolution of any size by im2col: gather the inputs of some output rows at a time, then multiply.

The gathered rows, one for each input channel and tap, stay in the cache and are multiplied as the planes of a 1x1
convolution are. This suits few input channels, strides and dilations, for which nothing special is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lilliput.engine.graph import Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels import pixels
from lilliput.engine.kernels.planes import After, Runs, Window, after, around, heads, plus, registers, window
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

SEGMENT = 512  # output columns at once where rows are longer
CACHE_BYTES = 192 * 1024


@kernel("Conv")
def patches(node: Node, target: Target) -> Iterator[Kernel]:
    """Convolutions in one or two dimensions, of any settings."""
    taken, what = window(node), after(node)
    if taken is None or what is None:
        return
    w, weight = taken[0], taken[1].reshape(taken[0].groups, taken[0].outs, taken[0].depth)
    bias = what.bias if what.bias is not None else np.zeros(w.groups * w.outs, np.float32)
    tall, wide = tile(w)
    common: dict[str, Any] = {
        "wants": (Want(), None, None, *([Want()] if what.residual else [])),
        "skips": (1, 2),
        "helpers": (*heads(target.lanes), *what.helpers),
        "scratch": 4 * w.depth * tall * wide + 64,
        "reuses": (3,) if what.residual else (),
    }
    images = int(node.x.shape[0])
    count = images * w.out[0] * w.out[1]
    gather_ns = 0.25 * w.depth * w.groups * count + 20.0 * w.depth * w.groups * images * w.out[0]
    each_ns = 0.3 * count / max(min(target.lanes, 16), 4 if target.lanes > 1 else 1)
    rows = 8 if registers(target) == 32 else 4
    rows = min(rows, w.outs)
    yield Kernel(
        f"patches-dense-{rows}x3",
        lambda n: body(n, w, what, lambda spans: pixels.dense_run(spans, what, (w.outs, w.depth), rows, target)),
        constants={"w": np.concatenate([pixels.packed(part, rows) for part in weight]), "bias": bias},
        cost_ns=gather_ns + each_ns * weight.size + 200,
        **common,
    )
    kept = int(np.count_nonzero(weight))
    if w.groups > 1 or kept > pixels.WORTH * weight.size:
        return
    for most in pixels.wide(target):
        block = most * target.lanes
        chunk = pixels.chunked(w.depth, block)
        values, indices, counts = pixels.nonzeros(weight[0], chunk)
        yield Kernel(
            f"patches-sparse-{block}",
            lambda n, most=most, chunk=chunk: body(  # type: ignore[misc]
                n,
                w,
                what,
                lambda spans: pixels.sparse_run(
                    spans, what, (w.outs, w.depth), most, chunk, pixels.kinds(n.kernel), target
                ),
            ),
            constants={"w": values, "indices": indices, "counts": counts, "bias": bias},
            cost_ns=gather_ns + 1.6 * each_ns * kept + 1.5 * len(counts) * -(-count // block) + most,
            nonzeros=kept,
            values=weight.size,
            **common,
        )


def tile(w: Window) -> tuple[int, int]:
    """(rows, columns) of output whose patches are gathered at once."""
    tall, wide = w.out
    if wide > SEGMENT:
        return 1, SEGMENT
    most = max(CACHE_BYTES // (4 * w.depth), 48)
    good = [r for r in range(1, tall + 1) if r * wide <= min(most, SEGMENT) or r == 1]
    # Whole blocks of rows where they can be had without making the tile much smaller.
    return max(good, key=lambda r: (min(r * wide, 150) * (1.0 if tall % r == 0 else 0.8), -r)), wide


def body(node: Node, w: Window, what: After, multiplied: Callable[[Runs], list[str]]) -> str:
    """The C of the kernel; multiplied(runs) gives the lines that multiply what was gathered."""
    x, y = node.x, node.y
    residual = node.input(what.residual) if what.residual is not None else None
    flat = x.rank == 3
    tall, wide = tile(w)
    pitch = tall * wide
    row_y = 0 if flat else y.strides[2]
    row_r = 0 if flat or residual is None else residual.strides[2]
    row_x = 0 if flat else x.strides[2]
    channels = [y.strides[1], pitch, *([] if residual is None else [residual.strides[1]])]
    together = tall == 1 or (row_y == wide and (residual is None or row_r == wide))
    lines: list[str] = []
    for first_row, row_times, rows in parts(w.out[0], tall):
        for first_column, times, columns in parts(w.out[1], wide):
            i, j = ("i", tall if row_times > 1 else 0), ("j", wide if times > 1 else 0)
            row, column = plus(str(first_row), i), plus(str(first_column), j)

            def moved(
                name: str,
                pitch: int,
                start: int = first_row,
                at: int = first_column,
                i: tuple[str, int] = i,
                j: tuple[str, int] = j,
            ) -> str:
                return plus(name, (i[0], i[1] * pitch), j, start * pitch + at)

            block = gathered(w, rows, columns, pitch, row, column, x.strides[1], row_x)
            block += [f"float *y = {moved('yg', row_y)};", "const float *x = patch;"]
            if residual is not None:
                block.append(f"const float *r = {moved('rg', row_r)};")
            if together or rows == 1:
                block += multiplied(Runs([], [], rows * columns, channels, lambda lanes: False))
            else:
                steps = [f"y += {c(row_y)}", f"x += {columns}", *([f"r += {c(row_r)}"] if residual is not None else [])]
                line = multiplied(Runs([], [], columns, channels, lambda lanes: False))
                block += [
                    f"for (int line = 0; line < {rows}; line++, {', '.join(steps)}) {{",
                    *(f"    {text}" for text in line),
                    "}",
                ]
            lines += around(row_times, "i", around(times, "j", block))
    grouped = w.groups > 1
    head = ["float *patch = (float *)scratch;"]
    group = [
        f"const float *xg = {plus('x0', ('n', x.strides[0]), ('e', w.ins * x.strides[1] if grouped else 0))};",
        f"float *yg = {plus('y0', ('n', y.strides[0]), ('e', w.outs * y.strides[1] if grouped else 0))};",
    ]
    if residual is not None:
        step = w.outs * residual.strides[1] if grouped else 0
        group.append(f"const float *rg = {plus('x3', ('n', residual.strides[0]), ('e', step))};")
    if grouped:
        head += ["const float *all = w, *each = bias;"]
        group += [f"const float *w = all + e * {w.outs * w.depth};", f"const float *bias = each + e * {w.outs};"]
    kind = "int" if fixed(x.shape[0]) else "int64_t"
    return "\n".join(
        [
            *head,
            f"for ({kind} n = 0; n < {c(x.shape[0])}; n++) {{",
            *(f"    {line}" for line in around(w.groups, "e", [*group, *lines])),
            "}",
        ]
    )


def parts(total: int, size: int) -> list[tuple[int, int, int]]:
    """(start, how many, size) of the whole parts of a total and of the rest."""
    whole, rest = divmod(total, size)
    return [(0, whole, size)] * (whole > 0) + [(whole * size, 1, rest)] * (rest > 0)


def gathered(w: Window, rows: int, columns: int, pitch: int, row: str, column: str, plane: int, line: int) -> list[str]:
    """C lines that gather the patches of `rows` x `columns` outputs from (row, column) on."""
    copies: list[str] = []
    s = w.stride[1]
    for k in range(w.kernel[1]):
        shift = k * w.dilation[1] - w.before[1]
        # Columns from `low` up to `high` read inside: s j + shift lies in [0, width).
        low, high = max(0, -(shift // s)), (w.size[1] - 1 - shift) // s + 1
        to = f"to[{plus('q', k * pitch)}]"
        if columns == w.out[1]:
            low = min(low, columns)
            high = max(min(high, columns), low)
            source = f"from[{plus(f'q * {s}' if s > 1 else 'q', shift)}]"
            for start, end, text in ((0, low, "0"), (low, high, source), (high, columns, "0")):
                if end > start:
                    copies.append(f"for (int q = {start}; q < {end}; q++) {to} = {text};")
        else:
            source = f"from[{plus(f'(q + first) * {s}' if s > 1 else 'q + first', shift)}]"
            copies.append(f"for (int q = 0; q < {columns}; q++)")
            copies.append(f"    {to} = q + first >= {low} && q + first < {high} ? {source} : 0;")
    taps = w.kernel[0] * w.kernel[1]
    inside = [
        f"const int at = ({row} + h) * {w.stride[0]} + k * {w.dilation[0]} - {w.before[0]};",
        f"float *to = patch + c * {taps * pitch} + k * {w.kernel[1] * pitch} + h * {columns};",
        f"if (at < 0 || at >= {w.size[0]}) {{",
        *(f"    for (int q = 0; q < {columns}; q++) to[{plus('q', t * pitch)}] = 0;" for t in range(w.kernel[1])),
        "    continue;",
        "}",
        f"const float *from = xg + c * {c(plane)} + at * {c(line)};",
        *([] if columns == w.out[1] else [f"const int first = {column};"]),
        *copies,
    ]
    return [
        f"for (int c = 0; c < {w.ins}; c++)",
        f"    for (int k = 0; k < {w.kernel[0]}; k++)",
        f"        for (int h = 0; h < {rows}; h++) {{",
        *(f"            {text}" for text in inside),
        "        }",
    ]
