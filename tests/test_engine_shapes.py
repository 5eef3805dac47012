"""Operators that move elements: every one against ONNX's own reference, at fixed and at free sizes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from lilliput.engine.compile import compile
from lilliput.engine.run import Engine
from lilliput.errors import NotSupported

Array = np.ndarray[Any, Any]
KINDS = {"f": TensorProto.FLOAT, "i": TensorProto.INT64}


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[str, Sequence[Any]]],
    outputs: dict[str, str],
    constants: dict[str, Array] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, KINDS[kind], shape) for n, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(n, KINDS[kind], None) for n, kind in outputs.items()],
        [numpy_helper.from_array(data, n) for n, data in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def agrees(engine: Engine, proto: onnx.ModelProto, feeds: dict[str, Array]) -> None:
    outputs = engine(**feeds)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for a, b in zip(outputs, ReferenceEvaluator(proto).run(None, feeds), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert a.dtype == b.dtype


def numbers(*shape: int) -> Array:
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def test_one_model_of_every_way_to_move() -> None:
    """Many operators on one input, so that one compiler run tests them."""

    def ints(*x: int) -> Array:
        return np.array(x, np.int64)

    constants = {
        "starts": ints(-1, 5),
        "ends": ints(-100, 1),
        "axes": ints(1, 2),
        "steps": ints(-2, -1),
        "pads": ints(0, 1, 2, 1, 0, 3),
        "cut": ints(0, 1, 2, 1, 0, 3),
        "seven": np.float32([7])[0],
        "twice": ints(1, 2, 3),
        "wide": ints(4, 2, 3, 6),
        "order": ints(2, 0, 1, 1),
        "last": ints(-1)[0],
        "half": np.float32([1, 1.5, 0.5]),
        "steps2": ints(0, 2),
        "up": np.float32([1, 2, 3]),
    }
    make = helper.make_node
    nodes = [
        make("Slice", ["x", "starts", "ends", "axes", "steps"], ["a"]),
        make("Pad", ["x", "pads", "seven"], ["b"]),
        make("Pad", ["x", "pads"], ["c"], mode="edge"),
        make("Pad", ["x", "cut"], ["e"], mode="reflect"),
        make("Tile", ["x", "twice"], ["f"]),
        make("Expand", ["x", "wide"], ["g"]),
        make("Gather", ["x", "order"], ["h"], axis=1),
        make("Gather", ["x", "last"], ["i"], axis=2),
        make("Gather", ["x", "steps2"], ["j"], axis=2),
        make("Split", ["x"], ["k", "l"], axis=2, num_outputs=2),
        make("Concat", ["k", "l", "x"], ["m"], axis=-1),
        make("Transpose", ["m"], ["n"], perm=[2, 0, 1]),
        make("Resize", ["x", "", "half"], ["o"], mode="linear"),
        make("Resize", ["x", "", "half"], ["p"], mode="cubic"),
        make("Resize", ["x", "", "up"], ["q"], mode="nearest"),
        make("Trilu", ["x"], ["r"], upper=0),
        make("Flatten", ["x"], ["s"], axis=2),
    ]
    outputs = {name: "f" for name in "abcefghijmnopqrs"}
    proto = model(nodes, {"x": ("f", [2, 3, 6])}, outputs, constants)
    agrees(compile(proto, tune=False), proto, {"x": numbers(2, 3, 6)})


def test_a_negative_pad_takes_away() -> None:
    proto = model(
        [helper.make_node("Pad", ["x", "p"], ["y"])], {"x": ("f", [3, 4])}, {"y": "f"}, {"p": np.array([-1, 2, 1, -3])}
    )
    x = numbers(3, 4)
    np.testing.assert_array_equal(compile(proto, tune=False)(x), np.pad(x[1:, :1], ((0, 1), (2, 0))))


def test_positions_that_come_when_it_runs_are_checked() -> None:
    make = helper.make_node
    nodes = [
        make("Gather", ["x", "i"], ["a"], axis=1),
        make("GatherElements", ["x", "j"], ["b"], axis=1),
        make("ScatterElements", ["x", "j", "u"], ["c"], axis=1, reduction="add"),
        make("GatherND", ["x", "k"], ["d"]),
        make("ScatterND", ["x", "k", "v"], ["e"], reduction="max"),
    ]
    inputs = {
        "x": ("f", [3, 4]),
        "i": ("i", [2]),
        "j": ("i", [3, 2]),
        "u": ("f", [3, 2]),
        "k": ("i", [2, 1]),
        "v": ("f", [2, 4]),
    }
    proto = model(nodes, inputs, {name: "f" for name in "abcde"})
    engine = compile(proto, tune=False)
    feeds = {
        "x": numbers(3, 4),
        "i": np.array([-1, 2]),
        "j": np.array([[0, 3], [-4, 1], [2, 2]]),
        "u": numbers(3, 2),
        "k": np.array([[2], [-3]]),
        "v": numbers(2, 4),
    }
    agrees(engine, proto, feeds)
    for name, wrong in (("i", 4), ("i", -5), ("j", 2**40), ("k", 3), ("k", -4)):
        bad = feeds[name].copy()
        bad.reshape(-1)[0] = wrong
        with pytest.raises(ValueError, match="index is out of range"):
            engine(**{**feeds, name: bad})


def test_a_constant_index_outside_is_refused() -> None:
    proto = model(
        [helper.make_node("Gather", ["x", "i"], ["y"], axis=1)],
        {"x": ("f", [3, 4])},
        {"y": "f"},
        {"i": np.array([0, 4])},
    )
    with pytest.raises(ValueError, match="must be below 4"):
        compile(proto, tune=False)


def test_sizes_that_follow_from_free_ones_are_numbers_when_it_runs() -> None:
    """Shape, Gather, Concat, Reshape, Range, Expand, Slice and ConstantOfShape, as exporters chain them."""
    make = helper.make_node
    zero, one = np.array(0, np.int64), np.array(1, np.int64)
    nodes = [
        make("Shape", ["x"], ["s"]),
        make("Gather", ["s", "zero"], ["batch"]),
        make("Gather", ["s", "one"], ["seq"]),
        make("Range", ["zero", "seq", "one"], ["place"]),
        make("Gather", ["table", "place"], ["rows"]),
        make("Add", ["x", "rows"], ["sum"]),
        make("Unsqueeze", ["batch", "axis"], ["b1"]),
        make("Unsqueeze", ["seq", "axis"], ["s1"]),
        make("Concat", ["b1", "s1", "heads"], ["split"], axis=0),
        make("Reshape", ["sum", "split"], ["four"]),
        make("Transpose", ["four"], ["turned"], perm=[0, 2, 1, 3]),
        make("Slice", ["mask", "start", "s1", "axis"], ["m"]),
        make("Slice", ["m", "start", "s1", "last"], ["square"]),
        make("Concat", ["b1", "s1"], ["pair"], axis=0),
        make("ConstantOfShape", ["pair"], ["fill"]),
        make("Mul", ["seq", "seq"], ["area"]),
        make("Cast", ["area"], ["float"], to=TensorProto.FLOAT),
        make("Sqrt", ["float"], ["root"]),
        make("Mul", ["turned", "root"], ["y"]),
        make("Slice", ["x", "back", "far", "one1"], ["tail"]),
    ]
    constants = {
        "zero": zero,
        "one": one,
        "table": numbers(9, 6),
        "axis": np.array([0]),
        "heads": np.array([2, 3]),
        "mask": np.tril(np.ones((9, 9), np.float32)),
        "start": np.array([0]),
        "last": np.array([1]),
        "back": np.array([-1]),
        "far": np.array([2**60]),
        "one1": np.array([1]),
    }
    outputs = {"y": "f", "square": "f", "fill": "f", "seq": "i", "pair": "i", "place": "i", "tail": "f"}
    proto = model(nodes, {"x": ("f", ["b", "t", 6])}, outputs, constants)
    engine = compile(proto, tune=False, shapes={"x": (4, 9, 6)})
    for batch, seq in ((4, 9), (1, 1), (2, 5), (4, 1), (1, 9), (3, 2)):
        agrees(engine, proto, {"x": numbers(batch, seq, 6)})


def test_a_size_too_small_for_a_slice_is_refused_when_it_runs() -> None:
    proto = model(
        [helper.make_node("Slice", ["x", "s", "e", "a"], ["y"])],
        {"x": ("f", [1, "t"])},
        {"y": "f"},
        {"s": np.array([2]), "e": np.array([5]), "a": np.array([1])},
    )
    engine = compile(proto, tune=False, shapes={"x": (1, 30)})
    agrees(engine, proto, {"x": numbers(1, 5)})
    with pytest.raises(ValueError, match="free sizes"):
        engine(numbers(1, 4))


def test_dropout_that_trains_is_refused() -> None:
    proto = model(
        [helper.make_node("Dropout", ["x", "r", "t"], ["y"])],
        {"x": ("f", [3])},
        {"y": "f"},
        {"r": np.float32(0.5), "t": np.array(True)},
    )
    with pytest.raises(NotSupported, match="must not train"):
        compile(proto, tune=False)
