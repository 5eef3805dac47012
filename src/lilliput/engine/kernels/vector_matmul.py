"""Multiply a sparse matrix by one or a few positions, one after the other, in the ways that recurrent networks use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.matvec import ways
from lilliput.engine.kernels.matvec_way import MatVec
from lilliput.engine.kernels.product import Linear, Tail, at, inside, linear, size_type, tail_of, times, walk
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

DENSEST = 0.6


@kernel("MatMul")
def sparse_vector(node: Node, target: Target) -> Iterator[Kernel]:
    """Few positions, or any number where there are no vectors."""
    layer = linear(node)
    if layer is None or (target.vector_bytes > 0 and not (fixed(layer.positions) and layer.positions < 4)):
        return
    filled = np.count_nonzero(layer.weight) / layer.weight.size
    if filled > DENSEST or layer.ins >= 2**16:
        return
    for way in ways(layer.weight, None, target):
        if way.name.startswith("sparse, 16") or way.name == "sparse, by outputs":
            yield _kernel(layer, way)


def _kernel(layer: Linear, way: MatVec) -> Kernel:
    tail = tail_of(layer.node, layer.feature_y)
    constants: dict[str, Array] = dict(way.constants)
    if tail.bias is not None:
        constants["bias"] = tail.bias
    wants: list[Want | None] = [None] * 4
    wants[layer.x], gives = layer.inner(positions_inside=False)
    return Kernel(
        way.name, lambda n: _body(n, layer, tail, way), tuple(wants), gives, constants,
        (1 - layer.x, *((2,) if tail.bias is not None else ())), scratch=4 * (way.ins + way.outs + 16),
        cost_ns=(way.ns + 0.3 * layer.outs) * int(layer.positions) + 20, helpers=(*way.helpers, *tail.helpers),
        nonzeros=way.nonzeros, values=way.values,
    )  # fmt: skip


def _body(node: Node, layer: Linear, tail: Tail, way: MatVec) -> str:
    x, y, name = node.input(layer.x), node.y, f"x{layer.x}"
    path = walk(y, layer.feature_y, [(name, x, layer.feature_x), *tail.others(node)])
    step, many = path.feature[name], not (fixed(path.count) and path.count == 1)
    direct = way.outs == layer.outs and path.feature["y0"] == 1

    def place(key: str) -> str:
        return at(path.base[key], ("t", path.step[key])) if many else path.base[key]

    text = [f"const float *const x = {place(name)};", f"float *const y = {place('y0')};"]
    given = "x"
    if way.ins != layer.ins or step != 1:
        given = "in"
        text += [
            "float *const in = (float *)scratch;",
            f"for (int i = 0; i < {layer.ins}; i++) in[i] = x[{times('i', step)}];",
        ]
        if way.ins > layer.ins:
            text.append(f"for (int i = {layer.ins}; i < {way.ins}; i++) in[i] = 0;")
    made = "y" if direct else "sum"
    if not direct:
        text.append(f"float *const sum = (float *)scratch + {-(-way.ins // 16) * 16};")
    text.append(way.call.format(y=made, x=given, **{key: key for key in way.constants}))
    text += tail.outputs(made, layer.outs, path.feature, place)
    if many:
        kind = size_type(path.count)
        text = [f"for ({kind} t = 0; t < {c(path.count)}; t++) {{", *inside(text), "}"]
    return "\n".join([*path.open, *text, *path.close])
