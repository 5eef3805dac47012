"""Dynamic int8 quantization of the matrix products of an ONNX network, after training, on a CPU.

A product y = x W of activations x (rows, in) with stored weights W (in, out) becomes y = (q - z) C * (s t): q are the
8-bit levels of x, found anew in every run (z their zero point, s their step), C (in, out) the 8-bit levels of W with
one step t for each output. Four ideas make that exact enough to need no training and fast enough to be worth it:

1. **Weights of nearly eight bits that cannot saturate.** CPUs with AVX2 but no VNNI multiply with `vpmaddubsw`, which
   adds two neighbouring products in 16 bits. The usual remedy halves the range of all weights ("reduce_range"). But
   255 (max(C_2k, 0) + max(C_2k+1, 0)) <= 32767 is all that is needed, and neighbours are seldom large together:
   `pair_levels` takes the smallest step for which every pair keeps within it.
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

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lilliput.cost.measure import latency
from lilliput.errors import NotSupported, near
from lilliput.onnx.session import Session
from lilliput.quant.int8 import ARITHMETICS, Arithmetic, equaliser, predicted
from lilliput.quant.products import Array, Floats, Group, Observed, groups, observe
from lilliput.quant.rewrite import folded, with_narrow_tables, write


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

    Example:
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
    known = folded(proto)
    products = groups(known)
    if not products:
        raise NotSupported("dynamic: the network must have a MatMul or Gemm with stored float32 weights, and has none.")
    for name in named:
        if name not in {group.input for group in products}:
            raise KeyError(f"dynamic: {name} is the input of no product. {near(name, [g.input for g in products])}")
    seen, dense = observe(known, products, calibration)
    ones = {g.input: np.ones(len(g.weights[0]), np.float32) for g in products}
    scales = {g.input: equaliser(g, seen[g.input]) for g in products} if equalise else ones

    base = with_narrow_tables(known) if tables else known

    def build(choice: Mapping[str, Arithmetic]) -> ModelProto:
        return write(base, products, seen, scales, choice)

    if arithmetic is not None:
        default = arithmetic if isinstance(arithmetic, str) else "narrow"
        return build({g.input: named.get(g.input, default) for g in products})
    return build(_choose(products, seen, scales, build, calibration, dense, tolerance, allowed))


def gain_ms(proto: ModelProto, calibration: Sequence[Mapping[str, Array]]) -> float:
    """Milliseconds of a run that the products of a network would save in their fastest arithmetic, measured by shape.

    Args:
        proto: float32, any opset from 13.
        calibration: inputs by name, one run each; the number of rows is taken from them.

    Raises:
        NotSupported: without a product with stored weights, or for an opset below 13.
    """
    known = folded(proto)
    products = groups(known)
    if not products:
        raise NotSupported("dynamic: the network must have a MatMul or Gemm with stored float32 weights, and has none.")
    seen, _ = observe(known, products, calibration)
    costs = [times(group.shapes, seen[group.input].rows) for group in products]
    return sum(cost["float"] - min(cost.values()) for cost in costs)


def _choose(
    products: Sequence[Group],
    seen: Mapping[str, Observed],
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
    for group in products:
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
    products, one = groups(proto), {"x": np.ones(shapes[0][0], np.float32)}
    # Narrow weights are widened when the file is loaded: float32 arithmetic.
    distinct: list[Arithmetic] = [a for a in ("float", "tensor", "row") if a == "float" or a in allowed]
    seen = {"x": Observed(x, (0,), rows)}
    sessions = {str(a): Session(write(proto, products, seen, one, {"x": a})) for a in distinct}
    measured = latency(sessions, {"x": x}, seconds=0.02 * len(sessions), batch=rows, clock=time.thread_time)
    base = measured["float"].median_ms  # ratios hold on a busy machine
    return {a: base / measured["float" if a == "narrow" else a].ratio for a in allowed}
