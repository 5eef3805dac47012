"""Convolutions of 8-bit integers, exact in int32."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from lilliput.engine import loops
from lilliput.engine.expr import needs, statements
from lilliput.engine.graph import Array, Node, Value
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.integer_matmul import dot4
from lilliput.engine.kernels.product import vector, vector_types
from lilliput.engine.kernels.tiles import registers
from lilliput.engine.levels import border
from lilliput.engine.size import c
from lilliput.engine.target import Target


@kernel("ConvInteger")
def plain(node: Node, target: Target) -> Iterator[Kernel]:
    """Every output is a sum over channels and taps, with bounds checked: inputs x, w and their zero points or None."""
    w = node.input(1)
    yield Kernel("plain", _plain, cost_ns=3.0 * int(node.y.size) * int(w.size) / max(int(w.shape[0]), 1))


def _plain(node: Node) -> str:
    x, w, y, a = node.x, node.input(1), node.y, node.attrs
    dims, ins = x.rank - 2, w.shape[1]
    outs = w.shape[0] // a["group"]
    zero_w = node.maybe(3)

    def inner(names: list[str]) -> list[str]:
        n, o, *place = names
        taps = [f"k{d}" for d in range(dims)]
        base = f"{c(x.strides[0])}*{n} + {c(x.strides[1])}*({o} / {outs} * {ins} + i)"
        lines = ["int32_t sum = 0;", f"for (int i = 0; i < {ins}; i++) {{"]
        for d in range(dims):
            where = f"{place[d]}*{a['strides'][d]} - {a['pads'][d]} + {taps[d]}*{a['dilations'][d]}"
            lines += [
                f"for (int {taps[d]} = 0; {taps[d]} < {w.shape[2 + d]}; {taps[d]}++) {{",
                f"const int64_t p{d} = {where};",
                f"if (p{d} < 0 || p{d} >= {c(x.shape[2 + d])}) continue;",
            ]
        at = " + ".join([base, *(f"{c(x.strides[2 + d])}*p{d}" for d in range(dims))])
        zero = (
            "" if zero_w is None else " - x3[0]" if zero_w.size == 1 else f" - x3[{loops.index([o], zero_w.strides)}]"
        )
        lines.append(
            f"sum += (x0[{at}]{' - x2[0]' if node.maybe(2) is not None else ''}) * "
            f"(x1[{loops.index([o, 'i', *taps], w.strides)}]{zero});"
        )
        return [*lines, *["}"] * (dims + 1), f"y0[{loops.index(names, y.strides)}] = sum;"]

    return loops.nest(y.shape, inner)


# -------------------------------------------------------------------------------------------------- levels to levels


@kernel("Conv8")
def plain_levels(node: Node, target: Target) -> Iterator[Kernel]:
    """Conv8(x, w, scale, bias, residual): attrs expr, of the sum times the scale plus the bias, and of the residual."""
    w = node.input(1)
    if target.lanes >= 4:
        return
    yield Kernel(
        "plain",
        _plain_levels,
        cost_ns=3.0 * int(node.y.size) * int(w.size) / max(int(w.shape[0]), 1),
        helpers=texts(*needs([node.attrs["expr"]])),
    )


def _plain_levels(node: Node) -> str:
    x, w, y, a = node.x, node.input(1), node.y, node.attrs

    def inner(names: list[str]) -> list[str]:
        n, o, i, j = names
        lines = [
            "int32_t sum = 0;",
            f"for (int ky = 0; ky < {w.shape[2]}; ky++) {{",
            f"const int py = {i}*{a['strides'][0]} - {a['pads'][0]} + ky*{a['dilations'][0]};",
            f"if (py < 0 || py >= {c(x.shape[2])}) continue;",
            f"for (int kx = 0; kx < {w.shape[3]}; kx++) {{",
            f"const int px = {j}*{a['strides'][1]} - {a['pads'][1]} + kx*{a['dilations'][1]};",
            f"if (px < 0 || px >= {c(x.shape[3])}) continue;",
            f"for (int k = 0; k < {w.shape[1]}; k++)",
            f"    sum += x0[{loops.index([n, 'k', 'py', 'px'], x.strides)}] * "
            f"x1[{loops.index([o, 'k', 'ky', 'kx'], w.strides)}];",
            "}",
            "}",
            f"const float total = (float)sum * x2[{o}] + x3[{o}];",
        ]
        places = [
            "total",
            *(f"x4[{loops.index(names, loops.strides_of(node.input(4), y.shape))}]" for _ in node.inputs[4:]),
        ]
        more, (result,) = statements([a["expr"]], places)
        return [*lines, *more, f"y0[{loops.index(names, y.strides)}] = {result};"]

    return loops.nest(y.shape, inner)


@kernel("Conv8")
def channels(node: Node, target: Target) -> Iterator[Kernel]:
    """Channels innermost: four inputs at once, outputs side by side in a vector, several pixels in registers."""
    w, y = node.input(1), node.y
    data = w.data
    if target.lanes < 4 or data is None:
        return
    lanes = target.lanes
    while lanes > 4 and lanes >= 2 * w.shape[0]:
        lanes //= 2
    vectors = -(-int(w.shape[0]) // lanes)
    full = [(16, 1), (8, 2), (12, 2), (6, 4)] if registers(target) == 32 else [(8, 1), (4, 2), (6, 2)]
    for high, wide in full:
        if wide > vectors or (high > y.shape[3] and (high, wide) != full[0]):
            continue
        high = min(high, int(y.shape[3]))
        groups = [wide] * (vectors // wide) + ([vectors % wide] if vectors % wide else [])
        constants: dict[str, Array] = {"levels": _packed(data, lanes, groups), "scale": _filled(node.input(2), lanes),
                                       "bias": _filled(node.input(3), lanes)}  # fmt: skip
        tiles = sum(-(-int(y.shape[3]) // high) * g * high for g in groups) * int(y.shape[0]) * int(y.shape[2])
        work = tiles * lanes * int(data[0].size) / (4 * lanes)
        helpers = (vector_types(lanes), dot4(lanes), *([BYTES] if lanes == 16 else []))
        helpers += texts(*needs([node.attrs["expr"]]))
        yield Kernel(
            f"8-bit, {high} pixels x {wide * lanes} outputs", _writer(lanes, groups, high),
            (Want(order=(0, 2, 3, 1), border=border(node)), None, None, None, *([None] * len(node.inputs[4:]))),
            Want(order=(0, 2, 3, 1), border=node.attrs["border"]), constants, (1, 2, 3), 4 * high * wide * lanes,
            work / 3.0 + 0.3 * int(y.size) + 50,
            helpers,
            values=data.size,
        )  # fmt: skip


def _packed(data: Array, lanes: int, groups: list[int]) -> Array:
    """For each block of outputs, tap by tap, four inputs of each output side by side."""
    outs = sum(groups) * lanes
    held = np.zeros((outs, *data.shape[1:]), np.int8)
    held[: len(data)] = data
    panels, start = [], 0
    for group in groups:
        part = held[start : start + group * lanes]
        turned = part.reshape(group * lanes, -1, 4, *part.shape[2:]).transpose(3, 4, 1, 0, 2)  # ky kx c/4 out 4
        panels.append(np.ascontiguousarray(turned).reshape(-1))
        start += group * lanes
    return np.concatenate(panels)


def _filled(value: Value, lanes: int) -> Array:
    assert value.data is not None
    return np.append(value.data, np.zeros(-len(value.data) % lanes, np.float32)).astype(np.float32)


def _writer(lanes: int, groups: list[int], high: int) -> Callable[[Node], str]:
    return lambda node: _channels(node, lanes, groups, high)


def _channels(node: Node, lanes: int, groups: list[int], high: int) -> str:
    x, y, a = node.x, node.y, node.attrs
    ky, kx = a["kernel_shape"]
    row = (
        f"x0 + n*{c(x.strides[0])} + (i*{a['strides'][0]} - {a['pads'][0]})*{c(x.strides[2])} "
        f"- {a['pads'][1]}*{c(x.strides[3])}"
    )
    lines = ["float *const sum = (float *)scratch;", f"for (int n = 0; n < {y.shape[0]}; n++) {{"]
    lines.append("    const int8_t *w = levels;")
    # Blocks of outputs that are as wide run in one loop; the last may have fewer outputs than lanes.
    blocks: dict[tuple[int, int], int] = {}
    left = int(y.shape[1])
    for wide in groups:
        key = (wide, min(wide * lanes, left))
        blocks[key] = blocks.get(key, 0) + 1
        left -= key[1]
    start = 0
    for (wide, width), count in blocks.items():
        end, size = start + count * width, ky * kx * int(x.shape[1]) * wide * lanes
        lines += [f"    for (int o = {start}; o < {end}; o += {width}, w += {size})"]
        lines += [f"    for (int i = 0; i < {y.shape[2]}; i++) {{", f"        const uint8_t *const row = {row};"]
        whole, rest = divmod(int(y.shape[3]), high)
        lines.append(f"        for (int j = 0; j < {whole * high}; j += {high}) {{")
        lines += [*(f"            {line}" for line in _tile(node, lanes, wide, high, width)), "        }"]
        if rest:
            lines += ["        {", f"            const int j = {whole * high};"]
            lines += [*(f"            {line}" for line in _tile(node, lanes, wide, rest, width)), "        }"]
        lines.append("    }")
        start = end
    return "\n".join([*lines, "}"])


def _tile(node: Node, lanes: int, wide: int, high: int, width: int) -> list[str]:
    """`high` pixels of a row from column j on, for `wide` vectors of outputs from o on."""
    x, y, a = node.x, node.y, node.attrs
    kind, wide_kind, ins = vector(lanes, "i32"), vector(lanes), int(x.shape[1])
    ky, kx = a["kernel_shape"]
    names = [[f"a{p}_{v}" for v in range(wide)] for p in range(high)]
    step = a["strides"][1] * x.strides[3]
    lines = [
        f"const uint8_t *r = row + j*{c(step)};",
        "const int8_t *v = w;",
        *(f"{kind} {', '.join(f'{n} = {{0}}' for n in line)};" for line in names),
        f"for (int ky = 0; ky < {ky}; ky++, r += {c(a['dilations'][0] * x.strides[2])})",
        f"for (int kx = 0; kx < {kx}; kx++) {{",
        f"    const uint8_t *q = r + kx*{c(a['dilations'][1] * x.strides[3])};",
        f"    for (int k = 0; k < {ins}; k += 4, q += 4, v += {4 * wide * lanes}) {{",
    ]
    lines += [f"        const {kind} v{u} = *(const {kind} *)(v + {4 * u * lanes});" for u in range(wide)]
    for p, line in enumerate(names):
        place = f"q + {c(p * step)}" if p else "q"
        lines.append(
            f"        {{ uint32_t s; memcpy(&s, {place}, 4); "
            + " ".join(f"{n} = dot4_{lanes}({n}, s, v{u});" for u, n in enumerate(line))
            + " }"
        )
    lines += ["    }", "}"]
    for p, line in enumerate(names):
        lines.append(
            " ".join(
                f"*({wide_kind} *)(sum + {(p * wide + u) * lanes}) = __builtin_convertvector({n}, {wide_kind});"
                for u, n in enumerate(line)
            )
        )
    base = f"n*{c(y.strides[0])} + i*{c(y.strides[2])} + (j + p)*{c(y.strides[3])} + o*{c(y.strides[1])}"
    lines += [f"for (int p = 0; p < {high}; p++) {{", f"    {y.c_type} *const z = y0 + {base};"]
    lines.append(f"    float *const f = sum + p*{wide * lanes};")
    places = ["(f[l] * scale[o + l] + bias[o + l])"]
    for value in node.inputs[4:]:
        assert value is not None
        s = loops.strides_of(value, y.shape)
        place = f"n*{c(s[0])} + i*{c(s[2])} + (j + p)*{c(s[3])} + o*{c(s[1])}"
        lines.append(f"    const {value.c_type} *const e = x4 + {place};")
        places.append("e[l]" if s[1] == 1 else f"e[l*{c(s[1])}]")
    expr = a["expr"]
    # Levels are made from whole vectors of floats: loops as short as these the compiler does not make into good ones.
    bytes_ = lanes == 16 and expr.op == "cast" and expr.dtype == "uint8" and y.strides[1] == 1 and width == wide * lanes
    more, (result,) = statements([expr.args[0] if bytes_ else expr], places)
    to = "f[l]" if bytes_ else "z[l]" if y.strides[1] == 1 else f"z[l*{c(y.strides[1])}]"
    lines += [
        f"    for (int l = 0; l < {width}; l++) {{",
        *(f"        {line}" for line in more),
        f"        {to} = {result};",
        "    }",
    ]
    if bytes_:
        lines += [f"    bytes_16(z + {u * lanes}, f + {u * lanes});" for u in range(wide)]
    return [*lines, "}"]


BYTES = (
    """
/* 16 whole numbers from 0 to 255 as bytes. */
static inline void bytes_16(uint8_t *to, const float *from)
{
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i *)to, _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(_mm512_loadu_ps(from))));
#else
    for (int l = 0; l < 16; l++) to[l] = (uint8_t)from[l];
#endif
}
""".strip("\n")
    + "\n"
)
