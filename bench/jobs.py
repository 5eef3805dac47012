"""The jobs that lilliput is judged by, each in its own process on an idle machine; summaries go to results/jobs/.

python bench/jobs.py [JOB ...] [--seeds 0 1 2]

The bench-work jobs read the files in the folder LILLIPUT_BENCH_WORK and nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
JOBS = {  # target, budget, floor
    "work-digits": ("bench/work.py:digits", "5m", "0.5%"),
    "work-digits-10m": ("bench/work.py:digits", "10m", "0.5%"),
    "work-digits-latency": ("bench/work.py:digits", "5m", "0.5%", "--for", "latency"),
    "work-mlp": ("bench/work.py:mlp", "2m", "1%"),
    "work-cnn": ("bench/work.py:cnn", "2m", "1%"),
    "digits": ("digits", "5m", "0.5%"),
    "languages": ("languages", "4m", "1%"),
    "work-sentences": ("bench/work.py:sentences", "5m", "1%", "--for", "latency"),
}


def job(name: str, seed: int, out: Path) -> Path:
    """Run one job and keep its summary, without what only its report needs."""
    target, budget, floor, *more = JOBS[name]
    with tempfile.TemporaryDirectory() as folder:
        command = ["shrink", target, "--floor", floor, "--budget", budget, "--seed", str(seed), *more]
        done = subprocess.run(
            [sys.executable, "-m", "lilliput.cli", *command, "--out", f"{folder}/{name}"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            check=False,
        )
        if done.returncode not in (0, 3):
            raise SystemExit(f"{name} failed with status {done.returncode}")
        summary = json.loads(Path(folder, name, "summary.json").read_text())
    summary["command"] = " ".join(["lilliput", *command])
    summary["load"] = [summary["machine"].pop("load_before"), summary["machine"].pop("load_after")]
    for key in ("points", "sensitivity"):
        summary.pop(key)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{seed}.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", nargs="*", default=list(JOBS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    given = parser.parse_args()
    for seed in given.seeds:
        for name in given.jobs:
            print(job(name, seed, ROOT / "results" / "jobs"), flush=True)
