"""Lower operators that have kernels of their own to one form each."""

from __future__ import annotations

from typing import Any

import numpy as np

from lilliput.engine.graph import Node
from lilliput.engine.lower import Build, lower
from lilliput.errors import NotSupported


@lower("Conv")
def conv(node: Node, build: Build) -> None:
    """Conv(x, w, b) with attrs strides, dilations, pads (before each, then after each) and group, all explicit."""
    build.keep(node, **settings(node))


def settings(node: Node) -> dict[str, Any]:
    """The attributes of a convolution, all explicit."""
    x, w = node.x, node.input(1)
    dims = x.rank - 2
    kernel = list(w.shape[2:])
    strides = [int(s) for s in node.attrs.get("strides", [1] * dims)]
    dilations = [int(d) for d in node.attrs.get("dilations", [1] * dims)]
    group = int(node.attrs.get("group", 1))
    sound = dims > 0 and len(kernel) == len(strides) == len(dilations) == dims and min(*strides, *dilations, group) > 0
    if not sound or w.rank != x.rank or int(min(w.shape)) < 1 or int(w.shape[0]) % group:
        raise ValueError(
            f"{node.op} {node.name}: weights, strides, dilations and group must fit its input, got "
            f"{[int(n) for n in w.shape]}, {strides}, {dilations} and {group}. The file is damaged."
        )
    pads = padding(node, list(x.shape[2:]), kernel, strides, dilations)
    if len(pads) != 2 * dims or min(pads) < 0:
        raise ValueError(
            f"{node.op} {node.name}: pads must be {2 * dims} numbers from 0 on, got {pads}. The file is damaged."
        )
    return {"strides": strides, "dilations": dilations, "group": group, "kernel_shape": kernel, "pads": pads}


def padding(node: Node, sizes: list[int], kernel: list[int], strides: list[int], dilations: list[int]) -> list[int]:
    """The explicit pads of a convolution or pooling, for its auto_pad."""
    how = node.attrs.get("auto_pad", "NOTSET") or "NOTSET"
    dims = len(kernel)
    if how == "NOTSET":
        return [int(p) for p in node.attrs.get("pads", [0] * 2 * dims)]
    if how == "VALID":
        return [0] * 2 * dims
    if how not in ("SAME_UPPER", "SAME_LOWER"):
        raise NotSupported(f"{node.op} {node.name}: auto_pad must be one of ONNX's, got {how!r}.")
    before, after = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-int(size) // s) - 1) * s + (k - 1) * d + 1 - int(size), 0)
        small, large = total // 2, total - total // 2
        before.append(small if how == "SAME_UPPER" else large)
        after.append(large if how == "SAME_UPPER" else small)
    return before + after


@lower("Gemm")
def gemm(node: Node, build: Build) -> None:
    """alpha A B + beta C as MatMul and, where they are not 1, what scales it. A constant B takes alpha in."""
    a, b, bias = node.x, node.input(1), node.maybe(2)
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    if node.attrs.get("transA"):
        a = build.transpose(a, (1, 0))
    if node.attrs.get("transB"):
        if b.constant:
            moved = build.const(np.ascontiguousarray(b.data.T))  # type: ignore[union-attr]
            moved.narrow = b.narrow.moved(np.transpose) if b.narrow else None
            moved.name, b = b.name, moved
        else:
            b = build.transpose(b, (1, 0))
    plain = alpha == 1 and bias is None
    product = node.y if plain else build.value(node.y.dtype, node.y.shape)
    build.add("MatMul", [a, b], [product])
    if plain:
        return
    scaled = product
    if bias is None:
        build.map([scaled], lambda y: y * alpha, node.y)
    elif alpha == 1 and beta == 1:
        build.map([scaled, bias], lambda y, c: y + c, node.y)
    else:
        build.map([scaled, bias], lambda y, c: y * alpha + c * beta, node.y)


@lower("MatMul")
def matmul(node: Node, build: Build) -> None:
    """Matrices, or stacks of them that broadcast."""
    build.keep(node)


@lower("GlobalAveragePool")
def global_average_pool(node: Node, build: Build) -> None:
    """The mean over every dimension but the first two."""
    axes = tuple(range(2, node.x.rank))
    build.add("Reduce", [node.x], [node.y], axes=axes, kind="mean", keep=True)


@lower("ConvTranspose")
def conv_transpose(node: Node, build: Build) -> None:
    """ConvTranspose(x, w, b) with attrs strides, dilations, pads (before each) and group, all explicit."""
    x, w, y = node.x, node.input(1), node.y
    dims = x.rank - 2
    strides = [int(s) for s in node.attrs.get("strides", [1] * dims)]
    dilations = [int(d) for d in node.attrs.get("dilations", [1] * dims)]
    extra = [int(p) for p in node.attrs.get("output_padding", [0] * dims)]
    group, how = int(node.attrs.get("group", 1)), node.attrs.get("auto_pad", "NOTSET") or "NOTSET"
    sound = dims > 0 and w.rank == x.rank and len(strides) == len(dilations) == len(extra) == dims
    if (
        not sound
        or min(*strides, *dilations, group) < 1
        or int(w.shape[0]) != int(x.shape[1])
        or int(x.shape[1]) % group
    ):
        raise ValueError(
            f"ConvTranspose {node.name}: weights, strides, dilations and group must fit its input, got "
            f"{[int(n) for n in w.shape]}, {strides}, {dilations} and {group}. The file is damaged."
        )
    pads = [int(p) for p in node.attrs.get("pads", [0] * 2 * dims)][:dims]
    if "output_shape" in node.attrs or how.startswith("SAME"):
        pads = []
        for d in range(dims):
            reach = (int(w.shape[2 + d]) - 1) * dilations[d] + 1
            total = max(strides[d] * (int(x.shape[2 + d]) - 1) + extra[d] + reach - int(y.shape[2 + d]), 0)
            pads.append(total // 2 if how == "SAME_UPPER" else total - total // 2)
    if len(pads) != dims or min(pads) < 0:
        raise ValueError(f"ConvTranspose {node.name}: pads must be {2 * dims} numbers from 0 on. The file is damaged.")
    build.keep(node, strides=strides, dilations=dilations, group=group, pads=pads)
