"""When a search is killed, the disk is full, files are damaged or a training diverges: nothing finished is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lilliput.train
from lilliput import Distill, Recipe, Task, Train
from lilliput.runner import Runner
from lilliput.search import finish
from lilliput.shrinking import shrink
from lilliput.store import Store

pytestmark = pytest.mark.slow  # whole searches, killed and resumed

TARGET = """
import torch
from torch import nn
from lilliput import Task


def make():
    torch.manual_seed(0)
    x = torch.randn(160, 8)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        y = (model(x) + 0.1 * torch.randn(160, 3)).argmax(1)
    return model, Task("toy", (x[:96], y[:96]), (x[96:128], y[96:128]), (x[128:], y[128:]))
"""


TIMED = ("flags", "price", "at_s", "seconds", "modelled")


def make() -> tuple[nn.Module, Task]:
    space: dict[str, Any] = {}
    exec(TARGET, space)
    made: tuple[nn.Module, Task] = space["make"]()
    return made


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    shrink(*make(), floor=0.5, trials=3, out=folder / "out")
    return folder / "out"


@pytest.fixture
def again(whole: Path, tmp_path: Path) -> Path:
    """A copy of its folder."""
    shutil.copytree(whole, tmp_path / "out")
    return tmp_path / "out"


def summary(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return data


def facts(folder: Path) -> list[Any]:
    """Recipes and scores of everything that was tried, without what was timed."""
    rows = [
        {key: value for key, value in row.items() if "latency" not in key and key not in TIMED}
        for row in summary(folder)["points"]
    ]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def trained(folder: Path) -> dict[str, int]:
    """Every finished training and when it was written."""
    return {
        key: (folder / "records" / f"{key}.json").stat().st_mtime_ns
        for key, record in Store(folder / "records").records()
        if record.get("kind") == "train"
    }


def same(a: Path, b: Path) -> None:
    assert facts(a) == facts(b)
    assert summary(a)["chosen"]["recipe"] == summary(b)["chosen"]["recipe"]
    assert (a / "model.onnx").read_bytes() == (b / "model.onnx").read_bytes()
    first, second = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_equals_the_search_that_was_left_alone(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TARGET)
    command = [
        sys.executable,
        "-m",
        "lilliput.cli",
        "shrink",
        "toy.py:make",
        "--floor",
        "50%",
        "--trials",
        "3",
        "--out",
        "out",
        "--resume",
    ]
    records, finished = tmp_path / "out" / "records", dict[str, int]()
    for enough in (6, 11, 17):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(records.glob("*.json"))) < enough:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = trained(tmp_path / "out")
        assert finished.items() <= now.items()  # none lost, none written again
        finished = now
    assert len(finished) >= 3
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert finished.items() <= trained(tmp_path / "out").items()
    assert summary(tmp_path / "out")["damaged"] == []
    same(whole, tmp_path / "out")


def test_a_finished_search_is_not_trained_again(again: Path, whole: Path) -> None:
    before = trained(again)
    result = shrink(*make(), floor=0.5, trials=3, out=again, resume=True)
    assert trained(again) == before and result.summary["steps_per_s"] == 0
    same(whole, again)


def test_without_resume_an_earlier_search_is_left_alone(again: Path) -> None:
    with pytest.raises(ValueError, match="--resume"):
        shrink(*make(), floor=0.5, trials=3, out=again)


def test_damaged_records_and_tensors_are_named_set_aside_and_made_again(again: Path, whole: Path) -> None:
    keys = sorted(trained(again))
    records = again / "records"
    (records / f"{keys[0]}.json").write_text('{"kind": "tr')
    data = (records / f"{keys[1]}.safetensors").read_bytes()
    (records / f"{keys[1]}.safetensors").write_bytes(data[:-20])
    made = sorted(records.glob("made-*.json"))[0]
    made.write_bytes(b"\xff\xfe\x00")
    shrink(*make(), floor=0.5, trials=3, out=again, resume=True)
    damaged = summary(again)["damaged"]
    assert made.name in damaged and f"{keys[0]}.json" in damaged
    assert all((records / f"{name}.corrupt").exists() for name in damaged)
    same(whole, again)


def test_a_full_disk_is_a_clear_error_and_the_search_goes_on_from_there(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "toy.py").write_text(TARGET)
    code = (
        "import os, pathlib\nreplace, count = os.replace, iter(range(99))\n"
        "def full(a, b):\n    if pathlib.Path(b).parent.name == 'records' and next(count) > 5:\n"
        "        raise OSError(28, 'No space left on device')\n    replace(a, b)\n"
        "os.replace = full\nfrom lilliput.cli import app\napp()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "shrink", "toy.py:make", "--floor", "50%", "--trials", "3", "--out", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "could not be written" in done.stderr and "Traceback" not in done.stderr
    store = Store(tmp_path / "out" / "records")
    assert list(store.records()) and store.damaged == []
    shrink(*make(), floor=0.5, trials=3, out=tmp_path / "out", resume=True)
    same(whole, tmp_path / "out")


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(lilliput.StoreError, match="must be a folder that can be written"):
        shrink(*make(), trials=1, out=tmp_path / "file" / "out")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(lilliput.StoreError):
            shrink(*make(), trials=1, out=tmp_path / "closed" / "out")


def poison(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose value is finite and whose gradient is not."""
    return nn.functional.cross_entropy(output, target) + (output - output).abs().sqrt().sum()


def test_diverging_trainings_are_recorded_as_failed_and_the_search_goes_on(tmp_path: Path) -> None:
    model, task = make()
    bad = Task("toy", task.split("train"), task.split("val"), loss=poison)
    result = shrink(model, bad, floor=0.5, trials=2, out=tmp_path / "out")
    failed = [row for row in result.summary["points"] if row["status"] == "failed"]
    assert failed and all("Diverged: Train: the" in row["reason"] for row in failed)
    assert result.met and "without training" in result.summary["chosen"]["name"]
    assert (tmp_path / "out" / "report.html").exists()


class Interrupted(Exception):
    """Stands for the kill."""


def stochastic() -> tuple[nn.Module, Task]:
    model, task = make()
    return nn.Sequential(*list(model)[:2], nn.Dropout(0.3), *list(model)[2:]).eval(), task


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_long_training_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    model, task = stochastic()
    recipe = Recipe((Train(40, rules=(Distill(),), batch_size=16, optimizer=optimizer),))
    left_alone = Runner(model, task, Store(tmp_path / "a")).make(recipe).state_dict()
    monkeypatch.setattr(lilliput.train, "CHECKPOINT_SECONDS", -1.0)
    steps: list[int] = []

    def kill(step: int) -> bool:
        steps.append(step)
        if step == 25:
            raise Interrupted
        return False

    with pytest.raises(Interrupted):
        Runner(model, task, Store(tmp_path / "b")).make(recipe, kill)
    assert steps == list(range(1, 26))
    torch.manual_seed(12345)  # another process has another random state
    steps.clear()
    trained = Runner(model, task, Store(tmp_path / "b")).make(recipe, lambda step: bool(steps.append(step)))
    assert steps == list(range(25, 41))
    assert all(torch.equal(left_alone[name], value) for name, value in trained.state_dict().items())
    assert not list((tmp_path / "b").glob("*.ckpt"))  # of no use once the training is finished


def test_only_the_last_of_trainings_in_a_row_is_needed_to_go_on(tmp_path: Path) -> None:
    model, task = make()
    recipe = Recipe(tuple(Train(6, batch_size=16, seed=seed) for seed in range(3)))
    first = Runner(model, task, Store(tmp_path / "a"))
    expected, key = first.make(recipe).state_dict(), first.key(recipe)
    store = Store(tmp_path / "b")
    store.put(key, first.store.record(key) or {}, first.store.tensors(key))
    steps: list[int] = []
    found = Runner(model, task, store).make(recipe, lambda step: bool(steps.append(step))).state_dict()
    assert not steps and all(torch.equal(expected[name], value) for name, value in found.items())


def test_a_damaged_checkpoint_starts_the_training_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = stochastic()
    recipe = Recipe((Train(20, batch_size=16),))
    left_alone = Runner(model, task, Store(tmp_path / "a")).make(recipe).state_dict()
    monkeypatch.setattr(lilliput.train, "CHECKPOINT_SECONDS", -1.0)

    def kill(step: int) -> bool:
        if step == 9:
            raise Interrupted
        return False

    with pytest.raises(Interrupted):
        Runner(model, task, Store(tmp_path / "b")).make(recipe, kill)
    path = next((tmp_path / "b").glob("*.ckpt"))
    path.write_bytes(path.read_bytes()[:-100])
    runner = Runner(model, task, Store(tmp_path / "b"))
    tensors = runner.make(recipe).state_dict()
    assert runner.store.damaged == [path.name]
    assert all(torch.equal(left_alone[name], value) for name, value in tensors.items())


@pytest.mark.slow
def test_with_a_budget_what_was_trained_is_not_trained_again(tmp_path: Path) -> None:
    model, task = make()
    shrink(model, task, floor=0.5, budget="12s", out=tmp_path / "out")
    before = trained(tmp_path / "out")
    refused = [item["reason"] for item in summary(tmp_path / "out")["left_alone"] if item["name"] == "training"]
    assert before or "too little time" in refused[0]  # a machine that is busy enough trains nothing in this time
    shrink(model, task, floor=0.5, budget="12s", out=tmp_path / "out", resume=True)
    assert before.items() <= trained(tmp_path / "out").items()


def test_the_callers_model_and_random_state_are_left_alone(tmp_path: Path) -> None:
    model, task = make()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    shrink(model, task, floor=0.5, trials=1, out=tmp_path / "out")
    assert torch.equal(torch.rand(3), expected) and model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
