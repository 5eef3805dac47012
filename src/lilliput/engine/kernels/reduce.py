"""Reductions over some dimensions."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import loops
from lilliput.engine.graph import Node
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.size import c, product
from lilliput.engine.target import Target


@kernel("Reduce")
def plain(node: Node, target: Target) -> Iterator[Kernel]:
    """attrs: axes, kind ("mean"), keep."""
    yield Kernel("plain", _body, cost_ns=1.0 * int(node.x.size))


def _body(node: Node) -> str:
    x, y, axes = node.x, node.y, node.attrs["axes"]
    kept = [d for d in range(x.rank) if d not in axes]
    inside = [x.shape[d] for d in axes]

    def outer(names: list[str]) -> list[str]:
        to = dict(zip(kept, names, strict=True))
        ys = y.strides if len(y.strides) == x.rank else None
        place = loops.index(names, [ys[d] for d in kept] if ys else list(y.strides))
        sums = loops.nest(inside, lambda k: [
            f"sum += x0[{loops.index([*to.values(), *k], [*(x.strides[d] for d in kept), *(x.strides[d] for d in axes)])}];"
        ], "k").splitlines()
        return ["float sum = 0;", *sums, f"y0[{place}] = sum / (float){c(product(inside))};"]

    return loops.nest([x.shape[d] for d in kept], outer)
