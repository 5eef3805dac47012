"""Dense products with constant weights, vectorized over outputs: blocks of positions x outputs in registers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.product import (
    Linear,
    Tail,
    Walk,
    at,
    at_value,
    clamped,
    inside,
    linear,
    size_type,
    tail_of,
    times,
    vector,
    walk,
)
from lilliput.engine.kernels.tiles import FEW, bits_of, macs_ns, registers, tail_helpers, tiles
from lilliput.engine.kernels.widen import Widen, widen
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target


@kernel("MatMul")
def rows(node: Node, target: Target) -> Iterator[Kernel]:
    """Outputs innermost: a vector holds neighbouring outputs, activations are broadcast."""
    layer = linear(node)
    if layer is None:
        return
    lanes = target.lanes
    while lanes > 4 and lanes >= 2 * layer.outs:
        lanes //= 2
    if layer.outs < lanes:
        lanes = 1
    count, narrow = layer.positions, widen(layer.narrow, layer.weight)
    done: set[tuple[int, int]] = set()
    for vectors, high in tiles(target, lanes, 0, -(-layer.outs // lanes), flip=True):
        high = high if not fixed(count) or count >= high else int(count)
        if high <= 2:  # few positions: more vectors instead
            vectors = min(registers(target) * 3 // 4 // high, -(-layer.outs // lanes), 12)
        if (vectors, high) in done:
            continue
        done.add((vectors, high))
        if narrow is not None:
            yield _rows(layer, target, lanes, high, vectors, narrow)
        if narrow is None or (count < FEW and fixed(count)):
            yield _rows(layer, target, lanes, high, vectors, None)


def packed_rows(weight: Array, wide: int, lanes: int) -> Array:
    """(out, in) in blocks of `wide` outputs, each input's together; the last is as wide as vectors need."""
    outs, ins = weight.shape
    parts = []
    for o in range(0, outs, wide):
        part = weight[o : o + wide]
        held = np.zeros((-(-len(part) // lanes) * lanes, ins), np.float32)
        held[: len(part)] = part
        parts.append(held.T.reshape(-1))
    return np.concatenate(parts)


def _rows(layer: Linear, target: Target, lanes: int, high: int, vectors: int, narrow: Widen | None) -> Kernel:
    tail = tail_of(layer.node, layer.feature_y)
    want_x, want_y = layer.inner(positions_inside=False)
    wide = lanes * vectors
    constants = (
        {"weight": packed_rows(layer.weight, wide, lanes)}
        if narrow is None
        else (narrow.constants(wide, layer.ins, lanes))
    )
    if tail.bias is not None:
        bias = np.zeros(-(-layer.outs // lanes) * lanes, np.float32)
        bias[: layer.outs] = tail.bias
        constants["bias"] = bias
    wants: list[Want | None] = [None] * 4
    wants[layer.x] = want_x
    skips = (1 - layer.x, *((2,) if tail.bias is not None else ()))
    padded = -(-layer.outs // lanes) * lanes
    work = macs_ns(target, padded * layer.ins * int(layer.positions))
    bytes_ns = padded * layer.ins * (4 if narrow is None else narrow.bits / 8) / 100  # they come from L2 at best
    widened = macs_ns(target, padded * layer.ins) * 5 if narrow is not None else 0.0
    return Kernel(
        f"dense{bits_of(narrow)}, {high} positions x {wide} outputs",
        lambda n: _rows_body(n, layer, tail, lanes, high, vectors, narrow), tuple(wants), want_y, constants, skips,
        scratch=4 * wide * (layer.ins + 4) if narrow is not None else 0,
        cost_ns=max(work + widened, bytes_ns) * 1.03 + 20, values=layer.weight.size,
        helpers=(*tail_helpers(tail, lanes), *(narrow.helpers if narrow is not None else ())),
    )  # fmt: skip


def _rows_body(node: Node, layer: Linear, tail: Tail, lanes: int, high: int, vectors: int, narrow: Widen | None) -> str:
    x, y = node.input(layer.x), node.y
    name = f"x{layer.x}"
    way = walk(y, layer.feature_y, [(name, x, layer.feature_x), *tail.others(node)])
    text: list[str] = [*way.open, f"const float *const x = {way.base[name]};", f"float *const y = {way.base['y0']};"]
    for i in tail.extras:
        text.append(f"const float *const e{i} = {way.base[f'x{i}']};")
    count, outs, wide = way.count, layer.outs, lanes * vectors
    text += ["const float *w = weight;"] if narrow is None else ["float *const w = (float *)scratch;", *narrow.starts()]
    full, rest = outs // wide, outs % wide
    for width, start, loop in ((wide, 0, full), (rest, full * wide, 1)):
        if not width or not loop:
            continue
        use = -(-width // lanes)
        inner = _positions(layer, tail, way, lanes, use, width, high, count, name)
        if narrow is None:
            inner.append(f"w += {use * lanes * layer.ins};")
        else:
            blocks = str(-(-layer.ins // narrow.block))
            inner = [*narrow.lines(use * lanes, str(layer.ins), blocks, "w"), *inner]
        if loop > 1:
            text += [f"for (int o = {start}; o < {start + loop * width}; o += {width}) {{", *inside(inner), "}"]
        else:
            text += at_value("int", "o", start, inner)
    text += way.close
    return "\n".join(text)


def _positions(
    layer: Linear, tail: Tail, way: Walk, lanes: int, vectors: int, width: int, high: int, count: int, name: str
) -> list[str]:
    """Outputs o .. o + width - 1 at every position."""
    kind = size_type(count)

    def tile(high: int) -> list[str]:
        return _tile(layer, tail, way, lanes, vectors, width, high, name)

    text: list[str] = []
    if fixed(count):
        count = int(count)
        blocks = -(-count // high)
        high = -(-count // blocks)
        full, rest = count // high, count % high
        if full > 1:
            text += [f"for ({kind} t = 0; t < {full * high}; t += {high}) {{", *inside(tile(high)), "}"]
        else:
            text += at_value(kind, "t", 0, tile(high))
        if rest:
            text += at_value(kind, "t", full * high, tile(rest))
        return text
    text += [f"{kind} t = 0;", f"for (; t + {high} <= {c(count)}; t += {high}) {{", *inside(tile(high)), "}"]
    if high > 4:
        text += [f"for (; t + 4 <= {c(count)}; t += 4) {{", *inside(tile(4)), "}"]
    if high > 1:
        text += [f"for (; t < {c(count)}; t++) {{", *inside(tile(1)), "}"]
    return text


def _tile(
    layer: Linear, tail: Tail, way: Walk, lanes: int, vectors: int, width: int, high: int, name: str
) -> list[str]:
    kind, unit = vector(lanes), lanes == 1
    sx, tx, ty = way.feature[name], way.step[name], way.step["y0"]
    names = [[f"a{i}" if vectors == 1 else f"a{i}_{j}" for j in range(vectors)] for i in range(high)]
    flat = [n for line in names for n in line]
    text = [
        f"const float *r = {at('x', ('t', tx))};",
        "const float *v = w;",
        f"float *const q = {at('y', ('t', ty), ('o', 1))};",
        f"{kind} {', '.join(flat)};",
    ]
    for j in range(vectors):
        start = f"bias[o + {j * lanes}]" if unit else f"*(const {kind} *)(bias + o + {j * lanes})"
        value = start if tail.bias is not None else "0" if unit else f"({kind}){{}}"
        text.append(" ".join(f"{names[i][j]} = {value};" for i in range(high)))
    text += [f"for (int k = 0; k < {layer.ins}; k++, v += {vectors * lanes}, r += {c(sx)}) {{"]
    load = "v[{}]" if unit else f"*(const {kind} *)(v + {{}})"
    text += [f"    const {kind} v{j} = {load.format(j * lanes)};" for j in range(vectors)]
    for i in range(high):
        number = f"r[{times(str(i), tx)}]" if i else "r[0]"
        if unit:
            text.append("    " + " ".join(f"{n} += {number} * v{j};" for j, n in enumerate(names[i])))
        else:
            text.append(
                f"    {{ const {kind} s = ({kind}){{}} + {number}; "
                + " ".join(f"{n} += s * v{j};" for j, n in enumerate(names[i]))
                + " }"
            )
    text.append("}")
    if tail.clamp is not None:
        for n in flat:
            text.append(" ".join(clamped(n, lanes, tail.clamp)))
    whole, left = width // lanes, width % lanes
    for i in range(high):
        place = at("q", (str(i), ty))
        text += (
            [
                " ".join(
                    f"{'*(' if unit else f'*({kind} *)('}{place} + {j * lanes}) = {names[i][j]};" for j in range(whole)
                )
            ]
            if whole
            else []
        )
        if left:
            text += [f"for (int j = 0; j < {left}; j++) ({place})[{whole * lanes} + j] = {names[i][whole]}[j];"]
    if tail.expr is not None:
        text += [f"for (int i = 0; i < {high}; i++) {{", f"    float *const z = {at('q', ('i', ty))};"]
        for i in tail.extras:
            place = at(f"e{i}", ("t + i", way.step[f"x{i}"]), ("o", way.feature[f"x{i}"]))
            text.append(f"    const float *const z{i} = {place};")
        text += [
            f"    for (int j = 0; j < {width}; j++) {{",
            *inside(tail.text("z[j]", [f"z{i}[{times('j', way.feature[f'x{i}'])}]" for i in tail.extras]), "        "),
            "    }",
            "}",
        ]
    return text
