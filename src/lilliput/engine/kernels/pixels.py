"""1x1 convolution on planes: for each output channel a sum of input planes, over pixels that lie one after another.

Sparse: an output channel runs through its non-zeros, each a broadcast weight times a block of its input plane. Input
channels are taken in chunks whose block fits the first-level cache, and partial sums wait in the output. Dense: some
output channels times some vectors of pixels stay in registers while the input channels go by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.planes import (
    L1_BYTES,
    After,
    Block,
    Runs,
    after,
    around,
    blocks,
    heads,
    load,
    planes,
    plus,
    registers,
    runs,
    spread,
    store,
)
from lilliput.engine.kernels.product import vector
from lilliput.engine.size import fixed
from lilliput.engine.target import Target

WORTH = 0.6  # the largest part of non-zeros with which skipping zeros may pay


@kernel("Conv")
def pixels(node: Node, target: Target) -> Iterator[Kernel]:
    """Convolutions of one pixel, in one group, that visit every pixel."""
    suited = suits(node)
    if suited is None:
        return
    weight, what = suited
    x = node.x
    bias = what.bias if what.bias is not None else np.zeros(len(weight), np.float32)
    kept = int(np.count_nonzero(weight))
    pixels = int(x.size) // max(int(x.shape[1]), 1)
    common: dict[str, Any] = {
        "wants": (planes(x, target.lanes), None, None, *([planes(x, target.lanes)] if what.residual else [])),
        "skips": (1, 2),
        "reuses": (3,) if what.residual else (),
        "helpers": (*heads(target.lanes), *what.helpers),
    }
    each_ns = 0.3 * pixels / max(min(target.lanes, 16), 4 if target.lanes > 1 else 1)
    rows = 8 if registers(target) == 32 else 4
    yield Kernel(
        f"pixels-dense-{rows}x3",
        lambda n: over(n, what, lambda spans: dense_run(spans, what, weight.shape, rows, target)),
        constants={"w": packed(weight, rows), "bias": bias},
        cost_ns=each_ns * weight.size + 200,
        **common,
    )
    if kept > WORTH * weight.size:
        return
    for most in wide(target):
        block = most * max(target.lanes, 1)
        chunk = chunked(weight.shape[1], block)
        values, indices, counts = nonzeros(weight, chunk)
        yield Kernel(
            f"pixels-sparse-{block}",
            lambda n, most=most, chunk=chunk: over(  # type: ignore[misc]
                n, what, lambda spans: sparse_run(spans, what, weight.shape, most, chunk, kinds(n.kernel), target)
            ),
            constants={"w": values, "indices": indices, "counts": counts, "bias": bias},
            cost_ns=1.6 * each_ns * kept + 1.5 * len(counts) * -(-pixels // block) + most,
            nonzeros=kept,
            values=weight.size,
            **common,
        )


def suits(node: Node) -> tuple[Array, After] | None:
    """The weights (out, in) and what follows of a Conv that is one pixel in size; None for another."""
    a, x, what = node.attrs, node.x, after(node)
    weight = node.input(1).data
    if weight is None or what is None or a["group"] != 1 or x.rank < 3 or not fixed(*x.shape[1:]) or 0 in x.shape:
        return None
    if any(k != 1 for k in weight.shape[2:]) or any(s != 1 for s in a["strides"]) or any(a["pads"]):
        return None
    return np.ascontiguousarray(weight.reshape(weight.shape[:2]), np.float32), what


def wide(target: Target) -> tuple[int, ...]:
    """How many vectors of pixels a sparse block may have."""
    return {16: (4, 7), 8: (4, 8), 4: (6, 12)}.get(target.lanes, (4,))


def chunked(ins: int, block: int) -> int:
    """Input channels in a chunk: as many as fit the first-level cache with `block` pixels of each."""
    most = max(L1_BYTES // (4 * block), 16)
    return ins if ins < 1.5 * most else -(-ins // -(-ins // most))


def nonzeros(weight: Array, chunk: int) -> tuple[Array, Array, Array]:
    """(values, input channel inside the chunk, how many) in the order in which they are read: by chunk, by output."""
    values, indices, counts = [], [], []
    kind = np.uint8 if chunk <= 256 else np.uint16 if chunk <= 65536 else np.uint32
    for start in range(0, weight.shape[1], chunk):
        part = weight[:, start : start + chunk]
        row, column = np.nonzero(part)
        values.append(part[row, column])
        indices.append(column.astype(kind))
        counts.append(np.bincount(row, minlength=len(weight)))
    most = max(int(c.max(initial=0)) for c in counts)
    return (
        np.concatenate(values).astype(np.float32),
        np.concatenate(indices),
        np.concatenate(counts).astype(np.uint16 if most < 65536 else np.uint32),
    )


def packed(weight: Array, rows: int) -> Array:
    """The weights in the order in which the dense kernel reads them: `rows` output channels side by side, by input."""
    parts = [weight[start : start + rows].T.reshape(-1) for start in range(0, len(weight), rows)]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


# -------------------------------------------------------------------------------------------------------------- text


def over(node: Node, what: After, multiplied: Callable[[Runs], list[str]]) -> str:
    """The C of a kernel: multiplied(runs) gives the lines for one run, where x, y and r point to its first pixel."""
    values, pointers = [node.y, node.x], [("float *y", "y0"), ("const float *x", "x0")]
    if what.residual is not None:
        values.append(node.input(what.residual))
        pointers.append(("const float *r", f"x{what.residual}"))
    spans = runs(values)
    return "\n".join(spans.inside(pointers, multiplied(spans)))


def sparse_run(
    spans: Runs, what: After, shape: tuple[int, ...], most: int, chunk: int, types: tuple[str, str], target: Target
) -> list[str]:
    """C lines for one run: y, x and r point to its first pixel."""
    return [
        line
        for block in blocks(spans.count, target.lanes, most, spans.gap(target.lanes))
        for line in _sparse_block(spans, block, what, shape, chunk, -(-shape[1] // chunk), types)
    ]


def kinds(kernel: Kernel) -> tuple[str, str]:
    """The C types of the indices and the counts."""
    names = {"uint8": "uint8_t", "uint16": "uint16_t", "uint32": "uint32_t"}
    return names[kernel.constants["indices"].dtype.name], names[kernel.constants["counts"].dtype.name]


def _sparse_block(
    spans: Runs, block: Block, what: After, shape: tuple[int, ...], chunk: int, parts: int, types: tuple[str, str]
) -> list[str]:
    pieces = list(enumerate(block.pieces))
    step_y, step_x = spans.channel[0], spans.channel[1]
    at = (("b", block.width if block.times > 1 else 0), block.start)

    def first(place: int, lanes: int) -> str:
        return spread("bias[o]", lanes) + (
            f" + {load(plus('rb', ('o', spans.channel[2]), place), lanes)}" if what.residual is not None else ""
        )

    begin = [f"{vector(lanes)} a{i} = {first(place, lanes)};" for i, (place, lanes) in pieces]
    if parts > 1:
        begin += ["if (k) {", *(f"    a{i} = {load(plus('q', place), lanes)};" for i, (place, lanes) in pieces), "}"]
    loop = [
        "for (int left = *n++; left; left--) {",
        f"    const float *p = xb + *i++ * {step_x};",
        "    const float c = *v++;",
        *(f"    a{i} += c * {load(plus('p', place), lanes)};" for i, (place, lanes) in pieces),
        "}",
    ]
    end = [line for i, (_, lanes) in pieces for line in what.finished(f"a{i}", lanes)]
    end = end if parts == 1 or not end else [f"if (k == {parts - 1}) {{", *(f"    {line}" for line in end), "}"]
    put = [store(plus("q", place), lanes, f"a{i}") for i, (place, lanes) in pieces]
    rest = what.rest("q", block.width)
    rest = rest if parts == 1 or not rest else [f"if (k == {parts - 1}) {{", *(f"    {line}" for line in rest), "}"]
    row = [
        f"for (int o = 0; o < {shape[0]}; o++, q += {step_y}) {{",
        *(f"    {line}" for line in (*begin, *loop, *end, *put, *rest)),
        "}",
    ]
    inside = [
        f"const float *xb = {plus('x', *at, ('k', chunk * step_x) if parts > 1 else 0)};",
        f"float *q = {plus('y', *at)};",
        *row,
    ]
    chunks = around(parts, "k", inside) if parts > 1 else inside
    start = [
        "const float *v = w;",
        f"const {types[0]} *i = indices;",
        f"const {types[1]} *n = counts;",
        *([f"const float *rb = {plus('r', *at)};"] if what.residual is not None else []),
    ]
    return around(block.times, "b", [*start, *chunks])


def dense_run(spans: Runs, what: After, shape: tuple[int, ...], rows: int, target: Target) -> list[str]:
    """C lines for one run: y, x and r point to its first pixel."""
    lines = []
    for block in blocks(spans.count, target.lanes, 3, spans.gap(target.lanes), strict=True):
        whole, rest = divmod(shape[0], rows)
        for first, times, height in ((0, whole, rows), (whole * rows, 1, rest)):
            if times and height:
                panel = _dense_panel(spans, block, what, shape[1], first, times, height, target.lanes)
                lines += around(block.times, "b", around(times, "g", panel))
    return lines


def _dense_panel(
    spans: Runs, block: Block, what: After, ins: int, first: int, panels: int, height: int, most_lanes: int
) -> list[str]:
    """Panel g of `panels`, each `height` output channels, the first at `first`, over one block of pixels."""
    step_y, step_x = spans.channel[0], spans.channel[1]
    at = (("b", block.width if block.times > 1 else 0), block.start)
    many = int(panels > 1)
    # A single pixel beside vectors: its accumulators are the output channels, whose weights lie side by side.
    turned = height in (4, 8, 16) and height <= most_lanes
    vectors = [(i, place, lanes) for i, (place, lanes) in enumerate(block.pieces) if lanes > 1 or not turned]
    single = [(i, place) for i, (place, lanes) in enumerate(block.pieces) if lanes == 1 and turned]
    lines = [
        f"const float *p = {plus('x', *at)};",
        f"float *q = {plus('y', *at, ('g', many * height * step_y), first * step_y)};",
        f"const float *v = {plus('w', ('g', many * height * ins), first * ins)};",
        f"const float *s = {plus('bias', ('g', many * height), first)};",
    ]
    residual = what.residual is not None
    if residual:
        step_r = spans.channel[2]
        lines.append(f"const float *rb = {plus('r', *at, ('g', many * height * step_r), first * step_r)};")
    for o in range(height):
        for i, place, lanes in vectors:
            more = f" + {load(plus('rb', o * step_r + place), lanes)}" if residual else ""
            lines.append(f"{vector(lanes)} a{o}_{i} = {spread(f's[{o}]', lanes)}{more};")
    for i, _ in single:
        lines.append(f"{vector(height)} u{i} = {load('s', height)};")
    lines.append(f"for (int c = 0; c < {ins}; c++, p += {step_x}, v += {height}) {{")
    for i, place, lanes in vectors:
        lines.append(f"    const {vector(lanes)} z{i} = {load(plus('p', place), lanes)};")
    for o in range(height):
        lines.append("    " + " ".join(f"a{o}_{i} += v[{o}] * z{i};" for i, _, _ in vectors))
    if single:
        lines.append(f"    const {vector(height)} column = {load('v', height)};")
        lines += [f"    u{i} += p[{place}] * column;" for i, place in single]
    return [*lines, "}", *_stored(spans, what, block, height, vectors, single)]


def _stored(
    spans: Runs,
    what: After,
    block: Block,
    height: int,
    vectors: list[tuple[int, int, int]],
    single: list[tuple[int, int]],
) -> list[str]:
    """C lines that finish and store the sums of a panel: a0_0, ... of vectors of pixels, u0, ... of single pixels."""
    step_y, lines = spans.channel[0], []
    for o in range(height):
        for i, place, lanes in vectors:
            lines += [*what.finished(f"a{o}_{i}", lanes), store(plus("q", o * step_y + place), lanes, f"a{o}_{i}")]
    for i, place in single:
        if what.residual is not None:
            lines += [f"u{i}[{o}] += rb[{o * spans.channel[2] + place}];" for o in range(height)]
        lines += what.finished(f"u{i}", height)
        lines += [f"q[{o * step_y + place}] = u{i}[{o}];" for o in range(height)]
    for o in range(height):
        lines += what.rest(f"(q + {o * step_y})" if o else "q", block.width)
    return lines
