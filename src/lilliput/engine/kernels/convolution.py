"""Shared parts of convolution kernels: geometry, and writing a tile of sums."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lilliput.engine.expr import Expr, clamp_of, needs, statements
from lilliput.engine.graph import Node, Value
from lilliput.engine.helpers import HELPERS
from lilliput.engine.kernels.product import clamped, pick, vector, vector_types
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target


@dataclass(frozen=True)
class Geometry:
    """A convolution over planes; one over a line is a plane of one row.

    Args:
        ins: Channels that one output channel sums over (of one group).
        before: The padding in rows and columns.
    """

    groups: int
    ins: int
    outs: int
    size: tuple[int, int]
    made: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]

    @property
    def after(self) -> tuple[int, int]:
        """Rows and columns that are read behind the last ones."""
        return tuple(
            max((m - 1) * s + (k - 1) * d + 1 - b - n, 0)
            for m, s, k, d, b, n in zip(
                self.made, self.stride, self.kernel, self.dilation, self.before, self.size, strict=True
            )
        )

    @property
    def channels(self) -> int:
        """Of the input."""
        return self.ins * self.groups


def geometry(node: Node) -> Geometry | None:
    """The geometry of a float32 convolution over lines or planes of fixed size with constant weights, else None."""
    x, w, y, a = node.x, node.input(1), node.y, node.attrs
    dims = x.rank - 2
    if w.data is None or dims not in (1, 2) or not fixed(*x.shape[1:]) or 0 in (*w.shape, *y.shape):
        return None
    if x.dtype.name != "float32" or w.dtype.name != "float32":
        return None

    def two(values: Sequence[int], missing: int) -> tuple[int, int]:
        pair = [missing] * (2 - dims) + [int(v) for v in values]
        return pair[0], pair[1]

    return Geometry(
        int(a["group"]),
        int(w.shape[1]),
        int(w.shape[0]),
        two(x.shape[2:], 1),
        two(y.shape[2:], 1),
        two(w.shape[2:], 1),
        two(a["strides"], 1),
        two(a["dilations"], 1),
        two(a["pads"][:dims], 0),
    )


def strides(value: Value) -> tuple[int, int, int, int]:
    """Of batch, channel, row and column."""
    batch, channel, *rest = value.strides
    row, column = rest if len(rest) == 2 else (0, rest[0])
    return batch, channel, row, column


def registers(target: Target) -> int:
    """How many vectors the machine holds."""
    many = {"AVX512F", "aarch64", "riscv64", "AARCH64EL", "riscv"}
    return 32 if many & target.features else 16


def lane_widths(target: Target, columns: int) -> list[int]:
    """Lanes of the vectors that are worth trying on rows of so many columns."""
    widths: dict[int, int] = {}
    lanes = target.lanes
    while lanes >= 4:
        widths.setdefault(-(-columns // lanes) * lanes, lanes)
        lanes //= 2
    least = min(widths, default=0)
    return [
        lanes for width, lanes in widths.items() if width == least or (lanes == target.lanes and width < 2 * columns)
    ]


def shuffled(a: str, b: str, start: int, lanes: int) -> str:
    """The C expression of `lanes` lanes from lane `start` of a followed by b."""
    if start == 0:
        return a
    return f"__builtin_shufflevector({a}, {b}, {', '.join(str(start + i) for i in range(lanes))})"


def heads(lanes: int) -> tuple[str, ...]:
    """The C text that code on vectors of `lanes` needs."""
    widths = [w for w in (4, 8, 16) if w <= lanes]
    return ("#include <stdint.h>\n", *(text for w in widths for text in (vector_types(w), pick(w))))


def helpers(node: Node, lanes: int) -> tuple[str, ...]:
    """The C text that a convolution on vectors of `lanes` needs, with that of its activation."""
    act = node.attrs.get("act")
    more = () if act is None or clamp_of(act) else tuple(HELPERS[n] for n in needs([act]))
    return (*heads(lanes), *more)


@dataclass(frozen=True)
class Finish:
    """What becomes of the sums of a tile: bias, residual, activation, and the way to memory.

    Args:
        rows: Of the tile, which stands at `out` (and the residual at `more`).
        columns: As `rows`.
        lanes: Of the vectors.
        out_row: C expressions of their steps from row to row, where they are not known yet.
        more_row: As `out_row`.
    """

    node: Node
    rows: int
    columns: int
    lanes: int
    out: str = "out"
    more: str = "more"
    out_row: str = ""
    more_row: str = ""

    @property
    def vectors(self) -> int:
        """In a row."""
        return -(-self.columns // self.lanes)

    def lines(self, sums: Sequence[str], bias: str = "") -> list[str]:
        """C lines that finish a tile whose sums are vector variables, row by row; bias: C expression that is added."""
        act: Expr | None = self.node.attrs.get("act")
        clamp = clamp_of(act) if act is not None else None
        lines = [f"{s} += {bias};" for s in sums] if bias else []
        lines += self._residual(sums)
        if clamp:
            lines += [text for s in sums for text in clamped(s, self.lanes, clamp)]
        lines += self._stored(sums)
        if act is not None and not clamp:
            _, _, row, column = strides(self.node.y)
            where = f"{self.out}[r * {self.out_row or row} + i * {column}]"
            inner, (result,) = statements([act], ["sum"])
            lines += [
                f"for (int r = 0; r < {self.rows}; r++)",
                f"    for (int i = 0; i < {self.columns}; i++) {{",
                f"        const float sum = {where};",
                *(f"        {line}" for line in inner),
                f"        {where} = {result};",
                "    }",
            ]
        return lines

    def _residual(self, sums: Sequence[str]) -> list[str]:
        value = self.node.maybe(3)
        if value is None:
            return []
        lines = []
        for i, s in enumerate(sums):
            r, v = divmod(i, self.vectors)
            lines += added(
                s,
                self.lanes,
                value,
                _row(self.more, r, self.more_row),
                0 if self.more_row else r,
                v * self.lanes,
                self.columns,
            )
        return lines

    def _stored(self, sums: Sequence[str]) -> list[str]:
        lines = []
        for i, s in enumerate(sums):
            r, v = divmod(i, self.vectors)
            lines += put(
                s,
                self.lanes,
                self.node.y,
                _row(self.out, r, self.out_row),
                0 if self.out_row else r,
                v * self.lanes,
                self.columns,
            )
        return lines


def _row(base: str, row: int, step: str) -> str:
    """The C expression of where a row starts, its step being an expression ("" where it is added later)."""
    return base if not step or row == 0 else f"{base} + {row} * {step}" if row > 1 else f"{base} + {step}"


def added(name: str, lanes: int, value: Value, base: str, row: int, column: int, columns: int) -> list[str]:
    """C lines that add to a vector what `value` holds at (row, column) from `base` on, of rows of `columns`."""
    _, _, step, one = strides(value)
    at, left = row * step + column * one, min(columns - column, lanes)
    # Behind a value in the arena there is always a vector that may be read: what is summed there is not kept.
    if one == 1 and (left == lanes or (value.buffer is not None and value.buffer.place == "arena")):
        return [f"{name} += *(const {vector(lanes)} *)({base} + {at});"]
    return [f"{name}[{lane}] += ({base})[{at + lane * one}];" for lane in range(left)]


def put(
    name: str,
    lanes: int,
    y: Value,
    base: str,
    row: int,
    column: int,
    columns: int,
    first: int = 0,
    count: int | None = None,
) -> list[str]:
    """C lines that store a vector's lanes, `count` from `first` on, at (row, column) from `base` on."""
    _, _, step, one = strides(y)
    count = lanes if count is None else count
    spare = y.border[-1][1] if y.border else 0  # zeros behind a row are set again after the layer ran
    left = count if one == 1 and columns - column + spare >= count else min(columns - column, count)
    lines, lane = [], 0
    while lane < left:
        size = next((w for w in (16, 8, 4) if w <= left - lane), 1) if one == 1 else 1
        where = row * step + (column + lane) * one
        if size == 1:
            lines.append(f"({base})[{where}] = {name}[{first + lane}];")
        else:
            lines.append(f"*({vector(size)} *)({base} + {where}) = {lanes_of(name, first + lane, size, lanes)};")
        lane += size
    return lines


def lanes_of(name: str, first: int, count: int, lanes: int) -> str:
    """The C expression of `count` lanes of a vector of `lanes`."""
    if count == lanes:
        return name
    return f"__builtin_shufflevector({name}, {name}, {', '.join(str(first + k) for k in range(count))})"


def batches(node: Node) -> tuple[str, list[str]]:
    """(C lines around all, the name of the image's number or 0) of a loop over the batch."""
    count = node.x.shape[0]
    if count == 1 and fixed(count):
        return "0", []
    kind = "int" if fixed(count) else "int64_t"
    return "n", [f"for ({kind} n = 0; n < {c(count)}; n++) {{"]


def indented(lines: Sequence[str], depth: int = 1) -> list[str]:
    """The lines, further right."""
    return ["    " * depth + line if line else line for line in lines]
