"""Lower normalizations and softmax to two operators: Normalize and Softmax."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lilliput.engine.expr import arg
from lilliput.engine.graph import Node, Value
from lilliput.engine.infer import INFER
from lilliput.engine.lower import Build, lower
from lilliput.engine.size import product


@lower("Softmax", "LogSoftmax")
def softmax(node: Node, build: Build) -> None:
    """Softmax(x): attrs axis, log, pre. Before opset 13 every dimension from axis on counts as one."""
    x, log = node.x, node.op == "LogSoftmax"
    if node.opset >= 13:
        axis = int(node.attrs.get("axis", -1)) % max(x.rank, 1)
        _softmax(build, x, axis, log, node.y)
        return
    axis = int(node.attrs.get("axis", 1)) % max(x.rank, 1)
    if axis == x.rank - 1:
        _softmax(build, x, axis, log, node.y)
        return
    flat = build.reshape(x, _flat(x, axis))
    made = build.value(x.dtype, flat.shape)
    _softmax(build, flat, 1, log, made)
    build.reshape(made, node.y.shape, node.y)


def _softmax(build: Build, x: Value, axis: int, log: bool, out: Value) -> None:
    if not x.rank:
        x, wide = build.reshape(x, [1]), build.value(x.dtype, [1])
        build.add("Softmax", [x], [wide], axis=0, log=log, pre=None)
        build.reshape(wide, [], out)
        return
    build.add("Softmax", [x], [out], axis=axis, log=log, pre=None)


def _flat(x: Value, axis: int) -> list[int]:
    return [product(x.shape[:axis]), product(x.shape[axis:])]


@lower("Hardmax")
def hardmax(node: Node, build: Build) -> None:
    """1 at the first of the largest along an axis, 0 elsewhere."""
    x = node.x
    axis = int(node.attrs.get("axis", -1 if node.opset >= 13 else 1)) % x.rank
    if node.opset < 13:
        x = build.reshape(x, _flat(x, axis))
        axis = 1
    place = build.value(np.int64, [1 if d == axis else size for d, size in enumerate(x.shape)])
    build.add("ArgMax", [x], [place], axis=axis, largest=True, last=False, keep=True)
    count = build.const(np.arange(x.shape[axis]).reshape([-1 if d == axis else 1 for d in range(x.rank)]))
    made = build.map([count, place], lambda k, p: k.of("eq", p, dtype="bool").cast(node.y.dtype.name))
    build.reshape(made, node.y.shape, node.y)


def normalize(
    build: Build,
    x: Value,
    axes: Sequence[int],
    scale: Value | None,
    bias: Value | None,
    epsilon: float,
    outputs: Sequence[Value | None],
    center: bool = True,
) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over axes; outputs: y and, where wanted, mean and inverse
    deviation."""
    wanted = [*outputs, None, None][:3]
    while wanted[-1] is None:
        wanted.pop()
    build.add(
        "Normalize",
        [x, scale, bias],
        wanted,
        axes=tuple(axes),
        epsilon=epsilon,
        center=center,
        stats=len(wanted) > 1,
        pre=None,
    )


def shaped(build: Build, value: Value, shape: Sequence[int]) -> Value:
    """A value in another shape: a constant at once, else a view."""
    if value.data is not None:
        made = build.const(value.data.reshape([int(s) for s in shape]))
        made.name = value.name
        return made
    return build.reshape(value, shape)


@lower("LayerNormalization")
def layer_normalization(node: Node, build: Build) -> None:
    """Over the last dimensions from axis on; its outputs 1 and 2 are the mean and the inverse deviation."""
    axis = int(node.attrs.get("axis", -1)) % node.x.rank
    normalize(
        build,
        node.x,
        range(axis, node.x.rank),
        node.input(1),
        node.maybe(2),
        float(node.attrs.get("epsilon", 1e-5)),
        node.outputs,
    )


@lower("RMSNormalization")
def rms_normalization(node: Node, build: Build) -> None:
    """x / sqrt(mean of squares + epsilon) * scale."""
    axis = int(node.attrs.get("axis", -1)) % node.x.rank
    normalize(
        build,
        node.x,
        range(axis, node.x.rank),
        node.input(1),
        None,
        float(node.attrs.get("epsilon", 1e-5)),
        [node.y],
        center=False,
    )


@lower("InstanceNormalization")
def instance_normalization(node: Node, build: Build) -> None:
    """Every channel of every example by itself."""
    x = node.x
    wide = [x.shape[1], *[1] * (x.rank - 2)]
    normalize(
        build,
        x,
        range(2, x.rank),
        shaped(build, node.input(1), wide),
        shaped(build, node.input(2), wide),
        float(node.attrs.get("epsilon", 1e-5)),
        [node.y],
    )


INFER["GroupNormalization"] = lambda node, shapes: [("float32", shapes[0])]


@lower("GroupNormalization")
def group_normalization(node: Node, build: Build) -> None:
    """Groups of channels; before opset 21 scale and bias are by group, then by channel."""
    x, groups = node.x, int(node.attrs["num_groups"])
    per = x.shape[1] // groups
    split = build.reshape(x, [x.shape[0], groups, per, *x.shape[2:]])
    wide = [groups, 1 if int(node.input(1).size) == groups and per != 1 else per, *[1] * (x.rank - 2)]
    made = build.value(x.dtype, split.shape)
    normalize(
        build,
        split,
        range(2, split.rank),
        shaped(build, node.input(1), wide),
        shaped(build, node.input(2), wide),
        float(node.attrs.get("epsilon", 1e-5)),
        [made],
    )
    build.reshape(made, node.y.shape, node.y)


@lower("BatchNormalization")
def batch_normalization(node: Node, build: Build) -> None:
    """In inference x a + b by channel, which joins the product before it; training_mode takes the batch's moments."""
    x = node.x
    wide = [x.shape[1], *[1] * (x.rank - 2)] if x.rank > 1 else [1]
    scale, bias, mean, variance = (shaped(build, node.input(i), wide) for i in range(1, 5))
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    if node.attrs.get("training_mode", 0):
        _trained(node, build, scale, bias, mean, variance, epsilon)
        return
    if all(v.data is not None for v in (scale, bias, mean, variance)):
        a = np.asarray(scale.data) / np.sqrt(np.asarray(variance.data, np.float64) + epsilon)
        b = np.asarray(bias.data) - np.asarray(mean.data) * a
        build.map(
            [x, build.const(a.astype(np.float32)), build.const(b.astype(np.float32))], lambda x, a, b: x * a + b, node.y
        )
        return
    build.map(
        [x, scale, bias, mean, variance], lambda x, s, b, m, v: (x - m) / (v + epsilon).of("sqrt") * s + b, node.y
    )


def _trained(node: Node, build: Build, scale: Value, bias: Value, mean: Value, variance: Value, epsilon: float) -> None:
    x = node.x
    axes = tuple(d for d in range(x.rank) if d != 1)
    held = [1, x.shape[1], *[1] * (x.rank - 2)]
    average, spread = build.value(x.dtype, held), build.value(x.dtype, held)
    build.add("Reduce", [x], [average], axes=axes, kind="mean", keep=True, pre=None, post=None)
    off = arg(0, "float32") - arg(1, "float32")
    build.add("Reduce", [x, average], [spread], axes=axes, kind="mean", keep=True, pre=off * off, post=None)
    build.map(
        [x, scale, bias, average, spread], lambda x, s, b, m, v: (x - m) / (v + epsilon).of("sqrt") * s + b, node.y
    )
    momentum = float(node.attrs.get("momentum", 0.9))
    for i, (old, new) in enumerate(((mean, average), (variance, spread)), 1):
        out = node.outputs[i] if i < len(node.outputs) else None
        if out is not None:
            moved = build.map([old, new], lambda o, n: o * momentum + n * (1 - momentum))
            build.reshape(moved, out.shape, out)


@lower("MeanVarianceNormalization")
def mean_variance_normalization(node: Node, build: Build) -> None:
    """(x - mean) / (deviation + 1e-9) over axes."""
    axes = [int(a) % node.x.rank for a in node.attrs.get("axes", [0, 2, 3])]
    normalize(build, node.x, sorted(axes), None, None, 1e-18, [node.y])


@lower("LpNormalization")
def lp_normalization(node: Node, build: Build) -> None:
    """x over its length along an axis: of absolute values (p = 1) or squares (p = 2)."""
    x, axis = node.x, int(node.attrs.get("axis", -1)) % node.x.rank
    e = arg(0, "float32")
    pre, post = (e.of("abs"), None) if int(node.attrs.get("p", 2)) == 1 else (e * e, e.of("sqrt"))
    length = build.value(x.dtype, [1 if d == axis else size for d, size in enumerate(x.shape)])
    build.add("Reduce", [x], [length], axes=(axis,), kind="sum", keep=True, pre=pre, post=post)
    build.map([x, length], lambda x, n: x / n.max(1e-30), node.y)


@lower("LRN")
def local_response(node: Node, build: Build) -> None:
    """Attrs size, alpha, beta and bias, all explicit."""
    build.keep(
        node,
        size=int(node.attrs["size"]),
        alpha=float(node.attrs.get("alpha", 1e-4)),
        beta=float(node.attrs.get("beta", 0.75)),
        bias=float(node.attrs.get("bias", 1.0)),
    )
