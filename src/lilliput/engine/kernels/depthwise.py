"""Depthwise convolution on planes: one input channel for each output channel.

Some output rows of a vector's width stay in registers; for each column of taps every input row is loaded once, shifted,
and goes to all the output rows that it reaches. Planes need no border of zeros: rows outside are not visited, columns
outside are masked. A stride of 2 along rows takes every other element of two vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lilliput.engine.graph import Array, Node, Value
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.planes import (
    After,
    Window,
    after,
    around,
    heads,
    load,
    plus,
    registers,
    spread,
    store,
    window,
)
from lilliput.engine.kernels.product import vector
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

Masks = dict[tuple[bool, ...], str]  # names by which lanes are kept


@kernel("Conv")
def depthwise(node: Node, target: Target) -> Iterator[Kernel]:
    """Convolutions in one or two dimensions with as many groups as input channels."""
    suited = suits(node)
    if suited is None:
        return
    taps, weight, what = suited
    x, y = node.x, node.y
    lanes = narrowest(taps.out[1], target.lanes)
    rows = height(taps, registers(target))
    bias = what.bias if what.bias is not None else np.zeros(y.shape[1], np.float32)
    slack = reach(taps, lanes)
    whole = Want(pitch=target.lanes, slack=slack) if x.rank == 3 else Want(plane=target.lanes, slack=slack)
    yield Kernel(
        f"depthwise-{rows}x{lanes}",
        lambda n: body(n, what, taps, lanes, rows),
        wants=(whole, None, None, *([whole] if what.residual else [])),
        skips=(1, 2),
        constants={"w": weight, "bias": bias},
        cost_ns=estimate(taps, lanes) * int(x.shape[0]) + 100,
        helpers=(*heads(target.lanes), *what.helpers),
    )


def suits(node: Node) -> tuple[Window, Array, After] | None:
    """The settings, the weights in order and what follows of a Conv that is depthwise; None for another."""
    taken, what = window(node), after(node)
    if taken is None or what is None:
        return None
    taps, weight = taken
    if taps.ins != 1 or taps.groups == 1 < node.x.shape[1] or taps.stride[1] > 2 or taps.depth > 400:
        return None
    return taps, np.ascontiguousarray(weight.reshape(-1), np.float32), what


def reach(taps: Window, lanes: int) -> int:
    """How many elements behind the last one loads may reach."""
    return (1 + taps.stride[1]) * lanes + sum(taps.kernel) * taps.dilation[1]


def estimate(taps: Window, lanes: int) -> float:
    """ns for one image."""
    vectors = -(-taps.out[1] // lanes)
    return 0.2 * max(lanes // 8, 1) * taps.out[0] * vectors * taps.depth * taps.groups * taps.outs


def narrowest(width: int, lanes: int) -> int:
    """The vector for rows of this width: no wider than they need."""
    while lanes > 4 and lanes // 2 >= width:
        lanes //= 2
    return lanes


def height(taps: Window, registers: int) -> int:
    """Output rows at once: accumulators, a column of taps and one input row share the registers."""
    most = max(1, min(14, registers - taps.kernel[0] - 2))
    rows = taps.out[0]
    return -(-rows // -(-rows // most))


# -------------------------------------------------------------------------------------------------------------- text


def body(node: Node, what: After, taps: Window, lanes: int, rows: int) -> str:
    """The C of the kernel."""
    x, y = node.x, node.y
    residual = node.input(3) if what.residual is not None else None
    masks: Masks = {}
    lines = channels(x, y, residual, what, taps, lanes, rows, masks)
    pointers = [
        f"const float *xn = {plus('x0', ('n', x.strides[0]))};",
        f"float *yn = {plus('y0', ('n', y.strides[0]))};",
    ]
    if residual is not None:
        pointers.append(f"const float *rn = {plus('x3', ('n', residual.strides[0]))};")
    kind = "int" if fixed(x.shape[0]) else "int64_t"
    return "\n".join(
        [
            *declared(masks, lanes),
            f"for ({kind} n = 0; n < {c(x.shape[0])}; n++) {{",
            *(f"    {line}" for line in (*pointers, *lines)),
            "}",
        ]
    )


def declared(masks: Masks, lanes: int) -> list[str]:
    """C lines that define the masks."""
    return (
        [
            f"const {vector(lanes, 'i32')} {name} = {{{', '.join('-1' if on else '0' for on in bits)}}};"
            for bits, name in masks.items()
        ]
        if lanes > 1
        else []
    )


def channels(
    x: Value,
    y: Value,
    residual: Value | None,
    what: After,
    taps: Window,
    lanes: int,
    rows: int,
    masks: Masks,
    names: tuple[str, str, str] = ("xn", "yn", "rn"),
) -> list[str]:
    """C lines for the channels of one image, whose pointers have these names."""
    flat = x.rank == 3
    pitch = {"x": 0 if flat else int(x.strides[2]), "y": 0 if flat else int(y.strides[2])}
    if residual is not None:
        pitch["r"] = 0 if flat else int(residual.strides[2])
    lines = _Text(x, y, what, taps, lanes, rows, pitch, masks).plane()
    channel = "c" if taps.outs == 1 else f"(c / {taps.outs})"
    pointers = [
        f"const float *x = {plus(names[0], (channel, x.strides[1]))};",
        f"float *y = {plus(names[1], ('c', y.strides[1]))};",
        f"const float *v = {plus('w', ('c', taps.kernel[0] * taps.kernel[1]))};",
    ]
    if residual is not None:
        pointers.append(f"const float *r = {plus(names[2], ('c', residual.strides[1]))};")
    if int(y.shape[1]) == 1:
        return ["{", "    const int c = 0;", *(f"    {line}" for line in (*pointers, *lines)), "}"]
    return around(int(y.shape[1]), "c", [*pointers, *lines])


class _Text:
    def __init__(
        self, x: Value, y: Value, what: After, taps: Window, lanes: int, rows: int, pitch: dict[str, int], masks: Masks
    ) -> None:
        self.what, self.taps, self.lanes, self.rows, self.pitch, self.masks = what, taps, lanes, rows, pitch, masks
        self.spill = _spills(y, taps, lanes)
        self.before = int(x.offset)  # elements before the first that may be read

    def plane(self) -> list[str]:
        """C lines that compute one plane: blocks of rows by blocks of columns, those that are alike in loops."""
        taps, lanes = self.taps, self.lanes
        tall, wide = taps.out
        starts = list(range(0, tall, self.rows))
        row_blocks = [(r, min(self.rows, tall - r)) for r in starts]
        columns = list(range(0, wide - lanes + 1, lanes)) or [0]
        if columns[-1] + lanes < wide:
            columns.append(wide - lanes)
        lines: list[str] = []
        for row_group in _alike(row_blocks, lambda b: (b[1], self._reached(*b), self._edge(*b))):
            for column_group in _alike([(s, lanes) for s in columns], lambda b: self._columns(b[0])):
                r, c_ = row_group[0], column_group[0]
                row_step = row_group[1][0] - r[0] if len(row_group) > 1 else 0
                column_step = column_group[1][0] - c_[0] if len(column_group) > 1 else 0
                block = self._block(r, c_[0], row_step, column_step)
                lines += (
                    around(len(row_group), "i", around(len(column_group), "j", block))
                    if len(row_group) > 1
                    else (around(len(column_group), "j", block))
                )
        return lines

    def _reached(self, first: int, rows: int) -> tuple[tuple[int, ...], ...]:
        """For each output row, the taps whose input row lies inside."""
        t = self.taps
        return tuple(
            tuple(
                k
                for k in range(t.kernel[0])
                if 0 <= (first + i) * t.stride[0] + k * t.dilation[0] - t.before[0] < t.size[0]
            )
            for i in range(rows)
        )

    def _edge(self, first: int, rows: int) -> tuple[bool, bool]:
        """Whether the block reads the first input row, and writes the last output row."""
        return first * self.taps.stride[0] - self.taps.before[0] <= 0, first + rows == self.taps.out[0]

    def _columns(self, start: int) -> tuple[object, ...]:
        """What differs between blocks of columns: the masks, and whether loads begin before the row."""
        return tuple(
            (self._mask(start, k), self._from(start, k) < 0, start + self.lanes > self.taps.out[1])
            for k in range(self.taps.kernel[1])
        )

    def _from(self, start: int, k: int) -> int:
        t = self.taps
        return start * t.stride[1] + k * t.dilation[1] - t.before[1]

    def _mask(self, start: int, k: int) -> tuple[bool, ...] | None:
        """Which lanes read a column inside; None where all that count do."""
        t, first = self.taps, self._from(start, k)
        bits = tuple(0 <= first + j * t.stride[1] < t.size[1] for j in range(self.lanes))
        return None if all(on or start + j >= t.out[1] for j, on in enumerate(bits)) else bits

    def _loaded(self, row: int, start: int, k: int, base: str) -> str:
        """The C expression of one shifted input row, zero where it is outside."""
        t, lanes = self.taps, self.lanes
        first, mask = self._from(start, k), self._mask(start, k)
        if lanes == 1:
            return f"{base}[{row * self.pitch['x'] + first}]" if mask is None else "0"
        at = row * self.pitch["x"]
        if t.stride[1] == 1:
            if at + first + self.before < 0:  # nothing lies before the plane: load from its start on
                picks = ", ".join(str(max(0, j + first)) for j in range(lanes))
                text = f"shuffle_f32x{lanes}({load(plus(base, at), lanes)}, {load(plus(base, at), lanes)}, {picks})"
            else:
                text = load(plus(base, at + first), lanes)
        else:
            low = first if first % 2 == 0 or first < 0 else first - 1
            if first < 0:
                low = 0 if at + first + self.before < 0 else first
            picks = ", ".join(str(max(0, 2 * j + first - low)) for j in range(lanes))
            text = (
                f"shuffle_f32x{lanes}({load(plus(base, at + low), lanes)}, "
                f"{load(plus(base, at + low + lanes), lanes)}, {picks})"
            )
        if mask is None:
            return text
        name = self.masks.setdefault(mask, f"m{len(self.masks)}")
        return f"({vector(lanes)})(({vector(lanes, 'i32')}){text} & {name})"

    def _block(self, block: tuple[int, int], start: int, row_step: int, column_step: int) -> list[str]:
        t, lanes = self.taps, self.lanes
        first, rows = block
        reached = self._reached(first, rows)
        moving = [*([("i", row_step)] if row_step else []), *([("j", column_step)] if column_step else [])]

        def base(name: str, scale: tuple[int, int]) -> str:
            return plus(
                name, *((n, step * (scale[0] * self.pitch[name] if n == "i" else scale[1])) for n, step in moving)
            )

        kind = vector(lanes)
        lines = []
        xs, ys = "x", "y"
        if moving:
            lines += [f"const float *xb = {base('x', t.stride)};", f"float *yb = {base('y', (1, 1))};"]
            xs, ys = "xb", "yb"
            if "r" in self.pitch:
                lines.append(f"const float *rb = {base('r', (1, 1))};")
        rs = "rb" if moving else "r"
        for i in range(rows):
            more = ""
            if "r" in self.pitch:
                more = f" + {load(plus(rs, (first + i) * self.pitch['r'] + start), lanes)}"
            lines.append(f"{kind} a{i} = {spread('bias[c]', lanes)}{more};")
        used = sorted({k for taps in reached for k in taps})
        for kx in range(t.kernel[1]):
            mask = self._mask(start, kx)
            if not used or (mask is not None and not any(mask)):
                continue
            lines.append("{")
            lines.append("    const float " + ", ".join(f"w{k} = v[{k * t.kernel[1] + kx}]" for k in used) + ";")
            for row, hits in self._hits(first, reached):
                text = self._loaded(row, start, kx, xs)
                sums = " ".join(f"a{i} += w{k} * t;" for i, k in hits)
                lines.append(f"    {{ const {kind} t = {text}; {sums} }}")
            lines.append("}")
        return [*lines, *self._stored(block, start, ys)]

    def _hits(self, first: int, reached: Sequence[Sequence[int]]) -> list[tuple[int, list[tuple[int, int]]]]:
        """For each input row that a block of output rows reads: which of them, with which row of the kernel."""
        t = self.taps
        readers: dict[int, list[tuple[int, int]]] = {}
        for i, taps in enumerate(reached):
            for k in taps:
                readers.setdefault((first + i) * t.stride[0] + k * t.dilation[0] - t.before[0], []).append((i, k))
        return sorted(readers.items())

    def _stored(self, block: tuple[int, int], start: int, ys: str) -> list[str]:
        """Lines that finish and store the sums a0, a1, ... of a block of rows."""
        (first, rows), lanes, lines = block, self.lanes, []
        count = min(lanes, self.taps.out[1] - start)
        for i in range(rows):
            lines += self.what.finished(f"a{i}", lanes)
            place = plus(ys, (first + i) * self.pitch["y"] + start)
            if count < lanes and not self.spill(first + i):
                lines.append(f"memcpy({place}, &a{i}, {4 * count});")
            else:
                lines.append(store(place, lanes, f"a{i}"))
        for i in range(rows):
            lines += self.what.rest(f"({plus(ys, (first + i) * self.pitch['y'] + start)})", count)
        return lines


def _spills(y: Value, taps: Window, lanes: int) -> Callable[[int], bool]:
    """Whether the vector that ends an output row may write behind it."""
    assert y.buffer is not None
    over, pitch = lanes - taps.out[1], 0 if y.rank == 3 else int(y.strides[2])
    room = int(y.buffer.count) - int(y.offset) if fixed(*y.shape) else 0
    last = sum(int(s) * (int(n) - 1) for s, n in zip(y.strides, y.shape, strict=True)) + 1

    def spill(row: int) -> bool:
        if y.border or over <= 0:
            return over <= 0
        if row < taps.out[0] - 1:  # what is written too much is written again with the next rows
            return pitch * (taps.out[0] - 1 - row) >= over
        inside = all(y.shape[d] == 1 or (taps.out[0] - 1) * pitch + lanes <= int(y.strides[d]) for d in (0, 1))
        return inside and last + over <= room

    return spill


def _alike(items: list[tuple[int, int]], sign: Callable[[tuple[int, int]], object]) -> list[list[tuple[int, int]]]:
    """Neighbours of the same sign and distance, together."""
    groups: list[list[tuple[int, int]]] = []
    for item in items:
        if groups and sign(groups[-1][0]) == sign(item):
            group = groups[-1]
            if len(group) == 1 or item[0] - group[-1][0] == group[1][0] - group[0][0]:
                group.append(item)
                continue
        groups.append([item])
    return groups
