"""Convolutions of the engine agree with ONNX Runtime, whichever kernel computes them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lilliput
from lilliput.engine import tune
from lilliput.engine.graph import Node
from lilliput.engine.kernel import Kernel
from lilliput.engine.kernel import candidates as every_candidate
from lilliput.engine.target import target
from lilliput.export.onnx import Session

ACTS = ("none", "Relu", "Clip", "HardSwish")


def layer(rng: np.random.Generator, number: int, zeros: float, settings: dict[str, Any]) -> tuple[Any, ...]:
    """(nodes, inputs, outputs, constants) of one convolution, perhaps with bias, residual and activation."""
    s = settings
    dims = len(s["size"])
    group, ins, outs = s.get("group", 1), s.get("ins", 3), s.get("outs", 5)
    kernel = s["kernel"]
    w = rng.standard_normal((outs, ins // group, *kernel)).astype(np.float32)
    w /= np.sqrt(w[0].size, dtype=np.float32)
    w[rng.random(w.shape) < zeros] = 0
    constants = [numpy_helper.from_array(w, f"w{number}")]
    names = [f"x{number}", f"w{number}"]
    if rng.random() < 0.6:
        constants.append(numpy_helper.from_array(rng.standard_normal(outs).astype(np.float32), f"b{number}"))
        names.append(f"b{number}")
    strides, dilations = s.get("strides", [1] * dims), s.get("dilations", [1] * dims)
    pads = s.get("pads", [k // 2 for k in kernel] * 2)
    nodes = [
        helper.make_node("Conv", names, [f"c{number}"], strides=strides, dilations=dilations, pads=pads, group=group)
    ]
    made = [
        (n + pads[d] + pads[d + dims] - (kernel[d] - 1) * dilations[d] - 1) // strides[d] + 1
        for d, n in enumerate(s["size"])
    ]
    batch = s.get("batch", 1)
    inputs = [helper.make_tensor_value_info(f"x{number}", TensorProto.FLOAT, [batch, ins, *s["size"]])]
    last = f"c{number}"
    if rng.random() < 0.4:
        inputs.append(helper.make_tensor_value_info(f"r{number}", TensorProto.FLOAT, [batch, outs, *made]))
        nodes.append(helper.make_node("Add", [last, f"r{number}"], [f"s{number}"]))
        last = f"s{number}"
    act = ACTS[rng.integers(len(ACTS))]
    if act == "Clip":
        constants += [numpy_helper.from_array(np.float32(v), f"{k}{number}") for k, v in (("lo", -0.5), ("hi", 1.0))]
    if act != "none":
        nodes.append(
            helper.make_node(act, [last, f"lo{number}", f"hi{number}"] if act == "Clip" else [last], [f"a{number}"])
        )
        last = f"a{number}"
    nodes.append(helper.make_node("Identity", [last], [f"y{number}"]))
    outputs = [helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [batch, outs, *made])]
    return nodes, inputs, outputs, constants


def model(layers: list[tuple[Any, ...]]) -> onnx.ModelProto:
    """Convolutions side by side in one model, so that the C compiler runs once."""
    parts = [[x for one in layers for x in one[k]] for k in range(4)]
    graph = helper.make_graph(parts[0], "convolutions", parts[1], parts[2], parts[3])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def check(proto: onnx.ModelProto, folder: Path, starts: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Compile with the kernels whose names start so where there are any, compare; how often each was used."""

    def only(node: Node, target: Any) -> list[Kernel]:
        kernels = every_candidate(node, target)
        return [k for k in kernels if k.name.startswith(starts)] or kernels

    monkeypatch.setattr(tune, "candidates", only)
    engine = lilliput.compile(proto, folder, tune=False)
    rng = np.random.default_rng(1)
    feeds = {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in proto.graph.input
    }
    for again in range(2):  # what a first run leaves in the arena must not matter to a second one
        made = engine(**feeds)
        made = made if isinstance(made, tuple) else (made,)
        for output, a, b in zip(proto.graph.output, made, Session(proto).run(feeds), strict=True):
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max() + 1e-6, (output.name, again)
    used: dict[str, int] = {}
    for one in engine.manifest["layers"]:
        used[one["kernel"]] = used.get(one["kernel"], 0) + 1
    return used


PLANES: list[dict[str, Any]] = [
    {"size": (32, 32), "kernel": (3, 3), "ins": 4, "outs": 6},
    {"size": (16, 16), "kernel": (3, 3), "ins": 4, "outs": 3},
    {"size": (8, 8), "kernel": (3, 3), "ins": 8, "outs": 4, "batch": 2},
    {"size": (7, 7), "kernel": (3, 3), "ins": 8, "outs": 4},
    {"size": (14, 13), "kernel": (3, 3)},
    {"size": (28, 28), "kernel": (5, 5), "batch": 3},
    {"size": (9, 21), "kernel": (3, 5), "pads": [0, 1, 2, 3]},
    {"size": (12, 20), "kernel": (2, 4), "pads": [1, 0, 0, 0], "dilations": [2, 1]},
    {"size": (11, 17), "kernel": (3, 3), "pads": [2, 2, 2, 2], "dilations": [2, 2], "group": 2, "ins": 6, "outs": 4},
    {"size": (32, 32), "kernel": (3, 3), "strides": [2, 2], "ins": 4, "outs": 6},
    {"size": (17, 15), "kernel": (3, 3), "strides": [2, 2], "batch": 2},
    {"size": (16, 16), "kernel": (1, 1), "strides": [2, 2], "pads": [0, 0, 0, 0]},
    {"size": (19, 40), "kernel": (5, 3), "strides": [3, 1], "pads": [1, 0, 0, 1]},
    {"size": (20, 19), "kernel": (3, 4), "strides": [1, 3], "dilations": [1, 2], "pads": [1, 3, 1, 2]},
    {"size": (3, 300), "kernel": (3, 3)},
    {"size": (6, 5), "kernel": (3, 3), "pads": [4, 4, 4, 4]},
    {"size": (1, 16), "kernel": (1, 3), "ins": 1},
    {"size": (16, 16), "kernel": (1, 1), "ins": 7, "outs": 9, "pads": [0, 0, 0, 0]},
    {"size": (5, 6), "kernel": (5, 6), "pads": [0, 0, 0, 0]},
]
LINES: list[dict[str, Any]] = [
    {"size": (40,), "kernel": (5,), "strides": [2], "pads": [1, 1], "ins": 1, "outs": 25},
    {"size": (19,), "kernel": (3,), "strides": [2], "pads": [1, 1], "ins": 25, "outs": 25},
    {"size": (40,), "kernel": (5,), "ins": 6},
    {"size": (333,), "kernel": (7,), "ins": 4, "batch": 2},
    {"size": (21,), "kernel": (3,), "dilations": [4], "pads": [8, 0]},
    {"size": (64,), "kernel": (3,), "group": 3, "ins": 6, "outs": 9},
    {"size": (3,), "kernel": (3,)},
]


@pytest.mark.parametrize("starts", ["sparse shifts", "sparse copies"])
def test_sparse_convolutions_of_every_setting(starts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    layers = [layer(rng, i, 0.75, s) for i, s in enumerate([*PLANES, *LINES])]
    used = check(model(layers), tmp_path / "net", starts, monkeypatch)
    share = {"sparse shifts": 0.5, "sparse copies": 0.25}[starts]
    assert sum(n for name, n in used.items() if name.startswith(starts)) >= share * len(layers)


@pytest.mark.parametrize("starts", ["winograd 2x2", "winograd 4x4"])
def test_dense_convolutions_with_fewer_multiplications(
    starts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    settings = [
        {"size": (32, 32), "ins": 16, "outs": 16},
        {"size": (16, 16), "ins": 8, "outs": 20},
        {"size": (8, 8), "ins": 9, "outs": 17},
        {"size": (28, 28), "ins": 4, "outs": 5, "batch": 2},
        {"size": (14, 14), "ins": 5, "outs": 8},
        {"size": (7, 7), "ins": 8, "outs": 16},
        {"size": (17, 30), "ins": 4, "outs": 4, "pads": [0, 1, 2, 1]},
        {"size": (30, 13), "ins": 5, "outs": 8, "pads": [1, 0, 0, 0]},
        {"size": (10, 60), "ins": 4, "outs": 4},
        {"size": (9, 31), "ins": 4, "outs": 7, "pads": [3, 1, 3, 1]},
    ]
    layers = [layer(rng, i, 0.0, {"kernel": (3, 3), **s}) for i, s in enumerate(settings)]
    used = check(model(layers), tmp_path / "net", starts, monkeypatch)
    # A row of tiles of 2x2 has to fit into a vector: with eight lanes planes of at most 16 columns.
    assert used[starts] >= (7 if target().lanes >= 16 or starts == "winograd 4x4" else 5)


@pytest.mark.parametrize("kind", ["float16", "bytes", "nibbles", "signs"])
def test_narrow_weights_stay_narrow(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    nodes, inputs, outputs, constants = layer(rng, 0, 0.8, {"size": (16, 16), "kernel": (3, 3), "ins": 16, "outs": 16})
    w = numpy_helper.to_array(constants[0])
    if kind == "float16":
        stored = [numpy_helper.from_array(w.astype(np.float16), "narrow")]
        read = helper.make_node("Cast", ["narrow"], ["w0"], to=TensorProto.FLOAT)
    else:
        most = {"bytes": 127, "nibbles": 7, "signs": 1}[kind]
        scale = np.abs(w).max((1, 2, 3)) / most
        levels = np.sign(w) if kind == "signs" else np.rint(w / scale[:, None, None, None])
        stored = [numpy_helper.from_array(levels.astype(np.int8), "narrow"), numpy_helper.from_array(scale, "scale")]
        read = helper.make_node("DequantizeLinear", ["narrow", "scale"], ["w0"], axis=0)
    proto = model([([read, *nodes], inputs, outputs, [*stored, *constants[1:]])])
    check(proto, tmp_path / "net", "sparse", monkeypatch)
    text = (tmp_path / "net" / "model.c").read_text()
    assert {"float16": "unpack_halves", "bytes": "unpack_bytes", "nibbles": "unpack_nibbles", "signs": "unpack_signs"}[
        kind
    ] in text


def test_a_layer_without_any_weight_left_is_its_bias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    settings: list[dict[str, Any]] = [
        {"size": (8, 8), "kernel": (3, 3)},
        {"size": (8, 8), "kernel": (3, 3), "strides": [2, 2]},
    ]
    check(model([layer(rng, i, 1.0, s) for i, s in enumerate(settings)]), tmp_path / "net", "sparse", monkeypatch)
