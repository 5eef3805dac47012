"""Recurrent layers: every direction, state, activation and way of storing the weights equals ONNX Runtime."""

import ctypes
import subprocess

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lilliput.engine.compile import compile
from lilliput.engine.graph import C_TYPES
from lilliput.engine.kernels.matvec import ways
from lilliput.engine.kernels.matvec_way import MatVec
from lilliput.engine.target import Target, target
from lilliput.export.onnx import Session

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}


def model(
    kind: str,
    direction: str,
    hidden: int,
    zeros: float,
    steps: int = 5,
    batch: int = 2,
    ins: int = 3,
    state: bool = False,
    lengths: bool = False,
    block: int = 1,
    **attrs: object,
) -> bytes:
    draw = np.random.default_rng(0)
    many, gates = 2 if direction == "bidirectional" else 1, GATES[kind]
    shapes = {"W": (many, gates * hidden, ins), "R": (many, gates * hidden, hidden), "B": (many, 2 * gates * hidden)}
    held = {name: (0.5 * draw.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    dropped = draw.random((many, gates * hidden // block, hidden)) < zeros
    held["R"][np.repeat(dropped, block, 1)] = 0
    names = ["x", "W", "R", "B", "", ""]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, (steps, batch, ins))]
    if state:
        names[5:] = ["h"] + (["c"] if kind == "LSTM" else [])
        given += [helper.make_tensor_value_info(n, TensorProto.FLOAT, (many, batch, hidden)) for n in names[5:]]
    if lengths:
        names[4] = "lengths"
        held["lengths"] = np.array([steps, steps - 2], np.int32)[:batch]
    made = ["y", "y_h"] + (["y_c"] if kind == "LSTM" else [])
    node = helper.make_node(kind, names, made, hidden_size=hidden, direction=direction, **attrs)
    graph = helper.make_graph(
        [node],
        "g",
        given,
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in made],
        [numpy_helper.from_array(a, n) for n, a in held.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnx.shape_inference.infer_shapes(proto).SerializeToString()


def same(data: bytes, tune: bool = False) -> list[str]:
    draw = np.random.default_rng(1)
    engine = compile(data, tune=tune)
    feeds = {name: draw.standard_normal(tuple(shape)).astype(np.float32) for name, _, shape in engine._kinds}
    for output, wanted in zip(engine(**feeds), Session(onnx.load_from_string(data)).run(feeds), strict=True):
        assert output.shape == wanted.shape
        assert np.abs(output - wanted).max() <= 1e-4 * np.abs(wanted).max()
    return [layer["kernel"] for layer in engine.manifest["layers"] if layer["op"] == "Recurrence"]


@pytest.mark.parametrize(
    ("kind", "direction", "attrs"),
    [
        ("GRU", "bidirectional", {"linear_before_reset": 1}),
        ("GRU", "reverse", {}),
        ("LSTM", "bidirectional", {"clip": 0.7}),
        ("RNN", "bidirectional", {"activations": ["Relu", "HardSigmoid"]}),
        ("LSTM", "forward", {"input_forget": 1}),
    ],
)
def test_equals_onnx_runtime(kind: str, direction: str, attrs: dict[str, object]) -> None:
    same(model(kind, direction, 8, 0.3, state=True, lengths=True, **attrs))


def test_one_step_with_its_state() -> None:
    kernels = same(model("GRU", "forward", 64, 0.9, steps=1, batch=1, state=True, block=16, linear_before_reset=1))
    assert kernels and "sparse" in kernels[0]


def offered(m: int, k: int, zeros: float, block: int, machine: Target) -> list[tuple[np.ndarray, MatVec]]:
    draw = np.random.default_rng(2)
    weight = draw.standard_normal((m, k)).astype(np.float32)
    weight[np.repeat(draw.random((m // block, k)) < zeros, block, 0)] = 0
    return [(weight, way) for way in ways(weight, None, machine)]


def test_every_way_gives_the_product(tmp_path: object) -> None:
    native = target("native")
    narrow = Target("native", 16, native.flags, native.cc)
    cases = [
        c
        for args in ((128, 40, 0.0, 1), (100, 33, 0.8, 1), (96, 224, 0.9, 1), (64, 24, 0.9, 16), (16, 8, 1.0, 1))
        for t in (native, narrow, Target("portable", 0, native.flags, native.cc))
        for c in offered(*args, t)
    ]
    text = ["#include <stdint.h>", "#include <string.h>", *dict.fromkeys(h for _, way in cases for h in way.helpers)]
    for i, (_, way) in enumerate(cases):
        keys = [f"const {C_TYPES[np.asarray(a).dtype.name]} *{key}" for key, a in way.constants.items()]
        text.append(
            f"void f{i}(float *y, const float *x, {', '.join(keys)}) {{ "
            f"{way.call.format(y='y', x='x', **{key: key for key in way.constants})} }}"
        )
    (tmp_path / "m.c").write_text("\n".join(text))  # type: ignore[operator]
    made = str(tmp_path / "m.so")  # type: ignore[operator]
    command = [
        *native.cc,
        *native.flags,
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-shared",
        "-fPIC",
        str(tmp_path / "m.c"),
        "-o",
        made,
    ]  # type: ignore[operator]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(made)
    for i, (weight, way) in enumerate(cases):
        x, y = np.zeros(way.ins + 16, np.float32), np.zeros(way.outs, np.float32)
        x[: weight.shape[1]] = np.random.default_rng(3).standard_normal(weight.shape[1])
        kept = [np.ascontiguousarray(a) for a in way.constants.values()]
        getattr(library, f"f{i}")(*(ctypes.c_void_p(a.ctypes.data) for a in (y, x, *kept)))
        wanted = weight @ x[: weight.shape[1]]
        assert np.abs(y[: len(wanted)] - wanted).max() <= 4e-5 * max(np.abs(wanted).max(), 1e-9), way.name
