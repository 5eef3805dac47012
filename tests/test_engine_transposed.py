"""Transposed convolutions against ONNX Runtime: every setting, any number of dimensions."""

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import lilliput
from lilliput.export.onnx import Session


@pytest.mark.parametrize(
    "sizes, kernel, settings",
    [
        ((7,), (3,), {"strides": [2], "pads": [1, 0]}),
        ((5, 4), (3, 2), {"strides": [2, 3], "pads": [1, 0, 0, 1], "output_padding": [1, 2]}),
        ((4, 5), (3, 3), {"strides": [1, 2], "dilations": [2, 1], "group": 2}),
        ((4, 4), (3, 3), {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
        ((4, 4), (2, 3), {"strides": [3, 2], "auto_pad": "SAME_LOWER"}),
        ((3, 3), (3, 3), {"strides": [3, 2], "output_shape": [10, 8], "output_padding": [1, 1]}),
        ((3, 2, 4), (2, 2, 2), {"strides": [2, 1, 2], "pads": [0, 1, 1, 0, 0, 1]}),
    ],
)
def test_transposed_convolutions(sizes: tuple[int, ...], kernel: tuple[int, ...], settings: dict[str, Any]) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 4, *sizes)).astype(np.float32)
    weight = draw.standard_normal((4, 3, *kernel)).astype(np.float32)
    bias = draw.standard_normal(3 * settings.get("group", 1)).astype(np.float32)
    nodes = [
        helper.make_node("ConvTranspose", ["x", "w", "b"], ["c"], **settings),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    expected = Session(proto).all({"x": x})[0]
    output = lilliput.compile(proto, tune=False)(x)
    assert output.shape == expected.shape and np.abs(output - expected).max() <= 1e-5 * np.abs(expected).max()
