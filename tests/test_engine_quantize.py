"""Quantized networks: what ONNX Runtime's static quantizer writes, in both of its formats, agrees to one quantum."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lilliput.engine.compile import compile, write
from lilliput.engine.plan import Plan
from lilliput.engine.run import Engine
from lilliput.engine.target import target
from lilliput.export.onnx import Session


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.c, self.d = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        y = torch.relu(self.c(nn.functional.relu6(self.b(x))))
        y = nn.functional.max_pool2d(y, 2)
        y = y * torch.sigmoid(y) + nn.functional.leaky_relu(y)
        return self.d(torch.cat([y, y], 1)[:, 8:24].mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("form", "kind"), [("QDQ", "QInt8"), ("QOperator", "QUInt8")])
def test_static_quantization(tmp_path: Path, form: str, kind: str) -> None:
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(
                [{"x": np.random.default_rng(i).standard_normal((1, 3, 8, 8)).astype(np.float32)} for i in range(3)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    torch.manual_seed(0)
    torch.onnx.export(
        Net().eval(),
        (torch.zeros(1, 3, 8, 8),),
        str(tmp_path / "net.onnx"),
        input_names=["x"],
        output_names=["y"],
        dynamo=False,
        opset_version=13,
    )
    made = tmp_path / "quantized.onnx"
    q.quantize_static(
        tmp_path / "net.onnx",
        made,
        Reader(),
        per_channel=True,
        quant_format=getattr(q.QuantFormat, form),
        activation_type=getattr(q.QuantType, kind),
        weight_type=q.QuantType.QInt8,
    )
    engine = compile(made, tune=False)
    scales = [numpy_helper.to_array(t) for t in onnx.load(made).graph.initializer if t.name == "y_scale"]
    for seed in range(5):
        x = np.random.default_rng(10 + seed).standard_normal((1, 3, 8, 8)).astype(np.float32)
        assert np.abs(engine(x) - Session(made).run({"x": x})[0]).max() <= 1.01 * float(scales[0])


@pytest.mark.parametrize("axis", [None, 1, -1])
def test_codes_and_back(axis: int | None) -> None:
    scale = np.array(0.1, np.float32) if axis is None else np.array([0.1, 0.03, 1.7, 0.25], np.float32)
    zero = np.array(7, np.uint8) if axis is None else np.array([0, 255, 128, 3], np.uint8)
    given = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["levels"], **given),
        helper.make_node("DequantizeLinear", ["levels", "s", "z"], ["y"], **given),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (3, 4, 4))],
        [
            helper.make_tensor_value_info("levels", TensorProto.UINT8, (3, 4, 4)),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, (3, 4, 4)),
        ],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")],
    )
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString()
    x = 10 * np.random.default_rng(0).standard_normal((3, 4, 4)).astype(np.float32)
    levels, y = compile(data, tune=False)(x)
    wanted = Session(onnx.load_from_string(data)).run({"x": x})
    assert np.abs(levels.astype(int) - wanted[0]).max() <= 1 and (levels == wanted[0]).mean() > 0.95
    assert np.abs(y - wanted[1]).max() <= 1.01 * scale.max()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [64, 16, 0])
def test_codes_between_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """The same file on its levels: integer layers give what ONNX Runtime's give."""
    from onnxruntime import quantization as q

    monkeypatch.setattr(Plan, "cost_ns", property(lambda plan: -sum("8" in node.op for node in plan.graph.nodes)))

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(
                [{"x": np.random.default_rng(i).standard_normal((2, 4, 9, 9)).astype(np.float32)} for i in range(3)]
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    torch.manual_seed(0)
    torch.onnx.export(
        Block().eval(),
        (torch.zeros(2, 4, 9, 9),),
        str(tmp_path / "net.onnx"),
        input_names=["x"],
        output_names=["y"],
        dynamo=False,
        opset_version=13,
    )
    made = tmp_path / "quantized.onnx"
    q.quantize_static(tmp_path / "net.onnx", made, Reader(), per_channel=True, weight_type=q.QuantType.QInt8)
    native = target("native")
    machine = native if width == 64 else replace(native, vector_bytes=width)
    engine = Engine(write(made, tmp_path / "out", machine, tune=False))
    assert sum(layer["op"] == "Conv8" for layer in engine.manifest["layers"]) == 4
    scale = next(numpy_helper.to_array(t) for t in onnx.load(made).graph.initializer if t.name == "y_scale")
    x = np.random.default_rng(10).standard_normal((2, 4, 9, 9)).astype(np.float32)
    assert np.abs(engine(x) - Session(made).run({"x": x})[0]).max() <= 1.01 * float(scale)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1)
        self.c, self.d = nn.Conv2d(24, 36, 3, stride=2, padding=1), nn.Conv2d(24, 36, 1, stride=2)
        self.e, self.f = nn.Conv2d(36, 8, (3, 1), dilation=2), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.a(x))
        x = torch.relu(self.b(x) + x)
        x = torch.relu(self.c(x) + self.d(x))
        return self.f(torch.relu(self.e(x)).mean((2, 3)))
