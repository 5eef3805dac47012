"""Int8 arithmetic of an ONNX network: exact where it says so, close where it rounds, and chosen by measuring."""

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from lilliput.errors import NotSupported
from lilliput.export.onnx import Session
from lilliput.quant.dynamic import chosen, dynamic, error
from lilliput.quant.int8 import channel_levels, pair_levels, row_balance
from lilliput.quant.products import groups

WIDTH, HIDDEN, WORDS = 32, 64, 50


def network(
    nodes: list[Any], tensors: dict[str, Any], inputs: dict[str, tuple[int, list[Any]]], opset: int = 20
) -> ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return proto


def single(weight: np.ndarray, opset: int = 20) -> ModelProto:
    return network(
        [helper.make_node("MatMul", ["x", "w"], ["out"])], {"w": weight}, {"x": (1, ["n", len(weight)])}, opset
    )


@pytest.fixture
def block() -> tuple[ModelProto, list[dict[str, np.ndarray]]]:
    """A table, then a normalisation with outlier channels that feeds a product, a residual and a second product."""
    rng = np.random.default_rng(0)
    scale = np.ones(WIDTH, np.float32)
    scale[3], scale[17] = 40, 25
    tensors = {
        "table": rng.standard_normal((WORDS, WIDTH), dtype=np.float32),
        "scale": scale,
        "shift": rng.standard_normal(WIDTH, dtype=np.float32),
        "up": rng.standard_normal((WIDTH, HIDDEN), dtype=np.float32) / scale[:, None],
        "bias": rng.standard_normal(HIDDEN, dtype=np.float32),
        "down": rng.standard_normal((HIDDEN, WIDTH), dtype=np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("LayerNormalization", ["rows", "scale", "shift"], ["normal"]),
        helper.make_node("MatMul", ["normal", "up"], ["wide"]),
        helper.make_node("Add", ["wide", "bias"], ["biased"]),
        helper.make_node("Gelu", ["biased"], ["bent"]),
        helper.make_node("MatMul", ["bent", "down"], ["narrow"]),
        helper.make_node("Add", ["narrow", "normal"], ["out"]),
    ]
    runs = [{"ids": rng.integers(0, WORDS, (2, 8))} for _ in range(4)]
    return network(nodes, tensors, {"ids": (7, ["n", 8])}), runs


def outputs(proto: ModelProto, runs: list[dict[str, np.ndarray]]) -> list[list[np.ndarray]]:
    return [Session(proto).all(run) for run in runs]


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_pair_levels_never_saturate_in_the_runtime(rows: int) -> None:
    rng = np.random.default_rng(1)
    levels, _ = pair_levels(rng.standard_normal((63, 40), dtype=np.float32))
    assert np.abs(levels).max() > 90  # more than the 7 bits that reduce_range leaves
    q = np.where(rng.random((rows, 63)) < 0.8, 255, 0).astype(np.uint8)
    graph = [helper.make_node("MatMulInteger", ["q", "w"], ["sum"]), helper.make_node("Cast", ["sum"], ["out"], to=1)]
    got = Session(network(graph, {"w": levels}, {"q": (2, [rows, 63])})).all({"q": q})[0]
    assert np.array_equal(got, q.astype(np.int64) @ levels)


def test_pair_levels_are_as_fine_as_the_pairs_allow() -> None:
    alone = np.array([[1.0], [0.0], [0.0], [-1.0]], np.float32)
    together = np.array([[1.0], [1.0], [0.0], [-1.0]], np.float32)
    assert np.abs(pair_levels(alone)[0]).max() == 127
    assert np.abs(pair_levels(together)[0]).max() == 64
    levels, step = pair_levels(np.zeros((3, 2), np.float32))
    assert not levels.any() and (step == 1).all()


def test_channel_levels_err_by_half_a_step() -> None:
    weight = np.random.default_rng(2).standard_normal((20, 7), dtype=np.float32)
    levels, step = channel_levels(weight)
    assert np.abs(levels * step - weight).max() <= step.max() * 0.501


def test_row_balance_spends_few_codes_on_the_small_side() -> None:
    x = np.random.default_rng(3).standard_normal((200, 50), dtype=np.float32)
    assert 0.5 <= row_balance(x) <= 2
    assert row_balance(np.maximum(x, -0.17)) > 5


@pytest.mark.parametrize("how", ["tensor", "row", "narrow"])
def test_each_arithmetic_is_close(block: Any, how: Any) -> None:
    proto, runs = block
    small = dynamic(proto, runs, arithmetic=how)
    lost = error(small, runs, outputs(proto, runs))
    assert 0 < lost < (3e-4 if how == "row" else 2e-3)
    assert set(chosen(small).values()) == (set() if how == "narrow" else {how})
    types = {tensor.name: tensor.data_type for tensor in small.graph.initializer}
    assert types["up/codes"] == types["down/codes"] == types["table/rows"] == TensorProto.INT8
    assert "table" not in types and "up" not in types
    assert small.ByteSize() < proto.ByteSize()


def test_equalisation_is_exact_and_helps(block: Any) -> None:
    proto, runs = block
    dense = outputs(proto, runs)
    plain, equalised = (dynamic(proto, runs, arithmetic="tensor", equalise=e) for e in (False, True))
    assert error(equalised, runs, dense) < error(plain, runs, dense) / 2
    # The residual reads the normalised values as they were.
    before, after = ({t.name: numpy_helper.to_array(t) for t in net.graph.initializer} for net in (proto, equalised))
    assert np.allclose(after["scale/equalised"] * after["normal/equaliser"], before["scale"], rtol=1e-6)
    assert np.ptp(after["normal/equaliser"]) > 1


def test_rows_do_not_depend_on_their_neighbours() -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((4, 48), dtype=np.float32)
    x[0] *= 1000
    x[3] = 0
    proto = single(rng.standard_normal((48, 40), dtype=np.float32))
    dense = Session(proto).all({"x": x})[0]
    tensor, row = (Session(dynamic(proto, [{"x": x}], arithmetic=how)).all({"x": x})[0] for how in ("tensor", "row"))
    assert np.abs(tensor - dense)[1:3].max() > 1  # the large row's step drowns them
    assert np.abs(row - dense)[1:3].max() < 0.3
    assert np.array_equal(row[3], np.zeros(40))


def test_shared_input_is_quantized_once_and_shared_weights_are_stored_once() -> None:
    rng = np.random.default_rng(5)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["p"]),
        helper.make_node("MatMul", ["x", "b"], ["q"]),
        helper.make_node("Add", ["p", "q"], ["s"]),
        helper.make_node("MatMul", ["s", "a"], ["out"]),
    ]
    a, b = rng.standard_normal((2, 40, 40), dtype=np.float32)
    proto = network(nodes, {"a": a, "b": b}, {"x": (1, ["n", 40])})
    small = dynamic(proto, [{"x": rng.standard_normal((6, 40), dtype=np.float32)}], arithmetic="tensor")
    assert sum(node.op_type == "DynamicQuantizeLinear" for node in small.graph.node) == 2
    assert sum(tensor.data_type == TensorProto.INT8 for tensor in small.graph.initializer) == 2


@pytest.mark.parametrize("how", ["tensor", "row", "narrow", "float"])
def test_gemm_with_bias_and_folded_transpose(how: Any) -> None:
    rng = np.random.default_rng(6)
    nodes = [
        helper.make_node("Transpose", ["first"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned"], ["middle"]),
        helper.make_node("Gemm", ["middle", "last", "bias"], ["out"], transB=1),
    ]
    tensors = {
        "first": rng.standard_normal((50, 40), dtype=np.float32),
        "last": rng.standard_normal((30, 50), dtype=np.float32),
        "bias": rng.standard_normal(30, dtype=np.float32) * 20,
    }
    proto = network(nodes, tensors, {"x": (1, ["n", 40])})
    runs = [{"x": rng.standard_normal((9, 40), dtype=np.float32)}]
    lost = error(dynamic(proto, runs, arithmetic=how), runs, outputs(proto, runs))
    assert lost < (1e-10 if how == "float" else 1e-3)


def test_old_opset_reduces_by_attribute() -> None:
    rng = np.random.default_rng(7)
    runs = [{"x": rng.standard_normal((3, 40), dtype=np.float32)}]
    proto = single(rng.standard_normal((40, 30), dtype=np.float32), opset=13)
    assert error(dynamic(proto, runs, arithmetic="row"), runs, outputs(proto, runs)) < 1e-3


def test_the_choice_meets_the_tolerance(block: Any) -> None:
    proto, runs = block
    dense = outputs(proto, runs)
    for tolerance in (1e-1, 1e-4):
        small = dynamic(proto, runs, tolerance=tolerance)
        assert error(small, runs, dense) <= tolerance
    integer = dynamic(proto, runs, tolerance=1e-1, allowed=("tensor", "row"))
    assert set(chosen(integer)) == {"normal", "bent"}
    finest = dynamic(proto, runs, tolerance=1e-9, allowed=("tensor", "row"))  # out of reach: the finest that is allowed
    assert set(chosen(finest).values()) == {"row"}


def test_tensors_that_an_inner_graph_reads_stay() -> None:
    rng = np.random.default_rng(8)
    w = rng.standard_normal((40, 40), dtype=np.float32)
    inner = helper.make_graph(
        [helper.make_node("Add", ["y", "w"], ["z"])], "then", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("If", ["yes"], ["out"], then_branch=inner, else_branch=inner),
    ]
    proto = network(nodes, {"w": w, "yes": np.array(True)}, {"x": (1, [40, 40])})
    runs = [{"x": rng.standard_normal((40, 40), dtype=np.float32)}]
    assert error(dynamic(proto, runs, arithmetic="tensor"), runs, outputs(proto, runs)) < 1e-3


def test_groups_leave_alone_what_is_no_product() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["square"]),
        helper.make_node("Gemm", ["square", "w"], ["out"], alpha=2.0),
    ]
    proto = network(nodes, {"w": np.eye(8, dtype=np.float32)}, {"x": (1, [8, 8])})
    assert groups(proto) == []
    with pytest.raises(NotSupported, match="has none"):
        dynamic(proto, [{"x": np.eye(8, dtype=np.float32)}])


def test_wrong_arguments_are_named(block: Any) -> None:
    proto, runs = block
    with pytest.raises(ValueError, match="at least one run, got none"):
        dynamic(proto, [])
    with pytest.raises(ValueError, match="must be positive, got 0"):
        dynamic(proto, runs, tolerance=0)
    with pytest.raises(ValueError, match="got 'int4'"):
        dynamic(proto, runs, arithmetic="int4")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match=r"normals is the input of no product.*'normal'"):
        dynamic(proto, runs, arithmetic={"normals": "row"})
    with pytest.raises(NotSupported, match="opset must be at least 13, got 11"):
        dynamic(single(np.eye(40, dtype=np.float32), opset=11), [{"x": np.ones((1, 40), np.float32)}])
