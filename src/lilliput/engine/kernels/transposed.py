"""Transposed convolution: add every input to the outputs that its taps reach."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import loops
from lilliput.engine.graph import Node
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.plain import epilogue, helpers_of
from lilliput.engine.size import c
from lilliput.engine.target import Target


@kernel("ConvTranspose")
def spread(node: Node, target: Target) -> Iterator[Kernel]:
    """y[o, s q + d k - p] += w[i, o, k] x[i, q]; the innermost loop runs over the inputs q of a row."""
    if node.y.dtype.name == "float32":
        yield Kernel(
            "spread",
            _body,
            cost_ns=1.0 * int(node.x.size) * int(node.input(1).size) / int(node.x.shape[1]),
            helpers=helpers_of(node),
        )


def _body(node: Node) -> str:
    x, w, y, a = node.x, node.input(1), node.y, node.attrs
    dims, group = x.rank - 2, a["group"]
    ins, outs = int(x.shape[1]) // group, int(w.shape[1])
    lines = [
        loops.nest(y.shape, lambda names: [f"y0[{loops.index(names, y.strides)}] = 0;"]),
        f"for (int64_t n = 0; n < {c(x.shape[0])}; n++)",
        f"for (int o = 0; o < {outs * group}; o++)",
        f"for (int i = 0; i < {ins}; i++) {{",
    ]
    held = f"(o / {outs} * {ins} + i)"
    for d in range(dims):
        lines.append(f"for (int k{d} = 0; k{d} < {c(w.shape[2 + d])}; k{d}++) {{")
    taps = [f"k{d}" for d in range(dims)]
    lines.append(f"const float t = x1[{loops.index([held, f'(o % {outs})', *taps], w.strides)}];")
    lines.append("if (t == 0) continue;")
    for d in range(dims):
        s, shift = a["strides"][d], f"k{d}*{a['dilations'][d]} - {a['pads'][d]}"
        # q from the first output that is inside to the last.
        lines += [
            f"const int64_t shift{d} = {shift};",
            f"const int64_t first{d} = shift{d} < 0 ? (-shift{d} + {s - 1}) / {s} : 0;",
            f"int64_t last{d} = {c(y.shape[2 + d])} - 1 - shift{d} < 0 ? 0 : "
            f"({c(y.shape[2 + d])} - 1 - shift{d}) / {s} + 1;",
            f"if (last{d} > {c(x.shape[2 + d])}) last{d} = {c(x.shape[2 + d])};",
            f"for (int64_t q{d} = first{d}; q{d} < last{d}; q{d}++) {{",
        ]
    to = loops.index(["n", "o", *(f"({a['strides'][d]}*q{d} + shift{d})" for d in range(dims))], y.strides)
    at = loops.index(["n", held, *(f"q{d}" for d in range(dims))], x.strides)
    lines += [f"y0[{to}] += t * x0[{at}];", "}" * (2 * dims + 1)]
    if node.maybe(2) is not None or node.maybe(3) is not None or a.get("act") is not None:

        def finish(names: list[str]) -> list[str]:
            place = loops.index(names, y.strides)
            after, result = epilogue(node, f"y0[{place}]", names[1], names)
            return [*after, f"y0[{place}] = {result};"]

        lines.append(loops.nest(y.shape, finish))
    return "\n".join(lines)
