"""Every way in which a toolkit broke a network without a word, made again by our own code, and caught.

The eight cases are those seen in other toolkits: outputs that point elsewhere, 4-bit weights that two runtimes read in
two ways, 8-bit products that saturate, static activation ranges that clip, a pattern that skipped every Conv1d, an int8
file that is larger, one that is slower, and a small factorisation in a file of megabytes.
"""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lilliput.cost.measure import Measured
from lilliput.errors import ExportError
from lilliput.export import guard
from lilliput.export.onnx import Session, narrow
from lilliput.stored.grid import Grid, half
from lilliput.stored.plain import Plain
from lilliput.stored.sparse import Sparse

draw = np.random.default_rng(0)
WEIGHT = draw.standard_normal((32, 64)).astype(np.float32)
LAST = draw.standard_normal((8, 32)).astype(np.float32)


def dense(weight=WEIGHT):
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["y"], transB=1),
    ]
    return model(nodes, {"w": weight, "v": LAST})


def model(nodes, tensors, opset=20):
    held = [t if isinstance(t, TensorProto) else numpy_helper.from_array(t, name) for name, t in tensors.items()]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        held,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def inputs(count=200):
    return np.abs(np.random.default_rng(1).standard_normal((count, 64))).astype(np.float32)


def grid(weight, bits):
    top = 2 ** (bits - 1) - 1
    scale = half(np.abs(weight).max(1, keepdims=True) / top * 1.01)
    return Grid(np.clip(np.round(weight / scale), -top, top).astype(int), bits, scale)


def expected(proto=None):
    return Session(proto or dense()).outputs(inputs())


def test_a_good_artifact_passes():
    stored = {"w": grid(WEIGHT, 8)}
    measured = guard.compare(
        Session(narrow(dense(), stored)).outputs(inputs()), expected(dense(stored["w"].decode())), exact=False
    )
    assert measured["changed"] == 0 and measured["cosine"] > 0.999
    assert guard.flags(narrow(dense(), stored), dense()) == []


def test_scales_of_another_layer_that_turn_the_outputs_away():
    """A scale estimation that took an embedding to cosine .019: here the scales of the rows are shuffled."""
    g = grid(WEIGHT * np.linspace(0.01, 3, 32, dtype=np.float32)[:, None], 8)
    right = dense(g.decode())
    wrong = narrow(right, {"w": Grid(g.codes, 8, g.scale[np.random.default_rng(0).permutation(32)])})
    with pytest.raises(ExportError, match=r"may change|must lie where"):
        guard.compare(Session(wrong).outputs(inputs()), expected(right), exact=False)
    # For embeddings nobody asks which entry is the largest: the direction alone must do.
    with pytest.raises(ExportError, match="cosine"):
        guard.compare(Session(wrong).outputs(inputs()), expected(right), exact=False, most_changed=1.0)


def test_four_bits_that_are_read_in_another_order():
    """int4 that scores .967 in one runtime and .804 in another: two nibbles of a byte change places."""
    g = grid(WEIGHT, 4)
    proto = narrow(dense(), {"w": g})
    guard.compare(Session(proto).outputs(inputs()), expected(dense(g.decode())), exact=False)
    tensor = next(t for t in proto.graph.initializer if t.data_type == TensorProto.INT4)
    raw = np.frombuffer(tensor.raw_data, np.uint8)
    tensor.raw_data = (raw >> 4 | raw << 4).astype(np.uint8).tobytes()
    onnx.checker.check_model(proto, full_check=True)  # nothing is formally wrong with it
    with pytest.raises(ExportError, match="may change"):
        guard.compare(Session(proto).outputs(inputs()), expected(dense(g.decode())), exact=False)


def dynamic(codes, scale):
    """Dynamic int8 as the runtimes' own tools write it: u8 activations times s8 weights."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "t"], ["st"]),
        helper.make_node("Mul", ["f", "st"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["y"], transB=1),
    ]
    return model(nodes, {"w": codes.T.astype(np.int8), "t": np.float32(scale).reshape(()), "v": LAST})


def saturated(bits):
    """Weights of one sign, as after a ReLU-heavy layer: neighbours add up to more than 16 bits hold."""
    top = 2 ** (bits - 1) - 1
    weight = np.random.default_rng(2).uniform(0.5, 1, WEIGHT.shape).astype(np.float32)
    scale = weight.max() / top
    codes = np.round(weight / scale)
    return dynamic(codes, scale), dense((codes * scale).astype(np.float32))


def test_products_of_bytes_that_saturate_are_named():
    eight, _ = saturated(8)
    seven, _ = saturated(7)
    assert "can saturate" in guard.saturating(eight) and "reduced range" in guard.saturating(eight)
    assert guard.saturating(seven) == ""
    assert guard.saturating(dense()) == ""


def test_a_graph_of_dequantize_nodes_is_looked_at_too():
    scale, zero8, zero = np.float32(0.02), np.uint8(0), np.int8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zu"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zu"], ["a"]),
        helper.make_node("DequantizeLinear", ["w", "s", "zs"], ["b"]),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    tensors = {"w": np.full((64, 8), 120, np.int8), "s": np.array(scale), "zu": np.array(zero8), "zs": np.array(zero)}
    assert "can saturate" in guard.saturating(model(nodes, tensors))
    tensors["zu"] = np.array(np.int8(0))
    assert guard.saturating(model(nodes, tensors)) == ""  # signed activations do not overflow


def bright(count=200):
    """Activations near the top of their range."""
    return np.random.default_rng(3).uniform(0.7, 1, (count, 64)).astype(np.float32)


def test_saturation_on_this_machine_is_refused_with_its_reason():
    """Default int8 that took a perceptron from .665 to .576 on CPUs without VNNI."""
    proto, right = saturated(8)
    if guard.saturates():
        assert any("saturate" in sentence for sentence in guard.flags(proto, dense()))
        with pytest.raises(ExportError, match="must lie where"):
            guard.compare(
                Session(proto).outputs(bright()), Session(right).outputs(bright()), exact=False, least_cosine=0.9999
            )
    else:
        assert not any("saturate" in sentence for sentence in guard.flags(proto, dense()))
    proto, right = saturated(7)
    measured = guard.compare(
        Session(proto).outputs(bright()), Session(right).outputs(bright()), exact=False, most_changed=0.05
    )
    assert measured["cosine"] > 0.9999


def test_static_ranges_that_clip_the_activations():
    """Static int8 that took MiniLM to .357: outliers decide the range, or are cut off."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["a"]),
        helper.make_node("Gemm", ["a", "w"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "v"], ["y"], transB=1),
    ]
    clipped = model(nodes, {"s": np.float32(0.0005).reshape(()), "z": np.array(0, np.uint8), "w": WEIGHT, "v": LAST})
    with pytest.raises(ExportError, match="may change"):
        guard.compare(Session(clipped).outputs(inputs()), expected(), exact=False)


def test_a_pattern_that_skipped_every_conv1d():
    net = nn.Sequential(nn.Conv1d(4, 8, 4), nn.Conv1d(8, 8, 4), nn.Linear(8, 4))
    before = {name: value.detach().numpy() for name, value in net.named_parameters()}

    def two_of_four(value):
        rank = np.abs(value.reshape(-1, 4)).argsort(1).argsort(1)
        return Sparse((rank >= 2).reshape(value.shape), Plain(value))

    after = {name: two_of_four(value) if name == "2.weight" else Plain(value) for name, value in before.items()}
    assert guard.untouched(before, after) == ["0.weight", "1.weight"]
    assert guard.untouched(before, after, ["0.weight", "2.weight"]) == ["0.weight"]


def test_an_int8_file_that_is_larger_and_slower_than_the_dense_one():
    """Quantised and dequantised weights in float32 beside the integers, with a node for each."""
    g = grid(WEIGHT, 8)
    proto = dense(g.decode())
    proto.graph.initializer.append(numpy_helper.from_array(g.codes.astype(np.int32), "copy"))
    slow = Measured(2.0, 1.9, 2.1, 100, 1, 1, "here", 0.5)
    fast = Measured(1.0, 0.9, 1.1, 100, 1, 1, "here", 1.0)
    sentences = guard.flags(proto, dense(), slow, fast)
    assert any("larger than the dense one" in s for s in sentences)
    assert any("slower than the dense one: 2.000 ms against 1.000" in s for s in sentences)
    assert guard.slower(fast, slow) == guard.slower(fast, fast) == ""


def test_a_factorisation_whose_export_is_written_out():
    """10,853 values in a file of 9 MB: the exporter multiplied the factors out."""
    a, b = draw.standard_normal((256, 2)).astype(np.float32), draw.standard_normal((2, 256)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    written_out = model(nodes, {"w": a @ b})
    assert "1,024 values" in guard.bloated(written_out, values=a.size + b.size)
    kept = model(
        [helper.make_node("MatMul", ["x", "a"], ["i"]), helper.make_node("MatMul", ["i", "b"], ["y"])], {"a": a, "b": b}
    )
    assert guard.bloated(kept, values=a.size + b.size) == guard.bloated(kept) == ""


def test_a_float_artifact_of_other_weights_is_refused():
    with pytest.raises(ExportError, match="must predict what the model predicts"):
        guard.compare(Session(dense(WEIGHT[::-1].copy())).outputs(inputs()), expected(), exact=True)
