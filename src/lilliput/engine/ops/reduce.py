"""Lower reductions, scans along one dimension, ArgMax and TopK."""

from __future__ import annotations

from collections.abc import Callable

from lilliput.engine.expr import Expr, arg, const, where
from lilliput.engine.graph import Node
from lilliput.engine.lower import Build, lower
from lilliput.errors import NotSupported

# operator -> (how elements are combined, what is done to each before, what to the result).
REDUCTIONS: dict[str, tuple[str, Callable[[Expr], Expr] | None, Callable[[Expr], Expr] | None]] = {
    "ReduceSum": ("sum", None, None),
    "ReduceMean": ("mean", None, None),
    "ReduceMax": ("max", None, None),
    "ReduceMin": ("min", None, None),
    "ReduceProd": ("prod", None, None),
    "ReduceL1": ("sum", lambda x: x.of("abs"), None),
    "ReduceL2": ("sum", lambda x: x * x, lambda s: s.cast("float32").of("sqrt").cast(s.dtype)),
    "ReduceLogSum": ("sum", None, lambda s: s.cast("float32").of("log").cast(s.dtype)),
    "ReduceSumSquare": ("sum", lambda x: x * x, None),
}


def reduced_axes(node: Node) -> tuple[int, ...]:
    """The dimensions that a reduction runs over, in order."""
    axes = node.axes(node.x.rank)
    if not axes:
        return () if node.attrs.get("noop_with_empty_axes", 0) else tuple(range(node.x.rank))
    return tuple(sorted(set(axes)))


@lower(*REDUCTIONS)
def reduction(node: Node, build: Build) -> None:
    """Reduce(x): attrs axes, kind, keep, pre and post (expressions of one argument, or None)."""
    kind, before, after = REDUCTIONS[node.op]
    x = node.x
    pre = None if before is None else before(arg(0, x.dtype))
    post = None if after is None else after(arg(0, x.dtype))
    build.add(
        "Reduce",
        [x],
        [node.y],
        axes=reduced_axes(node),
        kind=kind,
        keep=int(node.attrs.get("keepdims", 1)) == 1,
        pre=pre,
        post=post,
    )


@lower("ReduceLogSumExp")
def log_sum_exp(node: Node, build: Build) -> None:
    """m + ln(sum e^(x - m)), where m is the largest."""
    x, axes = node.x, reduced_axes(node)
    if x.dtype != "float32":
        raise NotSupported(f"{node.op} {node.name}: of {x.dtype.name} is not computed.")
    held = [1 if d in axes else size for d, size in enumerate(x.shape)]
    top = build.value(x.dtype, held)
    build.add("Reduce", [x], [top], axes=axes, kind="max", keep=True, pre=None, post=None)
    shift = build.map([top], lambda m: where(m.of("isinf", dtype="bool"), const(0, "float32"), m))
    summed = build.value(x.dtype, held)
    build.add(
        "Reduce",
        [x, shift],
        [summed],
        axes=axes,
        kind="sum",
        keep=True,
        pre=(arg(0, x.dtype) - arg(1, x.dtype)).of("exp"),
        post=arg(0, x.dtype).of("log"),
    )
    total = build.map([summed, shift], lambda s, m: s + m)
    build.reshape(total, node.y.shape, node.y)


@lower("ArgMax", "ArgMin")
def arg_max(node: Node, build: Build) -> None:
    """The place of the largest or smallest element: attrs axis, largest, last (of equal ones), keep."""
    build.keep(
        node,
        "ArgMax",
        axis=int(node.attrs.get("axis", 0)) % max(node.x.rank, 1),
        largest=node.op == "ArgMax",
        last=bool(node.attrs.get("select_last_index", 0)),
        keep=int(node.attrs.get("keepdims", 1)) == 1,
    )


@lower("TopK")
def top_k(node: Node, build: Build) -> None:
    """The k largest or smallest elements in order and their places: attrs axis, largest, k."""
    known = node.known(1)
    k = int(known.reshape(-1)[0]) if known is not None else int(node.attrs["k"])
    axis = int(node.attrs.get("axis", -1)) % node.x.rank
    if not 0 <= k <= node.x.shape[axis]:
        raise ValueError(f"compile: {node.name} (TopK) must take at most {int(node.x.shape[axis])} elements, got {k}.")
    build.add("TopK", [node.x], node.outputs, axis=axis, largest=bool(node.attrs.get("largest", 1)), k=k)


@lower("CumSum", "CumProd")
def cumulative(node: Node, build: Build) -> None:
    """The sums or products of the elements up to each: attrs axis, kind, exclusive, reverse."""
    known = node.known(1)
    axis = 0 if known is None else int(known.reshape(-1)[0])
    build.add(
        "Cumulative",
        [node.x],
        [node.y],
        axis=axis % node.x.rank,
        kind="sum" if node.op == "CumSum" else "prod",
        exclusive=bool(node.attrs.get("exclusive", 0)),
        reverse=bool(node.attrs.get("reverse", 0)),
    )
