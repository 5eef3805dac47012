"""model.onnx as the target: a network that is only a file is made smaller without training."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner, Result

import lilliput
from lilliput.cli import app
from lilliput.onnx.session import Session
from lilliput.onnx.trace import trace
from lilliput.search import finish
from lilliput.search.onnx_codes import channels, grid
from lilliput.search.onnx_target import load_target
from lilliput.stored.grid import Grid


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.02)


def save(graph: onnx.GraphProto, opset: int, path: Path) -> None:
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """net.onnx, a convolution and two products on inputs x (n, 2, 12), and data.npz."""
    draw = np.random.default_rng(0)

    def held(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array((draw.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f"), name)

    nodes = [
        helper.make_node("Conv", ["x", "conv.w", "conv.b"], ["c"], pads=[1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("MatMul", ["f", "mat"], ["m"]),
        helper.make_node("Relu", ["m"], ["n"]),
        helper.make_node("Gemm", ["n", "gemm.w", "gemm.b"], ["y"], transB=1),
    ]
    tensors = [
        held("conv.w", 8, 2, 3),
        held("conv.b", 8),
        held("mat", 96, 32),
        held("gemm.w", 4, 32),
        held("gemm.b", 4),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", 1, [1, 2, 12])],
        [helper.make_tensor_value_info("y", 1, [1, 4])],
        tensors,
    )
    save(graph, 18, tmp_path / "net.onnx")
    x = draw.standard_normal((80, 2, 12)).astype("f")
    np.savez(tmp_path / "data.npz", x=x)
    return tmp_path


def shrink(place: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["shrink", str(place / "net.onnx"), "--out", str(place / "out"), *arguments])


def test_a_file_is_made_smaller_and_stays_the_same_function(place: Path) -> None:
    done = shrink(
        place, "--calib", str(place / "data.npz"), "--floor", "10%", "--sure", "50%", "--budget", "60s", "--json"
    )
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    dense, chosen = summary["dense"], summary["chosen"]
    assert summary["dense"]["val"] == 1.0  # it says what it says
    assert chosen["onnx_bytes"] < dense["onnx_bytes"] / 2.5 and chosen["packed_bytes"] < dense["packed_bytes"] / 4
    assert {"name": "training", "reason": "an ONNX file has no parameters that could be trained or removed"} in (
        summary["left_alone"]
    )
    names = [point["name"] for point in summary["points"]]
    assert {"same structure, 8 bits without training", "same structure, float16 without training"} <= {*names}
    assert sum("bits on average" in name for name in names) >= 3
    assert {row["bits"] for row in chosen["layers"]} <= {*range(2, 11), 12, 16}
    x = np.load(place / "data.npz")["x"]
    small = Session(place / "out" / "model.onnx").outputs(x)
    packed = lilliput.load(place / "out")(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(packed, small, atol=1e-5)
    whole = np.concatenate([Session(place / "net.onnx").outputs(row[None]) for row in x])
    assert (whole.argmax(1) == small.argmax(1)).mean() > 0.85


def test_eight_bits_lose_almost_nothing(place: Path) -> None:
    model, task = load_target(place / "net.onnx", place / "data.npz", [])
    found = lilliput.shrink(model, task, floor=0.02, budget="60s", out=place / "out")
    row = next(point for point in found.summary["points"] if point["name"].startswith("same structure, 8 bits"))
    assert row["val"] >= 0.97 and row["distance"] < 1e-3
    again = lilliput.shrink(model, task, floor=0.02, out=place / "out", resume=True)
    assert again.summary["sensitivity"] == found.summary["sensitivity"]


def test_channels_follow_the_operator(place: Path) -> None:
    proto = onnx.load(place / "net.onnx")
    assert channels(proto) == {"conv.w": 0, "mat": 1, "gemm.w": 0}
    weights = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer if len(t.dims) > 1}
    for name, shape in (("conv.w", (8, 1, 1)), ("mat", (1, 32)), ("gemm.w", (4, 1))):
        stored = grid(weights[name], channels(proto)[name], 8)
        assert isinstance(stored, Grid) and stored.scale.shape == shape
        np.testing.assert_allclose(stored.decode(), weights[name], atol=float(np.abs(weights[name]).max()) / 120)


def test_labels_make_it_a_task_of_their_own(place: Path) -> None:
    x = np.load(place / "data.npz")["x"]
    np.savez(place / "labels.npz", x=x, targets=np.arange(80) % 4)
    _, task = load_target(place / "net.onnx", place / "labels.npz", [])
    assert task.metric_name == "accuracy" and task.split("val")[1].dtype == torch.int64  # type: ignore[union-attr]
    np.savez(place / "values.npz", x=x, targets=np.zeros((80, 4), "f"))
    _, task = load_target(place / "net.onnx", place / "values.npz", [])
    assert task.metric_name == "mse" and not task.higher_is_better


def test_two_files_with_the_same_weights_have_different_keys(place: Path) -> None:
    from lilliput.recipe import weights_hash

    proto = onnx.load(place / "net.onnx")
    proto.graph.node[1].op_type = "Sigmoid"
    onnx.save(proto, place / "other.onnx")
    (a, _), (b, _) = (load_target(place / name, place / "data.npz", []) for name in ("net.onnx", "other.onnx"))
    assert weights_hash(a) != weights_hash(b)


def test_a_size_that_is_free_can_be_fixed(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x"], ["m"], axes=[1], keepdims=0),
            helper.make_node("MatMul", ["m", "w"], ["y"]),
        ],
        "net",
        [helper.make_tensor_value_info("x", 1, ["n", "t", 3])],
        [helper.make_tensor_value_info("y", 1, ["n", 2])],
        [numpy_helper.from_array(np.ones((3, 2), "f"), "w")],
    )
    save(graph, 17, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((8, 10, 3)).astype("f"))
    _, task = load_target(tmp_path / "net.onnx", tmp_path / "data.npz", ["x=1x4x3"])
    assert task.example["x"].shape == (1, 4, 3)
    for wrong in ("z=1x4x3", "x=1x4", "x=1x40x3", "x=4,4"):
        with pytest.raises(ValueError, match="must"):
            load_target(tmp_path / "net.onnx", tmp_path / "data.npz", [wrong])


def test_what_is_wrong_with_the_data_is_said_and_nothing_written(place: Path) -> None:
    x = np.load(place / "data.npz")["x"]
    np.savez(place / "names.npz", y=x)
    np.savez(place / "few.npz", x=x[:3])
    np.savez(place / "lengths.npz", x=x, targets=np.zeros(5, "i8"))
    np.savez(place / "shape.npz", x=x[:, :, :7])
    np.savez(place / "targets.npz", x=x, targets=np.zeros((80, 9), "f"))
    np.savez(place / "objects.npz", x=np.array([{}] * 8, dtype=object))
    (place / "text.npz").write_text("no archive")
    for arguments, said in [
        ([], "needs --calib"),
        (["--calib", "nowhere.npz"], "got nowhere.npz"),
        (["--calib", str(place / "names.npz")], "misses ['x']"),
        (["--calib", str(place / "few.npz")], "at least 4"),
        (["--calib", str(place / "lengths.npz")], "as many of each"),
        (["--calib", str(place / "shape.npz")], "must run on several examples"),
        (["--calib", str(place / "targets.npz")], "the outputs' shape (80, 4)"),
        (["--calib", str(place / "objects.npz")], "npz file of plain arrays"),
        (["--calib", str(place / "text.npz")], "npz file of plain arrays"),
    ]:
        done = shrink(place, *arguments)
        assert done.exit_code == 2 and said in done.stderr, (arguments, done.stderr, done.exception)
        assert not (place / "out").exists()
    (place / "net.onnx").write_bytes(b"not a model")
    done = shrink(place, "--calib", str(place / "data.npz"))
    assert done.exit_code == 2 and "must be an ONNX model" in done.stderr and not (place / "out").exists()


def test_a_dry_run_lists_its_tensors(place: Path) -> None:
    done = shrink(place, "--calib", str(place / "data.npz"), "--dry-run", "--json")
    plan = json.loads(done.stdout)
    assert "conv.w, mat, gemm.w" in plan["tried"]["bits"] and not (place / "out").exists()


class Fixed(nn.Module):
    """Its forward holds the batch size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.cell(x, x.new_zeros(2, 6)))
        return found


def test_a_model_that_fixes_its_batch_size_is_told_how_not_to() -> None:
    with pytest.raises(lilliput.ExportError, match=r"count examples by x\.shape\[0\]"):
        trace(Fixed().eval(), torch.zeros(1, 4))


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_bags_are_exported_without_a_loop(mode: str, padding_idx: int | None) -> None:
    bag = nn.EmbeddingBag(20, 4, mode=mode, padding_idx=padding_idx)
    model = nn.Sequential(bag, nn.Linear(4, 3)).eval()
    x = torch.randint(0, 20, (6, 5))
    x[0], x[1, 2:] = 0, 0
    proto = trace(model, x[:1]).proto
    assert "Loop" not in [node.op_type for node in proto.graph.node] and "forward" not in vars(bag)
    np.testing.assert_allclose(Session(proto).outputs(x), model(x).detach().numpy(), atol=1e-6)


def test_a_file_with_several_outputs_is_judged_by_its_first(tmp_path: Path) -> None:
    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            y = super().forward(x)
            return y, y.flatten(1)[:, :1] * 2

    onnx.save(trace(Two(20, 4), torch.zeros(1, 20)).proto, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((40, 20)).astype("f"))
    model, task = load_target(tmp_path / "net.onnx", tmp_path / "data.npz", [])
    session = Session(tmp_path / "net.onnx")
    assert task.score(model).value == task.score(session).value == 1
    assert task.score(session).outputs.shape == (30, 4)
    done = shrink(tmp_path, "--calib", str(tmp_path / "data.npz"), "--floor", "50%", "--budget", "20s")
    assert done.exit_code == 0, done.stderr
    names = [value.name for value in onnx.load(tmp_path / "out" / "model.onnx").graph.output]
    assert names == ["output_0", "output_1"], "the file keeps all of them"
