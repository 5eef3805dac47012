"""The jobs that lilliput is judged by, each in its own process, with the rival's result beside it; results/jobs/.

python bench/jobs.py [JOB ...] [--seeds 0 1 2] [--no-rival]

The bench-work jobs read the files in the folder LILLIPUT_BENCH_WORK and nothing else; those of other people read what
bench/fetch.py fetches. The rival (bench/rival.py) gets the same floor and as many processor seconds as the search took.
Both files and the dense one are timed in ONNX Runtime in one interleaved run; what is lost on test is measured for both
where the task has such a split (bench-work has none).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import held

ROOT = Path(__file__).resolve().parents[1]
ONNX = ("--file", "onnx")
LATENCY = ("--for", "latency")
JOBS = {  # target, budget, floor
    "work-digits": ("bench/work.py:digits", "5m", "0.5%"),
    "work-digits-10m": ("bench/work.py:digits", "10m", "0.5%"),
    "work-digits-latency": ("bench/work.py:digits", "5m", "0.5%", *LATENCY),
    "work-mlp": ("bench/work.py:mlp", "2m", "1%"),
    "work-cnn": ("bench/work.py:cnn", "2m", "1%"),
    "digits": ("digits", "5m", "0.5%"),
    "languages": ("languages", "4m", "1%"),
    "work-sentences": ("bench/work.py:sentences", "5m", "1%", *LATENCY),
    "flights": ("bench/people.py:flights", "3m", "2r", *ONNX),
    "movielens": ("bench/people.py:movielens", "3m", "1%", *ONNX),
    "stamps": ("bench/people.py:stamps", "4m", "3%", *LATENCY),
    "sections": ("bench/people.py:sections", "3m", "1%", *ONNX),
    "legs": ("bench/people.py:legs", "3m", "1%", *ONNX),
    "letters": ("bench/people.py:letters", "3m", "1%", *ONNX),
}
WITHOUT_RIVAL = ("work-sentences",)  # a class of its own, no constructor's argument of which may be smaller


def child(command: list[str]) -> tuple[int, float]:
    """Run a command; its status, and the processor seconds of it and all its children."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime


def job(name: str, seed: int, out: Path, with_rival: bool) -> Path:
    """Run one job and keep its summary, without what only its report needs."""
    target, budget, floor, *more = JOBS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = ["shrink", target, "--floor", floor, "--budget", budget, "--seed", str(seed), *more]
        ours = Path(folder, name)
        status, spent = child([sys.executable, "-m", "lilliput.cli", *command, "--out", str(ours)])
        if status not in (0, 3):
            raise SystemExit(f"{name} failed with status {status}")
        summary = json.loads((ours / "summary.json").read_text())
        summary["processor_s"] = round(spent, 1)
        if with_rival:
            rival = Path(folder, "rival")
            asked = ["--floor", floor, "--seconds", f"{spent:.0f}", "--for", summary["objective"], "--seed", str(seed)]
            status, _ = child([sys.executable, "bench/rival.py", target, *asked, "--folder", str(rival)])
            summary["rival"] = beside(target, ours, rival, summary) if not status else {"failed": status}
    summary["command"] = " ".join(["lilliput", *command])
    summary["load"] = [summary["machine"].pop("load_before"), summary["machine"].pop("load_after")]
    for key in ("points", "sensitivity"):
        summary.pop(key)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{seed}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path


def beside(target: str, ours: Path, rival: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """The rival's record, with both files' speed from one run and our loss on test measured as the rival's was."""
    from lilliput.cost.measure import latency
    from lilliput.export.onnx import Session
    from lilliput.targets.function import resolve

    record: dict[str, Any] = json.loads((rival / "rival.json").read_text())
    record.pop("attempts")
    model, task = resolve(target)
    files = {"dense": rival / "dense.onnx", "ours": ours / "model.onnx", "rival": rival / "rival.onnx"}
    sessions = {name: Session(file) for name, file in files.items()}
    times = latency(sessions, task.example, seconds=4.0, clock=time.process_time)
    chosen = summary.get("chosen") or summary["dense"]
    summary["held_out"] = held.drop(task, model, sessions["ours"], summary["floor"])
    return record | {
        "ours": {
            "bytes": files["ours"].stat().st_size,
            "packed_bytes": chosen["packed_bytes"],
            "bytes_over_rival": round(files["ours"].stat().st_size / record["bytes"], 4),
            "speed_over_rival": round(times["rival"].median_ms / times["ours"].median_ms, 4),
            "speedup": times["ours"].ratio,
            "engine_ms": chosen.get("engine_ms"),
        },
        "speedup": times["rival"].ratio,
        "ms": {name: each.median_ms for name, each in times.items()},
    }


def told(path: Path) -> str:
    """A job's result and its rival's, in a line each."""
    summary = json.loads(path.read_text())
    rival = summary.get("rival") or {}
    if "ours" not in rival:
        return f"{path}"
    rows = [("ours", rival["ours"], summary.get("held_out")), ("rival", rival, rival["held_out"])]
    return "\n".join([f"{path}"] + [
        f"  {name:6s}{row['bytes']:12,} bytes  {row['speedup']:6.2f} x dense"
        + (f"  loses {lost['drop']:.5g} +- {lost['standard_error']:.2g} on test (floor {summary['floor']:.5g})"
           f"{'' if lost['held'] else ', not held'}" if lost else "")
        for name, row, lost in rows
    ])  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--no-rival", action="store_true")
    given = parser.parse_args()
    for seed in given.seeds:
        for name in given.jobs:
            path = job(name, seed, ROOT / "results" / "jobs", not given.no_rival and name not in WITHOUT_RIVAL)
            print(told(path), flush=True)
