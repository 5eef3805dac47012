"""Normalizations: subtract the mean over some dimensions, divide by the deviation, scale and shift."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import loops
from lilliput.engine.expr import literal, needs
from lilliput.engine.graph import Node
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.reduce import over
from lilliput.engine.kernels.softmax import Entry, operands
from lilliput.engine.kernels.walk import Each, Once, Walk
from lilliput.engine.size import c, product
from lilliput.engine.target import Target


@kernel("Normalize")
def normalize(node: Node, target: Target) -> Iterator[Kernel]:
    """Inputs x, scale, bias, then what `pre` reads beside x.

    attrs: axes; epsilon; center, whether the mean is subtracted; stats, whether outputs 1 and 2 are the mean and the
    inverse deviation; pre, an expression of the inputs' elements (x where it is None).
    """
    pre = node.attrs.get("pre")
    yield Kernel(
        "three passes",
        lambda n: _normalize(n, target),
        cost_ns=4.0 * int(node.x.size) / target.lanes + 50,
        helpers=texts(*(needs([pre]) if pre is not None else ())),
        follows=True,
    )


def _normalize(node: Node, target: Target) -> str:
    shape, axes = node.y.shape, node.attrs["axes"]
    places = operands(node, shape)
    stats = node.attrs.get("stats", False)
    if stats:
        places |= {f"y{i}": over(v, shape, axes, True) for i, v in enumerate(node.outputs) if i and v is not None}
    walk = Walk(shape, axes, places, target)
    entry = Entry(node)
    count = f"(float){c(product([shape[d] for d in axes]))}"
    epsilon = literal(node.attrs["epsilon"], "float32")
    center = node.attrs.get("center", True)

    def away(w: Walk) -> str:
        return f"{entry.again(w)} - {w.value('mean')}" if center else entry.again(w)

    def result(w: Walk) -> list[str]:
        text = f"({away(w)}) * {w.value('inverse')}"
        text += f" * {w.at('x1')}" if node.maybe(1) is not None else ""
        text += f" + {w.at('x2')}" if node.maybe(2) is not None else ""
        return [f"{w.at('y0')} = {text};"]

    def told(w: Walk) -> list[str]:
        values = {"y1": "mean" if center else "", "y2": "inverse"}
        return [f"{w.at(key)} = {w.value(name)};" for key, name in values.items() if key in places and stats and name]

    def off(w: Walk) -> list[str]:
        return [f"const float off = {away(w)};"]

    inverse = Once((("inverse", lambda w: f"1.0f / sqrtf({w.value('square')} / {count} + {epsilon})"),), told)
    if not center:
        return walk.text(Each(entry.first, (("square", "sum", lambda w: "element * element"),)), inverse, Each(result))
    return walk.text(
        Each(entry.first, (("sum", "sum", lambda w: "element"),)),
        Once((("mean", lambda w: f"{w.value('sum')} / {count}"),)),
        Each(off, (("square", "sum", lambda w: "off * off"),)),
        inverse,
        Each(result),
    )


@kernel("LRN")
def local_response(node: Node, target: Target) -> Iterator[Kernel]:
    """x / (bias + alpha / size * sum of squares over `size` channels around)^beta."""
    yield Kernel("plain", _local_response, cost_ns=(5.0 + node.attrs["size"]) * int(node.x.size))


def _local_response(node: Node) -> str:
    x, a = node.x, node.attrs
    size, channels = a["size"], c(x.shape[1])
    before, after = (size - 1) // 2, size - 1 - (size - 1) // 2

    def inner(names: list[str]) -> list[str]:
        at = loops.index([names[0], "k", *names[2:]], x.strides)
        return [
            "float sum = 0.0f;",
            f"const int64_t first = {names[1]} > {before} ? {names[1]} - {before} : 0;",
            f"const int64_t last = {names[1]} + {after} < {channels} ? {names[1]} + {after} : {channels} - 1;",
            f"for (int64_t k = first; k <= last; k++) sum += x0[{at}] * x0[{at}];",
            f"y0[{loops.index(names, node.y.strides)}] = x0[{loops.index(names, x.strides)}] / powf("
            f"{literal(a['bias'], 'float32')} + {literal(a['alpha'] / size, 'float32')} * sum, "
            f"{literal(a['beta'], 'float32')});",
        ]

    return loops.nest(x.shape, inner)
