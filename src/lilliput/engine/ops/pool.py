"""Lower pooling: windows to one operator, whole planes to a reduction."""

from __future__ import annotations

from lilliput.engine.expr import arg
from lilliput.engine.graph import Node
from lilliput.engine.lower import Build, lower
from lilliput.engine.ops.network import padding
from lilliput.errors import NotSupported

KINDS = {"MaxPool": "max", "AveragePool": "mean", "LpPool": "norm"}


@lower(*KINDS)
def pool(node: Node, build: Build) -> None:
    """Pool(x): attrs kind, kernel_shape, strides, dilations, pads (before, then after each), include, p, order."""
    a, x = node.attrs, node.x
    kernel = [int(k) for k in a["kernel_shape"]]
    strides = [int(s) for s in a.get("strides", [1] * len(kernel))]
    dilations = [int(d) for d in a.get("dilations", [1] * len(kernel))]
    if len(kernel) != x.rank - 2 or min(kernel + strides + dilations, default=1) < 1:
        raise ValueError(
            f"{node.op} {node.name}: kernel_shape, strides and dilations must be positive and of "
            f"{x.rank - 2} dimensions, got {kernel}, {strides}, {dilations}. The file is damaged."
        )
    if node.op != "MaxPool" and x.dtype != "float32":
        raise NotSupported(f"{node.op} {node.name}: of {x.dtype.name} is not computed.")
    pads = padding(node, list(x.shape[2:]), kernel, strides, dilations)
    if len(pads) != 2 * len(kernel):
        raise ValueError(
            f"{node.op} {node.name}: pads must be {2 * len(kernel)} numbers, got {pads}. The file is damaged."
        )
    build.keep(
        node,
        "Pool",
        kind=KINDS[node.op],
        kernel_shape=kernel,
        strides=strides,
        dilations=dilations,
        pads=pads,
        include=bool(a.get("count_include_pad", 0)),
        p=float(a.get("p", 2)),
        order=int(a.get("storage_order", 0)),
    )


@lower("GlobalMaxPool")
def global_max_pool(node: Node, build: Build) -> None:
    """The largest over every dimension but the first two."""
    build.add(
        "Reduce", [node.x], [node.y], axes=tuple(range(2, node.x.rank)), kind="max", keep=True, pre=None, post=None
    )


@lower("GlobalLpPool")
def global_lp_pool(node: Node, build: Build) -> None:
    """(sum |x|^p)^(1/p) over every dimension but the first two."""
    p, x = float(node.attrs.get("p", 2)), arg(0, "float32")
    if node.x.dtype != "float32":
        raise NotSupported(f"{node.op} {node.name}: of {node.x.dtype.name} is not computed.")
    pre, post = x.of("abs"), None
    if p == 2:
        pre, post = x * x, x.of("sqrt")
    elif p != 1:
        pre, post = pre.of("pow", p), x.of("pow", 1 / p)
    build.add(
        "Reduce", [node.x], [node.y], axes=tuple(range(2, node.x.rank)), kind="sum", keep=True, pre=pre, post=post
    )


@lower("MaxUnpool")
def max_unpool(node: Node, build: Build) -> None:
    """Every element of the first input where the second says, zero elsewhere."""
    if node.x.dtype != "float32":
        raise NotSupported(f"{node.op} {node.name}: of {node.x.dtype.name} is not computed.")
    a, x = node.attrs, node.x
    kernel = [int(k) for k in a["kernel_shape"]]
    dims = len(kernel)
    strides, pads = a.get("strides", [1] * dims), a.get("pads", [0] * 2 * dims)
    if dims != x.rank - 2 or len(strides) != dims or len(pads) != 2 * dims:
        raise ValueError(
            f"{node.op} {node.name}: kernel_shape, strides and pads must be of {x.rank - 2} dimensions, "
            f"got {kernel}, {strides}, {pads}. The file is damaged."
        )
    # What the places are counted in: the size that the attributes give, whatever size is asked for.
    inner = [
        (size - 1) * int(strides[d]) + k - int(pads[d]) - int(pads[dims + d])
        for d, (size, k) in enumerate(zip(x.shape[2:], kernel, strict=True))
    ]
    if min(inner, default=1) < 1:
        raise ValueError(f"{node.op} {node.name}: the output must have elements, got {inner}. The file is damaged.")
    build.add("MaxUnpool", [x, node.input(1)], [node.y], inner=[*x.shape[:2], *inner])
