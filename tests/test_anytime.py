"""A search may end at any time: its folder is whole, holds the best so far, and is finished without training."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import nn

import lilliput
from lilliput import StoreError, Task
from lilliput.export.onnx import Session
from lilliput.files import recover, write, write_set
from lilliput.search import files, finish, shelf
from lilliput.search.ending import Ending, Stopped
from lilliput.search.journal import journal
from lilliput.search.lock import NAME, held
from lilliput.shrinking import shrink

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
NAMES = ("model.onnx", "model.lil", "model.safetensors", "recipe.toml")


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.02)


@pytest.fixture
def toy() -> tuple[nn.Module, Task]:
    space: dict[str, Any] = {}
    exec(TARGET, space)
    made: tuple[nn.Module, Task] = space["make"]()
    return made


def whole(folder: Path) -> dict[str, Any]:
    """The summary of a folder whose files are those that it names, and compute the same."""
    recover(folder)
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    for name in NAMES:
        data = (folder / name).read_bytes()
        assert len(data) == summary["files"][name]
        assert hashlib.sha256(data).hexdigest() == summary["hashes"][name]
    x = torch.randn(5, 8)
    packed, exported = lilliput.load(folder)(x), Session(folder / "model.onnx").outputs(x)
    torch.testing.assert_close(packed, torch.from_numpy(exported), atol=1e-5, rtol=1e-5)
    return summary


# --- files that belong together ------------------------------------------------------------------------------------


class PowerCut(BaseException):
    """Stands for it."""


@pytest.mark.parametrize("moved", range(5))
def test_a_set_that_is_cut_off_at_any_rename_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int
) -> None:
    names = ("a", "b", "deep/c", "all")
    write_set(tmp_path, {name: b"old" for name in names}, last="all")
    replace, count = os.replace, 0

    def cut(source: Any, target: Any) -> None:
        nonlocal count
        count += 1
        if count > moved:
            raise PowerCut
        replace(source, target)

    monkeypatch.setattr(os, "replace", cut)
    if moved < len(names):
        with pytest.raises(PowerCut):
            write_set(tmp_path, {name: b"new" for name in names}, last="all")
        assert (tmp_path / "all").read_bytes() == b"old", "the mark comes last"
    else:
        write_set(tmp_path, {name: b"new" for name in names}, last="all")
    monkeypatch.undo()
    assert all((tmp_path / name).read_bytes() in (b"old", b"new") for name in names), "each is whole at any time"
    recover(tmp_path)
    assert {(tmp_path / name).read_bytes() for name in names} == {b"new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "all", "b", "deep"]


def test_a_set_that_was_not_decided_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, {"a": b"old", "all": b"old"}, last="all")

    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left on device\. What was there before is unharmed"):
        write_set(tmp_path, {"a": b"new", "all": b"new"}, last="all")
    monkeypatch.undo()
    recover(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"old", "all": b"old"}


def test_what_belonged_to_the_earlier_set_goes(tmp_path: Path) -> None:
    write_set(tmp_path, {"engine/model.c": b"1", "all": b"1"}, last="all")
    write_set(tmp_path, {"engine": None, "all": b"2"}, last="all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all"]


# --- one at a time ---------------------------------------------------------------------------------------------------


def test_two_searches_in_one_folder_are_refused_and_a_dead_ones_lock_is_taken_over(
    toy: tuple[nn.Module, Task], tmp_path: Path
) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lilliput.search.lock import held\n"
        "with held(Path(sys.argv[1])):\n print('held', flush=True); time.sleep(60)"
    )
    out = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(StoreError, match=f"must not be in use, but process {other.pid} works in it"):
                shrink(*toy, floor=0.5, trials=1, out=out)
        finally:
            other.kill()
    assert (out / NAME).exists(), "a killed process leaves its file"
    with held(out):
        assert (out / NAME).read_text() == str(os.getpid())
    assert not (out / NAME).exists()


def test_two_threads_do_not_share_a_folder(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(StoreError, match="must not be in use"), held(tmp_path):
        pass


# --- what ends a search ----------------------------------------------------------------------------------------------


def test_the_first_signal_ends_the_search_and_the_second_everything() -> None:
    with Ending() as ending:
        with pytest.raises(Stopped, match="Ctrl-C"), ending.search(60):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        with pytest.raises(Stopped), ending.search(60):
            raise AssertionError("nothing begins after the end")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_outside_of_the_search_is_remembered() -> None:
    with Ending() as ending:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert ending.reason == "SIGTERM"
        with pytest.raises(Stopped, match="SIGTERM"), ending.search(60):
            raise AssertionError("nothing begins after the end")


def test_the_deadline_ends_what_does_not_look_at_the_clock() -> None:
    began = time.monotonic()
    with Ending() as ending, pytest.raises(Stopped, match="the end of the budget"), ending.search(0.2):
        while True:
            sum(range(1000))
    assert time.monotonic() - began < 5


def test_a_signal_waits_until_a_callback_of_the_garbage_collector_is_over() -> None:
    class Thing:
        pass

    def callback(dead: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # an exception raised here would be lost
        seen.append("whole")

    seen: list[str] = []
    thing = Thing()
    reference = weakref.ref(thing, callback)
    with Ending() as ending, pytest.raises(Stopped, match="Ctrl-C"), ending.search(60):
        del thing
        for _ in range(100):
            time.sleep(0.1)
    assert seen == ["whole"] and reference() is None


def test_a_signal_waits_until_a_file_is_written(tmp_path: Path) -> None:
    def fill(file: BinaryIO) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # an exception raised where the file is opened would leave it open
        time.sleep(0.05)
        file.write(b"whole")

    with Ending() as ending, pytest.raises(Stopped, match="Ctrl-C"), ending.search(60):
        write(tmp_path / "file", fill)
        for _ in range(100):
            time.sleep(0.1)
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_in_another_thread_there_are_no_signals() -> None:
    seen: list[str] = []

    def run() -> None:
        with Ending() as ending, ending.search(60):
            seen.append("ran")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == ["ran"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- the folder while a search runs ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_dense_network_comes_first_then_it_only_gets_better(
    toy: tuple[nn.Module, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []
    replaced = files.write_set

    def watched(*arguments: Any, **named: Any) -> None:
        replaced(*arguments, **named)
        seen.append(whole(tmp_path / "out"))

    monkeypatch.setattr(files, "write_set", watched)
    result = shrink(*toy, floor="20%", trials=2, out=tmp_path / "out")
    assert [row["name"] for row in result.summary["history"]][:2] == [
        "dense",
        "same structure, 8 bits without training",
    ]
    sizes = [summary["files"]["model.lil"] for summary in seen]
    assert len(seen) >= 3 and sizes[:-1] == sorted(sizes[:-1], reverse=True) and sizes[0] > 2 * sizes[1]
    assert [summary["finished"] for summary in seen] == [False] * (len(seen) - 1) + [True]
    assert all("test" not in (summary["chosen"] or {}) for summary in seen[:-1]), "test is read at the end"
    assert all(summary["chosen"]["val"] > 0 for summary in seen[1:])
    times = [row["at_s"] for row in result.summary["history"]]
    assert times == sorted(times) and result.summary["axes"]


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    """A search in a process of its own that would take long."""
    (folder / "toy.py").write_text(TARGET)
    words = ["shrink", "toy.py:make", "--floor", "20%", "--budget", "120s", "--out", "out", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "lilliput.cli", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def handed_over(folder: Path, least: int = 2, seconds: float = 240) -> dict[str, Any]:
    """The summary once so many points were handed over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (folder / "summary.json").exists():
            summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
            if len(summary["history"]) >= least:
                return summary
        time.sleep(0.05)
    raise AssertionError(f"{folder} must hold {least} points within {seconds} s")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_in_choice_test_and_report(tmp_path: Path, number: int) -> None:
    process = start(tmp_path)
    handed_over(tmp_path / "out")
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    summary = whole(tmp_path / "out")
    assert summary["finished"] and summary["ended"] == reason and summary["wall_s"] < 118
    assert summary["drop_test"] is not None and (tmp_path / "out" / "report.html").exists()
    assert f"The search was ended by {reason}" in output and f"ended by {reason}: choosing" in output


@pytest.mark.slow
def test_a_second_interrupt_ends_at_once_and_leaves_the_best_so_far(tmp_path: Path) -> None:
    process = start(tmp_path)
    handed_over(tmp_path / "out")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "lilliput finish" in errors and "Traceback" not in errors
    assert not whole(tmp_path / "out")["finished"]


@pytest.mark.slow
def test_after_a_kill_the_folder_is_whole_and_is_finished_without_training(tmp_path: Path) -> None:
    process, out = start(tmp_path), tmp_path / "out"
    handed_over(out)
    process.kill()
    process.communicate()
    before = whole(out)
    assert not before["finished"] and before["chosen"]["val"] > 0.5 and before["drop_test"] is None
    done = subprocess.run(
        [sys.executable, "-m", "lilliput.cli", "finish", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    after = whole(out)
    assert after["finished"] and after["drop_test"] is not None and (out / "report.html").exists()
    assert after["chosen"]["packed_bytes"] <= before["chosen"]["packed_bytes"] and after["steps_per_s"] == 0
    assert "toy is " in done.stdout
    # The target is needed for test alone: where it is gone, that is said.
    (tmp_path / "toy.py").rename(tmp_path / "moved.py")
    gone = subprocess.run(
        [sys.executable, "-m", "lilliput.cli", "finish", "out"], cwd=tmp_path, capture_output=True, text=True
    )
    assert gone.returncode == 2 and "the target of this search (toy.py:make" in gone.stderr
    assert whole(out) == after


def test_finish_from_python_needs_the_network_and_returns_it(toy: tuple[nn.Module, Task], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = shrink(*toy, floor="20%", budget="0.1s", out=out)
    with pytest.raises(ValueError, match=r"Call lilliput\.finish\(folder, model, task\)"):
        lilliput.finish(out)
    with pytest.raises(ValueError, match="must be a folder that `lilliput shrink` wrote"):
        lilliput.finish(tmp_path / "nowhere")
    again = lilliput.finish(out, *toy)
    assert again.met and again.chosen is not None and first.chosen is not None
    assert again.chosen["key"] == first.chosen["key"] and again.summary["drop_test"] == first.summary["drop_test"]
    x = torch.randn(7, 8)
    assert again.model is not None and first.model is not None
    torch.testing.assert_close(again.model(x), first.model(x))
    other = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(ValueError, match="must hold points of this network and task, got none"):
        lilliput.finish(out, other, toy[1])


def test_a_disk_that_fills_leaves_the_earlier_folder(
    toy: tuple[nn.Module, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, put = tmp_path / "out", shelf.shelve

    def full(job: Any, point: Any) -> Path:
        if len(job.history) >= 2 and point.files is None:
            raise StoreError("Store: the disk is full")
        return put(job, point)

    monkeypatch.setattr(shelf, "shelve", full)
    with pytest.raises(StoreError, match="the disk is full"):
        shrink(*toy, floor="20%", trials=1, out=out)
    summary = whole(out)
    assert not summary["finished"] and summary["chosen"]["name"] == "same structure, 8 bits without training"
    monkeypatch.undo()
    assert shrink(*toy, floor="20%", trials=1, out=out, resume=True).summary["finished"]


def test_a_clock_that_jumps_changes_nothing(
    toy: tuple[nn.Module, Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 86_400 * (-1) ** int(10 * time.monotonic()))
    result = shrink(*toy, floor="20%", budget="0.1s", out=tmp_path / "out")
    assert result.met and result.summary["wall_s"] < 60
    assert all(0 <= row["at_s"] < 60 for row in result.summary["history"])


def test_the_journal_is_what_optunas_dashboard_opens(tmp_path: Path) -> None:
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(study_name="first", storage=journal(tmp_path))
    trial = study.ask()
    study.tell(trial, trial.suggest_float("width", 0, 1))
    (tmp_path / "optuna.log.lock").write_text("")  # of a process that was killed
    again = optuna.load_study(study_name="first", storage=journal(tmp_path))
    assert len(again.trials) == 1 and again.trials[0].params.keys() == {"width"}
