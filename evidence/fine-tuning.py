"""Fine-tuning: which way of making zeros does best from a trained network, in few steps, with the dense one as teacher.

What `lilliput shrink` asks, and not the same question as from random weights (`jaxpruner`). The two trained networks on
MNIST-1D are pruned to 90, 95 and 98% zeros by each method while they train for 600 steps on shifted signals: AdamW on
half a cosine from 4e-3, distillation and the labels; masks move every 10 steps. Judged on 10,000 signals that nothing
was tuned on. With the time of each rule from bench/overhead.py this is the front that the search is held to.

Sources: V. Sanh, T. Wolf and A. Rush, Movement pruning: adaptive sparsity by fine-tuning, NeurIPS 2020,
arXiv:2005.07683; D. Blalock, J. J. Gonzalez Ortiz, J. Frankle and J. Guttag, What is the state of neural network
pruning?, MLSys 2020, arXiv:2003.03033; the methods as in evidence/jaxpruner.py.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lilliput
from lilliput import evidence
from lilliput.data import cache_folder, mnist1d
from lilliput.schedule import Cosine

STEPS, EVERY, SEEDS = 600, 10, 3
SPARSITIES = (0.9, 0.95, 0.98)
METHODS = evidence.load("jaxpruner").METHODS
NETWORKS = {"MLP": mnist1d.mnist1d_mlp, "CNN": mnist1d.mnist1d_cnn}
Job = tuple[str, str, float, int]  # network, method, sparsity, seed


@cache
def work(name: str) -> tuple[nn.Module, lilliput.Task]:
    """A trained network and its task."""
    return NETWORKS[name]()


@cache
def held_out(quick: bool) -> tuple[Tensor, Tensor]:
    """Signals that nothing was tuned on, and their labels."""
    return mnist1d.signals()[2:] if quick else mnist1d.fresh()


def accuracy(job: Job, folder: Path, quick: bool) -> float:
    """Held-out accuracy of one network that lost its weights while it trained."""
    torch.set_num_threads(1)
    name, method, sparsity, seed = job
    model, task = work(name)
    stages, rules = METHODS[method](sparsity, EVERY, seed)
    training = lilliput.Train(
        20 if quick else STEPS,
        Cosine(4e-3),
        (*rules, lilliput.Distill()),
        supervised=0.3,
        batch_size=100,
        weight_decay=0.0,
        seed=seed,
    )
    made = lilliput.realize(lilliput.run(model, task, [*stages, training], folder, seed=seed)).eval()
    x, y = held_out(quick)
    with torch.no_grad():
        right = torch.cat([made(part).argmax(1) for part in x.split(500)]) == y
    return float(right.double().mean())


def one(given: tuple[Job, Path, bool]) -> float:
    """`accuracy` with one argument, for a pool."""
    return accuracy(*given)


def standing(record: dict[str, Any], overhead: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Each method's gain and cost: held-out accuracy, the mean over networks and sparsities, and the time that its rule
    takes between two steps of ResNet-20, of a dense step; from the records of this script and of bench/overhead.py."""
    costs = overhead["results"]["ResNet-20"]
    gains: dict[str, list[float]] = {}
    for row in record["rows"]:
        if row["method"] != "dense":
            gains.setdefault(row["method"], []).extend(row[f"{sparsity:.0%}"] for sparsity in SPARSITIES)
    return {
        method: (float(np.mean(gain)), costs.get(method, costs["mask"])["updates"]) for method, gain in gains.items()
    }


def measure(quick: bool) -> dict[str, Any]:
    """Train everything, two at a time."""
    folder = Path(tempfile.mkdtemp()) if quick else cache_folder() / "evidence" / "fine-tuning"
    torch.set_num_threads(1)  # before the fork: a pool of threads does not survive one
    networks, methods = (("CNN",), ("dense", "global magnitude")) if quick else (tuple(NETWORKS), tuple(METHODS))
    jobs = [
        (name, method, sparsity, seed)
        for name in networks
        for method in methods
        for sparsity in ((0.0,) if method == "dense" else SPARSITIES)
        for seed in range(1 if quick else SEEDS)
    ]
    given = [(job, folder, quick) for job in jobs]
    results = [one(each) for each in given] if quick else evidence.each(one, given)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, method, sparsity in dict.fromkeys(job[:3] for job in jobs):
        scores = [score for job, score in zip(jobs, results, strict=True) if job[:3] == (name, method, sparsity)]
        column = "dense" if method == "dense" else f"{sparsity:.0%}"
        row = rows.setdefault((name, method), {"network": name, "method": method, "seeds": len(scores)})
        row |= {column: round(float(np.mean(scores)), 4), f"{column} interval": evidence.interval(scores)}
    return {
        "claim": "from a trained network and in few steps, what was learnt says which weights can go: by magnitude and "
        "by gradient far above random masks",
        "baseline": "the same training without zeros, and random masks; three seeds",
        "rows": list(rows.values()),
    }
