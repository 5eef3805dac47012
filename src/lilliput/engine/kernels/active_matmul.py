"""Multiply a vector by a matrix over the non-zero inputs only; most outputs of a ReLU are zero.

Weights are kept by input. The inputs that are not zero are listed first, with their numbers; then a block of outputs
at a time stays in registers while the list is walked through. It is right for any input (NaN and infinities are not
zero), and offered where an example said how many are zero.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.dense_rows import packed_rows
from lilliput.engine.kernels.matvec_way import GHZ, L2_BYTES_A_NS
from lilliput.engine.kernels.product import Linear, Tail, at, inside, linear, tail_of, times, vector, vector_types, walk
from lilliput.engine.size import fixed
from lilliput.engine.target import Target

MOST_ACTIVE = 0.8
MOST_POSITIONS = 3


@kernel("MatMul")
def active(node: Node, target: Target) -> Iterator[Kernel]:
    """Few positions, one after the other."""
    layer, share = linear(node), node.attrs.get("active")
    if layer is None or share is None or share > MOST_ACTIVE:
        return
    if not fixed(*node.y.shape) or int(layer.positions) > MOST_POSITIONS:
        return
    if not np.isfinite(layer.weight).all():  # 0 times infinity is not 0
        return
    lanes = target.lanes
    while lanes > 4 and lanes >= 2 * layer.outs:
        lanes //= 2
    many = -(-layer.outs // lanes)
    for most in dict.fromkeys((min(many, 8), min(many, 16 if lanes == 16 else 4))):
        yield _kernel(layer, share, lanes, -(-many // -(-many // most)))


def _kernel(layer: Linear, share: float, lanes: int, vectors: int) -> Kernel:
    tail = tail_of(layer.node, layer.feature_y)
    wide = lanes * vectors
    constants: dict[str, Array] = {"weight": packed_rows(layer.weight, wide, lanes)}
    if tail.bias is not None:
        constants["bias"] = tail.bias
    wants: list[Want | None] = [None] * 4
    wants[layer.x], gives = layer.inner(positions_inside=False)
    outs = -(-layer.outs // lanes) * lanes
    walked = max(4 * outs / L2_BYTES_A_NS, outs / lanes / GHZ) * share * layer.ins
    return Kernel(
        f"inputs that are not zero, {wide} outputs", lambda n: _body(n, layer, tail, lanes, vectors), tuple(wants),
        gives, constants, (1 - layer.x, *((2,) if tail.bias is not None else ())),
        scratch=8 * (layer.ins + 8) + 4 * outs, cost_ns=(walked + 0.5 * layer.ins + 40) * int(layer.positions),
        helpers=(*((vector_types(lanes),) if lanes > 1 else ()), *tail.helpers), values=layer.weight.size,
        active=share,
    )  # fmt: skip


def _body(node: Node, layer: Linear, tail: Tail, lanes: int, vectors: int) -> str:
    x, y, name = node.input(layer.x), node.y, f"x{layer.x}"
    path = walk(y, layer.feature_y, [(name, x, layer.feature_x), *tail.others(node)])
    many, step = int(path.count) > 1, path.feature[name]

    def place(key: str) -> str:
        return at(path.base[key], ("t", path.step[key])) if many else path.base[key]

    unroll = max(1, 4 // vectors)
    direct = layer.outs % lanes == 0 and path.feature["y0"] == 1
    made = "y" if direct else "sum"
    text = [
        f"const float *const x = {place(name)};",
        f"float *const y = {place('y0')};",
        "float *const value = (float *)scratch;",
        f"uint32_t *const from = (uint32_t *)scratch + {layer.ins + 8};",
    ]
    if not direct:
        text.append(f"float *const sum = (float *)scratch + {2 * (layer.ins + 8)};")
    text += [
        "int n = 0;",
        f"for (int i = 0; i < {layer.ins}; i++) {{",
        f"    const float v = x[{times('i', step)}];",
        "    value[n] = v;",
        "    from[n] = (uint32_t)i;",
        "    n += v != 0;",
        "}",
    ]
    if unroll > 1:
        text += [f"for (int i = 0; i < {unroll - 1}; i++) {{", "    value[n + i] = 0;", "    from[n + i] = 0;", "}"]
    wide, outs = lanes * vectors, -(-layer.outs // lanes) * lanes
    full = outs // wide
    text.append("const float *w = weight;")
    if full > 1:
        text += [
            f"for (int o = 0; o < {full * wide}; o += {wide}) {{",
            *inside(_block(layer, lanes, vectors, unroll, made, "o")),
            f"    w += {layer.ins * wide};",
            "}",
        ]
    else:
        text += ["{", *inside(_block(layer, lanes, vectors, unroll, made, "0")), "}"]
    if rest := (outs - full * wide) // lanes:
        if full == 1:
            text.append(f"w += {layer.ins * wide};")
        text += ["{", *inside(_block(layer, lanes, rest, unroll, made, str(full * wide))), "}"]
    text += tail.outputs(made, layer.outs, path.feature, place)
    if many:
        text = [f"for (int t = 0; t < {int(path.count)}; t++) {{", *inside(text), "}"]
    return "\n".join([*path.open, *text, *path.close])


def _block(layer: Linear, lanes: int, vectors: int, unroll: int, made: str, o: str) -> list[str]:
    """A block of outputs: `unroll` sums for each, added up at the end."""
    kind, wide = vector(lanes), lanes * vectors
    names = [[f"a{u}_{j}" for j in range(vectors)] for u in range(unroll)]
    zero = "0" if lanes == 1 else "{0}"
    text = [
        f"{kind} {', '.join(f'{n} = {zero}' for row in names for n in row)};",
        f"for (int k = 0; k < n; k += {unroll}) {{",
    ]
    for u, row in enumerate(names):
        spread = f"value[k + {u}]" if lanes == 1 else f"({kind}){{0}} + value[k + {u}]"
        text += [
            "    {",
            f"        const float *const p = w + (size_t)from[k + {u}] * {wide};",
            f"        const {kind} s = {spread};",
        ]
        text += [
            f"        {n} += s * " + (f"p[{j}];" if lanes == 1 else f"*(const {kind} *)(p + {j * lanes});")
            for j, n in enumerate(row)
        ]
        text.append("    }")
    text.append("}")
    for j in range(vectors):
        total = " + ".join(row[j] for row in names)
        place = f"{made} + {o} + {j * lanes}"
        text.append(f"*({place}) = {total};" if lanes == 1 else f"*({kind} *)({place}) = {total};")
    return text
