"""1x1 and depthwise convolutions, patches and pooling of the engine agree with ONNX Runtime."""

from dataclasses import replace
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
from lilliput.engine.kernels import stripes
from lilliput.export.onnx import Session

pytestmark = pytest.mark.slow  # hundreds of programs are compiled


class Net:
    """Nodes side by side in one model, so that the C compiler runs once."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.constants: list[Any] = []

    def const(self, data: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(data, np.float32), name))
        return name

    def given(self, *shape: int) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def add(self, op: str, *names: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(names), [name], **attributes))
        return name

    def conv(
        self,
        x: str,
        outs: int,
        ins: int,
        kernel: tuple[int, ...],
        zeros: float = 0.0,
        residual: str = "",
        act: str = "",
        **attributes: Any,
    ) -> str:
        w = self.rng.standard_normal((outs, ins, *kernel)) / np.sqrt(ins * np.prod(kernel))
        w[self.rng.random(w.shape) < zeros] = 0
        y = self.add("Conv", x, self.const(w), self.const(self.rng.standard_normal(outs)), **attributes)
        y = self.add("Add", y, residual) if residual else y
        if act == "Clip":
            return self.add("Clip", y, self.const(0.0), self.const(1.0))
        return self.add(act, y) if act else y

    def ends(self, y: str) -> None:
        name = f"y{len(self.outputs)}"
        self.nodes.append(helper.make_node("Identity", [y], [name]))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def proto(self, opset: int = 19) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "net", self.inputs, self.outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def check(
    proto: onnx.ModelProto,
    folder: Path,
    starts: str,
    monkeypatch: pytest.MonkeyPatch,
    lanes: int = 0,
    to: str = "native",
) -> list[str]:
    """Compile with the kernels whose names start so where there are any, compare; the kernels used."""

    def only(node: Node, target: Any) -> list[Kernel]:
        found = every_candidate(node, replace(target, vector_bytes=4 * lanes) if lanes else target)
        return [k for k in found if k.name.startswith(starts)] or found

    monkeypatch.setattr(tune, "candidates", only)
    engine = lilliput.compile(proto, folder, tune=False, to=to)
    rng = np.random.default_rng(1)
    feeds = {
        i.name: rng.standard_normal([d.dim_value for d in i.type.tensor_type.shape.dim]).astype(np.float32)
        for i in proto.graph.input
    }
    wanted = Session(proto).run(feeds)
    for again in range(2):  # what a first run leaves in the arena must not matter to a second one
        made = engine(**feeds)
        for output, a, b in zip(proto.graph.output, made if isinstance(made, tuple) else (made,), wanted, strict=True):
            assert a.shape == b.shape
            assert np.abs(a - b).max() <= 1e-4 * np.abs(b).max() + 1e-6, (output.name, again)
    return [str(one["kernel"]) for one in engine.manifest["layers"]]


def blocks(zeros: float) -> onnx.ModelProto:
    """Inverted bottlenecks over planes of many sizes: 1x1, depthwise, 1x1 with a residual."""
    net = Net()
    sizes = [(1, 14, 14), (2, 7, 7), (1, 3, 5), (3, 4, 4), (1, 1, 9), (1, 28, 13), (1, 2, 33)]
    for number, (batch, height, width) in enumerate(sizes):
        ins, inner = 5 + number, 24 + number
        x = net.conv(net.given(batch, ins, height, width), ins, ins, (1, 1), zeros)
        a = net.conv(x, inner, ins, (1, 1), zeros, act="Clip")
        b = net.conv(a, inner, 1, (3, 3), group=inner, pads=[1] * 4, act="Relu")
        net.ends(net.conv(b, ins, inner, (1, 1), zeros, residual=x, act=("", "HardSwish", "Relu")[number % 3]))
    lines = net.conv(net.given(2, 300, 11), 20, 300, (1,), zeros, act="Clip")  # many inputs: taken in chunks
    net.ends(net.conv(lines, 20, 1, (5,), group=20, pads=[2, 2]))
    return net.proto()


@pytest.mark.parametrize(
    ("starts", "lanes", "to"),
    [
        ("pixels-dense", 0, "native"),
        ("pixels-sparse", 0, "native"),
        *(
            pytest.param(*settings, marks=pytest.mark.slow)
            for settings in (
                ("pixels-sparse", 4, "native"),
                ("pixels-dense", 4, "native"),
                ("pixels-sparse", 0, "portable"),
            )
        ),
    ],
)
def test_inverted_bottlenecks(
    starts: str, lanes: int, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = check(blocks(0.8 if "sparse" in starts else 0.0), tmp_path / "net", starts, monkeypatch, lanes, to)
    assert sum(name.startswith(starts) for name in used) == 22
    assert sum(name.startswith("depthwise") for name in used) == 8


DEPTHWISE: list[dict[str, Any]] = [
    {"size": (14, 14), "kernel": (5, 5)},
    {"size": (7, 7), "kernel": (3, 3), "act": "Clip"},
    {"size": (28, 28), "kernel": (5, 5), "batch": 2},
    {"size": (112, 56), "kernel": (3, 3), "strides": [2, 2], "pads": [0, 0, 1, 1], "act": "Clip"},
    {"size": (14, 14), "kernel": (5, 5), "strides": [2, 2], "pads": [1, 1, 2, 2]},
    {"size": (13, 17), "kernel": (3, 5), "strides": [2, 1], "pads": [0, 3, 2, 1], "dilations": [2, 2], "each": 2},
    {"size": (33, 40), "kernel": (3, 3), "strides": [1, 2], "dilations": [1, 3], "residual": True, "act": "Relu"},
    {"size": (3, 3), "kernel": (3, 3), "residual": True},
    {"size": (5, 5), "kernel": (5, 5), "strides": [2, 2], "pads": [4, 4, 4, 4], "act": "HardSwish"},
    {"size": (2, 70), "kernel": (1, 9), "pads": [0, 8, 0, 8], "act": "HardSwish"},
    {"size": (30,), "kernel": (7,), "batch": 2},
    {"size": (90,), "kernel": (3,), "strides": [2], "each": 3, "act": "Relu"},
]


@pytest.mark.parametrize(
    ("lanes", "to"),
    [
        (0, "native"),
        pytest.param(4, "native", marks=pytest.mark.slow),
        pytest.param(0, "portable", marks=pytest.mark.slow),
    ],
)
def test_depthwise_convolutions_of_every_setting(
    lanes: int, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net()
    for setting in DEPTHWISE:
        s = dict(setting)
        size, kernel, batch, each = s.pop("size"), s.pop("kernel"), s.pop("batch", 1), s.pop("each", 1)
        residual = s.pop("residual", False)
        pads = s.pop("pads", [k // 2 for k in kernel] * 2)
        for direct in (True, False):  # at the borders of the model, and between other layers
            x = net.given(batch, 3, *size)
            x = x if direct else net.conv(x, 3, 3, (1,) * len(size))
            more = (
                net.conv(x, 3 * each, 1, kernel, pads=pads, group=3, **{k: v for k, v in s.items() if k != "act"})
                if residual
                else ""
            )
            y = net.conv(x, 3 * each, 1, kernel, pads=pads, group=3, residual=more, **s)
            net.ends(y if direct else net.conv(y, 2, 3 * each, (1,) * len(size)))
    used = check(net.proto(), tmp_path / "net", "depthwise", monkeypatch, lanes, to)
    assert sum(name.startswith("depthwise") for name in used) == 2 * (len(DEPTHWISE) + 2)


PATCHES: list[dict[str, Any]] = [
    {"size": (32, 32), "kernel": (3, 3), "strides": [2, 2], "pads": [0, 0, 1, 1], "outs": 16, "act": "Clip"},
    {"size": (28, 28), "kernel": (3, 3), "residual": True, "act": "Relu"},
    {"size": (15, 17), "kernel": (3, 5), "strides": [2, 3], "dilations": [1, 2], "pads": [2, 1, 0, 2], "batch": 2},
    {"size": (14, 14), "kernel": (1, 1), "strides": [2, 2], "outs": 9},
    {"size": (9, 9), "kernel": (3, 3), "strides": [3, 3], "group": 4, "residual": True},
    {"size": (3, 3), "kernel": (5, 5), "pads": [6, 6, 6, 6], "act": "HardSwish"},
    {"size": (1300,), "kernel": (5,), "dilations": [3], "pads": [9, 0], "residual": True},
    {"size": (700,), "kernel": (4,), "strides": [2], "pads": [0, 1]},
]


@pytest.mark.parametrize(
    ("starts", "to"),
    [
        ("patches-dense", "native"),
        ("patches-sparse", "native"),
        pytest.param("patches-dense", "portable", marks=pytest.mark.slow),
    ],
)
def test_patches_of_every_setting(starts: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    for setting in PATCHES:
        s = dict(setting)
        size, kernel, batch, outs = s.pop("size"), s.pop("kernel"), s.pop("batch", 1), s.pop("outs", 4)
        residual, ins = s.pop("residual", False), 4 // s.get("group", 1)
        s["pads"] = s.pop("pads", [k // 2 for k in kernel] * 2)
        x = net.given(batch, 4, *size)
        more = net.conv(x, outs, ins, kernel, **{k: v for k, v in s.items() if k != "act"}) if residual else ""
        net.ends(net.conv(x, outs, ins, kernel, 0.7 if "sparse" in starts else 0.0, residual=more, **s))
    used = check(net.proto(), tmp_path / "net", starts, monkeypatch, to=to)
    assert sum(name.startswith(starts) for name in used) >= len(PATCHES) - 1


POOLS: list[dict[str, Any]] = [
    {"size": (12, 12), "kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"size": (13, 40), "kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1},
    {"size": (7, 7), "kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "batch": 2},
    {"size": (9, 33), "kernel_shape": [3, 5], "strides": [1, 3], "pads": [0, 2, 1, 1], "ceil_mode": 1},
    {"size": (10, 20), "kernel_shape": [2, 3], "dilations": [2, 3], "auto_pad": "VALID"},
    {"size": (10, 21), "kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"size": (50,), "kernel_shape": [4], "strides": [3], "pads": [2, 1]},
    {"size": (4, 5, 6), "kernel_shape": [2, 3, 2], "strides": [1, 2, 2], "pads": [0, 1, 1, 1, 1, 0]},
    {"size": (6, 6), "kernel_shape": [6, 6]},
]


def test_pooling_of_every_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    for setting in POOLS:
        s = dict(setting)
        size, batch = s.pop("size"), s.pop("batch", 1)
        x = net.given(batch, 3, *size)
        net.ends(net.add("MaxPool", x, **s))
        net.ends(net.add("MaxPool", net.conv(x, 4, 3, (1,) * len(size)), **s))
        for include in (0, 1):
            net.ends(net.add("AveragePool", x, count_include_pad=include, **s))
        net.ends(net.add("LpPool", x, p=3, **s))
    used = check(net.proto(), tmp_path / "net", "rows", monkeypatch)
    assert used.count("rows") == 4 * (len(POOLS) - 1)


def test_places_of_the_largest_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    net.nodes.append(
        helper.make_node("MaxPool", [net.given(2, 3, 8, 10)], ["large", "place"], kernel_shape=[2, 2], strides=[2, 2])
    )
    net.nodes.append(helper.make_node("MaxUnpool", ["large", "place"], ["back"], kernel_shape=[2, 2], strides=[2, 2]))
    net.ends("back")
    check(net.proto(), tmp_path / "net", "plain", monkeypatch)


def test_means_of_whole_planes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net()
    for size in ((7, 7), (14, 14), (1, 3), (40, 41), (100,)):
        x = net.conv(net.given(2, 3, *size), 5, 3, (1,) * len(size))
        net.ends(net.add("GlobalAveragePool", x))
        net.ends(net.add("GlobalMaxPool", x))
    x = net.given(3, 20, 50)
    net.ends(net.add("ReduceMax", x, axes=[2], keepdims=0))
    net.ends(net.add("ReduceSum", x, keepdims=0))
    used = check(net.proto(17), tmp_path / "net", "whole", monkeypatch)
    assert sum(name.startswith("whole") for name in used) >= 9


@pytest.mark.parametrize(
    ("zeros", "cache"),
    [
        (0.8, 9_000),
        pytest.param(0.0, 30_000, marks=pytest.mark.slow),
        pytest.param(0.8, 90_000, marks=pytest.mark.slow),
    ],
)
def test_chains_in_stripes(zeros: float, cache: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stripes, "LEAST_BYTES", 0)
    monkeypatch.setattr(stripes, "CACHE_BYTES", (cache,))
    net = Net()
    for batch, height, width, size, strides, pads in [
        (1, 6, 24, 3, 1, [1, 1, 1, 1]),
        (1, 15, 24, 3, 2, [0, 0, 1, 1]),
        (2, 14, 14, 5, 2, [1, 1, 2, 2]),
        (1, 7, 7, 5, 1, [2, 2, 2, 2]),
        (1, 11, 5, 3, 1, [1, 1, 1, 1]),
    ]:
        for before, after in ((True, True), (True, False), (False, True)):
            x = net.conv(net.given(batch, 4, height, width), 8, 4, (1, 1), act="Relu")
            x = net.add("Neg", x)  # so that the first convolution is in no chain
            y = net.conv(x, 8, 8, (1, 1), zeros, act="Clip") if before else x
            y = net.conv(y, 8, 1, (size, size), group=8, pads=pads, strides=[strides] * 2, act="Clip")
            if after:
                y = net.conv(y, 8, 8, (1, 1), zeros, residual=x if strides == 1 else "")
            # Planes whose end is the beginning of the next, and a reader that asks for room behind the last.
            y = net.add("MaxPool", y, kernel_shape=[1, 1]) if batch == 2 else y
            net.ends(net.conv(y, 8, 1, (3, 3), group=8, pads=[1] * 4))
    used = check(net.proto(), tmp_path / "net", "stripes", monkeypatch)
    assert sum(name.startswith("stripes") for name in used) >= 15
