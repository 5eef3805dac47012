"""The main job from Python: questions, floors, devices, what is handed back."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import lilliput
from lilliput import Recipe, Task
from lilliput.cli import app
from lilliput.export.onnx import Session
from lilliput.report.summary import verdict
from lilliput.runner import run
from lilliput.search import finish

pytestmark = pytest.mark.slow  # whole searches

TARGET = """
import torch
from torch import nn
from lilliput import Task


def make():
    torch.manual_seed(0)
    x = torch.randn(240, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        y = (model(x) + 0.05 * torch.randn(240, 3)).argmax(1)
    return model, Task("toy", (x[:128], y[:128]), (x[128:192], y[128:192]), (x[192:], y[192:]))
"""


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.02)


@pytest.fixture
def toy() -> tuple[nn.Module, Task]:
    space: dict[str, Any] = {}
    exec(TARGET, space)
    made: tuple[nn.Module, Task] = space["make"]()
    return made


def test_what_is_handed_back_is_what_was_written(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    result = lilliput.shrink(model, task, floor="20%", trials=2, out=tmp_path / "out")
    assert result.met and result.chosen is not None and result.model is not None
    assert result.summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert result.front == result.summary["front"]
    assert result.chosen["packed_bytes"] < result.summary["dense"]["packed_bytes"] / 4
    assert result.summary["drop_corrected"] <= 0.2
    assert "test" in result.chosen and "test" in result.summary["dense"]
    assert not any(
        "test" in point for point in result.front[1:] if point["name"] not in ("dense", result.chosen["name"])
    )
    shares = result.summary["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    # The files have the sizes that are reported, and the front beats itself nowhere.
    for name, key in (("model.onnx", "onnx_bytes"), ("model.lil", "packed_bytes")):
        assert (tmp_path / "out" / name).stat().st_size == result.chosen[key]
    costs = [(-point["val"], point["onnx_bytes"], point["packed_bytes"], point["latency_ms"]) for point in result.front]
    for a in costs:
        assert not any(all(x <= y for x, y in zip(b, a, strict=True)) and b != a for b in costs)


def test_the_recipe_that_is_written_makes_the_same_network_again(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    result = lilliput.shrink(model, task, floor="20%", trials=1, out=tmp_path / "out")
    again = run(model, task, Recipe.read(tmp_path / "out" / "recipe.toml"))
    assert result.model is not None
    inputs, _ = task.split("val")
    with torch.no_grad():  # a value half way between two float16 may be rounded either way
        torch.testing.assert_close(again.eval()(inputs), result.model.eval()(inputs), atol=1e-3, rtol=1e-3)


def test_the_same_seed_finds_the_same_whatever_the_workers(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    a, b = (
        lilliput.shrink(model, task, floor="20%", trials=3, out=tmp_path / str(workers), workers=workers)
        for workers in (1, 3)
    )
    assert (tmp_path / "1" / "model.lil").read_bytes() == (tmp_path / "3" / "model.lil").read_bytes()
    names = [
        tuple(
            (row["kind"], row["name"], row.get("drop"), row.get("steps"), row.get("packed_bytes"))
            for row in found.summary["points"]
            if row["status"] == "done"
        )
        for found in (a, b)
    ]
    assert names[0] == names[1]


@pytest.mark.parametrize("objective", ["latency", "macs"])
def test_other_objectives(objective: str, toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    result = lilliput.shrink(model, task, floor="30%", objective=objective, trials=1, out=tmp_path / "out")
    assert result.met and result.chosen is not None and result.summary["objective"] == objective
    if objective == "macs":
        assert result.chosen["macs"] == min(point["macs"] for point in result.front if point.get("eligible"))


@pytest.mark.slow
def test_for_latency_the_engine_is_measured_and_its_artifact_written(
    toy: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    model, task = toy
    result = lilliput.shrink(model, task, floor="30%", objective="latency", trials=1, out=tmp_path / "out")
    assert result.met and result.chosen is not None
    fastest = min(min(p["latency_ms"], p.get("engine_ms", 9e9)) for p in result.front if p.get("eligible"))
    assert min(result.chosen["latency_ms"], result.chosen["engine_ms"]) <= 1.06 * fastest
    engine, inputs = lilliput.Engine(tmp_path / "out" / "engine"), np.asarray(task.split("val")[0])
    expected = Session(tmp_path / "out" / "model.onnx").outputs(inputs)
    got = np.concatenate([engine(x[None]) for x in inputs.astype(np.float32)])
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    assert abs(result.chosen["engine"]["val"] - result.chosen["val"]) < 0.02
    assert result.summary["files"]["engine/libmodel.so"] == result.chosen["engine"]["library_bytes"]


def test_most_bytes_turn_the_question_round(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    result = lilliput.shrink(model, task, trials=1, max_bytes="1.2kB", file="onnx", out=tmp_path / "out")
    assert result.met and result.chosen is not None and result.summary["floor"] is None
    assert (tmp_path / "out" / "model.onnx").stat().st_size == result.chosen["onnx_bytes"] <= 1200


def test_most_bytes_are_those_of_the_asked_file(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    result = lilliput.shrink(*toy, trials=1, max_bytes=700, out=tmp_path / "out")
    assert result.met and result.chosen is not None and result.summary["file"] == "lil"
    assert (tmp_path / "out" / "model.lil").stat().st_size == result.chosen["packed_bytes"] <= 700


def test_memory_is_an_objective_and_a_limit(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    result = lilliput.shrink(*toy, "30%", "memory", trials=1, runtime="engine", out=tmp_path / "a")
    assert result.met and result.chosen is not None
    planned = {p["name"]: p["engine_peak_bytes"] for p in (*result.front, result.chosen) if p.get("eligible")}
    assert result.chosen["engine_peak_bytes"] == min(planned.values()) < result.summary["dense"]["engine_peak_bytes"]
    most = result.chosen["engine_peak_bytes"]
    limited = lilliput.shrink(*toy, trials=1, max_peak=most, runtime="engine", out=tmp_path / "b")
    assert limited.met and limited.chosen is not None and limited.chosen["engine_peak_bytes"] <= most


def test_most_milliseconds_turn_the_question_round(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    result = lilliput.shrink(model, task, trials=1, max_latency_ms=1000, out=tmp_path / "out")
    assert result.met and result.chosen is not None and result.chosen["latency_ms"] <= 1000


def test_where_nothing_meets_the_question_the_dense_files_are_written(tmp_path: Path) -> None:
    (tmp_path / "toy_shrink.py").write_text(TARGET)
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app,
        ["shrink", f"{tmp_path}/toy_shrink.py:make", "--trials", "1", "--max-bytes", "50B", "--out", str(out)],
        env={"COLUMNS": "200"},
    )
    assert done.exit_code == 3 and "FloorNotMet" in done.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert not summary["met"] and summary["chosen"] is None and summary["nearest"]["name"]
    assert (out / "model.onnx").stat().st_size == summary["dense"]["onnx_bytes"]
    assert (out / "model.lil").stat().st_size == summary["dense"]["packed_bytes"]
    x = torch.randn(4, 8)
    space: dict[str, Any] = {}
    exec(TARGET, space)
    model, _ = space["make"]()
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(Session(out / "model.onnx").outputs(x)), model(x))
    assert (out / "report.html").exists() and Recipe.read(out / "recipe.toml") == Recipe()


def test_a_relative_floor_is_a_part_of_the_dense_score(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    result = lilliput.shrink(model, task, floor="20r", trials=1, out=tmp_path / "out")
    assert result.summary["floor"] == pytest.approx(0.2 * result.summary["dense"]["val"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(floor=1.5), "below 100%, got 1.5"),
        (dict(objective="speed"), "must be one of size"),
        (dict(budget=None), "budget or a number of trials must be given"),
        (dict(budget="-3s"), "must be a time"),
        (dict(trials=0), "at least 1"),
        (dict(max_bytes="x"), "must be a size"),
        (dict(max_latency_ms=-1), "above 0"),
        (dict(device="cuda:77"), "device must be one that this machine has"),
        (dict(device="meta"), "must hold values"),
    ],
)
def test_settings_out_of_range_write_nothing(
    settings: dict[str, Any], said: str, toy: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        lilliput.shrink(*toy, out=tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_training_happens_on_the_device(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    model, task = toy
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    result = lilliput.shrink(model, task, floor="20%", trials=1, out=tmp_path / "out", device="cuda")
    assert result.met and result.model is not None
    assert torch.cuda.memory_stats()["allocation.all.allocated"] > before
    assert all(p.device.type == "cpu" for p in result.model.parameters())


@pytest.mark.slow
def test_a_budget_is_kept(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    result = lilliput.shrink(*toy, floor="20%", budget="20s", out=tmp_path / "out")
    assert result.met and result.summary["wall_s"] <= 21 and result.summary["budget_s"] == 20


def test_a_budget_too_small_to_train_ends_with_the_best_there_is(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    result = lilliput.shrink(*toy, floor="20%", budget="0.1s", out=tmp_path / "out")
    assert result.met and result.chosen is not None
    assert result.chosen["packed_bytes"] < result.summary["dense"]["packed_bytes"] / 2


def test_public_names_are_functions_whatever_was_imported_before() -> None:
    import importlib

    for name in lilliput.__all__:
        importlib.import_module("lilliput.shrinking")
        assert name == "__version__" or callable(getattr(lilliput, name)), name


def test_nothing_of_a_file_is_executed(tmp_path: Path) -> None:
    """Weights are safetensors, or read with weights_only; no source of ours unpickles anything else.

    search/share.py hands objects to this program's own processes, in a private folder or a pipe.
    """
    for path in (Path(lilliput.__file__).parent).rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path.name == "share.py" or not re.search(
            r"\bpickle\.|import pickle|allow_pickle=True|\bmarshal\b|\bdill\b", text
        ), path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, (path, call)
        for call in re.findall(r"np\.load\([^)]*\)", text):
            assert "allow_pickle=False" in call, (path, call)


def test_with_twenty_examples_the_dense_network_is_what_can_be_promised(
    toy: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    model, task = toy
    x, y = task.split("val")
    few = Task("few", task.split("train"), (x[:20], y[:20]), task.split("test"))
    result = lilliput.shrink(model, few, floor="1%", trials=1, out=tmp_path / "out")
    summary = result.summary
    assert result.met and result.chosen is not None and result.chosen["name"] == "dense"
    assert summary["drop_bound"] == 0 and summary["drop_test"] == 0 and summary["sure"] == 0.9
    assert (result.folder / "model.lil").stat().st_size == summary["dense"]["packed_bytes"]
    bounds = [point["drop_bound"] for point in summary["near"]]
    assert bounds and bounds == sorted(bounds) and bounds[0] > 0.01
    assert "could be promised" in verdict(summary) and "With a floor of" in verdict(summary)
    halves = lilliput.shrink(model, few, floor="1%", sure="50%", trials=1, out=tmp_path / "half")
    assert halves.chosen is not None and halves.chosen["packed_bytes"] < summary["dense"]["packed_bytes"] / 2


def test_a_metric_without_a_value_on_some_draws_does_not_end_a_search(
    toy: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    """Two positive examples: AUC has no value on one draw in seven."""
    x, _ = toy[1].split("train")
    y = torch.zeros(len(x))
    y[:2] = 1
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).eval()
    rare = Task("rare", (x, y[:, None]), (x[:40], y[:40, None]), loss="bce", metric="auc")
    result = lilliput.shrink(net, rare, floor="40%", trials=1, out=tmp_path / "out")
    assert result.met and (result.folder / "report.html").exists()
