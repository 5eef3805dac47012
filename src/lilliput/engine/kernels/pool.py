"""Pooling: the largest, the mean or the norm of windows, and the mean of whole planes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lilliput.engine import loops
from lilliput.engine.expr import literal
from lilliput.engine.graph import Array, Node, row_major
from lilliput.engine.kernel import ROWS, Kernel, Want, kernel
from lilliput.engine.kernels.planes import heads, load, plus
from lilliput.engine.kernels.product import vector
from lilliput.engine.size import c, fixed, product
from lilliput.engine.target import Target

LOWEST: dict[str, Any] = {"float32": -np.inf, "int8": -128, "uint8": 0, "int32": -(2**31), "int64": -(2**63)}
MOST_TAPS, MOST_EDGES = 49, 24


@kernel("Pool")
def plain(node: Node, target: Target) -> Iterator[Kernel]:
    """Any settings: every window with bounds checked."""
    if node.x.dtype.name in LOWEST:
        taps = float(np.prod(node.attrs["kernel_shape"]))
        yield Kernel("plain", _plain, cost_ns=2.0 * taps * int(node.y.size) + 50)


def _plain(node: Node) -> str:
    x, y, a = node.x, node.y, node.attrs
    dims, kind, dtype = x.rank - 2, a["kind"], x.dtype.name
    indices = node.outputs[1] if len(node.outputs) > 1 else None

    def inner(names: list[str]) -> list[str]:
        place = names[2:]
        taps = [f"k{d}" for d in range(dims)]
        lines = [f"{x.c_type} best = {literal(LOWEST[dtype] if kind == 'max' else 0, dtype)};"]
        lines += ["int64_t found = 0;"] if indices is not None else []
        lines += ["int count = 0;"] if kind == "mean" else []
        for d in range(dims):
            lines += [
                f"for (int {taps[d]} = 0; {taps[d]} < {a['kernel_shape'][d]}; {taps[d]}++) {{",
                f"const int64_t p{d} = {place[d]}*{a['strides'][d]} - {a['pads'][d]} + {taps[d]}*{a['dilations'][d]};",
            ]
            after = a["pads"][dims + d] if kind == "mean" and a["include"] else 0
            if kind == "mean" and a["include"]:
                lines.append(f"if (p{d} >= {c(x.shape[2 + d] + after)}) continue;")
            else:
                lines.append(f"if (p{d} < 0 || p{d} >= {c(x.shape[2 + d])}) continue;")
        at = loops.index([*names[:2], *(f"p{d}" for d in range(dims))], x.strides)
        inside = " && ".join(f"p{d} >= 0 && p{d} < {c(x.shape[2 + d])}" for d in range(dims))
        if kind == "max":
            lines.append(f"const {x.c_type} next = x0[{at}];")
            if indices is not None:
                lines.append(f"if (next > best) found = {_flat(names, x.shape, a['order'])};")
            lines.append("best = next > best ? next : best;")
        elif kind == "mean":
            lines.append("count++;")
            lines.append(f"if ({inside}) best += x0[{at}];" if a["include"] else f"best += x0[{at}];")
        else:
            size = f"fabsf(x0[{at}])"
            lines.append(
                "best += "
                + (
                    size
                    if a["p"] == 1
                    else f"x0[{at}] * x0[{at}]"
                    if a["p"] == 2
                    else f"powf({size}, {literal(a['p'], 'float32')})"
                )
                + ";"
            )
        lines += ["}"] * dims
        out = f"y0[{loops.index(names, y.strides)}]"
        if kind == "norm" and a["p"] != 1:
            lines.append(
                f"{out} = " + ("sqrtf(best)" if a["p"] == 2 else f"powf(best, {literal(1 / a['p'], 'float32')})") + ";"
            )
        else:
            lines.append(f"{out} = best{' / (float)(count ? count : 1)' if kind == 'mean' else ''};")
        if indices is not None:
            lines.append(f"y1[{loops.index(names, indices.strides)}] = found;")
        return lines

    return loops.nest(y.shape, inner)


def _flat(names: Sequence[str], shape: Sequence[int], order: int) -> str:
    """The C expression of an element's number in the whole tensor, planes in C order or columns first."""
    dims = list(range(2, len(shape)))
    step, terms = 1, []
    for d in dims if order else dims[::-1]:
        terms.append(f"p{d - 2} * {c(step)}")
        step = step * shape[d]
    return " + ".join([f"(int64_t){names[1]} * {c(step)}", f"(int64_t){names[0]} * {c(step * shape[1])}", *terms])


# -------------------------------------------------------------------------------------------------------------- rows


@kernel("Pool")
def rows(node: Node, target: Target) -> Iterator[Kernel]:
    """The largest or the mean in one or two dimensions: a row of the output from the rows that its windows cover."""
    x, y, a = node.x, node.y, node.attrs
    dims = x.rank - 2
    if a["kind"] not in ("max", "mean") or dims not in (1, 2) or x.dtype != np.float32 or len(node.outputs) > 1:
        return
    if not fixed(*x.shape[1:]) or 0 in x.shape or 0 in y.shape:
        return
    taps = int(np.prod(a["kernel_shape"]))
    low, high = _middle(node)
    if taps > MOST_TAPS or low + int(y.shape[-1]) - high > MOST_EDGES:
        return
    outside = np.full(x.shape[-1], -np.inf if a["kind"] == "max" else 0, np.float32)
    constants: dict[str, Array] = {"outside": outside}
    if a["kind"] == "mean":
        counts = [_counts(node, d) for d in range(dims)]
        constants["columns"] = (1 / counts[-1]).astype(np.float32)
        constants["rows"] = (1 / counts[0] if dims == 2 else np.ones(1)).astype(np.float32)
    yield Kernel(
        "rows",
        _rows,
        wants=(Want(),),
        constants=constants,
        cost_ns=1.5 * taps * int(y.size) / max(target.lanes, 1) + 0.5 * int(y.size) + 50,
    )


def _middle(node: Node) -> tuple[int, int]:
    """The output columns whose windows lie inside: from, up to."""
    a, wide = node.attrs, int(node.y.shape[-1])
    stride, before = a["strides"][-1], a["pads"][node.x.rank - 3]
    reach = (a["kernel_shape"][-1] - 1) * a["dilations"][-1] + 1
    low = min(-(-before // stride), wide)
    return low, max(low, min(wide, (int(node.x.shape[-1]) - reach + before) // stride + 1))


def _counts(node: Node, d: int) -> Array:
    """By how much the sum over windows is divided, by place along a dimension."""
    a, dims = node.attrs, node.x.rank - 2
    size = int(node.x.shape[2 + d])
    place = np.arange(int(node.y.shape[2 + d]))[:, None] * a["strides"][d] - a["pads"][d]
    place = place + np.arange(a["kernel_shape"][d]) * a["dilations"][d]
    counted = place < size + a["pads"][dims + d] if a["include"] else (place >= 0) & (place < size)
    return np.asarray(np.maximum(counted.sum(1), 1))


def _rows(node: Node) -> str:
    x, y, a = node.x, node.y, node.attrs
    flat = x.rank == 3
    wide, size, is_max = int(y.shape[-1]), int(x.shape[-1]), a["kind"] == "max"
    high, tall = (1, 1) if flat else (int(x.shape[2]), int(y.shape[2]))
    taps = range(1 if flat else a["kernel_shape"][0])
    stride, dilation, before = a["strides"][-1], a["dilations"][-1], a["pads"][x.rank - 3]

    def result(columns: Sequence[int], at: str) -> list[str]:
        """Lines that make one output from columns of every row, given where the window's column 0 is."""
        lines = ["float best = outside[0];"] if not columns else []
        first = True
        for r in taps:
            for k in columns:
                element = f"p{r}[{plus(at, k) if at else k}]"
                if first:
                    lines.append(f"float best = {element};")
                elif is_max:
                    lines.append(f"best = best > {element} ? best : {element};")
                else:
                    lines.append(f"best += {element};")
                first = False
        return lines

    scale = "" if is_max else " * scale * columns[q]"
    lines = []
    for r in taps:
        if flat:
            lines.append(f"const float *p{r} = x;")
            continue
        row = f"i * {a['strides'][0]} - {a['pads'][0]} + {r * a['dilations'][0]}"
        lines.append(f"const int r{r} = {row};")
        held = plus("x", (f"r{r}", x.strides[2]))
        lines.append(f"const float *p{r} = r{r} >= 0 && r{r} < {high} ? {held} : outside;")
    lines += [] if is_max else ["const float scale = rows[i];"]
    low, end = _middle(node)
    for q in [*range(low), *range(end, wide)]:
        columns = [q * stride - before + k * dilation for k in range(a["kernel_shape"][-1])]
        inside = [k for k in columns if 0 <= k < size]
        lines += [
            "{",
            *(f"    {line}" for line in result(inside, "")),
            f"    y[{q}] = best{scale.replace('[q]', f'[{q}]')};",
            "}",
        ]
    if end > low:
        window = [k * dilation - before for k in range(a["kernel_shape"][-1])]
        lines += [
            f"for (int q = {low}; q < {end}; q++) {{",
            *(f"    {line}" for line in result(window, f"q * {stride}" if stride > 1 else "q")),
            f"    y[q] = best{scale};",
            "}",
        ]
    step = 0 if flat else y.strides[2]
    inner = [
        f"const float *x = {plus('x0', ('n', x.strides[0]), ('c', x.strides[1]))};",
        f"for (int i = 0; i < {tall}; i++) {{",
        f"    float *y = {plus('y0', ('n', y.strides[0]), ('c', y.strides[1]), ('i', step))};",
        *(f"    {line}" for line in lines),
        "}",
    ]
    return loops.nest(
        y.shape[:2], lambda names: [f"const int64_t n = {names[0]}, c = {names[1]};", "(void)n, (void)c;", *inner], "b"
    )


# ------------------------------------------------------------------------------------------------------ whole planes


@kernel("Reduce")
def whole(node: Node, target: Target) -> Iterator[Kernel]:
    """Sum, mean or largest over the last dimensions, which lie side by side: a vector of partial results."""
    x, a = node.x, node.attrs
    axes = tuple(a["axes"])
    if x.dtype != np.float32 or node.y.dtype != np.float32 or a.get("pre") is not None or a.get("post") is not None:
        return
    if a["kind"] not in ("sum", "mean", "max") or not axes or axes != tuple(range(x.rank - len(axes), x.rank)):
        return
    count = product(x.shape[axes[0] :])
    if target.lanes < 4 or not fixed(count) or count < target.lanes or len(node.inputs) != 1:
        return
    lead = int(product(x.shape[: axes[0]]))
    yield Kernel(
        "whole",
        lambda n: _whole(n, target.lanes),
        wants=(ROWS,),
        helpers=heads(target.lanes),
        cost_ns=lead * (0.3 * int(count) / target.lanes + 3),
    )
    if x.rank == 4 and len(axes) == 2:
        yield Kernel(
            "whole planes",
            lambda n: _whole(n, target.lanes),
            wants=(Want(plane=target.lanes, exact=True),),
            helpers=heads(target.lanes),
            cost_ns=lead * (0.3 * int(count) / target.lanes + 3),
        )


def _whole(node: Node, lanes: int) -> str:
    x, y, axes, kind = node.x, node.y, node.attrs["axes"], node.attrs["kind"]
    count, kept = int(product(x.shape[axes[0] :])), range(axes[0])
    number = max(1, min(4, count // lanes))
    step, name = number * lanes, vector(lanes)

    def joined(a: str, b: str, width: int = lanes) -> str:
        if kind != "max":
            return f"{a} += {b};"
        return f"{a} = {a} > {b} ? {a} : {b};" if width == 1 else f"{a} = above_{name}({a}, {b});"

    def inner(names: list[str]) -> list[str]:
        place = y.strides[: axes[0]]
        lines = [f"const float *x = x0 + {loops.index(names, x.strides[: axes[0]])};"]
        lines += [f"{name} a{i} = {load(plus('x', i * lanes), lanes)};" for i in range(number)]
        whole = count // step * step
        if whole > step:
            lines += [
                f"for (int k = {step}; k < {whole}; k += {step}) {{",
                *(
                    f"    {joined(f'a{i}', load(plus('x + k', i * lanes), lanes))}"
                    if kind != "max"
                    else f"    {{ const {name} t = {load(plus('x + k', i * lanes), lanes)}; {joined(f'a{i}', 't')} }}"
                    for i in range(number)
                ),
                "}",
            ]
        lines += [joined("a0", f"a{i}") for i in range(1, number)]
        while whole + lanes <= count:
            lines += [f"{{ const {name} t = {load(plus('x', whole), lanes)}; {joined('a0', 't')} }}"]
            whole += lanes
        half = lanes // 2
        while half:
            turned = ", ".join(str((j + half) % lanes) for j in range(lanes))
            lines.append(f"{{ const {name} t = shuffle_f32x{lanes}(a0, a0, {turned}); {joined('a0', 't')} }}")
            half //= 2
        lines.append("float all = a0[0];")
        lines += [joined("all", f"x[{k}]", 1) for k in range(whole, count)]
        out = f"y0[{loops.index(names, place)}]"
        scale = f" * {literal(1 / count, 'float32')}" if kind == "mean" else ""
        lines.append(f"{out} = all{scale};")
        return lines

    return loops.nest([x.shape[d] for d in kept], inner)


@kernel("MaxUnpool")
def unpool(node: Node, target: Target) -> Iterator[Kernel]:
    """Zeros, then every element to its place; places outside are left out."""
    yield Kernel("scatter", _unpool, wants=(ROWS, ROWS), gives=ROWS, cost_ns=2.0 * int(node.x.size) + int(node.y.size))


def _unpool(node: Node) -> str:
    x, y, inner = node.x, node.y, node.attrs["inner"]
    zeros = f"for (int64_t k = 0; k < {c(y.size)}; k++) y0[k] = 0;"
    lines = ["int64_t left = x1[k], to = 0;", f"if (left < 0 || left >= {c(product(inner))}) continue;"]
    for size, wide, step in list(zip(inner, y.shape, row_major(y.shape), strict=True))[::-1]:
        lines += [
            f"if (left % {c(size)} >= {c(wide)}) continue;",
            f"to += left % {c(size)} * {c(step)};",
            f"left /= {c(size)};",
        ]
    return "\n".join(
        [
            zeros,
            f"for (int64_t k = 0; k < {c(x.size)}; k++) {{",
            *(f"    {line}" for line in lines),
            "    y0[to] = x0[k];",
            "}",
        ]
    )
