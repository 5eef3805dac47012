"""Interpolate along one dimension by a table of positions and weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine import loops
from lilliput.engine.graph import Node
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.size import c
from lilliput.engine.target import Target


@kernel("Interpolate")
def interpolate(node: Node, target: Target) -> Iterator[Kernel]:
    """y[i] = sum over k of weights[i, k] x[positions[i, k]] along one dimension. attrs: axis, positions, weights."""
    constants = {
        "positions": np.asarray(node.attrs["positions"], np.int32),
        "weights": np.asarray(node.attrs["weights"], np.float32),
    }
    many = constants["weights"].shape[1]
    yield Kernel("table", _body, constants=constants, cost_ns=20.0 + 0.3 * many * int(node.y.size))


def _body(node: Node) -> str:
    x, y, axis = node.x, node.y, node.attrs["axis"]
    many = np.asarray(node.attrs["weights"]).shape[1]
    taps = range(many) if many <= 8 else None
    outside = [d for d in range(y.rank) if d != axis and abs(int(y.strides[d])) > abs(int(y.strides[axis]))]
    inside = [d for d in range(y.rank) if d != axis and d not in outside]
    step = c(x.strides[axis])

    def row(names: list[str]) -> list[str]:
        before, i = names[:-1], names[-1]
        start = loops.index(before, [x.strides[d] for d in outside])
        goal = loops.index(names, [*(y.strides[d] for d in outside), y.strides[axis]])
        sizes, (into, out) = loops.collapsed(
            [y.shape[d] for d in inside], [tuple(y.strides[d] for d in inside), tuple(x.strides[d] for d in inside)]
        )
        lines = [f"float *to = y0 + {goal};"]
        if taps is None:

            def sums(k: list[str]) -> list[str]:
                at = loops.index(k, out)
                return [
                    "float sum = 0;",
                    f"for (int t = 0; t < {many}; t++) sum += w[t] * from[{step}*(int64_t)p[t] + {at}];",
                    f"to[{loops.index(k, into)}] = sum;",
                ]

            lines += [
                f"const float *from = x0 + {start};",
                f"const float *w = weights + {many}*{i};",
                f"const int32_t *p = positions + {many}*{i};",
            ]
            return [*lines, *loops.nest(sizes, sums, "k").splitlines()]
        for t in taps:
            lines += [
                f"const float w{t} = weights[{many}*{i} + {t}];",
                f"const float *from{t} = x0 + {start} + {step}*(int64_t)positions[{many}*{i} + {t}];",
            ]
        total = " + ".join(f"w{t} * from{t}[{{0}}]" for t in taps)
        return [
            *lines,
            *loops.nest(
                sizes, lambda k: [f"to[{loops.index(k, into)}] = {total.format(loops.index(k, out))};"], "k"
            ).splitlines(),
        ]

    return loops.nest([*(y.shape[d] for d in outside), y.shape[axis]], row)
