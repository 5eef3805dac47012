"""Convolutions of 8-bit codes, exact in int32."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import loops
from lilliput.engine.graph import Node
from lilliput.engine.kernel import Kernel, kernel
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
