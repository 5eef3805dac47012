"""Dense products with constant weights, vectorized over positions: blocks of outputs x positions in registers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

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
from lilliput.engine.kernels.tiles import FEW, bits_of, macs_ns, tail_helpers, tiles
from lilliput.engine.kernels.widen import Widen, widen
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

DEPTH = 384  # values summed over before the next block of outputs: as many rows of a block of columns stay in L1


@kernel("MatMul")
def columns(node: Node, target: Target) -> Iterator[Kernel]:
    """Positions innermost: a vector holds neighbouring positions, weights are broadcast."""
    layer = linear(node)
    if layer is None:
        return
    count = layer.positions
    lanes = _lanes(target, int(count), fixed(count))
    narrow = widen(layer.narrow, layer.weight)
    for rows, vectors in tiles(target, lanes, layer.outs, max(int(count) // lanes, 1)):
        if narrow is not None:
            yield _columns(layer, target, lanes, rows, vectors, narrow)
        if narrow is None or (count < FEW and fixed(count)):
            yield _columns(layer, target, lanes, rows, vectors, None)


def _lanes(target: Target, count: int, known: bool) -> int:
    """Values in a vector of positions: no more than there are, unless how many is free."""
    lanes = target.lanes
    while known and lanes > 1 and lanes > count:
        lanes //= 2
    return lanes if lanes >= 4 else 1


def packed(weight: Array, rows: int, depth: int) -> Array:
    """(out, in) in panels of `rows` outputs, `depth` inputs at a time: depth, panel, input, output."""
    outs, ins = weight.shape
    parts = [
        weight[o : o + rows, k : k + depth].T.reshape(-1) for k in range(0, ins, depth) for o in range(0, outs, rows)
    ]
    return np.concatenate(parts).astype(np.float32)


def depth_of(ins: int, block: int = 8) -> int:
    """Inputs in one step over the depth: equal steps of about DEPTH, in blocks."""
    steps = -(-ins // DEPTH)
    return min(ins, math.ceil(math.ceil(ins / steps) / block) * block)


def _columns(layer: Linear, target: Target, lanes: int, rows: int, vectors: int, narrow: Widen | None) -> Kernel:
    tail = tail_of(layer.node, layer.feature_y)
    depth = depth_of(layer.ins) if narrow is None or narrow.block == layer.ins else depth_of(layer.ins, narrow.block)
    want_x, want_y = layer.inner(positions_inside=True)
    constants = {"weight": packed(layer.weight, rows, depth)} if narrow is None else narrow.constants(rows, depth)
    if tail.bias is not None:
        constants["bias"] = tail.bias
    count = layer.positions
    wide = lanes * vectors
    blocks = max(1.0, math.ceil(int(count) / lanes) * lanes / int(count))
    wants: list[Want | None] = [None] * 4
    wants[layer.x] = want_x
    skips = (1 - layer.x, *((2,) if tail.bias is not None else ()))
    work = macs_ns(target, layer.outs * layer.ins * int(count) * blocks) * (1.02 if vectors == 1 else 1)
    work += macs_ns(target, layer.weight.size) * 5 if narrow is not None else 0.0
    return Kernel(
        f"dense{bits_of(narrow)}, {rows} outputs x {wide} positions",
        lambda n: _columns_body(n, layer, tail, lanes, rows, vectors, depth, narrow), tuple(wants), want_y, constants,
        skips, scratch=4 * rows * (depth + 4) if narrow is not None else 0, cost_ns=work + 30, values=layer.weight.size,
        helpers=(*tail_helpers(tail, lanes), *(narrow.helpers if narrow is not None else ())),
    )  # fmt: skip


def _columns_body(
    node: Node, layer: Linear, tail: Tail, lanes: int, rows: int, vectors: int, depth: int, narrow: Widen | None
) -> str:
    x, y = node.input(layer.x), node.y
    name = f"x{layer.x}"
    way = walk(y, layer.feature_y, [(name, x, layer.feature_x), *tail.others(node)])
    text: list[str] = [*way.open, f"const float *const x = {way.base[name]};", f"float *const y = {way.base['y0']};"]
    for i in tail.extras:
        text.append(f"const float *const e{i} = {way.base[f'x{i}']};")
    if narrow is None:
        text += _runs(way.count, lanes, vectors, lambda a, v: _columns_block(layer, tail, way, a, v, rows, depth, name))
        return "\n".join([*text, *way.close])
    # Each panel is widened once, then used for all positions.
    deep = depth < layer.ins
    blocks = (
        f"((ks + {narrow.block - 1}) / {narrow.block})"
        if deep and narrow.block < layer.ins
        else (str(-(-layer.ins // narrow.block)))
    )
    text += ["float *const wide = (float *)scratch;", *narrow.starts()]

    def panel(high: int) -> list[str]:
        ks = "ks" if deep else str(layer.ins)
        each = _runs(
            way.count,
            lanes,
            vectors,
            lambda a, v: ["const float *w = wide;", *_panel(layer, tail, way, a, v, high, ks, deep, depth, name)],
        )
        return [*narrow.lines(high, ks, blocks, "wide"), *each]

    inner = _panels(layer.outs, rows, panel)
    if deep:
        inner = [
            f"for (int k0 = 0; k0 < {layer.ins}; k0 += {depth}) {{",
            f"    const int ks = {layer.ins} - k0 < {depth} ? {layer.ins} - k0 : {depth};",
            *inside(inner),
            "}",
        ]
    return "\n".join([*text, *inner, *way.close])


def _runs(count: int, lanes: int, vectors: int, block: Callable[[int, int], list[str]]) -> list[str]:
    """Lines for all positions: block(lanes, vectors) are those for the positions from t on."""
    kind = size_type(count)
    if fixed(count):
        count = int(count)
        if lanes > count:  # a walk with loops around may run over fewer positions than there are
            lanes = 1 if count < 4 else 1 << (count.bit_length() - 1)
        vectors = min(vectors, max(count // lanes, 1))
        wide, text = lanes * vectors, []
        full, rest = count // wide, count % wide
        if full:
            text += [f"for ({kind} t = 0; t < {full * wide}; t += {wide}) {{", *inside(block(lanes, vectors)), "}"]
        if rest:
            last = -(-rest // lanes)
            text += at_value(kind, "t", count - last * lanes, block(lanes, last))
        return text
    wide = lanes * vectors
    text = [f"{kind} t = 0;", f"for (; t + {wide} <= {c(count)}; t += {wide}) {{", *inside(block(lanes, vectors)), "}"]
    if vectors > 1:
        text += [f"for (; t + {lanes} <= {c(count)}; t += {lanes}) {{", *inside(block(lanes, 1)), "}"]
    if lanes > 1:
        text += [
            f"if (t < {c(count)} && {c(count)} >= {lanes}) {{",
            f"    t = {c(count)} - {lanes};",
            *inside(block(lanes, 1)),
            f"    t = {c(count)};",
            "}",
            f"for (; t < {c(count)}; t++) {{",
            *inside(block(1, 1)),
            "}",
        ]
    return ["{", *inside(text), "}"]


def _panels(outs: int, rows: int, panel: Callable[[int], list[str]]) -> list[str]:
    """Lines for all outputs: panel(how many) are those for the outputs from o on."""
    text: list[str] = []
    full, rest = outs // rows, outs % rows
    if full > 1:
        text += [f"for (int o = 0; o < {full * rows}; o += {rows}) {{", *inside(panel(rows)), "}"]
    elif full:
        text += at_value("int", "o", 0, panel(rows))
    return text + (at_value("int", "o", full * rows, panel(rest)) if rest else [])


def _columns_block(
    layer: Linear, tail: Tail, way: Walk, lanes: int, vectors: int, rows: int, depth: int, name: str
) -> list[str]:
    """All outputs at the positions t .. t + lanes * vectors - 1."""
    ins, deep = layer.ins, depth < layer.ins
    ks = "ks" if deep else str(ins)
    inner = _panels(
        layer.outs, rows, lambda high: _panel(layer, tail, way, lanes, vectors, high, ks, deep, depth, name)
    )
    if not deep:
        return ["const float *w = weight;", *inner]
    return [
        "const float *w = weight;",
        f"for (int k0 = 0; k0 < {ins}; k0 += {depth}) {{",
        f"    const int ks = {ins} - k0 < {depth} ? {ins} - k0 : {depth};",
        *inside(inner),
        "}",
    ]


def _panel(
    layer: Linear,
    tail: Tail,
    way: Walk,
    lanes: int,
    vectors: int,
    rows: int,
    ks: str,
    deep: bool,
    depth: int,
    name: str,
) -> list[str]:
    kind, wide = vector(lanes), lanes * vectors
    sx, sy = way.feature[name], way.feature["y0"]
    unit = lanes == 1
    names = [[f"a{i}" if vectors == 1 else f"a{i}_{j}" for j in range(vectors)] for i in range(rows)]
    flat = [n for line in names for n in line]

    def load(pointer: str) -> str:
        return f"*({pointer})" if unit else f"*(const {kind} *)({pointer})"

    text = [
        f"const float *r = {at('x', ('k0' if deep else '0', sx), ('t', 1))};",
        f"float *const q = {at('y', ('o', sy), ('t', 1))};",
        f"{kind} {', '.join(flat)};",
    ]
    first = []
    for i in range(rows):
        start = f"bias[o + {i}]" if tail.bias is not None else "0"
        value = start if unit else f"({kind}){{}} + {start}" if tail.bias is not None else f"({kind}){{}}"
        first.append(" ".join(f"{n} = {value};" for n in names[i]))
    if deep:
        again = [
            " ".join(f"{n} = {load(at('q', (str(i), sy), (str(j * lanes), 1)))};" for j, n in enumerate(names[i]))
            for i in range(rows)
        ]
        text += ["if (k0 == 0) {", *inside(first), "} else {", *inside(again), "}"]
    else:
        text += first
    text += [f"for (int k = 0; k < {ks}; k++, w += {rows}, r += {c(sx)}) {{"]
    text += [f"    const {kind} v{j} = {load(at('r', (str(j * lanes), 1)))};" for j in range(vectors)]
    for i in range(rows):
        if unit:
            text.append("    " + " ".join(f"{n} += w[{i}] * v{j};" for j, n in enumerate(names[i])))
        else:
            text.append(
                f"    {{ const {kind} s = ({kind}){{}} + w[{i}]; "
                + " ".join(f"{n} += s * v{j};" for j, n in enumerate(names[i]))
                + " }"
            )
    text.append("}")
    last = []
    if tail.clamp is not None:
        for n in flat:
            last += [" ".join(clamped(n, lanes, tail.clamp))]
    if last:
        text += [f"if (k0 + {depth} >= {layer.ins}) {{", *inside(last), "}"] if deep else last
    for i in range(rows):
        text.append(
            " ".join(
                f"{'*(' if unit else f'*({kind} *)('}{at('q', (str(i), sy), (str(j * lanes), 1))}) = {n};"
                for j, n in enumerate(names[i])
            )
        )
    if tail.expr is not None:
        places = [at(f"e{i}", ("o + i", way.feature[f"x{i}"]), ("t", way.step[f"x{i}"])) for i in tail.extras]
        loop = [
            f"for (int i = 0; i < {rows}; i++) {{",
            f"    float *const z = {at('q', ('i', sy))};",
            *(f"    const float *const z{i} = {place};" for i, place in zip(tail.extras, places, strict=True)),
            f"    for (int j = 0; j < {wide}; j++) {{",
            *inside(tail.text("z[j]", [f"z{i}[{times('j', way.step[f'x{i}'])}]" for i in tail.extras]), "        "),
            "    }",
            "}",
        ]
        text += [f"if (k0 + {depth} >= {layer.ins}) {{", *inside(loop), "}"] if deep else loop
    return text
