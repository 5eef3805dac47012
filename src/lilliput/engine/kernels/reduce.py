"""Reductions over some dimensions, and scans along one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lilliput.engine import loops
from lilliput.engine.expr import Expr, arg, literal, needs, statements
from lilliput.engine.graph import C_TYPES, Node, Value
from lilliput.engine.helpers import texts
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.walk import COMBINE, NEUTRAL, Each, Once, Walk, pieces
from lilliput.engine.size import c, fixed, product
from lilliput.engine.target import Target


def over(y: Value, shape: Sequence[int], axes: Sequence[int], keep: bool) -> tuple[int, ...]:
    """The strides of a reduction's output over the shape of its input: 0 along what is reduced."""
    kept = iter(y.strides[d] for d in range(y.rank) if not keep or d not in axes)
    return tuple(0 if d in axes else next(kept) for d in range(len(shape)))


@kernel("Reduce")
def reduction(node: Node, target: Target) -> Iterator[Kernel]:
    """attrs: axes, kind, keep; pre, an expression of the inputs' elements, and post, one of the result."""
    used = [e for e in (node.attrs.get("pre"), node.attrs.get("post"), _combining(node)) if e is not None]
    work = 0.7 * int(node.x.size) * max(1, sum(e.count() for e in used)) / target.lanes
    yield Kernel("walk", lambda n: _reduce(n, target), cost_ns=work + 20, helpers=texts(*needs(used)))


def _combining(node: Node) -> Expr:
    kind = node.attrs["kind"]
    x = arg(0, node.y.dtype)
    if kind == "mean":
        return x / x
    return COMBINE[kind](x, x)


def _reduce(node: Node, target: Target) -> str:
    x, y, axes = node.x, node.y, node.attrs["axes"]
    inputs = [v for v in node.inputs if v is not None]
    operands = {f"x{i}": loops.strides_of(v, x.shape) for i, v in enumerate(inputs)}
    operands["y0"] = over(y, x.shape, axes, node.attrs["keep"])
    walk = Walk(x.shape, axes, operands, target)
    kind, pre, post = node.attrs["kind"], node.attrs.get("pre"), node.attrs.get("post")
    dtype = y.dtype.name
    pre = pre or arg(0, x.dtype)
    lines: list[str] = []

    def element(w: Walk) -> list[str]:
        nonlocal lines
        lines, results = statements([pre], [w.at(f"x{i}") for i in range(len(inputs))])
        lines = [*lines, f"const {C_TYPES[pre.dtype]} element = {results[0]};"]
        return lines

    def result(w: Walk) -> list[str]:
        count = product([x.shape[d] for d in axes])
        value = w.value("all")
        if kind == "mean":
            value = f"{value} / (float){c(count)}" if dtype == "float32" else f"div_{dtype}({value}, {c(count)})"
        if post is None:
            return [f"{w.at('y0')} = {value};"]
        more, results = statements([post], [value])
        return [*more, f"{w.at('y0')} = {results[0]};"]

    how = "sum" if kind == "mean" else kind
    return walk.text(Each(element, (("all", how, lambda w: "element"),), dtype), Once(lines=result))


# ------------------------------------------------------------------------------------------------- along one dimension


@kernel("ArgMax")
def arg_max(node: Node, target: Target) -> Iterator[Kernel]:
    """The place of the largest element, by comparing each with the best so far."""
    yield Kernel("scan", lambda n: _arg_max(n, target), cost_ns=float(node.x.size))


def _arg_max(node: Node, target: Target) -> str:
    x, axis = node.x, node.attrs["axis"]
    less, last = "<" if node.attrs["largest"] else ">", node.attrs["last"]
    better = less + ("=" if last else "")

    def taken(next_: str, place: str) -> list[str]:
        return [
            f"const {x.c_type} next = {next_};",
            f"at[j] = best[j] {better} next ? {place} : at[j];",
            f"best[j] = best[j] {better} next ? next : best[j];",
        ]

    def across(w: Walk, place: Callable[..., str], count: str) -> list[str]:
        if not w.inner:
            return [f"for (int j = 0; j < {count}; j++) {place('y0')} = 0;"]
        lines = [
            f"{x.c_type} best[{w.width}];",
            f"int32_t at[{w.width}];",
            f"for (int j = 0; j < {count}; j++) {{",
            f"    best[j] = {place('x0', '0')};",
            "    at[j] = 0;",
            "}",
            f"for (int32_t r = 1; r < {c(x.shape[axis])}; r++) {{",
            f"    for (int j = 0; j < {count}; j++) {{",
            *(f"        {line}" for line in taken(place("x0", "r"), "r")),
            "    }",
            "}",
        ]
        return [*lines, f"for (int j = 0; j < {count}; j++) {place('y0')} = at[j];"]

    def inside(w: Walk, place: Callable[..., str], count: str) -> list[str]:
        """Several candidates side by side, of which the best is taken at the end."""
        if not w.inner:
            return [f"{place('y0')} = 0;"]
        width = w.width if fixed(x.shape[axis]) else 1
        lines = [
            f"{x.c_type} best[{width}];",
            f"int32_t at[{width}];",
            f"for (int j = 0; j < {width}; j++) {{",
            f"    best[j] = {place('x0', 'j')};",
            "    at[j] = j;",
            "}",
        ]
        for head, start, many in pieces(x.shape[axis], width, "i"):
            here = "j" if start == "0" else f"({start} + j)"
            lines += [
                head,
                f"    for (int j = 0; j < {many}; j++) {{",
                *(f"        {line}" for line in taken(place("x0", here), f"(int32_t){here}")),
                "    }",
                "}",
            ]
        if width > 1:
            lines += [
                f"for (int j = 1; j < {width}; j++) {{",
                f"    if (best[0] {less} best[j] || (best[0] == best[j] && at[j] {'>' if last else '<'} at[0]))",
                "    {",
                "        best[0] = best[j];",
                "        at[0] = at[j];",
                "    }",
                "}",
            ]
        return [*lines, f"{place('y0')} = at[0];"]

    walk = Walk(x.shape, [axis], {"x0": x.strides, "y0": over(node.y, x.shape, [axis], node.attrs["keep"])}, target)
    return walk.text(across if walk.across else inside)


@kernel("Cumulative")
def cumulative(node: Node, target: Target) -> Iterator[Kernel]:
    """Each element from the one before it."""
    x = arg(0, node.x.dtype)
    used = [COMBINE[node.attrs["kind"]](x, x)]
    yield Kernel("scan", lambda n: _cumulative(n, target), cost_ns=2.0 * int(node.x.size), helpers=texts(*needs(used)))


def _cumulative(node: Node, target: Target) -> str:
    x, axis, kind = node.x, node.attrs["axis"], node.attrs["kind"]
    dtype = x.dtype.name

    def scan(w: Walk, place: Callable[..., str], count: str) -> list[str]:
        each = f"for (int j = 0; j < {count}; j++) {{" if w.across else "{"
        extra, (total,) = statements([COMBINE[kind](arg(0, dtype), arg(1, dtype))], ["sum[j]", "next"])
        at = ["k"] if w.inner else []
        add, give = [*extra, f"sum[j] = {total};"], f"{place('y0', *at)} = sum[j];"
        k = f"{c(x.shape[axis])} - 1 - r" if node.attrs["reverse"] else "r"
        return [
            f"{x.c_type} sum[{w.width if w.across else 1}];",
            *([] if w.across else ["const int j = 0;"]),
            f"{each} sum[j] = {literal(NEUTRAL[kind](dtype), dtype)}; }}",
            f"for (int64_t r = 0; r < {c(x.shape[axis])}; r++) {{",
            *([f"    const int64_t k = {k};"] if at else []),
            f"    {each}",
            f"        const {x.c_type} next = {place('x0', *at)};",
            *(f"        {line}" for line in ([give, *add] if node.attrs["exclusive"] else [*add, give])),
            "    }",
            "}",
        ]

    return Walk(x.shape, [axis], {"x0": x.strides, "y0": node.y.strides}, target).text(scan)


@kernel("TopK")
def top_k(node: Node, target: Target) -> Iterator[Kernel]:
    """Each element is put into the ordered list of the best so far, if it belongs there."""
    k = node.attrs["k"]
    yield Kernel("insertion", _top_k, cost_ns=2.0 * int(node.x.size) + 10.0 * int(node.y.size), scratch=16 * max(k, 1))


def _top_k(node: Node) -> str:
    x, axis, k = node.x, node.attrs["axis"], node.attrs["k"]
    outputs = [v for v in node.outputs if v is not None]
    if not k:
        return ""
    shape = [size for d, size in enumerate(x.shape) if d != axis]
    better = ">" if node.attrs["largest"] else "<"
    kind = x.c_type

    def position(names: list[str]) -> list[str]:
        def at(value: Value, inner: str) -> str:
            return loops.index([*names[:axis], inner, *names[axis:]], value.strides)

        return [
            "int found = 0;",
            f"for (int64_t r = 0; r < {c(x.shape[axis])}; r++) {{",
            f"    const {kind} next = x0[{at(x, 'r')}];",
            f"    if (found == {k} && !(next {better} best[{k} - 1])) continue;",
            f"    int p = found < {k} ? found++ : {k} - 1;",
            f"    for (; p > 0 && next {better} best[p - 1]; p--) {{",
            "        best[p] = best[p - 1];",
            "        place[p] = place[p - 1];",
            "    }",
            "    best[p] = next;",
            "    place[p] = r;",
            "}",
            f"for (int p = 0; p < {k}; p++) {{",
            *(f"    y{i}[{at(v, 'p')}] = {('best', 'place')[i]}[p];" for i, v in enumerate(outputs) if i < 2),
            "}",
        ]

    return "\n".join(
        [
            "int64_t *place = (int64_t *)scratch;",
            f"{kind} *best = ({kind} *)(scratch + {8 * k});",
            loops.nest(shape, position),
        ]
    )
