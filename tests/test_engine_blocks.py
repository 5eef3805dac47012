"""The sparse product of one position whose zeros come in blocks: what it computes, and when it is offered."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from lilliput.engine.compile import compile


def weights(outs: int, ins: int, block: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    kept = (draw.random((outs // block, ins)) < 0.2).repeat(block, 0)
    return (draw.standard_normal((outs, ins)) * kept).astype(np.float32)


def model(weight: np.ndarray, bias: np.ndarray | None, *, relu: bool = False, tanh: bool = False,
          scale: np.ndarray | None = None) -> onnx.ModelProto:  # fmt: skip
    """relu or tanh (x w^T + bias); with a scale the weight is int8 levels of it."""
    outs, ins = weight.shape
    nodes, held = [], [numpy_helper.from_array(weight, "w")]
    if scale is not None:
        held.append(numpy_helper.from_array(scale, "scale"))
        nodes.append(helper.make_node("DequantizeLinear", ["w", "scale"], ["wide"], axis=0))
    if bias is not None:
        held.append(numpy_helper.from_array(bias, "b"))
    given = ["x", "w" if scale is None else "wide", *([] if bias is None else ["b"])]
    nodes.append(helper.make_node("Gemm", given, ["u"], transB=1))
    if relu or tanh:
        nodes.append(helper.make_node("Relu" if relu else "Tanh", ["u"], ["y"]))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, ins])],
        [helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, [1, outs])], held,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("block", "outs", "ins"), [(8, 40, 300), (16, 48, 70), (32, 64, 33), (64, 128, 20)])
@pytest.mark.parametrize("after", ["", "relu", "tanh"])
def test_it_equals_the_dense_product(tmp_path: Path, block: int, outs: int, ins: int, after: str) -> None:
    weight, bias = weights(outs, ins, block), np.linspace(-1, 1, outs, dtype=np.float32)
    bias_ = None if after == "relu" else bias
    engine = compile(model(weight, bias_, relu=after == "relu", tanh=after == "tanh"), tmp_path, tune=False)
    assert engine.manifest["layers"][0]["kernel"] == f"sparse, blocks of {block} outputs"
    assert engine.manifest["layers"][0]["nonzeros"] == np.count_nonzero(weight)
    x = np.random.default_rng(1).standard_normal((1, ins)).astype(np.float32)
    want = x.astype(np.float64) @ weight.T + (0 if bias_ is None else bias_)
    want = {"": want, "relu": np.maximum(want, 0), "tanh": np.tanh(want)}[after]
    np.testing.assert_allclose(engine(x), want, rtol=1e-5, atol=1e-5)


def test_eight_bit_values_stay_so(tmp_path: Path) -> None:
    levels = np.clip(np.round(weights(64, 90, 16) * 50), -127, 127).astype(np.int8)
    scale, bias = np.linspace(0.01, 0.02, 64, dtype=np.float32), np.ones(64, np.float32)
    engine = compile(model(levels, bias, scale=scale), tmp_path, tune=False)
    assert engine.manifest["layers"][0]["kernel"] == "sparse, blocks of 16 outputs, 8-bit"
    x = np.random.default_rng(1).standard_normal((1, 90)).astype(np.float32)
    np.testing.assert_allclose(engine(x), x @ (levels * scale[:, None]).T + bias, rtol=1e-5, atol=1e-5)


def test_scattered_zeros_are_left_to_others(tmp_path: Path) -> None:
    weight = np.where(np.random.default_rng(0).random((64, 64)) < 0.2, 1, 0).astype(np.float32)
    engine = compile(model(weight, None), tmp_path, tune=False)
    assert "blocks of" not in engine.manifest["layers"][0]["kernel"]
