"""Lower attention: write softmax(softcap(Q K^T scale) + bias) V as two products and a softmax.

The bias is what the mask, causality, the window and the lengths of the sequences forbid: 0 or minus infinity. A query
that may look at nothing gives 0.
"""

from __future__ import annotations

import math

import numpy as np

from lilliput.engine.expr import const, where
from lilliput.engine.graph import Node, Value
from lilliput.engine.lower import Build, gather, lower
from lilliput.engine.size import fixed, product
from lilliput.errors import NotSupported

FORBIDDEN = float("-inf")


@lower("Attention")
def attention(node: Node, build: Build) -> None:
    """ONNX's Attention, heads in a dimension of their own or side by side."""
    if any(node.input(i).dtype != np.float32 for i in range(3)):
        raise NotSupported(f"Attention {node.name}: Q, K and V must be float32.")
    flat = node.x.rank == 3
    heads = [int(node.attrs.get(name, 0)) for name in ("q_num_heads", "kv_num_heads", "kv_num_heads")]
    q, k, v = (_split(build, node.input(i), heads[i]) if flat else node.input(i) for i in range(3))
    past = node.maybe(4)
    k, v = _present(node, build, k, 1), _present(node, build, v, 2)
    scale = float(node.attrs.get("scale") or 1 / math.sqrt(int(q.shape[3])))
    cap, mode = float(node.attrs.get("softcap", 0)), int(node.attrs.get("qk_matmul_output_mode", 0))
    bias, guard = _bias(node, build, q, k, past)
    groups, shape = int(k.shape[1]), (*q.shape[:3], k.shape[2])
    repeats = int(q.shape[1]) // groups
    turned = build.transpose(k, (0, 1, 3, 2))
    if repeats > 1:  # queries of several heads share keys: one more dimension, along which keys broadcast
        q = build.reshape(q, [q.shape[0], groups, repeats, *q.shape[2:]])
        turned = build.reshape(turned, [turned.shape[0], groups, 1, *turned.shape[2:]])
        v = build.reshape(v, [v.shape[0], groups, 1, *v.shape[2:]])
        if bias is not None:
            split = [groups, repeats] if bias.shape[1] != 1 else [1, 1]
            bias = build.reshape(bias, [bias.shape[0], *split, *bias.shape[2:]])
    scores = build.value(np.float32, [*q.shape[:-1], k.shape[2]])
    build.add("MatMul", [q, turned], [scores])
    stages = [build.map([scores], lambda s: s * scale)]
    stages.append(build.map([stages[0]], lambda s: (s * (1 / cap)).of("tanh") * cap) if cap > 0 else stages[0])
    stages.append(stages[1] if bias is None else build.map([stages[1], bias], lambda s, b: s + b))
    soft = build.value(np.float32, scores.shape)
    gather()["Softmax"](Node("Softmax", [stages[2]], [soft], {"axis": -1}, node.name, 13), build)
    stages.append(soft)
    y = build.value(np.float32, [*q.shape[:-1], v.shape[-1]])
    build.add("MatMul", [soft, v], [y])
    if guard and bias is not None:
        top = build.value(np.float32, [*bias.shape[:-1], 1])
        build.add("Reduce", [bias], [top], axes=(bias.rank - 1,), kind="max", keep=True, pre=None, post=None)
        y = build.map([y, top], lambda y, t: where(t < -3.4e38, const(0, "float32"), y))
        if mode == 3 and len(node.outputs) > 3:
            stages[3] = build.map([soft, top], lambda s, t: where(t < -3.4e38, const(0, "float32"), s))
    if len(node.outputs) > 3 and node.outputs[3] is not None:
        build.reshape(stages[mode], shape, out=node.outputs[3])
    y = build.reshape(y, [y.shape[0], product(y.shape[1:-2]), *y.shape[-2:]])
    if flat:
        y = build.transpose(y, (0, 2, 1, 3))
    build.reshape(y, node.y.shape, out=node.y)


def _split(build: Build, x: Value, heads: int) -> Value:
    """(batch, heads, positions, features) of (batch, positions, heads * features)."""
    if heads < 1 or int(x.shape[2]) % heads:
        raise ValueError(
            f"Attention: {x.name} must be whole heads, got {heads} for {int(x.shape[2])} features. The file is damaged."
        )
    wide = build.reshape(x, [x.shape[0], x.shape[1], heads, int(x.shape[2]) // heads])
    return build.transpose(wide, (0, 2, 1, 3))


def _present(node: Node, build: Build, x: Value, i: int) -> Value:
    """Keys or values with those before them, which are an output as well where that is asked for."""
    past, out = node.maybe(3 + i), node.outputs[i] if i < len(node.outputs) else None
    if past is None:
        if out is not None:
            build.reshape(x, out.shape, out=out)
        return x
    shape = [*x.shape[:2], past.shape[2] + x.shape[2], x.shape[3]]
    made = out if out is not None else build.value(x.dtype, shape)
    gather()["Concat"](Node("Concat", [past, x], [made], {"axis": 2}, node.name, 13), build)
    return made


def _bias(node: Node, build: Build, q: Value, k: Value, past: Value | None) -> tuple[Value | None, bool]:
    """What is added to the scores, of four dimensions, and whether it can forbid a query everything."""
    queries, keys = q.shape[2], k.shape[2]
    mask, lengths = node.maybe(3), node.maybe(6)
    left, right = int(node.attrs.get("left_window_size", -1)), int(node.attrs.get("right_window_size", -1))
    causal = bool(node.attrs.get("is_causal", 0))
    masks: list[Value] = []
    if mask is not None:
        masks.append(_masked(node, build, mask, keys))
    most = int(keys) + int(queries)
    place = build.reshape(build.slice(build.const(np.arange(most, dtype=np.int32)), [0], [keys]), [1, 1, 1, keys])
    if lengths is not None:
        lengths = build.map([build.reshape(lengths, [lengths.size, 1, 1, 1])], lambda n: n.cast("int32"))
        masks.append(build.map([place, lengths], lambda j, n: where(j < n, const(0, "float32"), FORBIDDEN)))
    if causal or left >= 0 or right >= 0:
        start = past.shape[2] if past is not None else 0
        here = build.slice(build.const(np.arange(most, dtype=np.int32)), [start], [queries])
        here = build.reshape(here, [1, 1, queries, 1])
        if past is None and lengths is not None:
            if not fixed(queries):
                raise NotSupported(f"Attention {node.name}: with lengths the number of queries must not be free.")
            here = build.map([here, lengths], lambda i, n: i + n - int(queries))
        after = 0 if causal and right < 0 else min(right, 0) if causal else right
        if after >= 0:
            masks.append(build.map([here, place], lambda i, j: where(j <= i + after, const(0, "float32"), FORBIDDEN)))
        if left >= 0:
            masks.append(build.map([here, place], lambda i, j: where(j >= i - left, const(0, "float32"), FORBIDDEN)))
    if not masks:
        return None, False
    total = masks[0]
    for more in masks[1:]:
        total = build.map([total, more], lambda a, b: a + b)
    return total, mask is not None or lengths is not None or left >= 0 or right >= 0


def _masked(node: Node, build: Build, mask: Value, keys: int) -> Value:
    """The mask as numbers of four dimensions; keys that it does not reach are forbidden."""
    if mask.dtype == np.bool_:
        mask = build.map([mask], lambda m: where(m, const(0, "float32"), FORBIDDEN))
    if mask.dtype != np.float32:
        raise NotSupported(f"Attention {node.name}: its mask must be float32 or bool, got {mask.dtype.name}.")
    mask = build.reshape(mask, [*[1] * (4 - mask.rank), *mask.shape])
    missing = keys - mask.shape[3]
    if missing == 0:
        return mask
    if not fixed(missing):
        raise NotSupported(f"Attention {node.name}: a mask that is shorter than the keys must be so by a fixed number.")
    wide = build.value(np.float32, [*mask.shape[:3], keys])
    pads = build.const(np.array([0, 0, 0, 0, 0, 0, 0, int(missing)], np.int64))
    value = build.const(np.array(FORBIDDEN, np.float32))
    gather()["Pad"](Node("Pad", [mask, pads, value], [wide], {}, node.name, 13), build)
    return wide
