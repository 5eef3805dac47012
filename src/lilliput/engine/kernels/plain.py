"""Plain loops for products: correct for every setting, used where no faster kernel applies."""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.engine import expr, loops
from lilliput.engine.graph import Node
from lilliput.engine.helpers import HELPERS
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.size import c
from lilliput.engine.target import Target


def epilogue(node: Node, sum_: str, bias: str, place: list[str]) -> tuple[list[str], str]:
    """C statements and the expression of act(sum + bias + residual) at a place of the output (names of counters)."""
    total = sum_
    if node.maybe(2) is not None:
        total += f" + x2[{bias}]"
    residual = node.maybe(3)
    if residual is not None:
        total += f" + x3[{loops.index(place, loops.strides_of(residual, node.y.shape))}]"
    act = node.attrs.get("act")
    if act is None:
        return [], total
    lines, (result,) = expr.statements([act], ["total"])
    return [f"const float total = {total};", *lines], result


def helpers_of(node: Node) -> tuple[str, ...]:
    """The C helpers of a node's activation."""
    act = node.attrs.get("act")
    return () if act is None else tuple(HELPERS[n] for n in expr.needs([act]))


@kernel("Conv")
def plain_conv(node: Node, target: Target) -> Iterator[Kernel]:
    """Every output is a sum over channels and taps, with bounds checked."""
    w = node.input(1)
    yield Kernel(
        "plain", _conv, cost_ns=3.0 * int(node.y.size) * int(w.size) / max(int(w.shape[0]), 1), helpers=helpers_of(node)
    )


def _conv(node: Node) -> str:
    x, w, y, a = node.x, node.input(1), node.y, node.attrs
    dims, group = x.rank - 2, a["group"]
    outs, ins = w.shape[0] // group, w.shape[1]

    def inner(names: list[str]) -> list[str]:
        n, o, *place = names
        taps = [f"k{d}" for d in range(dims)]
        base = f"{c(x.strides[0])}*{n} + {c(x.strides[1])}*({o} / {outs} * {ins} + i)"
        where = [f"{place[d]}*{a['strides'][d]} - {a['pads'][d]} + {taps[d]}*{a['dilations'][d]}" for d in range(dims)]
        lines = ["float sum = 0;", f"for (int i = 0; i < {ins}; i++) {{"]
        for d in range(dims):
            lines += [
                f"for (int {taps[d]} = 0; {taps[d]} < {w.shape[2 + d]}; {taps[d]}++) {{",
                f"const int64_t p{d} = {where[d]};",
                f"if (p{d} < 0 || p{d} >= {c(x.shape[2 + d])}) continue;",
            ]
        at = " + ".join([base, *(f"{c(x.strides[2 + d])}*p{d}" for d in range(dims))])
        lines.append(f"sum += x0[{at}] * x1[{loops.index([o, 'i', *taps], w.strides)}];")
        lines += ["}"] * (dims + 1)
        after, result = epilogue(node, "sum", o, names)
        return [*lines, *after, f"y0[{loops.index(names, y.strides)}] = {result};"]

    return loops.nest(y.shape, inner)


@kernel("MatMul")
def plain_matmul(node: Node, target: Target) -> Iterator[Kernel]:
    """Every output is a sum; the innermost loop runs over columns."""
    yield Kernel("plain", _matmul, cost_ns=1.0 * int(node.y.size) * int(node.x.shape[-1]), helpers=helpers_of(node))


def _matmul(node: Node) -> str:
    a, b, y = node.x, node.input(1), node.y
    # One-dimensional operands have no row or no column of the output.
    rows, columns = a.rank > 1, b.rank > 1
    lead = y.rank - rows - columns
    depth = a.shape[-1]

    def inner(names: list[str]) -> list[str]:
        outer, m, n = names[:lead], names[lead] if rows else "", names[-1] if columns else ""
        sa, sb = (loops.strides_of(v, (*y.shape[:lead], *v.shape[-min(v.rank, 2) :])) for v in (a, b))
        at = loops.index([*outer, *([m] if rows else []), "k"], sa)
        bt = loops.index([*outer, "k", *([n] if columns else [])], sb)
        after, result = epilogue(node, "sum", n or "0", names)
        kind = {"float32": "float"}.get(y.dtype.name, y.c_type)
        return [
            f"{kind} sum = 0;",
            f"for (int64_t k = 0; k < {c(depth)}; k++) sum += x0[{at}] * x1[{bt}];",
            *after,
            f"y0[{loops.index(names, y.strides)}] = {result};",
        ]

    return loops.nest(y.shape, inner)
