"""The reader: a file from a stranger gives ValueError or NotSupported, whatever it holds."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lilliput.engine.compile import compile
from lilliput.engine.fuse import fused
from lilliput.engine.graph import Graph
from lilliput.engine.lower import lowered, supported
from lilliput.engine.read import read
from lilliput.errors import NotSupported


def model(
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray] | None = None,
    out: str = "y",
    shape: tuple[int, ...] = (1, 4),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(data, n) for n, data in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def graph_of(proto: onnx.ModelProto) -> Graph:
    return fused(lowered(read(proto.SerializeToString(), supported=supported)))


@pytest.mark.parametrize("op", ["Relu", "MatMul", "Softmax", "Identity", "double"])
def test_thousands_of_nodes_in_a_row(op: str) -> None:
    """No recursion, and nothing that grows with the square of their number or the depth of an expression."""
    nodes = [
        helper.make_node(
            "Add" if op == "double" else op,
            [f"v{i}", *({"MatMul": ["w"], "double": [f"v{i}"]}.get(op, []))],
            [f"v{i + 1}"],
        )
        for i in range(1500)
    ]
    nodes[0].input[0] = "x"
    if op == "double":
        nodes[0].input[1] = "x"
    assert graph_of(model(nodes, {"w": np.eye(4, dtype=np.float32)}, "v1500")).nodes


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([helper.make_node("Relu", ["nope"], ["y"])], "must be made before"),
        ([helper.make_node("Relu", ["z"], ["y"]), helper.make_node("Relu", ["y"], ["z"])], "must be made before"),
        ([helper.make_node("Flatten", ["x"], ["y"]), helper.make_node("Squeeze", ["x"], ["y"])], "made once"),
        ([helper.make_node("Relu", ["x"], ["x"])], "made once"),
        ([helper.make_node("Relu", [], ["y"])], "as ONNX defines"),
        ([helper.make_node("LayerNormalization", ["x", "x"], ["y"], axis=2**31)], "dimensions of its input"),
        ([helper.make_node("Split", ["x"], ["y", "z", "w"], axis=1, num_outputs=1)], "outputs"),
        ([helper.make_node("Einsum", ["x", "x"], ["y"], equation=b"x\xff")], "letters"),
        ([helper.make_node("Transpose", ["x"], ["y"], perm=[0, 0])], "once|fit"),
    ],
    ids=["missing", "cycle", "twice", "over its input", "no input", "axis", "split", "equation", "perm"],
)
def test_damaged_nodes_are_refused(nodes: list[onnx.NodeProto], message: str) -> None:
    with pytest.raises((ValueError, NotSupported), match=message):
        graph_of(model(nodes))


def test_sizes_are_not_trusted() -> None:
    huge = np.array([2**31, 2**31], np.int64)
    for nodes in (
        [helper.make_node("ConstantOfShape", ["s"], ["y"])],
        [helper.make_node("Tile", ["x", "s"], ["y"])],
        [helper.make_node("Expand", ["x", "s"], ["y"])],
    ):
        with pytest.raises((ValueError, NotSupported)):
            graph_of(model(nodes, {"s": huge}))
    negative = model([helper.make_node("Relu", ["x"], ["y"])])
    negative.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -3
    with pytest.raises(ValueError, match="negative"):
        graph_of(negative)


def test_functions_that_explode_or_call_themselves_are_refused() -> None:
    def function(name: str, called: str, times: int) -> onnx.FunctionProto:
        domain = "" if called == "Relu" else "own"
        nodes = [helper.make_node(called, ["a"], [f"b{i}"], domain=domain) for i in range(times)]
        return helper.make_function(
            "own", name, ["a"], [f"b{times - 1}"], nodes, [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
        )

    for functions in (
        [function("f", "f", 1)],
        [function("f", "g", 2), function("g", "f", 2)],
        [function(f"f{i or ''}", f"f{i + 1}" if i < 5 else "Relu", 30) for i in range(6)],
    ):
        proto = model([helper.make_node("f", ["x"], ["y"], domain="own")])
        proto.functions.extend(functions)
        proto.opset_import.append(helper.make_opsetid("own", 1))
        with pytest.raises(ValueError, match=r"call itself|at most"):
            graph_of(proto)


@pytest.mark.parametrize("place", ["/etc/passwd", "../w.bin", "link.bin", "sub/../../w.bin", "", "gone.bin"])
def test_external_data_stays_in_its_folder(tmp_path: Path, place: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(64))
    (folder / "link.bin").symlink_to(tmp_path / "w.bin")
    proto = model([helper.make_node("Add", ["x", "w"], ["y"])])
    tensor = proto.graph.initializer.add(name="w", dims=[1, 4], data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="beside it"):
        read(folder / "m.onnx")


def test_names_cannot_leave_a_comment_or_a_string() -> None:
    names = ["*/ #error a", 'quote" \\', "line\n#error b", "??/\n#error c", "n" * 10_000, "int"]
    nodes = [helper.make_node("Softmax", [a], [b], name=b) for a, b in zip(["x", *names], [*names, "y"], strict=False)]
    x = np.random.default_rng(0).standard_normal((1, 4)).astype(np.float32)
    engine = compile(model(nodes), tune=False)
    assert abs(float(engine(x).sum()) - 1) < 1e-5
    written = (engine.folder / "model.c").read_text().splitlines()
    assert not any(line.strip().startswith("#error") for line in written)
