"""The engine's elementwise operators, reductions and normalisations, against numpy and ONNX Runtime."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lilliput.engine.compile import compile
from lilliput.engine.expr import Expr, arg, const, statements, where
from lilliput.engine.fuse import fused
from lilliput.engine.helpers import HELPERS, texts, with_needed
from lilliput.engine.lower import lowered, supported
from lilliput.engine.read import read
from lilliput.export.onnx import Session

if shutil.which("cc") is None:
    pytest.skip("the engine needs a C compiler", allow_module_level=True)


def node(op: str, inputs: str, output: str, **attrs: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), output.split(), **attrs)


def model(
    nodes: list[onnx.NodeProto], inputs: dict[str, list[Any]], outputs: list[str], opset: int = 20, **constants: Any
) -> onnx.ModelProto:
    """A model of nodes over float32 inputs, its outputs' shapes found by ONNX."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True, data_prop=True)


def check(
    made: onnx.ModelProto,
    folder: Path,
    feeds: dict[str, np.ndarray] | None = None,
    to: str = "native",
    engine: Any = None,
    tolerance: float = 2e-6,
) -> Any:
    """Compile without tuning, compare with ONNX Runtime; the engine."""
    engine = engine or compile(made.SerializeToString(), folder / "out", to=to, tune=False)
    draw = np.random.default_rng(0)
    if feeds is None:
        feeds = {
            value.name: draw.standard_normal([d.dim_value for d in value.type.tensor_type.shape.dim], np.float32)
            for value in made.graph.input
        }
    outputs = engine(**feeds)
    onnx.save(made, folder / "model.onnx")
    for a, b in zip(
        outputs if isinstance(outputs, tuple) else (outputs,), Session(folder / "model.onnx").run(feeds), strict=True
    ):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert np.abs(a.astype(float) - b).max() <= tolerance * max(np.abs(b).max(), 1)
    return engine


def kernels(engine: Any) -> list[str]:
    return [layer["op"] for layer in engine.manifest["layers"]]


REFERENCES: dict[str, Callable[[float], float]] = {
    "Exp": math.exp,
    "Tanh": math.tanh,
    "Erf": math.erf,
    "Log": math.log,
    "Softplus": lambda x: math.log1p(math.exp(x)),
    "Sigmoid": lambda x: 1 / (1 + math.exp(-x)),
}


@pytest.fixture(scope="module")
def functions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    nodes = [node(op, "x", op) for op in REFERENCES]
    return compile(
        model(nodes, {"x": [4096]}, list(REFERENCES)).SerializeToString(),
        tmp_path_factory.mktemp("functions") / "out",
        tune=False,
    )


def test_functions_are_accurate_to_a_millionth(functions: Any) -> None:
    for low, high in ((1e-6, 1e-3), (1e-3, 1), (1, 80)):
        size = np.exp(np.linspace(math.log(low), math.log(high), 2048))
        x = np.concatenate([-size, size]).astype(np.float32)
        for (op, exact), computed in zip(REFERENCES.items(), functions(x), strict=True):
            for value, y in zip(x[::7], computed[::7], strict=True):
                if op == "Log" and value <= 0:
                    continue
                wanted = exact(float(value))
                assert abs(y - wanted) <= 1e-6 * abs(wanted) + 1e-37, (op, value, y, wanted)


def test_functions_where_float32_ends(functions: Any) -> None:
    x = np.zeros(4096, np.float32)
    x[:8] = np.inf, -np.inf, np.nan, 1e30, -1e30, 0, 88.5, 1e-40
    exp, tanh, erf, log, softplus, sigmoid = (y[:8] for y in functions(x))
    assert np.array_equal(exp[:6], np.array([np.inf, 0, np.nan, np.inf, 0, 1], np.float32), equal_nan=True)
    assert exp[6] == pytest.approx(math.exp(88.5), rel=1e-6)
    for computed in (tanh, erf):
        assert np.array_equal(computed[:6], np.array([1, -1, np.nan, 1, -1, 0], np.float32), equal_nan=True)
    assert np.array_equal(log[:3], np.array([np.inf, np.nan, np.nan], np.float32), equal_nan=True)
    assert log[5] == -np.inf
    assert log[7] == pytest.approx(math.log(1e-40), rel=1e-5)
    assert np.array_equal(softplus[:5], np.array([np.inf, 0, np.nan, 1e30, 0], np.float32), equal_nan=True)
    assert np.array_equal(sigmoid[:6], np.array([1, 0, np.nan, 1, 0, 0.5], np.float32), equal_nan=True)


def test_helpers_stand_behind_what_they_call() -> None:
    for name in HELPERS:
        assert with_needed(name)[-1] == name
    assert with_needed("softplus") == ["bits", "exp_falling", "log_series", "softplus"]
    assert len(texts("sigmoid", "exp")) == 3


def test_every_expression_is_written_without_a_name_twice() -> None:
    x: Expr = arg(0, "float32")
    lines, results = statements([where(x > 0, x.of("exp") + 1, const(2, "float32"))], ["x0[i]"], prefix="q")
    assert [line.split("=")[0].split()[-1] for line in lines] == [f"q{i}" for i in range(4)]
    assert results == ["q3"]


@pytest.mark.parametrize("to", ["native", "portable"])
def test_activations_in_one_pass(tmp_path: Path, to: str) -> None:
    ops = [
        "Relu",
        "LeakyRelu",
        "HardSigmoid",
        "HardSwish",
        "Elu",
        "Selu",
        "Gelu",
        "Mish",
        "Softsign",
        "ThresholdedRelu",
        "Sign",
        "Floor",
        "Round",
    ]
    nodes = [node(op, "x", op) for op in ops] + [
        node("Celu", "x", "Celu", alpha=0.7),
        node("Gelu", "x", "tanh", approximate="tanh"),
    ]
    check(model(nodes, {"x": [3, 37]}, [*ops, "Celu", "tanh"], opset=22), tmp_path, to=to)


def test_integers_wrap_and_divide_towards_zero(tmp_path: Path) -> None:
    a = np.array([7, -7, 2**31 - 1, -(2**31), 5, 0], np.int32)
    b = np.array([2, 2, 1, -1, 0, 3], np.int32)
    values = [helper.make_tensor_value_info(n, TensorProto.INT32, [6]) for n in "ab"]
    outs = ["sum", "div", "mod", "fmod"]
    graph = helper.make_graph(
        [
            node("Add", "a b", "sum"),
            node("Div", "a b", "div"),
            node("Mod", "a b", "mod"),
            node("Mod", "a b", "fmod", fmod=1),
        ],
        "ints",
        values,
        [helper.make_tensor_value_info(n, TensorProto.INT32, [6]) for n in outs],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    total, quotient, mod, fmod = compile(made.SerializeToString(), tmp_path / "out", tune=False)(a, b)
    with np.errstate(all="ignore"):
        assert np.array_equal(total, a + b)
    assert quotient.tolist()[:4] == [3, -3, 2**31 - 1, -(2**31)]
    assert mod.tolist()[:3] == [1, 1, 0]
    assert fmod.tolist()[:3] == [1, -1, 0]


REDUCTIONS = ["Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSumExp", "SumSquare"]


@pytest.mark.parametrize("axes", [[0], [1], [2], [0, 2], [0, 1, 2]])
def test_reductions_inside_and_across(tmp_path: Path, axes: list[int]) -> None:
    # Of x and of x with its dimensions turned, which a reduction reads as it lies.
    nodes, outputs = [node("Transpose", "x", "t", perm=[2, 0, 1])], []
    for source in "xt":
        for op in REDUCTIONS:
            outputs.append(f"{source}{op}")
            nodes.append(node(f"Reduce{op}", f"{source} axes", outputs[-1], keepdims=int(op in ("Sum", "Max"))))
    check(model(nodes, {"x": [5, 9, 70]}, outputs, axes=np.array(axes)), tmp_path, tolerance=4e-6)


def test_arg_max_top_k_and_sums_so_far(tmp_path: Path) -> None:
    nodes, outputs = [node("Transpose", "x", "t", perm=[1, 0]), node("Round", "t", "r")], []
    for axis in (0, 1):
        for last in (0, 1):
            outputs += [f"max{axis}{last}", f"min{axis}{last}"]
            nodes += [
                node("ArgMax", "r", outputs[-2], axis=axis, select_last_index=last),
                node("ArgMin", "r", outputs[-1], axis=axis, select_last_index=last, keepdims=0),
            ]
        outputs += [f"best{axis}", f"at{axis}", f"sum{axis}", f"back{axis}"]
        nodes += [
            node("TopK", "t k", f"best{axis} at{axis}", axis=axis),
            node("CumSum", f"t axis{axis}", f"sum{axis}", exclusive=1),
            node("CumSum", f"t axis{axis}", f"back{axis}", reverse=1),
        ]
    check(model(nodes, {"x": [23, 41]}, outputs, k=np.array([4]), axis0=np.array(0), axis1=np.array(1)), tmp_path)


@pytest.mark.parametrize("to", ["native", "portable"])
def test_normalisations_in_both_layouts(tmp_path: Path, to: str) -> None:
    draw = np.random.default_rng(1)
    nodes, outputs = [node("Transpose", "x", "t", perm=[0, 2, 1])], []
    constants = {f"{n}{k}": draw.standard_normal(k).astype(np.float32) for n in "gb" for k in (24, 70)}
    for source, size in (("x", 70), ("t", 24)):
        nodes += [
            node("LayerNormalization", f"{source} g{size} b{size}", f"ln{source}", axis=-1),
            node("Softmax", source, f"sm{source}", axis=-1),
            node("LogSoftmax", source, f"lsm{source}", axis=-1),
            node("Softmax", source, f"first{source}", axis=0),
            node("InstanceNormalization", f"{source} g{94 - size} b{94 - size}", f"in{source}"),
        ]
        outputs += [f"{op}{source}" for op in ("ln", "sm", "lsm", "first", "in")]
    engine = check(model(nodes, {"x": [3, 24, 70]}, outputs, **constants), tmp_path, to=to, tolerance=4e-6)
    assert "Reduce" not in kernels(engine)


def test_sizes_that_are_free(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    nodes = [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("Softmax", "t", "s", axis=1),
        node("Softmax", "t", "u", axis=2),
        node("Add", "s u", "v"),
        node("LayerNormalization", "v g g", "n", axis=-1),
        node("ReduceMean", "n axes", "m", keepdims=1),
        node("Mul", "n m", "y"),
        node("ArgMax", "n", "a", axis=1),
    ]
    made = model(
        nodes,
        {"x": ["batch", 12, "seq"]},
        ["y", "a"],
        g=draw.standard_normal(12).astype(np.float32),
        axes=np.array([1]),
    )
    engine = compile(made.SerializeToString(), tmp_path / "out", tune=False, shapes={"x": [2, 12, 100]})
    for batch, seq in ((2, 100), (1, 1), (2, 37), (1, 64)):
        check(made, tmp_path, {"x": draw.standard_normal((batch, 12, seq), np.float32)}, engine=engine, tolerance=4e-6)


EPSILON, TWO, ONE = np.float32(1e-5), np.float32(2), np.float32(1)
MEAN = [node("ReduceMean", "x axes", "m"), node("Sub", "x m", "d")]
ROOT = [node("ReduceMean", "q axes", "v"), node("Add", "v epsilon", "w"), node("Sqrt", "w", "s")]
TAIL = [node("Mul", "n g", "o"), node("Add", "o b", "y")]
SPELT = {
    "layer normalisation": ([*MEAN, node("Pow", "d two", "q"), *ROOT, node("Div", "d s", "n"), *TAIL], ["Normalize"]),
    "layer normalisation, then more": (
        [*MEAN, node("Mul", "d d", "q"), *ROOT, node("Div", "d s", "n"), node("Sigmoid", "n", "y")],
        ["Normalize", "Map"],
    ),
    "by the inverse": (
        [*MEAN, node("Mul", "d d", "q"), *ROOT, node("Reciprocal", "s", "i"), node("Mul", "i d", "n"), *TAIL],
        ["Normalize"],
    ),
    "without the mean": (
        [node("Mul", "x x", "q"), *ROOT, node("Div", "one s", "i"), node("Mul", "x i", "n"), node("Mul", "g n", "y")],
        ["Normalize"],
    ),
    "softmax": (
        [
            node("ReduceMax", "x axes", "m"),
            node("Sub", "x m", "d"),
            node("Exp", "d", "e"),
            node("ReduceSum", "e axes", "s"),
            node("Div", "e s", "y"),
        ],
        ["Softmax"],
    ),
    "scaled and masked": ([node("Mul", "x two", "h"), node("Add", "h b", "i"), node("Softmax", "i", "y")], ["Softmax"]),
    "a sum of squares": ([node("Mul", "x x", "q"), node("ReduceSum", "q axes", "y")], ["Reduce"]),
    # Not what it seems: another variance, another mean.
    "of another": (
        [*MEAN, node("Mul", "x x", "q"), *ROOT, node("Div", "d s", "y")],
        ["Reduce", "Map", "Reduce", "Map", "Map"],
    ),
}


@pytest.mark.parametrize("name", SPELT)
def test_what_is_spelt_out_becomes_one_layer(tmp_path: Path, name: str) -> None:
    nodes, wanted = SPELT[name]
    draw = np.random.default_rng(3)
    every = {
        "g": draw.standard_normal(40).astype(np.float32),
        "b": draw.standard_normal(40).astype(np.float32),
        "axes": np.array([-1]),
        "epsilon": EPSILON,
        "two": TWO,
        "one": ONE,
    }
    used = {k: v for k, v in every.items() if any(k in n.input for n in nodes)}
    made = model(nodes, {"x": [3, 11, 40]}, ["y"], **used)
    graph = fused(lowered(read(made.SerializeToString(), supported=supported)))
    ops = [n.op for n in graph.nodes]
    assert sorted(ops) == sorted(wanted) or (name == "of another" and "Normalize" not in ops)
    check(made, tmp_path, tolerance=4e-6)


def test_maps_of_operands_in_different_orders(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "x", "t", perm=[2, 0, 1]),
        node("Relu", "t", "r"),
        node("Transpose", "z", "u", perm=[0, 2, 1]),
        node("Add", "r u", "s"),
        node("Sigmoid", "s", "y"),
        node("Transpose", "x", "w", perm=[1, 2, 0]),
        node("Mul", "w k", "v"),
    ]
    check(model(nodes, {"x": [17, 35, 50], "z": [50, 35, 17]}, ["y", "v"], k=np.arange(17, dtype=np.float32)), tmp_path)


def test_batch_norm_in_training_and_groups(tmp_path: Path) -> None:
    draw = np.random.default_rng(4)
    channels = {n: np.abs(draw.standard_normal(8)).astype(np.float32) for n in "sbmv"}
    nodes = [
        node("BatchNormalization", "x s b m v", "y"),
        node("LRN", "x", "l", size=3),
        node("GroupNormalization", "x s b", "g", num_groups=2),
        node("MeanVarianceNormalization", "x", "n", axes=[0, 2]),
        node("LpNormalization", "x", "p", axis=1, p=2),
        node("Hardmax", "x", "h", axis=1),
    ]
    check(
        model(nodes, {"x": [2, 8, 5, 7]}, ["y", "l", "g", "n", "p", "h"], opset=21, **channels),
        tmp_path,
        tolerance=1e-5,
    )
