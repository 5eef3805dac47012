"""Dense 3x3 convolution with fewer multiplications.

Tiles of m x m outputs are computed from (m + 2) x (m + 2) inputs through products of transformed numbers, 16 for four
outputs (m = 2) or 36 for sixteen (m = 4) where the sum itself takes 36 or 144:

    Y = A' [sum_i (G w_i G') * (B' x_i B)] A

A vector holds the same element of neighbouring tiles, so that the sums over channels are one matrix product for each
of the (m + 2)^2 elements.

Source: A. Lavin and S. Gray, Fast algorithms for convolutional neural networks, CVPR 2016, arXiv:1509.09308, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lilliput.engine.expr import clamp_of
from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.convolution import (
    Finish,
    Geometry,
    added,
    batches,
    geometry,
    helpers,
    indented,
    lanes_of,
    put,
    registers,
    strides,
)
from lilliput.engine.kernels.product import clamped, vector
from lilliput.engine.size import c
from lilliput.engine.target import Target

G = {2: np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]),
     4: np.array([[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6], [1 / 24, 1 / 12, 1 / 6],
                  [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]])}  # fmt: skip
# B' x and A' p as C, over d0 ... and p0 ...
INPUT = {2: ("d0 - d2", "d1 + d2", "d2 - d1", "d1 - d3"),
         4: ("d4 + (4 * d0 - 5 * d2)", "(d4 - 4 * d2) + (d3 - 4 * d1)", "(d4 - 4 * d2) - (d3 - 4 * d1)",
             "(d4 - d2) + 2 * (d3 - d1)", "(d4 - d2) - 2 * (d3 - d1)", "d5 + (4 * d1 - 5 * d3)")}  # fmt: skip
OUTPUT = {2: ("p0 + p1 + p2", "p1 - p2 - p3"),
          4: ("p0 + (p1 + p2) + (p3 + p4)", "(p1 - p2) + 2 * (p3 - p4)", "(p1 + p2) + 4 * (p3 + p4)",
              "(p1 - p2) + 8 * (p3 - p4) + p5")}  # fmt: skip


@kernel("Conv")
def winograd(node: Node, target: Target) -> Iterator[Kernel]:
    """3x3 convolutions of stride 1 over planes, few of whose weights are zero."""
    g = geometry(node)
    if g is None or target.lanes < 4 or node.x.rank != 4 or g.groups != 1 or g.ins < 4 or g.outs < 4:
        return
    if g.kernel != (3, 3) or g.stride != (1, 1) or g.dilation != (1, 1) or g.before[1] > 1:
        return
    weight = node.input(1).data
    assert weight is not None
    if np.count_nonzero(weight) < 0.3 * weight.size:
        return
    for m in (2, 4):
        lanes = target.lanes
        wide = m * lanes
        while wide >= 2 * max(g.made[1], g.size[1]) and wide > 4:
            wide //= 2
        if wide < max(g.made[1], g.size[1]) or wide < m:
            continue
        high = m * lanes // wide  # rows of tiles in a vector
        rows = -(-g.made[0] // (m * high))
        if g.made[0] * g.made[1] < 0.45 * rows * m * high * wide:  # too many lanes would be idle
            continue
        together = next(n for n in (2, 3, 1) if rows % n == 0)
        block = (8 if together > 1 else 16) if registers(target) == 32 else (4 if together > 1 else 8)
        yield Tiles(g, m, lanes, wide, high, rows, together, min(block, g.outs)).kernel(node)


@dataclass(frozen=True)
class Tiles:
    """A convolution in tiles of m x m outputs.

    Args:
        wide: Columns that a row of tiles covers.
        high: Rows of tiles in one vector.
        rows: Vectors that cover a plane.
        together: Vectors that share each weight that is read.
        block: Outputs summed at once.
    """

    g: Geometry
    m: int
    lanes: int
    wide: int
    high: int
    rows: int
    together: int
    block: int

    @property
    def elements(self) -> int:
        """Of a transformed tile."""
        return (self.m + 2) ** 2

    @property
    def outs(self) -> int:
        """Outputs, in whole blocks."""
        return -(-self.g.outs // self.block) * self.block

    def step(self, channels: int) -> int:
        """Floats from one element's numbers to the next one's: an odd count of cache lines, which spreads them."""
        floats = channels * self.together * self.lanes
        return floats + (16 if floats // 16 % 2 == 0 else 0)

    def weights(self, weight: Array) -> Array:
        """G w G' as (elements, blocks of outputs, in, outputs of a block)."""
        g, side = self.g, self.m + 2
        made = np.einsum("ak,oikl,bl->oiab", G[self.m], weight.astype(np.float64), G[self.m])
        made = np.concatenate([made, np.zeros((self.outs - g.outs, *made.shape[1:]))])
        made = made.reshape(-1, self.block, g.ins, side * side).transpose(3, 0, 2, 1)
        return np.ascontiguousarray(made, np.float32)

    def kernel(self, node: Node) -> Kernel:
        """It, for a node with this geometry."""
        g, w = self.g, node.input(1)
        assert w.data is not None
        covered = self.rows * self.high * self.m
        border = ((0, 0), (0, 0), (g.before[0], covered + 2 - g.before[0] - g.size[0]), (0, self.wide - g.size[1]))
        x_want = Want(border=border, pitch=self.wide if self.wide < self.lanes else self.lanes)
        wants = (x_want, None, None, None if node.maybe(3) is None else Want())
        scratch = 4 * self.elements * (self.step(g.ins) + self.step(self.outs))
        per = 0.3 * max(self.lanes / 16, 0.25)
        ns = self.rows * per * (self.elements * g.ins * self.outs * 1.25 + 7 * self.elements * (g.ins + g.outs)) + 200
        return Kernel(
            f"winograd {self.m}x{self.m}",
            self.body,
            wants,
            None,
            {"weights": self.weights(w.data)},
            skips=(1,),
            scratch=scratch,
            cost_ns=ns * int(node.x.shape[0]),
            helpers=helpers(node, self.lanes),
            nonzeros=int(np.count_nonzero(w.data)),
            values=int(w.data.size),
        )

    def body(self, node: Node) -> str:
        """The C statements."""
        g, kind = self.g, vector(self.lanes)
        n, opened = batches(node)
        outs = self.step(self.outs)
        lines = [
            "float *const seen = (float *)scratch;",
            f"float *const sums = seen + {self.elements * self.step(g.ins)};",
            *opened,
        ]
        inner = [
            f"for (int i = 0; i < {g.ins}; i++)",
            f"    for (int t = 0; t < {self.together}; t++) {{",
            *indented(self._input(node, n), 2),
            "    }",
            f"for (int e = 0; e < {self.elements}; e++) {{",
            *indented(self._product(kind)),
            "}",
            f"for (int o = 0; o < {g.outs}; o++)",
            f"    for (int t = 0; t < {self.together}; t++) {{",
            f"        const float *const from = sums + (o * {self.together} + t) * {self.lanes};",
            *indented(self._output(node, n, outs), 2),
            "    }",
        ]
        if self.rows > self.together:
            inner = [f"for (int band = 0; band < {self.rows}; band += {self.together}) {{", *indented(inner), "}"]
        act = node.attrs.get("act")
        if act is not None and not clamp_of(act):
            yn, yc, _, _ = strides(node.y)
            image = f" + {c(yn)} * {n}" if n != "0" else ""
            inner += [
                f"for (int o = 0; o < {g.outs}; o++) {{",
                f"    float *const out = y0{image} + {yc} * o;",
                *indented(Finish(node, g.made[0], g.made[1], self.lanes).lines([])),
                "}",
            ]
        return "\n".join([*lines, *indented(inner, len(opened)), *["}"] * len(opened)])

    @property
    def _band(self) -> str:
        """The number of the vector that is worked on, as C."""
        return (
            ("t" if self.together > 1 else "0")
            if self.rows == self.together
            else ("(band + t)" if self.together > 1 else "band")
        )

    def _pieces(self, j: int) -> list[tuple[int, int]]:
        """(row of tiles, first column) of the runs of columns that lie in vector j of a row of elements."""
        if self.wide >= self.lanes:
            return [divmod(j * self.lanes, self.wide)]
        return [(j * self.lanes // self.wide + p, 0) for p in range(self.lanes // self.wide)]

    def _input(self, node: Node, n: str) -> list[str]:
        """C lines that transform the tiles of plane i that lie in vector t."""
        m, lanes, side = self.m, self.lanes, self.m + 2
        kind = vector(lanes)
        xn, xc, xr, _ = strides(node.x)
        image = f" + {c(xn)} * {n}" if n != "0" else ""
        top = f" - {self.g.before[0] * xr}" if self.g.before[0] else ""
        lines = [
            f"const float *const x = x0{image} + i * {xc} + {self._band} * {self.high * m * xr}{top};",
            f"float *const to = seen + (i * {self.together} + t) * {lanes};",
        ]
        for j in range(m):  # down the columns
            for r in range(side):
                parts = [
                    f"*(const {vector(min(lanes, self.wide))} *)(x + {(k * m + r) * xr + column})"
                    for k, column in self._pieces(j)
                ]
                width = min(lanes, self.wide)
                while len(parts) > 1:
                    parts = [_two(a, b, range(2 * width)) for a, b in zip(parts[::2], parts[1::2], strict=True)]
                    width *= 2
                lines.append(f"const {kind} x{j}{r} = {parts[0]};")
            lines += [
                f"const {kind} z{j}{r} = {_with(text, 'd', [f'x{j}{k}' for k in range(side)])};"
                for r, text in enumerate(INPUT[m])
            ]
        zero = f"({kind}){{0}}"
        per = self.wide // m  # tiles in a row
        for r in range(side):  # along the rows
            made, phases = _deinterleaved([f"z{j}{r}" for j in range(m)], lanes, f"v{r}", kind)
            lines += made
            elements = []
            for k in range(side):
                tiles, phase = divmod(k - self.g.before[1], m)
                if tiles == 0:
                    elements.append(phases[phase])
                    continue
                order = [lane + tiles if 0 <= lane % per + tiles < per else lanes for lane in range(lanes)]
                lines.append(f"const {kind} h{r}{k} = {_two(phases[phase], zero, order)};")
                elements.append(f"h{r}{k}")
            lines += [
                f"*({kind} *)(to + {(r * side + k) * self.step(self.g.ins)}) = {_with(text, 'd', elements)};"
                for k, text in enumerate(INPUT[m])
            ]
        return lines

    def _product(self, kind: str) -> list[str]:
        """C lines that sum over channels for element e."""
        g, lanes, block, vectors = self.g, self.lanes, self.block, self.together
        names = [[f"a{o}_{v}" for v in range(vectors)] for o in range(block)]
        flat = [name for row in names for name in row]
        return [
            f"for (int o = 0; o < {self.outs}; o += {block}) {{",
            f"    const float *w = weights + (e * {self.outs} + o) * {g.ins};",
            f"    const float *x = seen + e * {self.step(g.ins)};",
            f"    {kind} {', '.join(f'{name} = {{0}}' for name in flat)};",
            f"    for (int i = 0; i < {g.ins}; i++) {{",
            *(f"        const {kind} x{v} = *(const {kind} *)(x + {v * lanes});" for v in range(vectors)),
            *(f"        {name} += x{v} * w[{o}];" for o, row in enumerate(names) for v, name in enumerate(row)),
            f"        x += {vectors * lanes};",
            f"        w += {block};",
            "    }",
            f"    float *const to = sums + e * {self.step(self.outs)} + o * {vectors * lanes};",
            *(f"    *({kind} *)(to + {i * lanes}) = {name};" for i, name in enumerate(flat)),
            "}",
        ]

    def _output(self, node: Node, n: str, step: int) -> list[str]:
        """C lines that transform and finish the tiles of output o that lie in vector t."""
        m, lanes, side = self.m, self.lanes, self.m + 2
        kind = vector(lanes)
        yn, yc, yr, _ = strides(node.y)
        image = f" + {c(yn)} * {n}" if n != "0" else ""
        lines = [f"float *const out = y0{image} + o * {yc} + {self._band} * {self.high * m * yr};"]
        more = node.maybe(3)
        if more is not None:
            rn, rc, rr, _ = strides(more)
            image = f" + {c(rn)} * {n}" if n != "0" else ""
            lines.append(f"const float *const more = x3{image} + o * {rc} + {self._band} * {self.high * m * rr};")
        for r in range(side):  # along the rows
            lines += [f"const {kind} p{r}{k} = *(const {kind} *)(from + {(r * side + k) * step});" for k in range(side)]
            lines += [
                f"const {kind} q{r}{k} = {_with(text, 'p', [f'p{r}{j}' for j in range(side)])};"
                for k, text in enumerate(OUTPUT[m])
            ]
        if node.maybe(2) is not None:
            lines.append("const float bias = x2[o];")
        act = node.attrs.get("act")
        clamp = clamp_of(act) if act is not None else None
        for r in range(m):  # down the columns
            lines += [
                f"const {kind} s{r}{k} = {_with(OUTPUT[m][r], 'p', [f'q{j}{k}' for j in range(side)])};"
                for k in range(m)
            ]
            made, rows = _interleaved([f"s{r}{k}" for k in range(m)], lanes, f"y{r}_", kind)
            lines += made
            for j, name in enumerate(rows):
                if node.maybe(2) is not None:
                    lines.append(f"{name} += bias;")
                lines += self._finished(node, name, r, j, clamp)
        return lines

    def _finished(self, node: Node, name: str, r: int, j: int, clamp: tuple[float, float] | None) -> list[str]:
        """C lines that finish and store vector j of the tiles' row r."""
        lanes, more, columns = self.lanes, node.maybe(3), self.g.made[1]
        pieces, width = self._pieces(j), min(lanes, self.wide)
        lines = clamped(name, lanes, clamp) if more is None and clamp else []
        for p, (k, column) in enumerate(pieces):
            row, part, first, whole = k * self.m + r, name, p * width, lanes
            if column >= columns:
                continue
            if more is not None:
                if len(pieces) > 1:
                    part, first, whole = f"{name}p{p}", 0, width
                    lines.append(f"{vector(width)} {part} = {lanes_of(name, p * width, width, lanes)};")
                lines += self._inside(row, added(part, whole, more, "more", row, column, columns))
                if clamp:
                    lines += clamped(part, whole, clamp)
            lines += self._inside(row, put(part, whole, node.y, "out", row, column, columns, first, width))
        return lines

    def _inside(self, row: int, lines: list[str]) -> list[str]:
        """The lines, where row `row` of the vector can lie behind the last one only if it does not."""
        covered = self.high * self.m
        if (self.rows - 1) * covered + row < self.g.made[0]:
            return lines
        band = self._band
        return [f"if ({band} * {covered} + {row} < {self.g.made[0]}) {{", *indented(lines), "}"]


def _with(text: str, letter: str, names: Sequence[str]) -> str:
    """A transform's text with its operands named."""
    for i in range(len(names)):
        text = text.replace(f"{letter}{i}", f"<{i}>")
    for i, name in enumerate(names):
        text = text.replace(f"<{i}>", name)
    return text


def _two(a: str, b: str, order: Sequence[int]) -> str:
    return f"__builtin_shufflevector({a}, {b}, {', '.join(map(str, order))})"


def _deinterleaved(names: list[str], lanes: int, prefix: str, kind: str) -> tuple[list[str], list[str]]:
    """C lines that part len(names) vectors, one run of numbers, into every second (or fourth) one; the parts' names."""
    even, odd = list(range(0, 2 * lanes, 2)), list(range(1, 2 * lanes, 2))
    lines: list[str] = []

    def name(text: str) -> str:
        local = f"{prefix}_{len(lines)}"
        lines.append(f"const {kind} {local} = {text};")
        return local

    evens = [name(_two(a, b, even)) for a, b in zip(names[::2], names[1::2], strict=True)]
    odds = [name(_two(a, b, odd)) for a, b in zip(names[::2], names[1::2], strict=True)]
    if len(names) == 2:
        return lines, [evens[0], odds[0]]
    p0, p2 = name(_two(evens[0], evens[1], even)), name(_two(evens[0], evens[1], odd))
    p1, p3 = name(_two(odds[0], odds[1], even)), name(_two(odds[0], odds[1], odd))
    return lines, [p0, p1, p2, p3]


def _interleaved(names: list[str], lanes: int, prefix: str, kind: str) -> tuple[list[str], list[str]]:
    """C lines that put parts together again, the inverse of `_deinterleaved`; the vectors' names."""
    low = [i // 2 + i % 2 * lanes for i in range(lanes)]
    high = [i + lanes // 2 for i in low]
    lines: list[str] = []

    def name(text: str) -> str:
        local = f"{prefix}{len(lines)}"
        lines.append(f"{kind} {local} = {text};")
        return local

    def both(a: str, b: str) -> list[str]:
        return [name(_two(a, b, low)), name(_two(a, b, high))]

    if len(names) == 2:
        return lines, both(names[0], names[1])
    evens, odds = both(names[0], names[2]), both(names[1], names[3])
    return lines, [*both(evens[0], odds[0]), *both(evens[1], odds[1])]
