"""Sparsity against accuracy against measured time: which networks no other is both better and faster than.

ResNet-20 on digits is pruned while it is fine-tuned for 200 steps from its trained weights, with the dense network as
teacher: by weights, 2:4 and blocks, at several sparsities, and by channels. MiniLM (64 tokens) loses weights at once by
SparseGPT, with 2:4 and with attention heads or whole layers fewer beside it. Scores are on held-out data, times are the
engine's, all networks of a kind in one interleaved run; the front is what is left when every network goes that another
beats in both.

Sources: T. Hoefler et al., Sparsity in deep learning, JMLR 2021, arXiv:2102.00554, section 8; D. Blalock,
J. J. Gonzalez Ortiz, J. Frankle and J. Guttag, What is the state of neural network pruning?, MLSys 2020,
arXiv:2003.03033 (curves of tradeoffs instead of single points).
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import lilliput
from lilliput.cost.measure import latency
from lilliput.data import cache_folder, digits, mnist1d, sentences
from lilliput.evidence import each, front, interval
from lilliput.export.onnx import trace
from lilliput.runtimes.engine import EngineSession
from lilliput.schedule import Cosine
from lilliput.stage import Stage

STEPS = 200
Plan = Callable[[int], tuple[Stage, ...]]  # of the seed


def training(seed: int, *rules: lilliput.Rule, lr: float = 2e-3) -> lilliput.Train:
    """Fine-tuning with the dense network as teacher."""
    return lilliput.Train(STEPS, Cosine(lr), (*rules, lilliput.Distill()), supervised=0.3, weight_decay=0.01, seed=seed)


def weights(sparsity: float, seed: int, pattern: str = "elements") -> tuple[Stage, ...]:
    """Gradual magnitude pruning."""
    allocation = "normalized" if pattern == "elements" else "uniform"
    return (training(seed, lilliput.Prune(sparsity, pattern=pattern, allocation=allocation, every=10)),)


def channels(sparsity: float, seed: int) -> tuple[Stage, ...]:
    """Channels that go at once."""
    return lilliput.PruneChannels(sparsity, multiple=4), training(seed)


def at_once(sparsity: float, seed: int, pattern: str = "elements") -> tuple[Stage, ...]:
    """One pass over the layers, with the weights that stay updated."""
    return (lilliput.SparseGPT(sparsity, pattern=pattern, where="layers.*"),)


def layers(count: int, seed: int) -> tuple[Stage, ...]:
    """Whole layers that go at once."""
    return (lilliput.Student(remove=tuple(f"layers.{i}" for i in (4, 2)[:count])),)


def heads(sparsity: float, seed: int) -> tuple[Stage, ...]:
    """Attention heads that go at once."""
    return (lilliput.PruneHeads(sparsity, where="layers.*", seed=seed),)


RESNET: dict[tuple[str, float], Plan] = {
    ("dense", 0.0): lambda seed: (),
    **{("weights", s): partial(weights, s) for s in (0.5, 0.8, 0.9, 0.95, 0.98)},
    ("2:4", 0.5): partial(weights, 0.5, pattern="2:4"),
    ("blocks of 4x1", 0.9): partial(weights, 0.9, pattern="block 4x1"),
    **{("channels", s): partial(channels, s) for s in (0.25, 0.5, 0.75)},
}
MINILM: dict[tuple[str, float], Plan] = {
    ("dense", 0.0): lambda seed: (),
    **{("weights", s): partial(at_once, s) for s in (0.5, 0.6, 0.7, 0.8)},
    ("2:4", 0.5): partial(at_once, 0.5, pattern="2:4"),
    **{("heads", s): partial(heads, s) for s in (1 / 12, 1 / 4)},
    **{("layers", n / 6): partial(layers, n) for n in (1, 2)},
}


@cache
def work(network: str) -> tuple[nn.Module, lilliput.Task]:
    """A trained network and its task."""
    return {"ResNet-20": digits.digits, "MiniLM": sentences.sentences, "MLP": mnist1d.mnist1d_mlp}[network]()


def one(job: tuple[str, str, float, int, Path]) -> tuple[float, int, Path]:
    """Held-out score and non-zero weights of one network, and its ONNX file."""
    network, kind, sparsity, seed, folder = job
    torch.set_num_threads(1)
    model, task = work(network)
    plans = MINILM if network == "MiniLM" else RESNET
    made = lilliput.realize(lilliput.run(model, task, plans[kind, sparsity](seed), folder / "store", seed=seed)).eval()
    path = folder / f"{network}-{kind}-{sparsity:.2f}-{seed}.onnx".replace(":", "of").replace(" ", "-")
    if seed == 0:
        path.write_bytes(trace(made, task.example).proto.SerializeToString())
    kept = sum(int((p != 0).sum()) for p in made.parameters() if p.dim() > 1)
    return float(task.score(made, "test").value), kept, path


def measure(quick: bool) -> dict[str, Any]:
    """Everything, two at a time; the engine last, when nothing else runs."""
    folder = Path(tempfile.mkdtemp()) if quick else cache_folder() / "evidence" / "pruning-front"
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    chosen = (
        {"MLP": {("dense", 0.0): 1}}
        if quick
        else {"ResNet-20": {key: 1 if key[0] == "dense" else 3 for key in RESNET}, "MiniLM": dict.fromkeys(MINILM, 1)}
    )  # nothing is drawn
    jobs = [
        (network, *key, seed, folder)
        for network, plans in chosen.items()
        for key, seeds in plans.items()
        for seed in range(seeds)
    ]
    results = [one(job) for job in jobs] if quick else each(one, jobs)
    rows = []
    for network, plans in chosen.items():
        for kind, sparsity in plans:
            found = [result for job, result in zip(jobs, results, strict=True) if job[:3] == (network, kind, sparsity)]
            scores = [score for score, _, _ in found]
            rows.append(
                {
                    "network": network,
                    "what goes": kind,
                    "sparsity": round(sparsity, 3),
                    "score": round(float(np.mean(scores)), 4),
                    "interval": interval(scores),
                    "kept": found[0][1],
                    "file": found[0][2],
                }
            )
        mine = [row for row in rows if row["network"] == network]
        sessions = {str(i): EngineSession(row["file"]) for i, row in enumerate(mine)}
        times = latency(sessions, work(network)[1].example, seconds=0.1 if quick else 15)
        for i, row in enumerate(mine):
            row["engine_ms"] = round(times[str(i)].median_ms, 4)
            row["times_dense"] = round(times["0"].median_ms / times[str(i)].median_ms, 2)
    best = {
        i
        for network in chosen
        for i in front({i: (row["score"], row["engine_ms"]) for i, row in enumerate(rows) if row["network"] == network})
    }
    for i, row in enumerate(rows):
        row["front"] = i in best
        del row["file"]
    return {
        "claim": "no one kind of deletion wins everywhere: the front of score against measured time holds several",
        "baseline": "the dense network in the engine, and the same network with fewer channels or layers; three seeds "
        "where anything is drawn",
        "rows": rows,
    }
