"""Find the products of an ONNX network that share activations, and collect statistics of these activations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lilliput.onnx.session import Session

Array = NDArray[Any]
Floats = NDArray[np.float32]
ROWS = 64  # of each run, enough to predict noise from


@dataclass(frozen=True)
class Group:
    """The products that multiply the same activations; they share the levels of their input, so also the arithmetic.

    Args:
        input: name of the activations.
        nodes: names of the nodes that are products.
        weights: for each, its weights (in, out).
        norm: name of the layer normalisation that makes `input` if its scale and shift are nobody else's, or "".
    """

    input: str
    nodes: tuple[str, ...]
    weights: tuple[Floats, ...] = field(repr=False)
    norm: str = ""

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """(in, out) of each product."""
        return tuple(weight.shape for weight in self.weights)


@dataclass(frozen=True)
class Observed:
    """What calibration saw of one group's input, a row being the values that meet one weight column.

    Args:
        sample: (n, in), at most 64 rows of each run.
        starts: where each run begins in `sample`.
        rows: of one run.
    """

    sample: Floats = field(repr=False)
    starts: tuple[int, ...]
    rows: int

    def range(self, e: Floats) -> Floats:
        """max - min of each run, zero included, once channel j is divided by e_j."""
        x = self.sample / e
        span: Floats = np.maximum(np.maximum.reduceat(x.max(1), self.starts), 0) - np.minimum(
            np.minimum.reduceat(x.min(1), self.starts), 0
        )
        return span


def groups(proto: ModelProto) -> list[Group]:
    """Every product with stored weights (MatMul, Gemm), by input, in the order of the graph.

    Names of nodes must be unique (`dynamic` makes them so).
    """
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights = {name: t for name, t in stored.items() if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    readers = Counter(name for node in graph.node for name in node.input)
    hidden = {value.name for value in graph.output} | inner(graph)
    norms = {
        node.output[0]: node.name
        for node in graph.node
        if node.op_type == "LayerNormalization"
        and len(node.output) == 1
        and all(a.i == -1 for a in node.attribute if a.name == "axis")
        and all(name in stored and readers[name] == 1 and name not in hidden for name in node.input[1:] if name)
        and not {*node.output} & hidden
    }
    by_input: dict[str, list[tuple[str, Floats]]] = {}
    for node in graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = node.op_type == "MatMul" or (
            node.op_type == "Gemm"
            and settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0
            and not settings.get("transA")
        )
        if plain and node.domain == "" and node.input[1] in weights and node.input[0] not in stored:
            weight = numpy_helper.to_array(weights[node.input[1]])
            weight = np.ascontiguousarray(weight.T if settings.get("transB") else weight)
            by_input.setdefault(node.input[0], []).append((node.name, weight))
    return [
        Group(name, tuple(n for n, _ in parts), tuple(w for _, w in parts), norms.get(name, ""))
        for name, parts in by_input.items()
    ]


def inner(graph: Any) -> set[str]:
    """Every name that a graph inside a node (If, Loop, Scan) reads."""
    names: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            for inside in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                names |= inner(inside) | {v.name for v in inside.output}
                names |= {name for one in inside.node for name in one.input}
    return names


def observe(
    proto: ModelProto, groups: Sequence[Group], calibration: Sequence[Mapping[str, Array]]
) -> tuple[dict[str, Observed], list[list[Array]]]:
    """One run for each element of `calibration`: statistics of every group's input, and the network's outputs."""
    outputs = [value.name for value in proto.graph.output]
    inside = [g.input for g in groups if g.input not in {*outputs, *(value.name for value in proto.graph.input)}]
    wide = ModelProto()
    wide.CopyFrom(proto)
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside)
    session = Session(wide)
    kept: dict[str, list[Floats]] = {group.input: [] for group in groups}
    rows, dense = dict.fromkeys(kept, 1), []
    for inputs in calibration:
        values = session.all(dict(inputs))
        dense.append(values[: len(outputs)])
        value_of = dict(inputs) | dict(zip(outputs + inside, values, strict=True))
        for name, parts in kept.items():
            flat = value_of[name].reshape(-1, value_of[name].shape[-1])
            rows[name] = len(flat)
            parts.append(flat[:: math.ceil(len(flat) / ROWS)].copy())
    starts = {name: np.cumsum([0, *map(len, parts[:-1])]).tolist() for name, parts in kept.items()}
    return {n: Observed(np.concatenate(parts), tuple(starts[n]), rows[n]) for n, parts in kept.items()}, dense
