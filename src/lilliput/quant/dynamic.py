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

Sources: T. Dettmers et al. LLM.int8(). NeurIPS 2022. arXiv:2208.07339 (a step for each row). G. Xiao et al. SmoothQuant.
ICML 2023. arXiv:2211.10438, equation 4 (equalisation). The pair rule is ours.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS = 128  # of each run, enough to predict noise from
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
    rows, columns = weight.shape
    pairs = np.concatenate([weight, np.zeros((rows % 2, columns), np.float32)]).reshape(-1, 2, columns)
    sums = np.maximum(np.maximum(pairs, 0).sum(1).max(0), np.maximum(-pairs, 0).sum(1).max(0))
    # Rounding two halves up can add one to a sum: 127 leaves room for it.
    step = np.where(sums > 0, np.maximum(sums, np.abs(weight).max(0)) / 127, 1).astype(np.float32)
    return np.rint(weight / step).astype(np.int8), step


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
        sample: (rows, in), at most 128 rows of each run.
        low, high: each run's smallest and largest value, zero included.
        rows: of one run.
    """

    sample: Floats
    low: Floats
    high: Floats
    rows: int


def groups(proto: ModelProto) -> list[Group]:
    """Every product with stored weights (MatMul, Gemm), by input, in the order of the graph.

    Names of nodes must be unique (`dynamic` makes them so).
    """
    graph = proto.graph
    weights = {t.name: t for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    readers = Counter(name for node in graph.node for name in node.input)
    norms = {
        node.output[0]: node.name
        for node in graph.node
        if node.op_type == "LayerNormalization"
        and not {"axis", "stash_type"} & {a.name for a in node.attribute if a.i not in (-1, 1)}
        and all(readers[name] == 1 for name in node.input[1:])
        and {t.name for t in graph.initializer} >= set(node.input[1:])
    }
    outputs = {value.name for value in graph.output}
    found: dict[str, list[tuple[str, Floats]]] = {}
    for node in graph.node:
        settings = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = node.op_type == "MatMul" or (
            node.op_type == "Gemm"
            and settings.get("alpha", 1.0) == settings.get("beta", 1.0) == 1.0
            and not settings.get("transA")
        )
        if plain and node.domain == "" and node.input[1] in weights:
            weight = numpy_helper.to_array(weights[node.input[1]])
            weight = np.ascontiguousarray(weight.T if settings.get("transB") else weight)
            found.setdefault(node.input[0], []).append((node.name, weight))
    return [
        Group(name, tuple(n for n, _ in parts), tuple(w for _, w in parts), "" if name in outputs else norms.get(name, ""))
        for name, parts in found.items()
    ]


def observe(
    proto: ModelProto, found: Sequence[Group], calibration: Sequence[Mapping[str, Array]]
) -> tuple[dict[str, Statistics], list[list[Array]]]:
    """One run for each element of `calibration`: statistics of every group's input, and the network's outputs."""
    names = [group.input for group in found]
    session = Session(_with_outputs(proto, names))
    kept: dict[str, list[Floats]] = {name: [] for name in names}
    low: dict[str, list[float]] = {name: [] for name in names}
    high: dict[str, list[float]] = {name: [] for name in names}
    rows, outputs = dict.fromkeys(names, 1), []
    for inputs in calibration:
        values = session.all(dict(inputs))
        outputs.append(values[: len(proto.graph.output)])
        # A group may read an input or an output of the network, which is no further output of the session.
        for name, value in zip(names, _named(proto, names, inputs, values), strict=True):
            flat = value.reshape(-1, value.shape[-1])
            rows[name] = len(flat)
            kept[name].append(flat[:: math.ceil(len(flat) / ROWS)].copy())
            low[name].append(min(0.0, float(flat.min())))
            high[name].append(max(0.0, float(flat.max())))
    return {
        name: Statistics(
            np.concatenate(kept[name]), np.array(low[name], np.float32), np.array(high[name], np.float32), rows[name]
        )
        for name in names
    }, outputs


def _with_outputs(proto: ModelProto, names: Sequence[str]) -> ModelProto:
    """The network with further tensors as outputs."""
    wide = ModelProto()
    wide.CopyFrom(proto)
    there = {value.name for value in [*proto.graph.input, *proto.graph.output]}
    wide.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in there)
    return wide


def _named(
    proto: ModelProto, names: Sequence[str], inputs: Mapping[str, Array], values: Sequence[Array]
) -> list[Array]:
    there = {value.name for value in [*proto.graph.input, *proto.graph.output]}
    by_name = dict(inputs)
    by_name |= dict(zip([v.name for v in proto.graph.output] + [n for n in names if n not in there], values, strict=True))
    return [by_name[name] for name in names]


def equaliser(group: Group, seen: Statistics) -> Floats:
    """The e (in,) that predicts the least noise in int8 arithmetic with one step: SmoothQuant's, equation 4, for the
    best strength a of 0, 1/4, 1/2, 3/4 and 1. All ones where the group has no normalisation of its own."""
    weight = np.concatenate(group.weights, axis=1)
    ones: Floats = np.ones(len(weight), np.float32)
    if not group.norm:
        return ones
    x = np.maximum(np.abs(seen.sample).max(0), 1e-6)
    w = np.maximum(np.abs(weight).max(1), 1e-6)
    tried = [ones]
    for a in STRENGTHS[1:]:
        e = np.asarray(x**a / w ** (1 - a), np.float32)
        tried.append(e / np.exp(np.log(e).mean()).astype(np.float32))
    return min(tried, key=lambda e: _noise(group, seen, "tensor", e))


def _noise(group: Group, seen: Statistics, arithmetic: Arithmetic, e: Floats) -> float:
    """Predicted noise power of the group's outputs over their power.

    A step s adds s^2 / 12 to every value that is rounded: s_x^2 / 12 * sum W^2 from the input, and
    t_j^2 / 12 * mean |x|^2 from the weights of output j.
    """
    if arithmetic == "float":
        return 0.0
    weight, x = np.concatenate(group.weights, axis=1), seen.sample
    signal = float(np.square(x @ weight).sum(1).mean()) + 1e-20
    weight, x = weight * e[:, None], x / e
    if arithmetic == "narrow":
        return float((channel_codes(weight)[1] ** 2).sum() / 12 * np.square(x).sum(1).mean()) / signal
    pairs = np.concatenate([weight, np.zeros((len(weight) % 2, weight.shape[1]), np.float32)])
    pairs = pairs.reshape(-1, 2, weight.shape[1])
    t = np.maximum(np.maximum(pairs, 0).sum(1), np.maximum(-pairs, 0).sum(1)).max(0) / 127
    stored = float((t**2).sum() / 12 * np.square(x).sum(1).mean())
    if arithmetic == "row":
        step = _row_range(x, row_balance(x)) * (1 + 1 / row_balance(x)) / 255
        square = float(np.square(step).mean())
    elif (e == 1).all():
        square = float(np.square((seen.high - seen.low) / 255).mean())
    else:
        runs = x.reshape(len(seen.low), -1)
        square = float(np.square((runs.max(1) - runs.min(1)) / 255).mean())
    return (square / 12 * float(np.square(weight).sum()) + stored) / signal


def row_balance(x: Floats) -> float:
    """The c for which ranges max(max x, -c min x) of rows, quantized together, have the smallest mean squared step.

    Rows divided by that range lie in [-1 / c, 1], so a c above one spends fewer codes on negative numbers: about 15 for
    the outputs of a GELU, 1 for values that are as often negative.
    """
    return min(
        (float(c) for c in np.geomspace(1 / 32, 32, 21)),
        key=lambda c: float(np.square(_row_range(x, c)).mean()) * (1 + 1 / c) ** 2,
    )


def _row_range(x: Floats, c: float) -> Floats:
    return np.maximum(x.max(1), -c * x.min(1)).astype(np.float32)


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

    Error is sum |y - y'|^2 / sum |y|^2 over the calibration runs, of the worst output, measured in ONNX Runtime; for unit
    vectors it is 2 (1 - mean cosine). Products that stay in float32 arithmetic are stored in 8 bits all the same. Tables
    that are only looked up (Gather) are stored in 8 bits with a float16 step for each row.

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
    proto = _folded(proto)
    found = groups(proto)
    if not found:
        raise NotSupported("dynamic: the network must have a MatMul or Gemm with stored float32 weights, and has none.")
    for name in named:
        if name not in {group.input for group in found}:
            raise KeyError(f"dynamic: {name} is the input of no product. {near(name, [g.input for g in found])}")
    seen, dense = observe(proto, found, calibration)
    small = {g.input: sum(w.size for w in g.weights) < SMALLEST for g in found}
    scales = {g.input: equaliser(g, seen[g.input]) if equalise and not small[g.input] else _ones(g) for g in found}

    def build(choice: Mapping[str, Arithmetic]) -> ModelProto:
        return _write(proto, found, seen, scales, choice, tables)

    if arithmetic is not None:
        default = arithmetic if isinstance(arithmetic, str) else "narrow"
        return build({g.input: named.get(g.input, default) for g in found})
    return build(_choose(found, seen, scales, build, calibration, dense, tolerance, allowed))


def _ones(group: Group) -> Floats:
    return np.ones(len(group.weights[0]), np.float32)


def _choose(
    found: Sequence[Group],
    seen: Mapping[str, Statistics],
    scales: Mapping[str, Floats],
    build: Any,
    calibration: Sequence[Mapping[str, Array]],
    dense: Sequence[Sequence[Array]],
    tolerance: float,
    allowed: Sequence[Arithmetic],
) -> dict[str, Arithmetic]:
    """Start with the fastest arithmetic everywhere; buy exactness where a millisecond buys most until it suffices."""
    times = {
        (g.shapes, seen[g.input].rows): {} for g in found
    }  # type: dict[tuple[tuple[tuple[int, ...], ...], int], dict[Arithmetic, float]]
    for shape, rows in times:
        times[shape, rows] = _times(shape, rows, allowed)
    noise = {g.input: {a: _noise(g, seen[g.input], a, scales[g.input]) for a in allowed} for g in found}
    choice: dict[str, Arithmetic] = {}
    steps: list[tuple[float, str, Arithmetic]] = []
    for g in found:
        cost, loss = times[g.shapes, seen[g.input].rows], noise[g.input]
        ladder = sorted(allowed, key=lambda a: cost[a])
        choice[g.input], now = ladder[0], ladder[0]
        while True:
            # The lower convex hull of (milliseconds, noise): the step that buys most for its time comes next.
            better = [a for a in ladder if loss[a] < loss[now] and cost[a] >= cost[now]]
            if not better:
                break
            worth = {a: (loss[now] - loss[a]) / (cost[a] - cost[now] + 1e-9) for a in better}
            now_, now = now, max(better, key=lambda a: worth[a])
            del now_
            steps.append((worth[now], g.input, now))
    steps.sort(key=lambda step: -step[0])

    def taken(count: int) -> dict[str, Arithmetic]:
        return choice | {name: a for _, name, a in steps[:count]}

    low, high = 0, len(steps)  # the error falls with the number of steps
    while low < high:
        middle = (low + high) // 2
        if error(build(taken(middle)), calibration, dense) <= tolerance:
            high = middle
        else:
            low = middle + 1
    return taken(low)


def error(proto: ModelProto, calibration: Sequence[Mapping[str, Array]], dense: Sequence[Sequence[Array]]) -> float:
    """sum |y - y'|^2 / sum |y|^2 of the worst output over the runs; `dense` holds each run's true outputs."""
    session = Session(proto)
    lost, power = np.zeros(len(dense[0])), np.full(len(dense[0]), 1e-30)
    for inputs, wanted in zip(calibration, dense, strict=True):
        for i, (y, got) in enumerate(zip(wanted, session.all(dict(inputs)), strict=True)):
            lost[i] += np.square(y.astype(np.float64) - got).sum()
            power[i] += np.square(y.astype(np.float64)).sum()
    return float((lost / power).max())


def _times(shapes: tuple[tuple[int, ...], ...], rows: int, allowed: Sequence[Arithmetic]) -> dict[Arithmetic, float]:
    """Milliseconds of a group of these shapes in each arithmetic, measured in the runtime; random weights."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, shapes[0][0]), dtype=np.float32)
    value = helper.make_tensor_value_info
    weights = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=f"n{i}") for i in range(len(shapes))],
        "one",
        [value("x", TensorProto.FLOAT, ["rows", shapes[0][0]])],
        [value(f"y{i}", TensorProto.FLOAT, ["rows", shape[1]]) for i, shape in enumerate(shapes)],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = groups(proto)
    seen = {"x": Statistics(x, x.min(keepdims=True)[0], x.max(keepdims=True)[0], rows)}
    sessions = {
        a: Session(_write(proto, found, seen, {"x": _ones(found[0])}, {"x": a}, False)) for a in allowed if a != "narrow"
    }
    if "narrow" in allowed:  # the runtime widens the weights when it loads them: the same arithmetic
        sessions.setdefault("float", Session(proto))
    measured = latency(sessions, {"x": x}, seconds=0.02 * len(sessions))
    times = {a: 1 / measured[a].ratio for a in sessions}  # ratios hold on a busy machine
    first = next(iter(measured.values())).median_ms
    return {a: first * times["float" if a == "narrow" else a] for a in allowed}


class _Writer:
    """Nodes and initialisers as they come."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {}

    def constant(self, name: str, value: Array) -> str:
        self.tensors.setdefault(name, numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))
        return output

    def extreme(self, op_type: str, x: str, output: str) -> str:
        """ReduceMax or ReduceMin over the last axis, which became an input in opset 18."""
        if self.opset < 18:
            return self.node(op_type, [x], output, axes=[-1], keepdims=1)
        return self.node(op_type, [x, self.constant("last_axis", np.array([-1], np.int64))], output, keepdims=1)


def _write(
    proto: ModelProto,
    found: Sequence[Group],
    seen: Mapping[str, Statistics],
    scales: Mapping[str, Floats],
    choice: Mapping[str, Arithmetic],
    tables: bool,
) -> ModelProto:
    """The graph rewritten: each group's input quantized once, before the first of its products."""
    graph = proto.graph
    writer = _Writer(_opset(proto))
    arrays = {t.name: t for t in graph.initializer}
    group_of = {node: group for group in found for node in group.nodes}
    weight_of = {node: weight for group in found for node, weight in zip(group.nodes, group.weights, strict=True)}
    active = {g.input: g for g in found if (scales[g.input] != 1).any() and choice[g.input] in ("tensor", "row")}
    norms = {g.norm: g for g in active.values()}
    written: dict[str, tuple[str, str, str, str]] = {}
    renamed: dict[str, str] = {}
    for node in graph.node:
        group = group_of.get(node.name)
        if group is not None:
            how = choice[group.input]
            weight = weight_of[node.name] * (scales[group.input] if group.input in active else _ones(group))[:, None]
            if how != "float" and weight.size >= SMALLEST:
                if how != "narrow" and group.input not in written:
                    written[group.input] = _quantize(writer, group.input, how, seen[group.input], scales[group.input])
                _product(writer, node, how, weight, written.get(group.input))
                continue
        if tables and _is_table(node, arrays):
            _table(writer, node, numpy_helper.to_array(arrays[node.input[0]]))
            continue
        copy = NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(copy.input):
            if name in renamed and group is None:
                copy.input[i] = renamed[name]
        if node.name in norms:
            e = scales[node.output[0]]
            for i, name in enumerate(node.input[1:], 1):
                copy.input[i] = writer.constant(name + "_equalised", numpy_helper.to_array(arrays[name]) / e)
        writer.nodes.append(copy)
        if node.name in norms:
            out = node.output[0]
            if any(out in other.input for other in graph.node if other.name not in norms[node.name].nodes):
                renamed[out] = writer.node("Mul", [out, writer.constant(out + "_equaliser", scales[out])], out + "_again")
    small = ModelProto()
    small.CopyFrom(proto)
    del small.graph.node[:], small.graph.initializer[:], small.graph.value_info[:]
    small.graph.node.extend(writer.nodes)
    used = {name for node in writer.nodes for name in node.input} | {v.name for v in graph.output}
    kept = {name: tensor for name, tensor in {**arrays, **writer.tensors}.items() if name in used}
    small.graph.initializer.extend(kept.values())
    return small


def _quantize(writer: _Writer, x: str, how: Arithmetic, seen: Statistics, e: Floats) -> tuple[str, str, str, str]:
    """Names of the codes, step, zero point and rows' range ("" where there is one step) of the activations x."""
    span, source = "", x
    if how == "row":
        c = row_balance(seen.sample / e)
        high = writer.extreme("ReduceMax", x, x + "_high")
        low = writer.extreme("ReduceMin", x, x + "_low")
        low = writer.node("Mul", [low, writer.constant(x + "_balance", np.array(-c, np.float32))], x + "_depth")
        tiny = writer.constant("tiny", np.array(1e-20, np.float32))  # a row of zeros stays one
        span = writer.node("Max", [high, low, tiny], x + "_span")
        source = writer.node("Div", [x, span], x + "_unit")
    names = [x + "_codes", x + "_step", x + "_zero"]
    writer.nodes.append(helper.make_node("DynamicQuantizeLinear", [source], names, name=names[0]))
    return names[0], names[1], names[2], span


def _product(
    writer: _Writer, node: NodeProto, how: Arithmetic, weight: Floats, codes: tuple[str, str, str, str] | None
) -> None:
    """One product in its arithmetic, under the name that its output had."""
    out, stored = node.output[0], node.input[1] + "_" + how  # one weight may be read by groups that differ
    bias = node.input[2] if len(node.input) > 2 else ""
    last = out + "_unbiased" if bias else out
    if codes is None:
        value, step = channel_codes(weight)
        wide = writer.node("Cast", [writer.constant(stored, value)], out + "_wide", to=TensorProto.FLOAT)
        wide = writer.node("Mul", [wide, writer.constant(stored + "_step", step)], out + "_weight")
        writer.node("MatMul", [node.input[0], wide], last)
    else:
        q, s, z, span = codes
        value, step = pair_codes(weight)
        total = writer.node("MatMulInteger", [q, writer.constant(stored, value), z], out + "_sum")
        total = writer.node("Cast", [total], out + "_float", to=TensorProto.FLOAT)
        both = writer.node("Mul", [s, writer.constant(stored + "_step", step)], out + "_step")
        total = writer.node("Mul", [total, both], out + "_scaled" if span else last)
        if span:
            writer.node("Mul", [total, span], last)
    if bias:
        writer.node("Add", [last, bias], out)


def _is_table(node: NodeProto, arrays: Mapping[str, TensorProto]) -> bool:
    table = arrays.get(node.input[0]) if node.op_type == "Gather" else None
    return (
        table is not None
        and table.data_type == TensorProto.FLOAT
        and len(table.dims) == 2
        and table.dims[0] * table.dims[1] >= SMALLEST
        and all(a.i == 0 for a in node.attribute if a.name == "axis")
    )


def _table(writer: _Writer, node: NodeProto, table: Floats) -> None:
    """Rows looked up as codes and widened there, so the whole table is never widened."""
    name, out = node.input[0], node.output[0]
    step = channel_codes(table, axis=1)[1].astype(np.float16)
    step[step == 0] = 1
    codes = np.clip(np.rint(table / step[:, None].astype(np.float32)), -127, 127).astype(np.int8)
    rows = writer.node("Gather", [writer.constant(name + "_rows", codes), node.input[1]], out + "_rows")
    rows = writer.node("Cast", [rows], out + "_wide", to=TensorProto.FLOAT)
    steps = writer.node("Gather", [writer.constant(name + "_row_step", step[:, None]), node.input[1]], out + "_half")
    steps = writer.node("Cast", [steps], out + "_step", to=TensorProto.FLOAT)
    writer.node("Mul", [rows, steps], out)


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
            graph = helper.make_graph([node], "one", [], [onnx.ValueInfoProto(name=node.output[0])], [arrays[n] for n in inputs])
            one = helper.make_model(graph, opset_imports=proto.opset_import)
            value = np.asarray(ReferenceEvaluator(one).run(None, {})[0])
            if value.nbytes <= max(4096, sum(a.nbytes for a in known.values()) * 4):
                arrays[node.output[0]] = numpy_helper.from_array(value, node.output[0])
                continue
        node.name = f"{i}_{node.op_type}"
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | {v.name for v in copy.graph.output}
    del copy.graph.node[:], copy.graph.initializer[:]
    copy.graph.node.extend(nodes)
    copy.graph.initializer.extend(tensor for name, tensor in arrays.items() if name in used)
    return copy


def _pure(node: NodeProto) -> bool:
    return node.op_type in {
        "Cast", "Concat", "Constant", "Div", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Transpose",
        "Unsqueeze",
    }  # fmt: skip
