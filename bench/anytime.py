"""What a search reaches in which time, quiet and beside other work, against what it must reach: results/anytime.json.

    export LILLIPUT_BENCH_WORK=/path/to/bench-work
    python bench/anytime.py [ROW ...] [--seeds 0 1 2] [--again] [--list]

Each run is a command of its own, as a person would give it. A run that is on record for this commit is not repeated, so
an interrupted table goes on where it was. While a search runs, its folder is watched: the record says when the first
loadable file was there, and how large the best one was at which second. A value is the median over the seeds.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import held
import steps

from lilliput.cost.measure import machine
from lilliput.files import write
from lilliput.record import commit, versions
from lilliput.search import ask

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "anytime.json"
SEEDS = (0, 1, 2)
LATE = (1.1, 3.0)  # wall time may be the budget times this, plus so many seconds
BUSY = "while True: pass"
Summary = dict[str, Any]


def smaller(summary: Summary) -> float:
    """The dense ONNX file over the packed file."""
    return float(summary["dense"]["onnx_bytes"] / (summary["chosen"] or summary["dense"])["packed_bytes"])


def faster(summary: Summary) -> float:
    """Dense in ONNX Runtime over the chosen network in the faster of ONNX Runtime and the engine."""
    chosen = summary["chosen"] or summary["dense"]
    times = [chosen.get("latency_ms"), chosen.get("engine_ms")]
    return float(summary["dense"]["latency_ms"] / min(t for t in times if t))


@dataclass(frozen=True)
class Search:
    """One row that runs a search.

    Args:
        must: what the row must reach.
        target: what is shrunk; "demo" for the command of that name.
        budget: as on the command line.
        floor: as on the command line.
        more: other options.
        busy: endless loops beside it.
        value: what of the summary is compared.
    """

    must: float
    target: str
    budget: str
    floor: str
    more: tuple[str, ...] = ()
    busy: int = 0
    value: Callable[[Summary], float] = smaller

    def command(self, seed: int) -> list[str]:
        if self.target == "demo":
            return ["demo", *self.more]
        options = ["--floor", self.floor, "--budget", self.budget, "--seed", str(seed)]
        return ["shrink", self.target, *options, *self.more]

    def run(self, seed: int) -> dict[str, Any]:
        """The search in a process of its own, watched."""
        with tempfile.TemporaryDirectory() as folder, loops(self.busy):
            out, began = Path(folder, "out"), time.monotonic()
            process = subprocess.Popen(
                [sys.executable, "-m", "lilliput.cli", *self.command(seed), "--out", str(out)],
                cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            history = watched(process, out, began)
            wall, errors = time.monotonic() - began, process.stderr.read() if process.stderr else ""
            if process.returncode not in (0, 3) or not (out / "summary.json").exists():
                return {"value": None, "failed": f"status {process.returncode}: {errors.strip()[-300:]}"}
            summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
            found = self.found(summary, out)
        budget = ask.seconds(self.budget)
        return {
            **found,
            "wall_s": round(wall, 1),
            "in_time": wall <= budget * LATE[0] + LATE[1],
            "first_file_s": next((second for second, _ in history), None),
            "files": history,
        }

    def found(self, summary: Summary, out: Path) -> dict[str, Any]:
        """What a summary says, and what the file loses on the split that nothing was chosen on."""
        chosen = summary["chosen"] or {}
        return {
            "value": round(self.value(summary), 2),
            "met": summary["met"],
            "chosen": chosen.get("name"),
            **{key: chosen.get(key) for key in ("packed_bytes", "onnx_bytes", "latency_ms", "engine_ms", "val")},
            "drop_corrected": summary.get("drop_corrected"),
            "held_out": self.held_out(summary, out),
            "points_tried": len(summary["points"]),
        }

    def held_out(self, summary: Summary, out: Path) -> dict[str, Any] | None:
        """The drop on the test split by the written file; None for a job without one (those of bench-work)."""
        from lilliput.export.onnx import Session
        from lilliput.targets.function import resolve

        target = "digits" if self.target == "demo" else self.target
        if target.startswith("bench/work.py"):
            return None
        model, task = resolve(target)
        return held.drop(task, model, Session(out / "model.onnx"), float(summary["floor"]))


def watched(process: subprocess.Popen[str], out: Path, began: float) -> list[tuple[float, int]]:
    """(second, bytes of model.lil) whenever that file changed, until the process has ended."""
    history: list[tuple[float, int]] = []
    while process.poll() is None:
        with contextlib.suppress(OSError):
            size = (out / "model.lil").stat().st_size
            if size and (not history or history[-1][1] != size):
                history.append((round(time.monotonic() - began, 1), size))
        time.sleep(0.1)
    return history


@contextlib.contextmanager
def loops(count: int) -> Iterator[None]:
    """So many endless loops while something else is measured."""
    running = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
            process.wait()


@dataclass(frozen=True)
class Speed:
    """One row of training steps a second (bench/steps.py)."""

    must: float
    measure: Callable[[int], dict[str, Any]]

    def run(self, seed: int) -> dict[str, Any]:
        return self.measure(seed)


DIGITS, MLP, CNN, SENTENCES = (f"bench/work.py:{name}" for name in ("digits", "mlp", "cnn", "sentences"))
LATENCY = ("--for", "latency")
ROWS: dict[str, Search | Speed] = {
    "digits-20s": Search(12, DIGITS, "20s", "0.5%"),
    "digits-60s": Search(45, DIGITS, "60s", "0.5%"),
    "digits-2m": Search(150, DIGITS, "2m", "0.5%"),
    "digits-5m": Search(260, DIGITS, "5m", "0.5%"),
    "digits-10m": Search(300, DIGITS, "10m", "0.5%"),
    "digits-60s-busy": Search(15, DIGITS, "60s", "0.5%", busy=2),
    "digits-2m-busy": Search(45, DIGITS, "2m", "0.5%", busy=2),
    "digits-5m-busy": Search(120, DIGITS, "5m", "0.5%", busy=2),
    "digits-untrained-60s": Search(32, DIGITS, "60s", "0.5%", ("--no-train",)),
    "digits-latency-60s": Search(2, DIGITS, "60s", "0.5%", LATENCY, value=faster),
    "digits-latency-2m": Search(8, DIGITS, "2m", "0.5%", LATENCY, value=faster),
    "digits-latency-5m": Search(20, DIGITS, "5m", "0.5%", LATENCY, value=faster),
    "digits-latency-5m-busy": Search(8, DIGITS, "5m", "0.5%", LATENCY, busy=2, value=faster),
    "demo": Search(20, "demo", "2m", "1%"),
    "demo-busy": Search(20, "demo", "2m", "1%", busy=2),
    "mlp-2m": Search(190, MLP, "2m", "1%"),
    "cnn-2m": Search(30, CNN, "2m", "1%"),
    "languages-4m": Search(60, "languages", "4m", "1%"),
    "sentences-untrained-5m": Search(6, SENTENCES, "5m", "1%", ("--no-train",)),
    "sentences-untrained-5m-latency": Search(1.6, SENTENCES, "5m", "1%", ("--no-train", *LATENCY), value=faster),
    "sentences-20m": Search(10, SENTENCES, "20m", "1%"),
    "steps-digits-student": Speed(0.85, steps.against_bare("digits student")),
    "steps-mlp": Speed(0.85, steps.against_bare("MLP")),
    "steps-two-workers": Speed(1.8, steps.two_workers("digits student")),
}


def read() -> dict[str, Any]:
    """The record so far."""
    if not RECORD.exists():
        return {"what": "What a search reaches in which time", "command": "python bench/anytime.py", "rows": {}}
    record: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return record


def kept(record: dict[str, Any], name: str, seed: int, run: dict[str, Any]) -> None:
    """Put a run into the record, with the medians over the seeds of one commit, and write it."""
    row = ROWS[name]
    runs = record["rows"].get(name, {}).get("runs", {})
    runs = {key: value for key, value in runs.items() if value["commit"] == run["commit"]} | {str(seed): run}
    known = [value["value"] for value in runs.values() if value["value"] is not None]
    middle = round(statistics.median(known), 2) if known else None
    record["rows"][name] = {
        "must": row.must,
        "median": middle,
        "reached": middle is not None and middle >= row.must and len(known) == len(runs),
        "in_time": all(value.get("in_time", True) for value in runs.values()),
        "runs": dict(sorted(runs.items())),
    }
    record["rows"] = {key: record["rows"][key] for key in ROWS if key in record["rows"]}
    data = (json.dumps(record, indent=1) + "\n").encode()
    write(RECORD, lambda file: file.write(data))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is asked for and not on record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; all without any")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--again", action="store_true", help="also what is on record for this commit")
    parser.add_argument("--list", action="store_true", help="show the rows with what is on record, run nothing")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.rows) - set(ROWS))
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    for seed in asked.seeds if not asked.list else []:
        for name in asked.rows or ROWS:
            record, here = read(), commit()
            done = record["rows"].get(name, {}).get("runs", {}).get(str(seed), {})
            if done.get("commit") == here and not asked.again:
                continue
            before = machine()
            run = ROWS[name].run(seed)
            run |= {"commit": here, "machine": before, "load_after": machine()["load"], "versions": versions()}
            kept(record, name, seed, run)
            print(f"{name} seed {seed}: {run['value']} (must {ROWS[name].must}) {run.get('failed', '')}", flush=True)
    for name in asked.rows or ROWS:
        row = read()["rows"].get(name, {})
        print(f"{name:32s} must {ROWS[name].must:6g}  median {row.get('median')}  runs {len(row.get('runs', {}))}")


if __name__ == "__main__":
    main()
