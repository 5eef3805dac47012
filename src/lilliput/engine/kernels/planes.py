"""Helpers that kernels over planes share: runs of pixels, accumulators that cover a run, what follows the sum.

A value (N, C, ...) in channel-major order is one plane a channel. A kernel works on runs: pixels that lie one after
another in every plane, in blocks whose accumulators stay in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lilliput.engine import loops
from lilliput.engine.expr import Expr, clamp_of, literal, needs, statements
from lilliput.engine.graph import Array, Node, Value
from lilliput.engine.helpers import HELPERS
from lilliput.engine.kernel import Want
from lilliput.engine.kernels.product import pick, vector, vector_types
from lilliput.engine.size import c, fixed, product
from lilliput.engine.target import Target

L1_BYTES = 32 * 1024


def registers(target: Target) -> int:
    """How many vector registers (of floats, in scalar C) the machine has."""
    many = {"AVX512F", "aarch64", "riscv64", "AARCH64EL", "riscv"}
    return 32 if many & target.features else 16


def widths(lanes: int) -> list[int]:
    """The vector widths a kernel may use at most `lanes` wide, the widest first, 1 the last."""
    return [width for width in (16, 8, 4) if width <= lanes] + [1]


def heads(lanes: int) -> tuple[str, ...]:
    """The C text that vectors of at most `lanes` need."""
    return tuple(
        text
        for width in reversed(widths(lanes))
        if width > 1
        for text in (vector_types(width), pick(width), bounds(width), shuffle(width))
    )


def bounds(lanes: int) -> str:
    """C text of above_f32xN(a, b), the larger of each two, and below_f32xN: one instruction that GCC does not find."""
    f = vector(lanes)
    native = {
        16: [("__AVX512F__", "immintrin.h", "__m512", "_mm512_max_ps", "_mm512_min_ps")],
        8: [("__AVX__", "immintrin.h", "__m256", "_mm256_max_ps", "_mm256_min_ps")],
        4: [
            ("__SSE__", "immintrin.h", "__m128", "_mm_max_ps", "_mm_min_ps"),
            ("__ARM_NEON", "arm_neon.h", "float32x4_t", "vmaxq_f32", "vminq_f32"),
        ],
    }[lanes]
    lines = []
    for number, (has, header, kind, larger, smaller) in enumerate(native):
        lines += [f"#{'elif' if number else 'if'} defined({has})", f"#include <{header}>"]
        lines += [
            f"static inline {f} {name}_{f}({f} a, {f} b) {{ return ({f}){call}(({kind})a, ({kind})b); }}"
            for name, call in (("above", larger), ("below", smaller))
        ]
    lines.append("#else")
    i = vector(lanes, "i32")
    lines += [
        f"static inline {f} {name}_{f}({f} a, {f} b)\n{{\n    const {i} mask = a {sign} b;\n"
        f"    return ({f})((({i})a & mask) | (({i})b & ~mask));\n}}"
        for name, sign in (("above", ">"), ("below", "<"))
    ]
    return "\n".join([*lines, "#endif"])


def shuffle(lanes: int) -> str:
    """C text of shuffle_f32xN(a, b, which lanes of both), for the head of the file."""
    return (
        f"#if defined(__clang__) || __GNUC__ >= 12\n"
        f"#define shuffle_f32x{lanes}(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)\n"
        f"#else\n#define shuffle_f32x{lanes}(a, b, ...) __builtin_shuffle(a, b, (i32x{lanes}){{__VA_ARGS__}})\n"
        f"#endif"
    )


def spread(name: str, lanes: int) -> str:
    """The C expression of a vector with a number everywhere."""
    return name if lanes == 1 else f"{name} - ({vector(lanes)}){{}}"


def load(pointer: str, lanes: int) -> str:
    """The C expression of the vector at a pointer."""
    return f"*(const {vector(lanes)} *)({pointer})"


def store(pointer: str, lanes: int, value: str) -> str:
    """The C statement that writes a vector."""
    return f"*({vector(lanes)} *)({pointer}) = {value};"


def plus(base: str, *terms: tuple[str, int] | int) -> str:
    """The C expression of a base plus numbers and index * step, without what is zero."""
    parts = [base]
    for term in terms:
        if isinstance(term, tuple):
            name, step = term
            if step != 0:
                parts.append(name if step == 1 and fixed(step) else f"{name} * {c(step)}")
        elif term != 0:
            parts.append(c(term))
    return " + ".join(parts)


# ----------------------------------------------------------------------------------------------------- after the sum


@dataclass(frozen=True)
class After:
    """What a convolution does after its sum: add the bias (out,), add an input of the output's shape, an activation.

    Args:
        residual: The number of that input, or None.
        clamp: (low, high) where the activation is one.
        act: Its expression where it is not.
    """

    bias: Array | None
    residual: int | None
    clamp: tuple[float, float] | None
    act: Expr | None

    @property
    def helpers(self) -> tuple[str, ...]:
        """The C text that the activation needs."""
        return () if self.act is None else tuple(HELPERS[name] for name in needs([self.act]))

    def finished(self, name: str, lanes: int) -> list[str]:
        """C lines that finish an accumulator which already has bias and residual, as far as vectors do it."""
        low, high = self.clamp or (-math.inf, math.inf)
        lines = []
        for bound, call, sign in ((low, "above", ">"), (high, "below", "<")):
            text = "" if math.isinf(bound) else literal(bound, "float32")
            if text and lanes == 1:
                lines.append(f"{name} = {name} {sign} {text} ? {name} : {text};")
            elif text:
                lines.append(f"{name} = {call}_{vector(lanes)}({name}, {spread(text, lanes)});")
        return lines

    def rest(self, pointer: str, count: int) -> list[str]:
        """C lines that do the remaining activation in place over `count` numbers that were stored."""
        if self.act is None:
            return []
        if count == 1:
            lines, (result,) = statements([self.act], [f"{pointer}[0]"])
            return ["{", *(f"    {line}" for line in lines), f"    {pointer}[0] = {result};", "}"]
        lines, (result,) = statements([self.act], [f"{pointer}[j]"])
        return [
            f"for (int j = 0; j < {count}; j++) {{",
            *(f"    {line}" for line in lines),
            f"    {pointer}[j] = {result};",
            "}",
        ]


def after(node: Node) -> After | None:
    """What a Conv does after its sum; None where it is not float32 with a known bias."""
    bias = node.maybe(2)
    if node.y.dtype != np.float32 or node.x.dtype != np.float32 or (bias is not None and bias.data is None):
        return None
    act = node.attrs.get("act")
    clamp = None if act is None else clamp_of(act)
    if act is not None and act.op == "arg":
        act = None
    return After(
        None if bias is None else np.asarray(bias.data, np.float32).reshape(-1),
        3 if node.maybe(3) is not None else None,
        clamp,
        None if clamp else act,
    )


# ------------------------------------------------------------------------------------------------------------ windows


@dataclass(frozen=True)
class Window:
    """A convolution's settings, heights first, widths second; one-dimensional ones have a height of 1."""

    size: tuple[int, int]
    out: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    before: tuple[int, int]
    ins: int  # input and output channels of a group
    outs: int
    groups: int

    @property
    def depth(self) -> int:
        """What is summed over for one output."""
        return self.ins * self.kernel[0] * self.kernel[1]


def window(node: Node) -> tuple[Window, Array] | None:
    """The settings and weights (out, in, ...) of a convolution in one or two dimensions with known sizes, or None."""
    a, x, y = node.attrs, node.x, node.y
    weight = node.input(1).data
    dims = x.rank - 2
    if weight is None or dims not in (1, 2) or not fixed(*x.shape[1:]) or 0 in (*x.shape, *y.shape, *weight.shape):
        return None

    def pair(values: Sequence[int], fill: int = 1) -> tuple[int, int]:
        both = [fill] * (2 - dims) + [int(v) for v in values]
        return both[0], both[1]

    group = int(a["group"])
    return Window(
        pair(x.shape[2:]),
        pair(y.shape[2:]),
        pair(weight.shape[2:]),
        pair(a["strides"]),
        pair(a["dilations"]),
        pair(a["pads"][:dims], 0),
        int(weight.shape[1]),
        int(weight.shape[0]) // group,
        group,
    ), np.asarray(weight, np.float32)


# -------------------------------------------------------------------------------------------------------------- runs


@dataclass
class Runs:
    """The loops around a run, and the run: `count` pixels that are neighbours in each operand.

    Args:
        channel: By operand, the step from a plane to the next.
        gap: Whether whole vectors may be read and written behind the run.
    """

    sizes: list[int]
    steps: list[list[int]]
    count: int
    channel: list[int]
    gap: Callable[[int], bool]

    def inside(self, pointers: Sequence[tuple[str, str]], body: Sequence[str]) -> list[str]:
        """The lines in the loops around, with a pointer ("float *y", where it starts from) for each operand."""
        counters = [f"r{k}" for k in range(len(self.sizes))]
        lines = [
            f"{declared} = {plus(source, *zip(counters, steps, strict=True))};"
            for (declared, source), steps in zip(pointers, self.steps, strict=True)
        ]
        lines += body
        for name, size in reversed(list(zip(counters, self.sizes, strict=True))):
            kind = "int" if fixed(size) else "int64_t"
            lines = [f"for ({kind} {name} = 0; {name} < {c(size)}; {name}++) {{", *(f"    {x}" for x in lines), "}"]
        return lines


def runs(operands: Sequence[Value]) -> Runs:
    """The runs over operands of one shape but for the channels (dimension 1), each with stride 1 innermost."""
    first = operands[0]
    dims = [0, *range(2, first.rank)]
    shape = [first.shape[d] for d in dims]
    sizes, steps = loops.collapsed(shape, [tuple(v.strides[d] for d in dims) for v in operands])
    if not sizes or not fixed(sizes[-1]) or any(s[-1] != 1 for s in steps):
        sizes, steps = [*sizes, 1], [[*s, 1] for s in steps]
    count = int(sizes[-1])

    def gap(lanes: int) -> bool:
        """Whether the run is a whole plane and every operand has room for whole vectors at the end of each plane."""
        whole = -(-count // lanes) * lanes
        for value in operands:
            assert value.buffer is not None
            if value.border or not fixed(*value.shape) or count != product(value.shape[2:]):
                return False
            if any(value.shape[d] != 1 and int(value.strides[d]) < whole for d in (0, 1)):
                return False
            last = sum(int(s) * (int(n) - 1) for s, n in zip(value.strides, value.shape, strict=True))
            if int(value.offset) + last + 1 + whole - count > int(value.buffer.count):
                return False
        return True

    return Runs(sizes[:-1], [s[:-1] for s in steps], count, [v.strides[1] for v in operands], gap)


Piece = tuple[int, int]  # (place in the block, lanes)


@dataclass(frozen=True)
class Block:
    """`times` blocks one after another from pixel `start`, each of `width` pixels covered by the pieces."""

    start: int
    times: int
    width: int
    pieces: tuple[Piece, ...]


def blocks(count: int, lanes: int, most: int, gap: bool, strict: bool = False) -> list[Block]:
    """Cover `count` pixels with blocks of about (strict: at most) `most` vectors; a rest by narrower vectors, or by one
    that overruns."""
    whole, rest = divmod(count, lanes)
    tail: list[int] = []
    if rest and gap and (rest > lanes // 4 or not whole):
        whole, rest = whole + 1, 0
    for width in widths(lanes)[1:]:
        while rest >= width:
            tail.append(width)
            rest -= width
    number = max(1, -(-whole // most) if strict else round(whole / most))
    base, more = divmod(whole, number)
    runs: list[Block] = []
    start = 0
    sizes = [base + 1] * more + [base] * (number - more)
    for i, size in enumerate(sizes):
        pieces = [(k * lanes, lanes) for k in range(size)]
        width = size * lanes
        if i == number - 1:
            for piece in tail:
                pieces.append((width, piece))
                width += piece
        block = Block(start, 1, width, tuple(pieces))
        if runs and runs[-1].pieces == block.pieces:
            last = runs[-1]
            runs[-1] = Block(last.start, last.times + 1, last.width, last.pieces)
        else:
            runs.append(block)
        start += width
    return runs


def planes(value: Value, lanes: int) -> Want:
    """Channel-major, every plane starting at a multiple of a vector."""
    if value.rank == 3:
        return Want(pitch=lanes)
    return Want(plane=lanes if value.rank == 4 else 1)


def around(number: int, name: str, body: Sequence[str]) -> list[str]:
    """Lines in a loop that runs `number` times; in a block of their own, without the counter, where that is once."""
    head = "{" if number == 1 else f"for (int {name} = 0; {name} < {number}; {name}++) {{"
    return [head, *(f"    {line}" for line in body), "}"]
