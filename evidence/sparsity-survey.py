"""Sparsity in deep learning (2021): what to remove, by which criterion, in which pattern, on which schedule.

The trained perceptron on MNIST-1D with three quarters of its weights gone, in every combination: a criterion says which
go, a pattern which may go together, a schedule when. Each is fine-tuned for the same 350 steps and judged on 10,000
signals that nothing was tuned on. What the engine gains depends on the pattern alone, and is measured on the ResNet-20
for digits with as many random zeros, every pattern in one interleaved run.

Source: T. Hoefler, D. Alistarh, T. Ben-Nun, N. Dryden and A. Peste, Sparsity in deep learning, JMLR 2021,
arXiv:2102.00554, sections 2 to 5.
"""

import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lilliput
from lilliput.cost.measure import latency
from lilliput.data import cache_folder, digits, mnist1d
from lilliput.errors import NotSupported
from lilliput.evidence import each
from lilliput.export.onnx import trace
from lilliput.runtimes.engine import EngineSession
from lilliput.schedule import Cosine, Cubic, Cyclic, Schedule, Steps

SPARSITY = 0.75
CRITERIA = ("magnitude", "random", "lamp", "wanda", "ria", "taylor", "saliency", "obd", "woodfisher", "synflow")
PATTERNS = ("elements", "even", "1:4", "block 4x1", "block 1x8", "column", "channel")
SCHEDULES: dict[str, Callable[[], Schedule] | None] = {
    "once": None,
    "iterative": lambda: Steps(SPARSITY, rounds=5),
    "gradual": lambda: Cubic(SPARSITY),
    "cyclic": lambda: Cyclic(SPARSITY, rounds=3),
}


@cache
def work(quick: bool) -> tuple[nn.Module, lilliput.Task, Tensor, Tensor]:
    """The trained network, its task, and signals that judge it."""
    model, task = mnist1d.mnist1d_mlp()
    return model, task, *(mnist1d.signals()[2:] if quick else mnist1d.fresh())


def one(job: tuple[str, str, str, int, int, Path]) -> dict[str, Any]:
    """One combination: held-out accuracy after the fine-tuning."""
    criterion, pattern, schedule, seed, steps, folder = job
    torch.set_num_threads(1)
    model, task, x, y = work(steps < 100)
    where = "linear1,linear2"  # ten outputs have no row, column or block to spare
    made = SCHEDULES[schedule]
    prune = lilliput.Prune(
        SPARSITY if made is None else made(), criterion, pattern, "uniform", where, every=10, seed=seed
    )
    rules = (lilliput.Distill(),) if made is None else (prune, lilliput.Distill())
    training = lilliput.Train(steps, Cosine(2e-3), rules, supervised=0.3, batch_size=100, seed=seed)
    stages: list[lilliput.Stage] = [prune, training] if made is None else [training]
    net = lilliput.realize(lilliput.run(model, task, stages, folder, seed=seed)).eval()
    with torch.no_grad():
        right = float((net(x).argmax(1) == y).double().mean())
    pruned = torch.cat([net.get_parameter(f"{name}.weight").detach().flatten() for name in where.split(",")])
    zeros = float((pruned == 0).double().mean())
    return {"criterion": criterion, "pattern": pattern, "schedule": schedule, "accuracy": right, "zeros": zeros}


def speeds(quick: bool) -> dict[str, Any]:
    """How many times faster than dense a pattern is in the engine, at batch 1."""
    model, task = mnist1d.mnist1d_mlp() if quick else digits.digits()
    sessions, skipped = {"dense": EngineSession(trace(model, task.example).proto)}, {}
    for pattern in PATTERNS[:1] if quick else PATTERNS:
        try:
            pruned = lilliput.Prune(SPARSITY, "random", pattern, "uniform")(model, task, None)
            sessions[pattern] = EngineSession(trace(lilliput.realize(pruned), task.example).proto)
        except (ValueError, NotSupported) as error:
            skipped[pattern] = str(error)
    times = latency(sessions, task.example, seconds=0.1 if quick else 8)
    dense = times["dense"].median_ms
    return {
        "ratio": {name: round(dense / time.median_ms, 2) for name, time in times.items()},
        "dense_ms": round(dense, 4),
        "left": skipped,
    }


def jobs(quick: bool, folder: Path) -> Iterator[tuple[str, str, str, int, int, Path]]:
    """Every combination and seed."""
    steps = 5 if quick else 350
    chosen = (
        product(("magnitude", "taylor"), ("elements",), ("once", "gradual"), (0,))
        if quick
        else product(CRITERIA, PATTERNS, SCHEDULES, range(3))
    )
    yield from ((*job, steps, folder) for job in chosen)


def measure(quick: bool) -> dict[str, Any]:
    """Every combination, two at a time."""
    folder = Path(tempfile.mkdtemp()) if quick else cache_folder() / "evidence" / "sparsity-survey"
    torch.set_num_threads(1)
    fast = speeds(quick)
    given = list(jobs(quick, folder))
    results = [one(job) for job in given] if quick else each(one, given)
    rows = []
    for criterion, pattern in dict.fromkeys((run["criterion"], run["pattern"]) for run in results):
        row: dict[str, Any] = {"criterion": criterion, "pattern": pattern}
        for schedule in SCHEDULES:
            runs = [
                run["accuracy"]
                for run in results
                if (run["criterion"], run["pattern"], run["schedule"]) == (criterion, pattern, schedule)
            ]
            if runs:
                row[schedule] = round(float(np.mean(runs)), 4)
                row["largest spread"] = max(row.get("largest spread", 0.0), round(max(runs) - min(runs), 4))
        rows.append({**row, "engine, times dense": fast["ratio"].get(pattern)})
    wrong = [run for run in results if abs(run["zeros"] - SPARSITY) > 0.02 and not quick]
    if wrong:
        raise ValueError(f"sparsity-survey: every combination must reach {SPARSITY:.0%} zeros, got {wrong[0]}.")
    model, _, x, y = work(quick)
    with torch.no_grad():
        dense = float((model(x).argmax(1) == y).double().mean())
    return {
        "claim": "criterion, pattern and schedule are three choices: the criterion matters most at once, the schedule "
        "makes up for it, and coarser patterns cost accuracy and buy time",
        "baseline": f"the dense network's accuracy {dense:.4f} (3 seeds each, {SPARSITY:.0%} zeros) and the time of "
        f"ResNet-20 in the engine, {fast['dense_ms']} ms",
        "rows": rows,
        "engine": fast,
        "dense": round(dense, 4),
        "sparsity": SPARSITY,
    }
