"""Operators that move elements and compute none: views where strides can say it."""

from __future__ import annotations

from lilliput.engine.graph import Node
from lilliput.engine.lower import Build, lower


@lower("Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
def reshape(node: Node, build: Build) -> None:
    """The same elements in another shape (in inference Dropout is the identity)."""
    build.reshape(node.x, node.y.shape, node.y)
    if len(node.outputs) > 1 and node.outputs[1] is not None:
        build.map([node.x], lambda x: x.of("eq", x, dtype="bool"), node.outputs[1])


@lower("Transpose")
def transpose(node: Node, build: Build) -> None:
    """Dimensions in another order; reversed by default."""
    perm = node.attrs.get("perm", range(node.x.rank)[::-1])
    build.transpose(node.x, [int(p) for p in perm], node.y)
