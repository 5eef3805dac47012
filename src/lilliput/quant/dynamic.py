"""Int8 arithmetic for the matrix products of an ONNX network, after training, on a CPU.

A product y = x W of activations x (rows, in) with stored weights W (in, out) becomes y = (q - z) C * (s t): q are the
8-bit codes of x, found anew in every run (z their zero point, s their step), C (in, out) the 8-bit codes of W with one
step t for each output. Four ideas make that exact enough to need no training and fast enough to be worth it:

1. **Weights of nearly eight bits that cannot saturate.** CPUs with AVX2 but no VNNI multiply with `vpmaddubsw`, which
   adds two neighbouring products in 16 bits. The usual remedy halves the range of all weights ("reduce_range"). But
   255 (max(C_2k, 0) + max(C_2k+1, 0)) <= 32767 is all that is needed, and neighbours are seldom large together:
   `pair_codes` takes the smallest step for which every pair keeps within it.
2. **Equalisation** where it is exact: a layer normalisation that feeds products is divided by e_j in channel j, the
   weights' row j multiplied by it. e_j = max|x_j|^a / max|W_j|^(1-a), with the a that predicts the least noise.
   Whoever else reads the normalised values gets them multiplied by e.
3. **A step for each row** where one step for all of them is too coarse: rows are divided by their own range before
   they are quantized and the results multiplied by it, which standard operators can express.
4. **The choice of arithmetic is measured**: for each shape the latency of each arithmetic in the runtime, for each
   group of products the predicted noise, for the whole network the error of its outputs. The fastest choice within the
   tolerance is taken.

Only standard ONNX operators are written; ONNX Runtime fuses them (DynamicQuantizeMatMul, MatMulIntegerToFloat).

Sources: T. Dettmers et al. LLM.int8(). NeurIPS 2022. arXiv:2208.07339 (a step for each row). G. Xiao et al.
SmoothQuant. ICML 2023. arXiv:2211.10438, equation 4 (equalisation). The pair rule is ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lilliput.cost.measure import latency
from lilliput.errors import NotSupported, near
from lilliput.export.onnx import Session

Array = NDArray[Any]
Floats = NDArray[np.float32]
Arithmetic = Literal["tensor", "row", "narrow", "float"]
"""tensor: int8, one step for the whole input. row: int8, a step for each row. narrow: float32 arithmetic, the weights
stored in 8 bits and widened once when the runtime loads the file. float: left alone."""
ARITHMETICS: tuple[Arithmetic, ...] = ("tensor", "row", "narrow", "float")
PURE = {"Cast", "Concat", "Constant", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub",
        "Transpose", "Unsqueeze"}  # fmt: skip
ROWS = 64  # of each run, enough to predict noise from
SMALLEST = 1024  # values; below, a tensor's codes and nodes are not worth their bytes


def pair_codes(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """8-bit codes C and steps t with weight ~ C * t that no u8 x s8 product saturates, however it is computed.

    The largest sum of two neighbouring weights of one sign fits 128 = floor(32767 / 255): t_j is the smallest step with
    max(C_2k,j, 0) + max(C_2k+1,j, 0) <= 128 for all k, likewise for negative codes, and |C| <= 127.

    Args:
        weight: (in, out).

    Returns:
        codes int8 (in, out) and steps float32 (out,).

    >>> codes, step = pair_codes(np.array([[1.0, 1.0], [-0.5, 1.0]], np.float32))
    >>> codes.tolist()
    [[127, 64], [-64, 64]]
    """
    step = _pair_step(weight)
    return np.rint(weight / step).astype(np.int8), step


def _pair_step(weight: Floats) -> Floats:
    even, odd = weight[0::2], weight[1::2]
    if len(even) > len(odd):
        odd = np.concatenate([odd, np.zeros_like(even[:1])])
    # A sum of one sign: |a| + |b| where the signs agree, else the larger of the two.
    sums = np.maximum(np.abs(even + odd), np.maximum(np.abs(even), np.abs(odd))).max(0)
    # Rounding two halves up can add one to a sum: 127 instead of 128 leaves room for it.
    step: Floats = np.where(sums > 0, sums / np.float32(127), np.float32(1))
    return step


def channel_codes(weight: Floats, axis: int = 0) -> tuple[NDArray[np.int8], Floats]:
    """8-bit codes with steps max|weight| / 127 over `axis`: the storage of a table or of a product in float32."""
    step = np.abs(weight).max(axis, keepdims=True) / np.float32(127)
    step[step == 0] = 1
    return np.rint(weight / step).astype(np.int8), step.squeeze(axis)


@dataclass(frozen=True)
class Group:
    """The products that multiply the same activations; they share the codes of their input, so also the arithmetic.

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
class Statistics:
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
    hidden = {value.name for value in graph.output} | _inner(graph)
    norms = {
        node.output[0]: node.name
        for node in graph.node
        if node.op_type == "LayerNormalization"
        and len(node.output) == 1
        and all(a.i == -1 for a in node.attribute if a.name == "axis")
        and all(name in stored and readers[name] == 1 and name not in hidden for name in node.input[1:] if name)
        and not {*node.output} & hidden
    }
    found: dict[str, list[tuple[str, Floats]]] = {}
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
            found.setdefault(node.input[0], []).append((node.name, weight))
    return [
        Group(name, tuple(n for n, _ in parts), tuple(w for _, w in parts), norms.get(name, ""))
        for name, parts in found.items()
    ]


def _inner(graph: Any) -> set[str]:
    """Every name that a graph inside a node (If, Loop, Scan) reads."""
    names: set[str] = set()
    for node in graph.node:
        for attribute in node.attribute:
            for inside in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]:
                names |= _inner(inside) | {v.name for v in inside.output}
                names |= {name for one in inside.node for name in one.input}
    return names


def observe(
    proto: ModelProto, found: Sequence[Group], calibration: Sequence[Mapping[str, Array]]
) -> tuple[dict[str, Statistics], list[list[Array]]]:
    """One run for each element of `calibration`: statistics of every group's input, and the network's outputs."""
    outputs = [value.name for value in proto.graph.output]
    inside = [g.input for g in found if g.input not in {*outputs, *(value.name for value in proto.graph.input)}]
    wide = ModelProto()
    wide.CopyFrom(proto)
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in inside)
    session = Session(wide)
    kept: dict[str, list[Floats]] = {group.input: [] for group in found}
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
    return {n: Statistics(np.concatenate(parts), tuple(starts[n]), rows[n]) for n, parts in kept.items()}, dense


def equaliser(group: Group, seen: Statistics) -> Floats:
    """The e (in,) that predicts the least noise in int8 arithmetic with one step: SmoothQuant's, equation 4, for the
    best strength a of 0, 1/4, 1/2, 3/4 and 1. All ones where the group has no normalisation of its own."""
    ones: Floats = np.ones(len(group.weights[0]), np.float32)
    if not group.norm:
        return ones
    x = np.maximum(np.abs(seen.sample).max(0), 1e-6)
    w = np.maximum(np.abs(np.concatenate(group.weights, axis=1)).max(1), 1e-6)
    tried = [ones]
    for a in (0.25, 0.5, 0.75, 1.0):
        e = np.asarray(x**a / w ** (1 - a), np.float32)
        tried.append(e / np.exp(np.log(e).mean()))
    return min(tried, key=lambda e: predicted(group, seen, e)["tensor"])


def predicted(group: Group, seen: Statistics, e: Floats) -> dict[Arithmetic, float]:
    """Noise power that each arithmetic adds to the group's outputs, summed over them, for one row.

    A step s adds s^2 / 12 to every value that is rounded: s_x^2 / 12 * sum W^2 from the input, and
    t_j^2 / 12 * mean |x|^2 from the weights of output j.
    """
    x, weight = seen.sample / e, np.concatenate(group.weights, axis=1) * e[:, None]
    power, gain = float(np.square(x).sum(1).mean()) / 12, float(np.square(weight).sum()) / 12
    stored = power * float(np.square(_pair_step(weight)).sum())
    c = row_balance(x)
    row = np.maximum(x.max(1), -c * x.min(1)) * (1 + 1 / c) / 255
    return {
        "tensor": stored + gain * float(np.square(seen.range(e) / 255).mean()),
        "row": stored + gain * float(np.square(row).mean()),
        "narrow": power * float(np.square(np.abs(weight).max(0) / 127).sum()),
        "float": 0.0,
    }


def row_balance(x: Floats) -> float:
    """The c for which ranges max(max x, -c min x) of rows, quantized together, have the smallest mean squared step.

    Rows divided by that range lie in [-1 / c, 1], so a c above one spends fewer codes on negative numbers: about 15 for
    the outputs of a GELU, 1 for values that are as often negative.
    """
    high, low = x.max(1), -x.min(1)
    tried = [float(c) for c in np.geomspace(1 / 32, 32, 21)]
    return min(tried, key=lambda c: float(np.square(np.maximum(high, c * low)).mean()) * (1 + 1 / c) ** 2)


def dynamic(
    proto: ModelProto,
    calibration: Sequence[Mapping[str, Array]],
    *,
    tolerance: float = 0.005,
    arithmetic: Mapping[str, Arithmetic] | Arithmetic | None = None,
    allowed: Sequence[Arithmetic] = ARITHMETICS,
    equalise: bool = True,
    tables: bool = True,
) -> ModelProto:
    """The network with its products in the fastest arithmetic whose measured error is within `tolerance`.

    Error is sum |y - y'|^2 / sum |y|^2 over the calibration runs, of the worst output, measured in ONNX Runtime; for
    unit vectors it is 2 (1 - mean cosine). Products in narrow arithmetic are stored in 8 bits all the same, and tables
    that are looked up (Gather) in 8 bits with a float16 step for each row. With one step for a whole input, what an
    example becomes depends on the others in its batch; with a step for each row it does not.

    Args:
        proto: float32, any opset from 13.
        calibration: inputs by name, one run each, with the batch size that the network will see.
        tolerance: the error that is allowed; an error over it in float arithmetic is not repaired.
        arithmetic: fixes the choice, for all groups or by the name of the group's input; then nothing is measured.
        allowed: what may be chosen.
        equalise: fold scales into layer normalisations (exact in float arithmetic).
        tables: store tables in 8 bits.

    Raises:
        NotSupported: if the network has no product with stored weights, or an opset below 13.
        ValueError: for an empty calibration, a tolerance that is not positive, or an unknown arithmetic.
        KeyError: if `arithmetic` names no group.

    >>> w = numpy_helper.from_array(np.eye(64, dtype=np.float32), "w")
    >>> x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in "xy")
    >>> graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [w])
    >>> net = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    >>> small = dynamic(net, [{"x": np.ones((1, 64), np.float32)}], arithmetic="tensor")
    >>> [node.op_type for node in small.graph.node]
    ['DynamicQuantizeLinear', 'MatMulInteger', 'Cast', 'Mul', 'Mul']
    """
    if not calibration:
        raise ValueError("dynamic: calibration must have at least one run, got none. Give inputs by name.")
    if not tolerance > 0:
        raise ValueError(f"dynamic: tolerance must be positive, got {tolerance}. Use 0.004 for a mean cosine of 0.998.")
    named = dict(arithmetic) if isinstance(arithmetic, Mapping) else {}
    unknown = {*named.values(), *allowed, *([arithmetic] if isinstance(arithmetic, str) else [])} - {*ARITHMETICS}
    if unknown:
        raise ValueError(f"dynamic: arithmetic must be one of {ARITHMETICS}, got {', '.join(map(repr, unknown))}.")
    folded = _folded(proto)
    found = groups(folded)
    if not found:
        raise NotSupported("dynamic: the network must have a MatMul or Gemm with stored float32 weights, and has none.")
    for name in named:
        if name not in {group.input for group in found}:
            raise KeyError(f"dynamic: {name} is the input of no product. {near(name, [g.input for g in found])}")
    seen, dense = observe(folded, found, calibration)
    ones = {g.input: np.ones(len(g.weights[0]), np.float32) for g in found}
    scales = {g.input: equaliser(g, seen[g.input]) for g in found} if equalise else ones

    base = _with_narrow_tables(folded) if tables else folded

    def build(choice: Mapping[str, Arithmetic]) -> ModelProto:
        return _write(base, found, seen, scales, choice)

    if arithmetic is not None:
        default = arithmetic if isinstance(arithmetic, str) else "narrow"
        return build({g.input: named.get(g.input, default) for g in found})
    return build(_choose(found, seen, scales, build, calibration, dense, tolerance, allowed))


def _choose(
    found: Sequence[Group],
    seen: Mapping[str, Statistics],
    scales: Mapping[str, Floats],
    build: Callable[[Mapping[str, Arithmetic]], ModelProto],
    runs: Sequence[Mapping[str, Array]],
    dense: Sequence[Sequence[Array]],
    tolerance: float,
    allowed: Sequence[Arithmetic],
) -> dict[str, Arithmetic]:
    """Start with the fastest arithmetic everywhere; buy exactness where a millisecond buys most until it suffices."""
    choice: dict[str, Arithmetic] = {}
    steps: list[tuple[float, str, Arithmetic]] = []
    for group in found:
        name, statistics = group.input, seen[group.input]
        cost = times(group.shapes, statistics.rows, tuple(allowed))
        x = statistics.sample
        signal = sum(float(np.square(x @ weight).sum(1).mean()) for weight in group.weights) + 1e-20
        noise = {a: value / signal for a, value in predicted(group, statistics, scales[name]).items()}
        now = choice[name] = min(allowed, key=lambda a: (cost[a], noise[a]))
        while better := [a for a in allowed if noise[a] < noise[now]]:
            worth = {a: (noise[now] - noise[a]) / max(cost[a] - cost[now], 1e-6) for a in better}
            now = max(better, key=lambda a: worth[a])  # along the lower convex hull of (milliseconds, noise)
            steps.append((worth[now], name, now))
    steps.sort(key=lambda step: -step[0])

    def taken(count: int) -> dict[str, Arithmetic]:
        return choice | {name: arithmetic for _, name, arithmetic in steps[:count]}

    low, high = 0, len(steps)  # the error falls with the number of steps
    while low < high:
        middle = (low + high) // 2
        if error(build(taken(middle)), runs, dense) <= tolerance:
            high = middle
        else:
            low = middle + 1
    return taken(low)


def chosen(proto: ModelProto) -> dict[str, Arithmetic]:
    """What `dynamic` chose: the arithmetic by the name of each quantized input; what is missing stayed in float32."""
    return {
        node.output[0].removesuffix("/codes"): "row" if node.input[0].endswith("/unit") else "tensor"
        for node in proto.graph.node
        if node.op_type == "DynamicQuantizeLinear"
    }


def error(proto: ModelProto, calibration: Sequence[Mapping[str, Array]], dense: Sequence[Sequence[Array]]) -> float:
    """sum |y - y'|^2 / sum |y|^2 of the worst output over the runs; `dense` holds each run's true outputs."""
    session = Session(proto)
    lost, power = np.zeros(len(dense[0])), np.full(len(dense[0]), 1e-30)
    for inputs, wanted in zip(calibration, dense, strict=True):
        for i, (y, got) in enumerate(zip(wanted, session.all(dict(inputs)), strict=True)):
            lost[i] += np.square(y.astype(np.float64) - got).sum()
            power[i] += np.square(y.astype(np.float64)).sum()
    return float((lost / power).max())


@cache
def times(
    shapes: tuple[tuple[int, ...], ...], rows: int, allowed: tuple[Arithmetic, ...] = ARITHMETICS
) -> dict[Arithmetic, float]:
    """Milliseconds of a group of products of these shapes (in, out) in each arithmetic, measured here, kept."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, shapes[0][0]), dtype=np.float32)
    names, value = [str(i) for i in range(len(shapes))], helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w" + i], ["y" + i], name=i) for i in names],
        "group",
        [value("x", TensorProto.FLOAT, x.shape)],
        [value("y" + i, TensorProto.FLOAT, None) for i in names],
        [numpy_helper.from_array(rng.standard_normal(s, dtype=np.float32), "w" + i)
         for i, s in zip(names, shapes, strict=True)],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found, one = groups(proto), {"x": np.ones(shapes[0][0], np.float32)}
    # Narrow weights are widened when the file is loaded: float32 arithmetic.
    distinct: list[Arithmetic] = [a for a in ("float", "tensor", "row") if a == "float" or a in allowed]
    seen = {"x": Statistics(x, (0,), rows)}
    sessions = {str(a): Session(_write(proto, found, seen, one, {"x": a})) for a in distinct}
    measured = latency(sessions, {"x": x}, seconds=0.02 * len(sessions), batch=rows)
    base = measured["float"].median_ms  # ratios hold on a busy machine
    return {a: base / measured["float" if a == "narrow" else a].ratio for a in allowed}


class _Writer:
    """Nodes and initialisers as they come."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}

    def constant(self, name: str, value: Array) -> str:
        """The initialiser `name`: the one that is there if it is equal (a weight that is read twice)."""
        tensor = numpy_helper.from_array(np.array(value, order="C"), name)
        while self.tensors.setdefault(tensor.name, tensor) != tensor:
            tensor.name += "'"
        return str(tensor.name)

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def model(self, proto: ModelProto) -> ModelProto:
        """`proto` with these nodes instead of its own, and the initialisers that they need."""
        small = ModelProto()
        small.CopyFrom(proto)
        arrays = {tensor.name: tensor for tensor in proto.graph.initializer} | self.tensors
        del small.graph.node[:], small.graph.initializer[:], small.graph.value_info[:]
        small.graph.node.extend(self.nodes)
        small.graph.initializer.extend(_used(small.graph, arrays))
        return small

    def extreme(self, op_type: str, x: str, output: str) -> str:
        """ReduceMax or ReduceMin over the last axis, which became an input in opset 18."""
        if self.opset < 18:
            return self.node(op_type, [x], output, axes=[-1], keepdims=1)
        return self.node(op_type, [x, self.constant("/last_axis", np.array([-1], np.int64))], output, keepdims=1)


def _write(
    proto: ModelProto,
    found: Sequence[Group],
    seen: Mapping[str, Statistics],
    scales: Mapping[str, Floats],
    choice: Mapping[str, Arithmetic],
) -> ModelProto:
    """The graph rewritten: each group's input quantized once, before the first of its products."""
    graph, writer = proto.graph, _Writer(_opset(proto))
    arrays = {tensor.name: tensor for tensor in graph.initializer}
    product = {node: (g, weight) for g in found for node, weight in zip(g.nodes, g.weights, strict=True)}
    equalised = {
        g.norm: g for g in found if choice[g.input] in ("tensor", "row") and g.norm and (scales[g.input] != 1).any()
    }
    codes: dict[str, _Codes] = {}
    plain: dict[str, str] = {}  # what was equalised, as it was
    for node in graph.node:
        group, weight = product.get(node.name, (None, None))
        if group is not None and weight is not None:
            how, e = choice[group.input], scales[group.input]
            if group.norm in equalised:
                weight = weight * e[:, None]
            else:
                e = np.ones_like(e)
            if how in ("tensor", "row"):
                if group.input not in codes:
                    codes[group.input] = _quantize(writer, group.input, how, seen[group.input].sample / e)
                _integer_product(writer, node, weight, codes[group.input])
            elif how == "narrow" and weight.size >= SMALLEST:
                _narrow_product(writer, node, weight)
            else:
                writer.nodes.append(node)
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[:] = [plain.get(name, name) for name in node.input]
        writer.nodes.append(copy)
        if node.name in equalised:
            (out,), e = node.output, scales[node.output[0]]
            for i, name in enumerate(node.input[1:], 1):
                copy.input[i] = name and writer.constant(name + "/equalised", numpy_helper.to_array(arrays[name]) / e)
            if any(out in other.input for other in graph.node if other.name not in equalised[node.name].nodes):
                plain[out] = writer.node("Mul", [out, writer.constant(out + "/equaliser", e)], out + "/plain")
    return writer.model(proto)


def _used(graph: Any, tensors: Mapping[str, TensorProto]) -> list[TensorProto]:
    names = {name for node in graph.node for name in node.input} | {v.name for v in graph.output} | _inner(graph)
    return [tensor for name, tensor in tensors.items() if name in names]


@dataclass(frozen=True)
class _Codes:
    """Names of a quantized input's codes, step, zero point and rows' range ("" where there is one step)."""

    codes: str
    step: str
    zero: str
    span: str


def _quantize(writer: _Writer, x: str, how: Arithmetic, sample: Floats) -> _Codes:
    """Nodes that quantize the activations x, of which `sample` holds rows."""
    span, source = "", x
    if how == "row":
        balance = writer.constant(x + "/balance", np.array(-row_balance(sample), np.float32))
        tiny = writer.constant("/tiny", np.array(1e-20, np.float32))  # a row of zeros stays one
        depth = writer.node("Mul", [writer.extreme("ReduceMin", x, x + "/low"), balance], x + "/depth")
        span = writer.node("Max", [writer.extreme("ReduceMax", x, x + "/high"), depth, tiny], x + "/span")
        source = writer.node("Div", [x, span], x + "/unit")
    names = _Codes(x + "/codes", x + "/step", x + "/zero", span)
    quantize = helper.make_node(
        "DynamicQuantizeLinear", [source], [names.codes, names.step, names.zero], name=names.codes
    )
    writer.nodes.append(quantize)
    return names


def _integer_product(writer: _Writer, node: NodeProto, weight: Floats, x: _Codes) -> None:
    (_, name, *rest), (out,) = node.input, node.output
    bias = rest[0] if rest else ""
    codes, step = pair_codes(weight)
    stored = writer.constant(name + "/codes", codes)
    value = writer.node("MatMulInteger", [x.codes, stored, x.zero], out + "/sum")
    value = writer.node("Cast", [value], out + "/float", to=TensorProto.FLOAT)
    both = writer.node("Mul", [x.step, writer.constant(name + "/step", step)], out + "/scale")
    value = writer.node("Mul", [value, both], out + "/scaled" if x.span or bias else out)
    if x.span:
        value = writer.node("Mul", [value, x.span], out + "/spanned" if bias else out)
    if bias:
        writer.node("Add", [value, bias], out)


def _narrow_product(writer: _Writer, node: NodeProto, weight: Floats) -> None:
    (_, name, *rest), (out,) = node.input, node.output
    codes, step = channel_codes(weight)
    wide = writer.node("Cast", [writer.constant(name + "/codes", codes)], out + "/wide", to=TensorProto.FLOAT)
    wide = writer.node("Mul", [wide, writer.constant(name + "/step", step)], out + "/widened")
    bias = rest[0] if rest else ""
    value = writer.node("MatMul", [node.input[0], wide], out + "/unbiased" if bias else out)
    if bias:
        writer.node("Add", [value, bias], out)


def _with_narrow_tables(proto: ModelProto) -> ModelProto:
    """Looked-up rows come as codes and are widened then, so that the whole table never is."""
    arrays, writer = {tensor.name: tensor for tensor in proto.graph.initializer}, _Writer(_opset(proto))
    for node in proto.graph.node:
        tensor = arrays.get(node.input[0]) if node.op_type == "Gather" else None
        by_row = all(a.i == 0 for a in node.attribute if a.name == "axis")
        large = tensor is not None and len(tensor.dims) == 2 and math.prod(tensor.dims) >= SMALLEST
        if tensor is None or not large or not by_row or tensor.data_type != TensorProto.FLOAT:
            writer.nodes.append(node)
            continue
        (name, index), (out,), table = node.input, node.output, numpy_helper.to_array(tensor)
        step = channel_codes(table, axis=1)[1].astype(np.float16)[:, None]
        step[step == 0] = 1
        codes = np.clip(np.rint(table / step.astype(np.float32)), -127, 127).astype(np.int8)
        rows = writer.node("Gather", [writer.constant(name + "/rows", codes), index], out + "/rows")
        rows = writer.node("Cast", [rows], out + "/wide", to=TensorProto.FLOAT)
        steps = writer.node("Gather", [writer.constant(name + "/row_step", step), index], out + "/half")
        steps = writer.node("Cast", [steps], out + "/row_step", to=TensorProto.FLOAT)
        writer.node("Mul", [rows, steps], out)
    return writer.model(proto)


def _opset(proto: ModelProto) -> int:
    return next(int(o.version) for o in proto.opset_import if o.domain in ("", "ai.onnx"))


def _folded(proto: ModelProto) -> ModelProto:
    """A copy whose nodes have unique names, with what depends on constants alone computed (unless it would grow)."""
    from onnx.reference import ReferenceEvaluator

    if _opset(proto) < 13:
        raise NotSupported(f"dynamic: the opset must be at least 13, got {_opset(proto)}. Export the network again.")
    copy = ModelProto()
    copy.CopyFrom(proto)
    arrays = {t.name: t for t in copy.graph.initializer}
    nodes = []
    for i, node in enumerate(copy.graph.node):
        inputs = [name for name in node.input if name]
        if node.domain == "" and len(node.output) == 1 and all(name in arrays for name in inputs) and _pure(node):
            known = {name: numpy_helper.to_array(arrays[name]) for name in inputs}
            graph = helper.make_graph(
                [node], "one", [], [onnx.ValueInfoProto(name=node.output[0])], [arrays[n] for n in inputs]
            )
            one = helper.make_model(graph, opset_imports=proto.opset_import)
            value = np.asarray(ReferenceEvaluator(one).run(None, {})[0])
            if value.nbytes <= max(4096, sum(a.nbytes for a in known.values()) * 4):
                arrays[node.output[0]] = numpy_helper.from_array(value, node.output[0])
                continue
        node.name = f"{i}_{node.op_type}"
        nodes.append(node)
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(_used(copy.graph, arrays))
    return copy


def _pure(node: NodeProto) -> bool:
    """Whether the node is one of those that exporters leave between stored tensors and their readers."""
    return node.op_type in PURE
