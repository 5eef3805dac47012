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
    found = linear(node)
    if found is None or (target.vector_bytes > 0 and not (fixed(found.positions) and found.positions < 4)):
        return
    filled = np.count_nonzero(found.weight) / found.weight.size
    if filled > DENSEST or found.ins >= 2**16:
        return
    for way in ways(found.weight, None, target):
        if way.name.startswith("sparse, 16") or way.name == "sparse, by outputs":
            yield _kernel(found, way)


def _kernel(found: Linear, way: MatVec) -> Kernel:
    tail = tail_of(found.node, found.feature_y)
    constants: dict[str, Array] = dict(way.constants)
    if tail.bias is not None:
        constants["bias"] = tail.bias
    wants: list[Want | None] = [None] * 4
    wants[found.x], gives = found.inner(positions_inside=False)
    return Kernel(
        way.name, lambda n: _body(n, found, tail, way), tuple(wants), gives, constants,
        (1 - found.x, *((2,) if tail.bias is not None else ())), scratch=4 * (way.ins + way.outs + 16),
        cost_ns=(way.ns + 0.3 * found.outs) * int(found.positions) + 20, helpers=(*way.helpers, *tail.helpers),
        nonzeros=way.nonzeros, values=way.values,
    )  # fmt: skip


def _body(node: Node, found: Linear, tail: Tail, way: MatVec) -> str:
    x, y, name = node.input(found.x), node.y, f"x{found.x}"
    path = walk(y, found.feature_y, [(name, x, found.feature_x), *tail.others(node)])
    step, many = path.feature[name], not (fixed(path.count) and path.count == 1)
    direct = way.outs == found.outs and path.feature["y0"] == 1

    def place(key: str) -> str:
        return at(path.base[key], ("t", path.step[key])) if many else path.base[key]

    text = [f"const float *const x = {place(name)};", f"float *const y = {place('y0')};"]
    given = "x"
    if way.ins != found.ins or step != 1:
        given = "in"
        text += [
            "float *const in = (float *)scratch;",
            f"for (int i = 0; i < {found.ins}; i++) in[i] = x[{times('i', step)}];",
        ]
        if way.ins > found.ins:
            text.append(f"for (int i = {found.ins}; i < {way.ins}; i++) in[i] = 0;")
    made = "y" if direct else "sum"
    if not direct:
        text.append(f"float *const sum = (float *)scratch + {-(-way.ins // 16) * 16};")
    text.append(way.call.format(y=made, x=given, **{key: key for key in way.constants}))
    text += tail.outputs(made, found.outs, path.feature, place)
    if many:
        kind = size_type(path.count)
        text = [f"for ({kind} t = 0; t < {c(path.count)}; t++) {{", *inside(text), "}"]
    return "\n".join([*path.open, *text, *path.close])
