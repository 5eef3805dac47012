"""Products that skip the inputs that are zero: right for any input, offered only where an example showed zeros."""

import json
import subprocess

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import lilliput
from lilliput.cli import app
from lilliput.engine import compile as compiling
from lilliput.engine.kernel import candidates
from lilliput.engine.target import WARNINGS, target

pytestmark = pytest.mark.slow  # programs are compiled and tuned

SKIPS = "inputs that are not zero"
N, FLOAT = helper.make_node, TensorProto.FLOAT


def proto(nodes, inputs, constants):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "products",
        [value(n, FLOAT, s) for n, s in inputs],
        [value("y", FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def product(shape, weight, bias, after):
    """x W + bias and what follows it."""
    ends = {
        "relu": [N("Relu", ["a"], ["y"])],
        "clip": [N("Clip", ["a", "low", "high"], ["y"])],
        "residual": [N("Add", ["r", "a"], ["s"]), N("Sigmoid", ["s"], ["y"])],
    }
    inputs = [("x", shape)] + ([("r", (*shape[:-1], len(bias)))] if after == "residual" else [])
    return proto(
        [N("MatMul", ["x", "w"], ["m"]), N("Add", ["m", "b"], ["a"]), *ends[after]],
        inputs,
        {"w": weight, "b": bias, "low": -0.5, "high": 2},
    )


def reference(model, feeds):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def skipping(monkeypatch, made, example, to="native"):
    """The model compiled with nothing but the kernels that skip zeros for its products, each in turn; their names."""
    for which in range(2):
        names = []

        def ranked_of(target, which=which, names=names):
            def ranked(node):
                kernels = candidates(node, target)
                if node.op == "MatMul" and "active" in node.attrs:
                    kernels = [k for k in kernels if k.name.startswith(SKIPS)]
                    kernels = [kernels[min(which, len(kernels) - 1)]]
                    names.append(kernels[0].name)
                return kernels

            return ranked

        monkeypatch.setattr(compiling.tuning, "estimated", ranked_of)
        engine = compiling.compile(made, to=to, tune=False, example=example)
        assert names
        yield engine


def sparse(rng, shape, active):
    x = rng.standard_normal(shape).astype(np.float32)
    return np.where(rng.random(shape) < active, x, 0).astype(np.float32)


def close(a, b):
    return np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-3)


@pytest.mark.parametrize(("shape", "outs", "after", "to"), [
    ((1, 37), 50, "residual", "native"), ((1, 37), 50, "residual", "portable"), ((1, 64), 128, "relu", "native"),
    ((3, 45), 39, "clip", "native"), ((2, 9), 3, "relu", "native"), ((1, 20), 1, "relu", "portable"),
    ((1, 100), 700, "residual", "native"), ((1, 1, 33), 96, "clip", "portable")])  # fmt: skip
def test_skipping_is_right_for_any_input(monkeypatch, shape, outs, after, to):
    rng = np.random.default_rng(0)
    weight, bias = (rng.standard_normal(s).astype(np.float32) for s in ((shape[-1], outs), outs))
    made = product(shape, weight, bias, after)
    more = {"r": rng.standard_normal((*shape[:-1], outs)).astype(np.float32)} if after == "residual" else {}
    for engine in skipping(monkeypatch, made, {"x": sparse(rng, shape, 0.3), **more}, to):
        for active in (0.0, 0.05, 0.5, 1.0):
            feeds = {"x": sparse(rng, shape, active), **more}
            assert close(engine(feeds), reference(made, feeds)[0])


def test_what_is_no_number_is_not_skipped(monkeypatch):
    rng = np.random.default_rng(1)
    made = product((1, 40), np.abs(rng.standard_normal((40, 32))), np.ones(32), "relu")
    for engine in skipping(monkeypatch, made, sparse(rng, (1, 40), 0.2)):
        x = sparse(rng, (1, 40), 0.2)
        x[0, 7] = np.inf
        assert (engine(x) == np.inf).all()
        x[0, 8] = np.nan
        assert np.isnan(engine(x)).all()
        assert close(engine(np.full((1, 40), -0.0, np.float32)), np.ones((1, 32)))


def test_inputs_and_outputs_may_lie_in_any_order(monkeypatch):
    """W x with x and y as columns, which a transpose reads."""
    rng = np.random.default_rng(2)
    weight = rng.standard_normal((19, 30)).astype(np.float32)
    nodes = [N("Relu", ["x"], ["a"]), N("MatMul", ["w", "a"], ["b"]), N("Transpose", ["b"], ["y"], perm=[1, 0])]
    made = proto(nodes, [("x", (30, 2))], {"w": weight})
    x = rng.standard_normal((30, 2)).astype(np.float32)
    for engine in skipping(monkeypatch, made, x):
        assert close(engine(x), reference(made, {"x": x})[0])


def perceptron(ins=64, hidden=512, outs=384, bias=-1.5):
    """Two products with a ReLU between, of which few units are active."""
    rng = np.random.default_rng(3)
    arrays = {
        "w1": rng.standard_normal((ins, hidden)) / ins**0.5,
        "b1": np.full(hidden, bias),
        "w2": rng.standard_normal((hidden, outs)),
        "b2": rng.standard_normal(outs),
    }
    nodes = [N("Gemm", ["x", "w1", "b1"], ["h"]), N("Relu", ["h"], ["r"]), N("Gemm", ["r", "w2", "b2"], ["y"])]
    return proto(nodes, [("x", ("batch", ins))], arrays), arrays


def test_the_tuner_measures_on_the_zeros_of_the_example(tmp_path):
    made, arrays = perceptron()
    x = np.random.default_rng(4).standard_normal((20, 64)).astype(np.float32)
    share = float((x @ arrays["w1"] + arrays["b1"] > 0).mean())
    engine = lilliput.compile(made, tmp_path / "engine", example=x)
    first, second = engine.manifest["layers"]
    assert "active" not in first and not first["kernel"].startswith(SKIPS)
    assert second["kernel"].startswith(SKIPS) and second["active"] == pytest.approx(share, abs=1e-3) and share < 0.1
    plain = lilliput.compile(made)
    assert not any(layer["kernel"].startswith(SKIPS) for layer in plain.manifest["layers"])
    assert second["ns"] < 0.7 * plain.manifest["layers"][1]["ns"]
    for row in x:
        assert close(engine(row[None]), plain(row[None]))
    compiler, text = target(), (tmp_path / "engine" / "model.c").read_text()
    assert "of the inputs active" in text
    command = [
        *compiler.cc,
        *compiler.flags,
        *WARNINGS,
        "-Werror",
        "-c",
        str(tmp_path / "engine" / "model.c"),
        "-o",
        str(tmp_path / "model.o"),
    ]
    subprocess.run(command, check=True)


def test_it_is_not_offered_where_zeros_are_few_or_weights_endless():
    made, _ = perceptron(bias=3.0)
    x = np.random.default_rng(5).standard_normal((4, 64)).astype(np.float32)
    assert all("active" not in layer for layer in lilliput.compile(made, tune=False, example=x).manifest["layers"])
    made, _ = perceptron(hidden=64, outs=32)
    weight = numpy_helper.to_array(made.graph.initializer[2]).copy()
    weight[0, 0] = np.inf
    made.graph.initializer[2].CopyFrom(numpy_helper.from_array(weight, "w2"))
    assert all("active" not in layer for layer in lilliput.compile(made, tune=False, example=x).manifest["layers"])


@pytest.mark.parametrize(
    ("example", "wrong"),
    [
        (np.zeros((2, 63), np.float32), "must have shape"),
        (np.zeros((0, 64), np.float32), "must have shape"),
        ({"z": np.zeros((1, 64), np.float32)}, "must hold x"),
        (np.zeros((1, 64), np.complex64), "must be float32"),
    ],
)
def test_examples_that_do_not_fit(example, wrong):
    with pytest.raises(ValueError, match=wrong):
        lilliput.compile(perceptron(hidden=16, outs=8)[0], tune=False, example=example)


def test_the_command_line_takes_an_example(tmp_path):
    made, _ = perceptron(hidden=256, outs=128)
    onnx.save(made, tmp_path / "model.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32))
    command = [
        "compile",
        str(tmp_path / "model.onnx"),
        "--out",
        str(tmp_path / "out"),
        "--no-tune",
        "--json",
        "--example",
    ]
    shown = CliRunner().invoke(app, [*command, str(tmp_path / "x.npy")])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.stdout)["layers"][1]["kernel"].startswith(SKIPS)
    (tmp_path / "bad.npy").write_text("no numbers")
    shown = CliRunner().invoke(app, [*command, str(tmp_path / "bad.npy")])
    assert shown.exit_code == 2 and "must be a file of numpy's" in " ".join(shown.output.split())
