"""Softmax and its logarithm: find the maximum, then sum the exponentials, then divide."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lilliput.engine import loops
from lilliput.engine.expr import Expr, arg, needs, statements
from lilliput.engine.graph import Node
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.walk import Each, Once, Walk
from lilliput.engine.target import Target


class Entry:
    """The element that a normalisation starts from: x0, or an expression `pre` of elements of several inputs.

    An expression is computed once: the first pass leaves it in y0, the others read it there.
    """

    def __init__(self, node: Node) -> None:
        self.pre: Expr = node.attrs.get("pre") or arg(0, "float32")
        self.inputs = node.inputs
        self.kept = self.pre.op != "arg"

    def first(self, walk: Walk) -> list[str]:
        """Statements of the first pass, which define `element`."""
        read = [walk.at(f"x{i}") if v is not None else "" for i, v in enumerate(self.inputs)]
        lines, (result,) = statements([self.pre], read)
        return [*lines, f"const float element = {result};", *([f"{walk.at('y0')} = element;"] if self.kept else [])]

    def again(self, walk: Walk) -> str:
        """The element in a later pass."""
        return walk.at("y0") if self.kept else walk.at(f"x{self.pre.value}")


def operands(node: Node, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The strides of every input over a shape, the output's first where it decides the way."""
    strides = {f"x{i}": loops.strides_of(v, shape) for i, v in enumerate(node.inputs) if v is not None}
    return {**strides, "y0": node.y.strides}


@kernel("Softmax")
def softmax(node: Node, target: Target) -> Iterator[Kernel]:
    """attrs: axis; log; pre, an expression of the inputs' elements (x where it is None)."""
    names = ["exp_falling", "log"] if node.attrs.get("log") else ["exp_falling"]
    pre = node.attrs.get("pre")
    yield Kernel(
        "three passes",
        lambda n: _softmax(n, target),
        cost_ns=10.0 * int(node.x.size) / target.lanes + 50,
        helpers=texts(*names, *(needs([pre]) if pre is not None else ())),
        follows=True,
    )


def _softmax(node: Node, target: Target) -> str:
    walk = Walk(node.y.shape, [node.attrs["axis"]], operands(node, node.y.shape), target)
    entry = Entry(node)

    def grown(w: Walk) -> list[str]:
        return [
            f"const float e = fast_exp_falling({entry.again(w)} - {w.value('top')});",
            *([] if node.attrs.get("log") else [f"{w.at('y0')} = e;"]),
        ]

    top = Each(entry.first, (("top", "max", lambda w: "element"),))
    total = Each(grown, (("total", "sum", lambda w: "e"),))
    if node.attrs.get("log"):
        return walk.text(
            top,
            total,
            Once((("shift", lambda w: f"{w.value('top')} + fast_log({w.value('total')})"),)),
            Each(lambda w: [f"{w.at('y0')} = {entry.again(w)} - {w.value('shift')};"]),
        )
    return walk.text(
        top,
        total,
        Once((("scale", lambda w: f"1.0f / {w.value('total')}"),)),
        Each(lambda w: [f"{w.at('y0')} *= {w.value('scale')};"]),
    )
