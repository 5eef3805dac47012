"""Counted costs are exact, measured ones carry their machine, and the kinds never mix."""

import json
import time

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lilliput.cost.count import Counted, count, shapes, stored_values
from lilliput.cost.measure import Measured, latency, machine, profile
from lilliput.export.onnx import Session, narrow
from lilliput.stored.grid import Grid, half


def network(nodes, tensors, shape, out, kind=TensorProto.FLOAT):
    held = [
        numpy_helper.from_array(np.asarray(v, np.float32 if np.asarray(v).dtype.kind == "f" else np.int64), k)
        for k, v in tensors.items()
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", *out])],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def convolutions(width=8):
    draw = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "first"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "second"], ["c"], group=width, strides=[2, 2]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Flatten", ["d"], ["e"]),
        helper.make_node("Gemm", ["e", "last"], ["y"], transB=1),
    ]
    return network(
        nodes,
        {
            "first": draw.standard_normal((width, 1, 3, 3)),
            "second": draw.standard_normal((width, 1, 3, 3)),
            "last": draw.standard_normal((3, width)),
        },
        (1, 9, 9),
        (3,),
    )


def images(count=2):
    return np.random.default_rng(0).standard_normal((count, 1, 9, 9)).astype(np.float32)


def test_macs_of_convolutions_groups_strides_and_products():
    counted = count(convolutions(), images())
    assert counted.macs == 81 * 8 * 9 + 4 * 4 * 8 * 9 + 8 * 3
    assert counted.values == 8 * 9 * 2 + 24
    assert counted.bytes == convolutions().ByteSize()


def test_macs_of_attention_and_recurrent_cells():
    product = network(
        [helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), helper.make_node("MatMul", ["x", "t"], ["y"])],
        {},
        (5, 6),
        (5, 5),
    )
    assert count(product, np.zeros((3, 5, 6), np.float32)).macs == 5 * 5 * 6
    cell = network(
        [
            helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
            helper.make_node("GRU", ["t", "w", "r"], ["", "h"], hidden_size=4),
            helper.make_node("Squeeze", ["h", "zero"], ["y"]),
        ],
        {"w": np.zeros((1, 12, 3)), "r": np.zeros((1, 12, 4)), "zero": np.array([0])},
        (7, 3),
        (4,),
    )
    assert count(cell, np.zeros((1, 7, 3), np.float32)).macs == 7 * 12 * (3 + 4)
    with pytest.raises(ValueError, match=r"x must have the shape \(batch, 7, 3\), got \(1, 7, 9\)"):
        count(cell, np.zeros((1, 7, 9), np.float32))
    lstm = nn.LSTM(3, 4, batch_first=True, bidirectional=True)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = lstm

        def forward(self, x):
            return self.lstm(x)[0][:, -1]

    assert count(Last(), torch.zeros(1, 7, 3)).macs == 7 * 2 * 4 * 4 * (3 + 4)


def test_values_of_a_narrow_file_leave_scales_out():
    proto = convolutions()
    codes = np.random.default_rng(0).integers(-7, 8, (8, 1, 3, 3))
    small = narrow(proto, {"first": Grid(codes, 4, half(np.linspace(0.1, 1, 8).reshape(8, 1, 1, 1)))})
    assert stored_values(small) == stored_values(proto)
    assert count(small, images()).macs == count(proto, images()).macs
    assert count(proto, images(), values=10).values == 10


def test_shapes_are_those_of_a_run_at_batch_one():
    sizes = shapes(convolutions(), images())
    assert sizes["c"] == (1, 8, 4, 4) and sizes["y"] == (1, 3) and sizes["x"] == (1, 1, 9, 9)


def measured(ms=1.0):
    return Measured(ms, ms, ms, 1, 1, 1, "here", 1.0)


@pytest.mark.parametrize(
    "a, b",
    [
        (Counted(1, 1, 1), measured()),
        (measured(), Counted(1, 1, 1)),
        (measured(), measured()),
        (Counted(1, 1, 1), 3),
        (3, Counted(1, 1, 1)),
    ],
)
def test_costs_of_two_kinds_never_add_up(a, b):
    with pytest.raises(TypeError, match="must not be added"):
        a + b


def test_costs_of_one_kind_do():
    assert Counted(1, 2, 3) + Counted(1, 1, 1) == Counted(2, 3, 4)


def test_latency_is_interleaved_and_says_what_it_was_measured_with():
    sessions = {
        "wide": Session(convolutions(32)),
        "narrow": Session(convolutions(8)),
        "two": Session(convolutions(8), 2),
    }
    times = latency(sessions, images(), seconds=0.05, least=5, batch=3)
    assert list(times) == ["wide", "narrow", "two"] and times["wide"].ratio == 1.0
    assert len({m.runs for m in times.values()}) == 1 and times["wide"].runs >= 5
    for m in times.values():
        assert 0 < m.q1_ms <= m.median_ms <= m.q3_ms and m.batch == 3 and m.runtime.startswith("onnxruntime")
    assert times["two"].threads == 2
    own = latency(sessions, images(), seconds=0.02, least=5, clock=time.process_time)
    assert own["wide"].median_ms > 0
    with pytest.raises(ValueError, match="needs a session"):
        latency({}, images())


def test_the_machine_is_plain_data():
    here = machine()
    assert json.loads(json.dumps(here)) == here
    assert here["cores"] >= 1 and here["onnxruntime"] and here["torch"]


def test_profile_gives_every_layer_its_share():
    shares = profile(convolutions(64), images(), runs=5)
    assert {"first", "second", "last"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1) and all(share >= 0 for share in shares.values())
