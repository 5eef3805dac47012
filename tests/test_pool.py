"""pool: processes that do a search's work, killed, stopped and left alone."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lilliput.errors import StoreError
from lilliput.search import cores
from lilliput.search.pool import Pool, Progress, WorkerDied

PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool({"offset": 100}, 2) as pool:
        yield pool


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def patient(desk: Any, path: str) -> tuple[int, bool]:
    Path(path).touch()
    steps = 0
    while not desk.stopped:
        steps += 1
        desk.report(steps)
        time.sleep(0.01)
    return os.getpid(), desk.stopped


def deadly(desk: Any, deaths: int, path: str, smaller: int = 0) -> int:
    Path(path).touch()
    if smaller < deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return smaller


def test_calls_come_back_in_order_from_one_thread_each(pool: Pool) -> None:
    def work(desk: Any, x: int) -> tuple[int, int, int]:
        import torch

        return desk.thing["offset"] + x, torch.get_num_threads(), os.getpid()

    results = list(pool.map(work, range(8)))
    assert [value for value, _, _ in results] == list(range(100, 108))
    assert {threads for _, threads, _ in results} == {1}
    assert os.getpid() not in {pid for _, _, pid in results} <= set(pool.pids)


def test_a_worker_keeps_what_a_call_leaves(pool: Pool) -> None:
    def count(desk: Any) -> int:
        desk.kept["count"] = desk.kept.get("count", 0) + 1
        return int(desk.kept["count"])

    assert max(pool.submit(count).result() for _ in range(6)) >= 3


def test_what_is_put_is_found_in_every_worker(pool: Pool) -> None:
    assert pool.submit(lambda desk: desk.get("table")).result() is None
    table = np.arange(100_000.0)
    pool.put("table", table)

    def total(desk: Any) -> tuple[float, str, int]:
        return float(desk.get("table").sum()), type(desk.get("table")).__name__, desk.thing["offset"]

    assert {pool.submit(total).result() for _ in range(4)} == {(float(table.sum()), "memmap", 100)}


def test_what_is_shared_can_be_replaced() -> None:
    def look(desk: Any) -> tuple[Any, int]:
        desk.kept["count"] = desk.kept.get("count", 0) + 1
        return desk.thing, desk.kept["count"]

    with Pool("first", 1) as pool:
        assert [pool.submit(look).result() for _ in range(2)] == [("first", 1), ("first", 2)]
        pool.share("second")
        assert pool.submit(look).result() == ("second", 1)


def test_what_a_call_raises_is_raised_again(pool: Pool) -> None:
    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def fail(desk: Any, odd: bool) -> None:
        raise Odd(1, 2) if odd else KeyError("name")

    with pytest.raises(KeyError, match="name") as caught:
        pool.submit(fail, False).result()
    assert 'raise Odd(1, 2) if odd else KeyError("name")' in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="Odd: 1 and 2"):
        pool.submit(fail, True).result()
    with pytest.raises(TypeError, match="must be such as cloudpickle takes"):
        pool.submit(lambda desk: __import__("threading").Lock()).result()
    assert pool.submit(lambda desk: 1).result() == 1


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_worker_takes_its_own_call_along_and_no_other(pool: Pool, tmp_path: Path) -> None:
    running = pool.submit(patient, str(tmp_path / "running"))
    wait_for((tmp_path / "running").exists)
    once, twice = (pool.submit(deadly, n, str(tmp_path / str(n))) for n in (1, 2))
    behind = pool.submit(lambda desk: "behind")
    assert once.result() == 1  # the second try was asked to be smaller
    with pytest.raises(WorkerDied, match="the one that ran deadly was killed, and killed again"):
        twice.result()
    assert behind.result() == "behind" and not running.done()
    seen = pool.progress(running)
    assert seen.steps > 1 and seen.seconds > 0
    pool.end(running)
    pid, stopped = running.result()
    assert stopped and pid in pool.pids and pool.progress(running) == Progress()


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_an_idle_worker_that_is_killed_is_replaced(pool: Pool) -> None:
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    assert pool.submit(lambda desk: 5).result() == 5
    assert [pool.submit(lambda desk, x: x, i).result() for i in range(4)] == [0, 1, 2, 3]


def test_a_call_without_the_hint_is_tried_again_as_it_was(pool: Pool, tmp_path: Path) -> None:
    def once(desk: Any, path: str) -> str:
        if not Path(path).exists():
            Path(path).touch()
            os._exit(1)
        return "again"

    assert pool.submit(once, str(tmp_path / "seen")).result() == "again"


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_workers_can_be_held(pool: Pool, tmp_path: Path) -> None:
    running = pool.submit(patient, str(tmp_path / "held"))
    wait_for(lambda: pool.progress(running).steps > 2)
    with pool.paused():
        time.sleep(0.05)
        before = pool.progress(running)
        time.sleep(0.2)
        assert pool.progress(running) == before
    wait_for(lambda: pool.progress(running).steps > before.steps)
    pool.end(running)
    assert running.result()[1]


def test_a_closed_pool_leaves_nothing(tmp_path: Path) -> None:
    with Pool(None, 1) as pool:
        running, waiting = pool.submit(patient, str(tmp_path / "a")), pool.submit(patient, str(tmp_path / "b"))
        wait_for((tmp_path / "a").exists)
        assert pool.idle == 0
        pids, folder = pool.pids, pool.folder
    for future in (running, waiting):
        with pytest.raises(CancelledError):
            future.result()
    assert not folder.exists() and not any(map(psutil.pid_exists, pids))
    with pytest.raises(RuntimeError, match="must be open"):
        pool.submit(patient)


def test_workers_are_as_many_as_cores_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    net = torch.nn.Linear(1000, 1000)  # 4 MB
    monkeypatch.setattr(cores, "cpu_count", lambda: 8)
    for free, expected in ((100e9, 8), (2e9, 5), (0.1e9, 1)):
        monkeypatch.setattr(cores, "available_bytes", lambda free=free: free)
        assert cores.count_workers(net) == expected
    assert cores.count_workers(net, 20) == 20
    monkeypatch.setattr(cores, "available_bytes", lambda: 100e9)
    assert cores.count_workers(net, device="cuda") == 2
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        cores.count_workers(net, 0)


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"max": "1000\n", "current": "900\n", "stat": "anon 600\ninactive_file 300\n"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cores, "CGROUPS", [tuple(str(tmp_path / name) for name in texts)])
    assert cores.available_bytes() == 400
    (tmp_path / "max").write_text("max\n")
    assert cores.available_bytes() > 1e6


SCRIPT = """
import signal, sys, time
from lilliput.errors import StoreError
from lilliput.search import cores
from lilliput.search.pool import Pool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
scale = 3
def work(desk, x):
    return scale * desk.thing(x)
def long(desk):
    print(f"folder {desk.folder}", flush=True)
    time.sleep(600)
with Pool(lambda x: x + 1, 2) as pool:
    print(*pool.map(work, range(3)), flush=True)
    if sys.argv[-1] in ("long", "held"):
        pool.submit(long)
        work = pool.submit(long)
        time.sleep(1)
        if sys.argv[-1] == "held":
            with pool.paused():
                print("ready", flush=True)
                time.sleep(600)
        print("ready", flush=True)
        work.result()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "-c", "stdin"])
def test_a_program_needs_no_main_guard(how: str, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(SCRIPT)
    arguments = {"file": ["plain.py"], "-c": ["-c", SCRIPT], "stdin": ["-"]}[how]
    done = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if how == "stdin" else "",
        text=True,
        capture_output=True,
        cwd=tmp_path,
        timeout=PATIENCE_S,
    )
    assert (done.stdout, done.stderr) == ("3 6 9\n", "")


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
@pytest.mark.parametrize(("mode", "sent"), [("long", "INT"), ("long", "KILL"), ("held", "KILL"), ("long", "HUP")])
def test_workers_end_with_their_parent(mode: str, sent: str, tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text(SCRIPT)
    with subprocess.Popen(
        [sys.executable, "plain.py", mode],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        said = ""
        while "ready" not in said:
            line = parent.stdout.readline()
            assert line, parent.stderr.read()
            said += line
        family = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True)]
        assert len(family) >= 3
        if sent == "INT":  # as a terminal does: to everybody
            os.killpg(parent.pid, signal.SIGINT)
        else:
            parent.send_signal(getattr(signal, f"SIG{sent}"))
        with contextlib.suppress(subprocess.TimeoutExpired):
            parent.wait(PATIENCE_S)
        _, alive = psutil.wait_procs(family, timeout=10)
        for process in alive:
            process.kill()
        assert not alive
        errors = parent.stderr.read()
    if sent == "INT":
        assert errors.count("Traceback") == errors.count("KeyboardInterrupt") == 1 and "loky" not in errors
    else:  # loky's own process says that it has removed what the parent could not
        assert "Traceback" not in errors
    folder = re.search("folder (.*)", said)
    assert folder is not None and not Path(folder[1]).exists()


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(thing: Any, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lilliput.search.share.dump", full)
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(StoreError, match="must have room for the model and the data, got: No space left on device"):
        Pool("data", 1)
    gone = [
        child
        for child in psutil.Process().children()
        if child.pid not in before and "popen_loky" in str(child.cmdline())
    ]
    assert not gone


TOY = """
import torch
from torch import nn
from lilliput import Task


def make():
    torch.manual_seed(0)
    x = torch.randn(240, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    with torch.no_grad():
        y = model(x).argmax(1)
    return model, Task("toy", (x[:128], y[:128]), (x[128:192], y[128:192]), (x[192:], y[192:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_search_outlives_its_workers(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    arguments = ["shrink", "toy.py:make", "--floor", "20%", "--budget", "20s", "--workers", "2", "--out", "out"]
    with subprocess.Popen(
        [sys.executable, "-m", "lilliput.cli", *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    ) as search:
        killed: set[int] = set()
        while search.poll() is None and len(killed) < 3:  # workers that had time to begin something
            for child in psutil.Process(search.pid).children():
                old = time.time() - child.create_time() > 4
                if old and child.pid not in killed and "popen_loky" in " ".join(child.cmdline()):
                    child.kill()
                    killed.add(child.pid)
            time.sleep(0.1)
        said, errors = search.communicate(timeout=PATIENCE_S)
    assert search.returncode == 0 and killed, said + errors
    assert "Traceback" not in errors
    assert (tmp_path / "out" / "model.lil").stat().st_size < 4000


def test_a_worker_that_starts_later_takes_no_call_until_the_pool_is_complete() -> None:
    with Pool(None, 2, later=1) as pool:
        assert pool.workers == 2 and len(pool.pids) == 1 and pool.idle == 1
        first = [pool.submit(lambda desk: (time.sleep(0.2), desk.slot)[1]) for _ in range(2)]
        assert {future.result(60) for future in first} == {0}, "both ran in the one that there is"
        pool.complete()
        assert len(pool.pids) == 2
        slots = {
            future.result(60) for future in [pool.submit(lambda desk: (time.sleep(2), desk.slot)[1]) for _ in range(4)]
        }
        assert slots == {0, 1}
        pool.complete()
        assert len(pool.pids) == 2, "nothing is started twice"
