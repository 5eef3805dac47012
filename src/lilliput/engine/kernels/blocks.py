"""Multiply a block-sparse matrix by one vector: outputs that share their zeros share one index.

For each block of outputs its non-zero inputs are run through: each one a broadcast times a piece of a column as long as
the block. Several sums of a block are kept apart, so that no product waits for the one before. Values stay 8-bit where
the file has them so, and are widened in registers.

Source: S. Narang, E. Undersander, G. Diamos, Block-sparse recurrent neural networks, 2017, arXiv:1711.02782.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lilliput.engine.graph import Array, Node
from lilliput.engine.kernel import Kernel, kernel
from lilliput.engine.kernels.product import Linear, Tail, clamped, linear, pick, tail_of, vector, vector_types, walk
from lilliput.engine.kernels.tiles import macs_ns
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

SIZES = (64, 32, 16, 8)
DENSEST = 0.7  # of the blocks: above, a dense kernel is as fast
SUMS = 4  # vectors of sums that are under way at once


@kernel("MatMul")
def blocks(node: Node, target: Target) -> Iterator[Kernel]:
    """One position, outputs innermost."""
    layer = linear(node)
    if layer is None or target.vector_bytes == 0 or not fixed(layer.positions) or layer.positions != 1:
        return
    for size in SIZES:
        if layer.outs % size:
            continue
        held = (layer.weight.reshape(-1, size, layer.ins) != 0).any(1)
        if held.mean() > DENSEST or held.sum() * size > 1.1 * np.count_nonzero(layer.weight):
            continue
        lanes = min(target.lanes, size)
        levels, scale = _levels(layer)
        if scale is not None:
            yield _kernel(layer, target, size, lanes, held, levels, scale)
        yield _kernel(layer, target, size, lanes, held, layer.weight, None)


def _levels(layer: Linear) -> tuple[Array, Array | None]:
    """The weights as int8 with one scale an output, where the file keeps them so; else None for the scales."""
    narrow = layer.narrow
    if narrow is None or narrow.scale is None or narrow.scale.size not in (1, layer.outs):
        return layer.weight, None
    levels = narrow.levels.astype(np.int32) - (0 if narrow.zero_point is None else narrow.zero_point.astype(np.int32))
    if np.abs(levels).max(initial=0) > 127:
        return layer.weight, None
    if narrow.scale.size == layer.outs and narrow.scale.shape[0] != layer.outs:
        return layer.weight, None
    return levels.astype(np.int8), np.array(np.broadcast_to(narrow.scale.reshape(-1), (layer.outs,)), np.float32)


def _kernel(
    layer: Linear, target: Target, size: int, lanes: int, held: Array, weight: Array, scale: Array | None
) -> Kernel:
    tail = tail_of(layer.node, layer.feature_y)
    want_x, want_y = layer.inner(positions_inside=False)
    wants = [None, None, None, None]
    wants[layer.x] = want_x  # type: ignore[call-overload]
    where, inputs = np.nonzero(held)
    kind = np.uint8 if layer.ins <= 256 else np.uint16 if layer.ins <= 65536 else np.int32
    constants: dict[str, Array] = {
        "values": np.ascontiguousarray(weight.reshape(-1, size, layer.ins).transpose(0, 2, 1)[where, inputs]),
        "index": inputs.astype(kind), "counts": held.sum(1).astype(np.uint16 if layer.ins < 65536 else np.int32),
    }  # fmt: skip
    if scale is not None:
        constants["scale"] = scale
    if tail.bias is not None:
        constants["bias"] = np.array(tail.bias, np.float32)
    narrow = scale is not None
    helpers = [vector_types(lanes)]
    if narrow:
        helpers.append(_widened(lanes))
    if tail.clamp is not None:
        helpers.append(pick(lanes))
    return Kernel(
        f"sparse, blocks of {size} outputs{', 8-bit' if narrow else ''}",
        lambda n: _body(n, layer, tail, size, lanes, narrow), tuple(wants), want_y, constants,
        (1 - layer.x, *((2,) if tail.bias is not None else ())),
        cost_ns=macs_ns(target, held.sum() * size) * (1.0 if narrow else 1.2) + 3 * len(held) + 20,
        helpers=(*helpers, *tail.helpers), nonzeros=int(np.count_nonzero(layer.weight)), values=layer.weight.size,
    )  # fmt: skip


def _body(node: Node, layer: Linear, tail: Tail, size: int, lanes: int, narrow: bool) -> str:
    x, name, kind, vectors = node.input(layer.x), f"x{layer.x}", vector(lanes), size // lanes
    way = walk(node.y, layer.feature_y, [(name, x, layer.feature_x), *tail.others(node)])
    sums = max(SUMS // vectors, 1)
    names = [[f"a{u}" if vectors == 1 else f"a{u}_{j}" for j in range(vectors)] for u in range(sums)]
    step = way.feature[name]

    def added(u: int, at: str) -> str:
        place = f"p[{u}]" if step == 1 else f"p[{u}] * {c(step)}"
        parts = [f"const {kind} s = ({kind}){{}} + {way.base[name]}[{place}];"]
        for j, sum_ in enumerate(names[u if at else 0]):
            address = f"v + {(u * vectors + j) * lanes}"
            load = f"widened_{kind}({address})" if narrow else f"*(const {kind} *)({address})"
            parts.append(f"{sum_} += s * {load};")
        return "{ " + " ".join(parts) + " }"

    text = [
        f"const {'int8_t' if narrow else 'float'} *v = values;",
        f"const {_c_type(layer.ins)} *p = index;",
        f"for (int b = 0, o = 0; b < {layer.outs // size}; b++, o += {size}) {{",
        f"    float *const y = {way.base['y0']} + o;",
        "    int n = counts[b];",
        f"    {kind} {', '.join(n for line in names for n in line)};",
    ]
    bias = tail.bias is not None and not narrow
    for u, line in enumerate(names):
        text.append("    " + " ".join(
            f"{sum_} = {f'*(const {kind} *)(bias + o + {j * lanes})' if bias and u == 0 else f'({kind}){{}}'};"
            for j, sum_ in enumerate(line)))  # fmt: skip
    if sums > 1:
        text += [
            f"    for (; n >= {sums}; n -= {sums}, v += {sums * size}, p += {sums}) {{",
            *(f"        {added(u, 'apart')}" for u in range(sums)),
            "    }",
        ]
    text += [f"    for (; n > 0; n--, v += {size}, p++)", f"        {added(0, '')}"]
    for j in range(vectors):
        first = names[0][j]
        text += [f"    {first} += {line[j]};" for line in names[1:]]
        if narrow:
            plus = f" + *(const {kind} *)(bias + o + {j * lanes})" if tail.bias is not None else ""
            text.append(f"    {first} = {first} * *(const {kind} *)(scale + o + {j * lanes}){plus};")
        if tail.clamp is not None:
            text += [f"    {line}" for line in clamped(first, lanes, tail.clamp)]
        text.append(f"    *({kind} *)(y + {j * lanes}) = {first};")
    if tail.expr is not None:
        places = []
        for i in tail.extras:
            stride_ = way.feature[f"x{i}"]
            places.append(f"{way.base[f'x{i}']}[{'0' if stride_ == 0 else f'(o + j) * {c(stride_)}'}]")
        after = tail.text("y[j]", places)
        text += [f"    for (int j = 0; j < {size}; j++) {{", *(f"        {line}" for line in after), "    }"]
    return "\n".join([*text, "}"])


def _widened(lanes: int) -> str:
    """C text: int8 values as a vector of float32. GCC converts vectors of bytes one by one, so x86 has its own way."""
    kind, x86 = (
        vector(lanes),
        {
            16: ("AVX512F", "512", "loadu_si128", "(const __m128i *)"),
            8: ("AVX2", "256", "loadl_epi64", "(const __m128i *)"),
        }.get(lanes),
    )
    lines = [
        f"static inline {kind} widened_{kind}(const int8_t *p)",
        "{",
        f"    {kind} wide;",
        f"    for (int j = 0; j < {lanes}; j++)",
        "        wide[j] = p[j];",
        "    return wide;",
        "}",
    ]
    if x86:
        feature, bits, load, cast = x86
        lines[:0] = [
            f"#ifdef __{feature}__",
            "#include <immintrin.h>",
            *lines[:2],
            f"    return ({kind})_mm{bits}_cvtepi32_ps(_mm{bits}_cvtepi8_epi32(_mm_{load}({cast}p)));",
            "}",
            "#else",
        ]
        lines.append("#endif")
    return "\n".join(lines)


def _c_type(ins: int) -> str:
    return "uint8_t" if ins <= 256 else "uint16_t" if ins <= 65536 else "int32_t"
