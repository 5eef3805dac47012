"""A sparse matrix times one position, in the ways that recurrent networks use."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, Want, kernel
from lilliput.engine.kernels.matvec import MatVec, ways
from lilliput.engine.kernels.product import Linear, Tail, inside, linear, tail_of, times, walk
from lilliput.engine.size import fixed
from lilliput.engine.target import Target

DENSEST = 0.6


@kernel("MatMul")
def sparse_vector(node: Node, target: Target) -> Iterator[Kernel]:
    """One position whose weights have zeros."""
    found = linear(node)
    if found is None or not fixed(found.positions) or found.positions != 1:
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
        cost_ns=way.ns + 0.3 * found.outs + 20, helpers=(*way.helpers, *tail.helpers), nonzeros=way.nonzeros,
        values=way.values,
    )  # fmt: skip


def _body(node: Node, found: Linear, tail: Tail, way: MatVec) -> str:
    x, y, name = node.input(found.x), node.y, f"x{found.x}"
    path = walk(y, found.feature_y, [(name, x, found.feature_x), *tail.others(node)])
    step, text, given, made = path.feature[name], [], name, "y0"
    room = -(-way.ins // 16) * 16
    if way.ins != found.ins or step != 1:
        given = "in"
        text += ["float *const in = (float *)scratch;",
                 f"for (int i = 0; i < {found.ins}; i++) in[i] = {name}[{times('i', step)}];",
                 *([f"for (int i = {found.ins}; i < {way.ins}; i++) in[i] = 0;"] if way.ins > found.ins else [])]
    direct = way.outs == found.outs and path.feature["y0"] == 1
    if not direct:
        made = "sum"
        text.append(f"float *const sum = (float *)scratch + {room};")
    text.append(way.call.format(y=made, x=given, **{key: key for key in way.constants}))
    bias = [f"{made}[o] += bias[o];"] if tail.bias is not None else []
    places = [f"x{i}[{times('o', path.feature[f'x{i}'])}]" for i in tail.extras]
    after = [*bias, *tail.text(f"{made}[o]", places)]
    if not direct:
        after.append(f"y0[{times('o', path.feature['y0'])}] = sum[o];")
    if after:
        text += [f"for (int o = 0; o < {found.outs}; o++) {{", *inside(after), "}"]
    return "\n".join(text)
