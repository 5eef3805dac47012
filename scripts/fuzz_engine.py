"""Damaged ONNX files for the engine's reader, planner and writer, chosen by atheris: see make check-engine.

    python scripts/fuzz_engine.py [-max_total_time=60] [FILE]    # FILE: one that was kept, to see what it does

An input is a list of small damages to a sound file: a number of a shape, an attribute, a name, a value's type, a node
left out or doubled, or bytes anywhere. What the engine says to any of them must be ValueError or NotSupported; what it
accepts must become C whose text holds no name that could end a comment or start a line.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if __name__ == "__main__":  # only the engine's own modules are watched: all would take minutes to import
    import atheris

    with atheris.instrument_imports(include=["lilliput.engine"], enable_loader_override=False):
        import lilliput.engine.compile  # noqa: F401

from lilliput.engine.fuse import fused
from lilliput.engine.lower import lowered, supported
from lilliput.engine.plan import planned
from lilliput.engine.read import read
from lilliput.engine.target import Target
from lilliput.engine.tune import estimated
from lilliput.engine.write import written
from lilliput.errors import NotSupported

ACCEPTED = (ValueError, NotSupported)
OPERATORS = (
    "Conv",
    "MatMul",
    "Reshape",
    "Transpose",
    "Softmax",
    "LSTM",
    "Expand",
    "Tile",
    "Einsum",
    "TopK",
    "Loop",
    "If",
    "CumSum",
    "Range",
    "ConstantOfShape",
    "OneHot",
    "GatherND",
    "ScatterND",
    "DepthToSpace",
)
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 127, 255, 4096, 2**15, 2**31 - 1, -(2**31), 2**31, 2**40, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-38, 3e38, float("inf"), float("-inf"), float("nan"))
NAMES = ("", "*/ int evil; /*", 'a"\n#include "/etc/passwd"\n', "??/", "\\\n#error evil", "int", "model_run", "é\u2028",
         "x" * 5000, "%s%n{0}", "0", "arena", "../../x")  # fmt: skip
TARGET = Target("native", 32, features=frozenset({"AVX2", "FMA", "SSE2", "x86_64"}))


# ------------------------------------------------------------------------------------------------------------- seeds


def seeds() -> list[onnx.ModelProto]:
    """Small sound models: one for each family of operators."""
    draw = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape).astype(np.float32)

    def model(nodes: list, inputs: dict, constants: dict) -> onnx.ModelProto:
        held = [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
        outputs = [onnx.ValueInfoProto(name=nodes[-1].output[0])]
        graph = helper.make_graph(nodes, "g", values, outputs, held)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)

    n = helper.make_node
    sparse = floats(8, 4, 3, 3) * (draw.random((8, 4, 3, 3)) < 0.2)
    int64 = np.int64
    return [
        model([n("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]), n("Relu", ["h"], ["r"]),
               n("BatchNormalization", ["r", "g", "h0", "m", "v"], ["n"]),
               n("MaxPool", ["n"], ["p"], kernel_shape=[2, 2]), n("Flatten", ["p"], ["f"]),
               n("Gemm", ["f", "k"], ["y"], transB=1)],
              {"x": ["batch", 4, 8, 8]},
              {"w": sparse, "b": floats(8), "g": floats(8), "h0": floats(8), "m": floats(8), "v": abs(floats(8)),
               "k": floats(5, 392)}),
        model([n("MatMul", ["x", "w"], ["h"]), n("LayerNormalization", ["h", "g"], ["l"], axis=-1),
               n("Transpose", ["l"], ["t"], perm=[0, 2, 1]), n("MatMul", ["l", "t"], ["s"]),
               n("Softmax", ["s"], ["y"])], {"x": ["batch", 5, 6]}, {"w": floats(6, 6), "g": floats(6)}),
        model([n("GRU", ["x", "w", "r"], ["", "h"], hidden_size=4), n("Squeeze", ["h", "a"], ["y"])], {"x": [3, 1, 2]},
              {"w": floats(1, 12, 2), "r": floats(1, 12, 4), "a": np.array([0], int64)}),
        model([n("Split", ["x", "s"], ["a", "b"], axis=1), n("Concat", ["b", "a"], ["c"], axis=1),
               n("Slice", ["c", "i", "j"], ["d"]), n("Pad", ["d", "p"], ["e"]), n("Reshape", ["e", "q"], ["f"]),
               n("Gather", ["f", "k"], ["h"], axis=0), n("ReduceMean", ["h", "z"], ["y"])], {"x": [4, 6]},
              {"s": np.array([2, 4], int64), "i": np.array([1], int64), "j": np.array([3], int64),
               "p": np.array([0, 1, 0, 1], int64), "q": np.array([4, -1], int64), "k": np.array([3, 0], int64),
               "z": np.array([1], int64)}),
        model([n("QuantizeLinear", ["x", "s", "o"], ["q"]), n("DequantizeLinear", ["q", "s", "o"], ["d"]),
               n("Conv", ["d", "w"], ["t"], strides=[2, 2], group=4), n("Resize", ["t", "", "k"], ["r"]),
               n("Where", ["c", "r", "e"], ["y"])], {"x": [1, 4, 5, 5]},
              {"s": np.float32(0.1), "o": np.uint8(128), "w": floats(4, 1, 2, 2),
               "k": np.array([1, 1, 2, 2], np.float32), "c": np.array(True), "e": np.float32(0)}),
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ damage


class Bytes:
    """Choices read from bytes; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def remains(self) -> bool:
        """Whether there are any."""
        return self.at < len(self.data)

    def number(self, most: int) -> int:
        """0 to most - 1."""
        width = 1 if most <= 256 else 4
        number = int.from_bytes(self.data[self.at : self.at + width], "little")
        self.at += width
        return number % max(most, 1)

    def any(self, items: list | tuple) -> object:
        """One of them."""
        return items[self.number(len(items))]


def _shape(proto: onnx.ModelProto, choose: Bytes) -> None:
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    dims = choose.any(values).type.tensor_type.shape.dim  # type: ignore[attr-defined]
    if dims:
        dims[choose.number(len(dims))].dim_value = choose.any(NUMBERS)


def _dims(proto: onnx.ModelProto, choose: Bytes) -> None:
    tensor = choose.any(list(proto.graph.initializer))
    if tensor.dims:  # type: ignore[attr-defined]
        tensor.dims[choose.number(len(tensor.dims))] = choose.any(NUMBERS)  # type: ignore[attr-defined]


def _values(proto: onnx.ModelProto, choose: Bytes) -> None:
    tensor = choose.any(list(proto.graph.initializer))
    raw = bytearray(tensor.raw_data)  # type: ignore[attr-defined]
    if raw:
        array = np.frombuffer(raw, np.uint8)
        kind = tensor.data_type  # type: ignore[attr-defined]
        place = choose.number(max(len(raw) // 8, 1)) * 8
        what = np.int64(choose.any(NUMBERS)) if kind == TensorProto.INT64 else np.float32(choose.any(FLOATS))
        part = np.frombuffer(what.tobytes(), np.uint8)[: len(raw) - place]
        array[place : place + len(part)] = part
        tensor.raw_data = bytes(raw)  # type: ignore[attr-defined]


def _tensor_type(proto: onnx.ModelProto, choose: Bytes) -> None:
    choose.any(list(proto.graph.initializer)).data_type = choose.number(30)  # type: ignore[attr-defined]


def _attribute(proto: onnx.ModelProto, choose: Bytes) -> None:
    node = choose.any(list(proto.graph.node))
    if node.attribute:  # type: ignore[attr-defined]
        attribute = choose.any(list(node.attribute))  # type: ignore[attr-defined]
        if attribute.ints:  # type: ignore[attr-defined]
            attribute.ints[choose.number(len(attribute.ints))] = choose.any(NUMBERS)  # type: ignore[attr-defined]
        else:
            attribute.i = choose.any(NUMBERS)  # type: ignore[attr-defined]
    else:
        name = choose.any(("axis", "group", "hidden_size", "strides", "pads", "dilations", "perm", "to"))
        value = choose.any(NUMBERS)
        node.attribute.append(helper.make_attribute(name, [value] if choose.number(2) else value))  # type: ignore


def _name(proto: onnx.ModelProto, choose: Bytes) -> None:
    node = choose.any(list(proto.graph.node))
    new, kind = str(choose.any(NAMES)), choose.number(4)
    if kind == 0:
        node.name = new  # type: ignore[attr-defined]
    elif kind == 1 and node.output:  # type: ignore[attr-defined]
        old = node.output[0]  # type: ignore[attr-defined]
        for other in proto.graph.node:
            other.input[:] = [new if x == old else x for x in other.input]
            other.output[:] = [new if x == old else x for x in other.output]
        for value in proto.graph.output:
            value.name = new if value.name == old else value.name
    elif kind == 2:
        node.op_type = new  # type: ignore[attr-defined]
    else:
        value = choose.any([*proto.graph.input, *proto.graph.output])
        value.name = new  # type: ignore[attr-defined]


def _wire(proto: onnx.ModelProto, choose: Bytes) -> None:
    node, other = choose.any(list(proto.graph.node)), choose.any(list(proto.graph.node))
    if node.input and other.output:  # type: ignore[attr-defined]
        place = choose.number(len(node.input))  # type: ignore[attr-defined]
        node.input[place] = choose.any([*other.output, *other.input, ""])  # type: ignore[attr-defined]


def _drop(proto: onnx.ModelProto, choose: Bytes) -> None:
    del proto.graph.node[choose.number(len(proto.graph.node))]


def _double(proto: onnx.ModelProto, choose: Bytes) -> None:
    proto.graph.node.add().CopyFrom(choose.any(list(proto.graph.node)))  # type: ignore[arg-type]


def _operator(proto: onnx.ModelProto, choose: Bytes) -> None:
    choose.any(list(proto.graph.node)).op_type = choose.any(OPERATORS)  # type: ignore[attr-defined]


def _external(proto: onnx.ModelProto, choose: Bytes) -> None:
    tensor = choose.any(list(proto.graph.initializer))
    tensor.data_location = TensorProto.EXTERNAL  # type: ignore[attr-defined]
    entry = tensor.external_data.add()  # type: ignore[attr-defined]
    entry.key, entry.value = "location", str(choose.any(("/etc/passwd", "../x", "x", "", ".")))


def _opset(proto: onnx.ModelProto, choose: Bytes) -> None:
    proto.opset_import[0].version = choose.any((0, 1, 6, 11, 13, 17, 22, 2**31, -1))


DAMAGES: list[Callable[[onnx.ModelProto, Bytes], None]] = [
    _shape,
    _dims,
    _values,
    _tensor_type,
    _attribute,
    _attribute,
    _name,
    _wire,
    _drop,
    _double,
    _operator,
    _external,
    _opset,
]


def damaged(model: onnx.ModelProto, choose: Bytes) -> bytes:
    """The bytes of a model with as many damages as there are choices."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model)
    for _ in range(6):
        if not choose.remains():
            break
        try:
            DAMAGES[choose.number(len(DAMAGES))](proto, choose)
        except (ValueError, TypeError, OverflowError, IndexError, ZeroDivisionError):
            continue  # this damage cannot be written into a file
    raw = bytearray(proto.SerializeToString())
    if choose.remains() and choose.number(4) == 0:
        for _ in range(8):
            if raw and choose.remains():
                raw[choose.number(len(raw))] = choose.number(256)
    return bytes(raw)


# -------------------------------------------------------------------------------------------------------------- check


def text_of(model: bytes) -> str:
    """The C of a model's bytes; "" where it is refused as it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = fused(lowered(read(model, supported=supported)))
            source = written(planned(graph, estimated(TARGET)), "fuzz.onnx")
        except ACCEPTED:
            return ""
    return source.c + source.h


def check(model: bytes) -> str:
    """What `text_of` gives; raises AssertionError where a name of the file got into the C as it is."""
    text = text_of(model)
    outside = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    for mark in ("evil", "passwd", "??/"):
        assert mark not in outside.replace("int_evil", "").replace("error_evil", "").replace("etc_passwd", ""), mark
    return text


def one(data: bytes, models: list[onnx.ModelProto] | None = None) -> str:
    """Check the model that these bytes damage."""
    choose = Bytes(data)
    models = models or seeds()
    return check(damaged(models[choose.number(len(models))], choose))


def main() -> None:
    """Fuzz, or run one kept file."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    files = [word for word in sys.argv[1:] if not word.startswith("-")]
    models = seeds()
    if files:
        for file in files:
            print(one(Path(file).read_bytes(), models)[:2000] or "refused")
        return
    atheris.Setup(sys.argv, lambda data: one(data, models) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
