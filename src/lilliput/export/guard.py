"""Checks for silent failures of compressed models, run before anything is deployed.

- `saturating`: 8-bit products of unsigned activations and signed weights that overflow 16 bits on CPUs without VNNI;
- `compare`: a runtime, or a file, that computes something else than the model;
- `bloated`, `larger`, `slower`: a file with more bytes than its values need, or worse than the dense one;
- `untouched`: a technique that changed nothing.

`flags` says in sentences what is worth a look in a report; `compare` raises on what must not be deployed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from lilliput.errors import ExportError
from lilliput.onnx.compare import verify
from lilliput.onnx.session import Session
from lilliput.stored.base import Stored
from lilliput.stored.bits import Array
from lilliput.task.nested import leaves

if TYPE_CHECKING:
    from lilliput.cost.measure import Measured

PER_NODE = 200
"""Bytes of graph that a node may take before a file counts as bloated."""


def flags(
    artifact: ModelProto,
    dense: ModelProto,
    latency: Measured | None = None,
    dense_latency: Measured | None = None,
    values: int | None = None,
) -> list[str]:
    """What is wrong with a file beside the dense one on this machine, a sentence each; nothing is raised.

    Args:
        artifact: the file.
        dense: the dense network's file.
        latency: of the artifact, measured in one interleaved run with the dense network's.
        dense_latency: of the dense network.
        values: how many numbers the network keeps, where known.
    """
    sentences = [larger(artifact, dense), slower(latency, dense_latency), bloated(artifact, values)]
    if saturates():
        sentences.append(saturating(artifact))
    return [sentence for sentence in sentences if sentence]


def last_axis(outputs: Any) -> int | None:
    """The last axis: where classes lie if nothing else is known."""
    return -1


def compare(
    outputs: Any,
    expected: Any,
    *,
    exact: bool,
    who: str = "guard",
    most_changed: float = 0.005,
    least_cosine: float = 0.98,
    axis: Callable[[Any], int | None] = last_axis,
) -> dict[str, float]:
    """`verify` every output, and for wide ones such as embeddings the mean cosine too, which predictions do not show.

    Args:
        outputs: arrays or tensors (n, ...), or nested structures of them.
        expected: the same for the model.
        exact: a float artifact.
        who: whose outputs they are, for messages.
        most_changed: the largest allowed fraction of changed predictions.
        least_cosine: the smallest allowed cosine.
        axis: gives the axis of an output that holds the classes, None for values (`Task.class_axis`).

    Returns:
        The agreement; of several outputs the worst.

    Raises:
        ExportError: if the outputs are further apart than allowed, or there are others.
    """
    pairs = list(zip(leaves(outputs), leaves(expected), strict=False))
    if not pairs or not len(leaves(outputs)) == len(leaves(expected)) == len(pairs):
        raise ExportError(f"{who}: there must be {len(leaves(expected))} outputs, got {len(leaves(outputs))}.")
    rows = []
    for a, b in pairs:
        place = axis(b)
        measured = verify(np.asarray(a), np.asarray(b), exact=exact, axis=place, most_changed=most_changed, who=who)
        rows.append(measured | _directions(np.asarray(a), np.asarray(b), place, least_cosine, who))
    return worst(rows)


def worst(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several outputs' agreements the largest difference of each kind, and the smallest cosine."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: (min if key == "cosine" else max)(row[key] for row in rows if key in row) for key in keys}


def _directions(outputs: Array, expected: Array, axis: int | None, least_cosine: float, who: str) -> dict[str, float]:
    measured: dict[str, float] = {}
    a, b = np.asarray(outputs, np.float64), np.asarray(expected, np.float64)
    if axis is None and a.ndim > 2:  # a part of an image or a series has no direction of its own
        a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    elif axis is not None and a.ndim > 1:
        a, b = np.moveaxis(a, axis, -1), np.moveaxis(b, axis, -1)
    if a.ndim > 1 and a.shape[-1] > 1:
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = float(np.where(np.abs(a - b).max(-1) < 1e-6, 1, (a * b).sum(-1) / np.maximum(norms, 1e-12)).mean())
        if cosine < least_cosine:
            raise ExportError(
                f"{who}: outputs must lie where the model's do (cosine at least {least_cosine}), got {cosine:.3f}. "
                "The file or its runtime computes something else."
            )
        measured["cosine"] = cosine
    return measured


def larger(artifact: ModelProto, dense: ModelProto) -> str:
    """A sentence if the file has more bytes than the dense one."""
    a, b = artifact.ByteSize(), dense.ByteSize()
    return f"The file is larger than the dense one: {a:,} bytes against {b:,}." if a > b else ""


def slower(latency: Measured | None, dense: Measured | None) -> str:
    """A sentence if it is slower than the dense one by more than the two quartile ranges explain."""
    if latency is None or dense is None or latency.q1_ms <= dense.q3_ms:
        return ""
    return f"It is slower than the dense one: {latency.median_ms:.3f} ms against {dense.median_ms:.3f} in one run."


def bloated(artifact: ModelProto, values: int | None = None) -> str:
    """A sentence if the file has far more bytes than its values and nodes explain, such as an unrolled product."""
    from lilliput.cost.count import stored_values

    values = stored_values(artifact) if values is None else values
    most = 8 * values + PER_NODE * (len(artifact.graph.node) + 20)
    size = artifact.ByteSize()
    if size <= most:
        return ""
    return f"The file has {size:,} bytes for {values:,} values: constants were written out that a graph could compute."


def untouched(
    before: Mapping[str, Array], after: Mapping[str, Stored], chosen: Iterable[str] | None = None
) -> list[str]:
    """The tensors that a technique was to change and left exactly as they were, in full precision.

    Args:
        before: the dense tensors by name.
        after: how they are stored now.
        chosen: what the technique was applied to; every tensor of two or more dimensions otherwise.
    """
    names = [name for name, x in before.items() if x.ndim > 1] if chosen is None else list(chosen)
    return [
        name
        for name in names
        if name not in after
        or (
            after[name].plain
            and after[name].native().dtype == np.float32
            and np.array_equal(after[name].native(), before[name])
        )
    ]


# --------------------------------------------------------------------------------------------------------- saturation


@functools.cache
def saturates() -> bool:
    """Whether this machine's runtime clips `u8 * s8 + u8 * s8` to 16 bits, found by running one product.

    CPUs with AVX2 and no VNNI multiply bytes by vpmaddubsw, whose pair sums saturate at 32,767.
    """
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
            "g",
            [onnx.helper.make_tensor_value_info("a", TensorProto.UINT8, [8, 64])],
            [onnx.helper.make_tensor_value_info("y", TensorProto.INT32, [8, 32])],
            [numpy_helper.from_array(np.full((64, 32), 127, np.int8), "b")],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=8,
    )
    try:
        sums = Session(proto).outputs(np.full((8, 64), 255, np.uint8))
    except ExportError:
        return False
    return bool((sums != 255 * 127 * 64).any())


def saturating(proto: ModelProto) -> str:
    """A sentence if the graph multiplies unsigned activations by signed weights whose pair sums can pass 16 bits.

    Looked at are MatMulInteger, ConvInteger, QLinearMatMul, QLinearConv, and matrix products and convolutions between
    DequantizeLinear nodes, which the runtime turns into those. Neighbours w0, w1 along the summed axis overflow when
    `255 |w0 + w1| > 32767`; weights of 7 bits (reduced range) never do.
    """
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    made = {name: node for node in proto.graph.node for name in node.output}
    overflow = total = 0
    where: list[str] = []
    for node in proto.graph.node:
        pair = _operands(node, made)
        if pair is None or pair[1] not in held or held[pair[1]].data_type != TensorProto.INT8:
            continue
        if not _unsigned(pair[0], held, made, proto):
            continue
        weight = numpy_helper.to_array(held[pair[1]]).astype(np.int32)
        conv = "Conv" in node.op_type
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        # One row per output, the summed axis last.
        if conv:  # computed with the channels last; a depthwise one is not computed by pairs
            if weight.shape[1] == 1:
                continue
            weight = np.moveaxis(weight, 1, -1)
        rows = weight.reshape(len(weight), -1) if conv or transposed else np.moveaxis(weight, -2, -1)
        rows = rows[..., : rows.shape[-1] // 2 * 2]
        sums = np.abs(rows[..., ::2] + rows[..., 1::2])
        hits = int((255 * sums > 32767).sum())
        total += sums.size
        overflow += hits
        if hits:
            where.append(node.op_type)
    if not overflow:
        return ""
    return (
        f"8-bit products can saturate: {overflow / total:.1%} of weight pairs in {len(where)} nodes pass 16 bits on a "
        "CPU without VNNI. Use reduced range (7 bits), signed activations, or float arithmetic on narrow weights."
    )


def _operands(node: NodeProto, made: Mapping[str, NodeProto]) -> tuple[str, str] | None:
    """The quantised activation and weight of a product."""
    if node.op_type in ("MatMulInteger", "ConvInteger"):
        return node.input[0], node.input[1]
    if node.op_type in ("QLinearMatMul", "QLinearConv"):
        return node.input[0], node.input[3]
    if node.op_type in ("MatMul", "Conv", "Gemm"):
        sources: list[Any] = [made.get(name) for name in node.input[:2]]
        if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
            return sources[0].input[0], sources[1].input[0]
    return None


def _unsigned(name: str, held: Mapping[str, TensorProto], made: Mapping[str, NodeProto], proto: ModelProto) -> bool:
    node = made.get(name)
    if node is None:
        kinds = {value.name: value.type.tensor_type.elem_type for value in proto.graph.input}
        return bool(kinds.get(name) == TensorProto.UINT8)
    if node.op_type == "DynamicQuantizeLinear":
        return True
    if node.op_type in ("QuantizeLinear", "QLinearConv", "QLinearMatMul"):
        position = {"QuantizeLinear": 2, "QLinearConv": 7, "QLinearMatMul": 7}[node.op_type]
        if len(node.input) <= position:
            return bool(node.op_type == "QuantizeLinear")
        zero = held.get(node.input[position])
        return zero is not None and zero.data_type == TensorProto.UINT8
    if node.op_type in ("Relu", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"):
        return _unsigned(node.input[0], held, made, proto)
    return False
