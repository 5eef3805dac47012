"""Pruning that makes up for what goes: SparseGPT, OBC, WoodFisher's update, and the best weights under any mask.

Trained networks are pruned in one shot, without a step of training, from a few unlabelled examples (WoodFisher: with
their labels). All methods get the same examples and the same zeros in every layer: of the networks on signals and
images by ERK, of the transformer evenly over its linear layers. Judged on held-out data: 4,000 signals, 500 digits, 150
pairs of texts. Seconds are of the processor, for the pruning alone.

Sources: E. Frantar and D. Alistarh, SparseGPT, ICML 2023, arXiv:2301.00774; E. Frantar, S. P. Singh and D. Alistarh,
Optimal brain compression, NeurIPS 2022, arXiv:2208.11580; S. P. Singh and D. Alistarh, WoodFisher, NeurIPS 2020,
arXiv:2004.14340; M. Sun, Z. Liu, A. Bair and J. Z. Kolter, Wanda, ICLR 2024, arXiv:2306.11695.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import lilliput
from lilliput.data import digits, mnist1d, pretrained
from lilliput.data.sentences import sentences
from lilliput.nets.mnist1d import CNN, MLP
from lilliput.prune.masks import masks
from lilliput.prune.obc import OBC
from lilliput.prune.reconstruct import Reconstruct
from lilliput.prune.sparsegpt import SparseGPT
from lilliput.prune.woodfisher import WoodFisher
from lilliput.stage import Stage
from lilliput.task import Task, predict, take

TOKENS = 32


def methods(
    sparsity: float, pattern: str, allocation: str, where: str, examples: int, rounds: int, gradients: int
) -> dict[str, tuple[Stage, ...]]:
    """Every method as stages, on the same footing."""
    shared: dict[str, Any] = {"allocation": allocation, "where": where}
    within = "even" if pattern == "elements" else pattern
    gpt = SparseGPT(sparsity, pattern, examples=examples, **shared)
    magnitude = lilliput.Prune(sparsity, pattern=pattern, **shared)
    again = Reconstruct(where, examples)
    return {
        "magnitude": (magnitude,), "Wanda": (lilliput.Prune(sparsity, "wanda", within, **shared),),
        "magnitude + Reconstruct": (magnitude, again), "SparseGPT": (gpt,), "SparseGPT + Reconstruct": (gpt, again),
        "OBC": (OBC(sparsity, pattern, examples=examples, **shared),),
        "WoodFisher": (WoodFisher(sparsity, rounds, pattern, examples=gradients, **shared),)}  # fmt: skip


def part(task: Task, examples: int, seed: int, held: Any) -> Task:
    """The task with `examples` of its training examples, drawn by the seed, and with `held` to judge on."""
    inputs, labels = task.split("train")
    drawn = torch.randperm(task.examples, generator=torch.Generator().manual_seed(seed))[:examples].sort().values
    return Task(task.name, train=(take(inputs, drawn), None if labels is None else labels[drawn]), val=held,
                loss=task.loss_name, metric=task.metric, higher_is_better=True)  # fmt: skip


def rows(
    network: str,
    net: nn.Module,
    tasks: list[Task],
    judge: Any,
    points: list[tuple[float, str]],
    leave: dict[str, set[float]],
    **settings: Any,
) -> Iterator[dict[str, Any]]:
    """A row for each sparsity and method: the score on held-out data, its mean over the calibration sets, the seconds.

    judge(model) gives (score, alike); leave: the sparsities that a method is left out at.
    """
    for sparsity, pattern in points:
        for name, stages in methods(sparsity, pattern, **settings).items():
            if sparsity in leave.get(name, set()) or (pattern != "elements" and name in leave):
                continue
            scores, alike, seconds = [], [], []
            for task in tasks:
                reference, began, model = lilliput.Reference(net, task), time.process_time(), net
                for stage in stages:
                    model = stage(model, task, reference)
                seconds.append(time.process_time() - began)
                score, same = judge(lilliput.realize(model))
                scores.append(score)
                alike.append(same)
                if name == "magnitude":
                    break  # which sees no data
            held = masks(model)
            zeros = 1 - sum(int(code.mask.sum()) for code in held.values()) / sum(
                code.mask.numel() for code in held.values()
            )
            yield {"network": network, "method": name, "sparsity": sparsity, "pattern": pattern,
                   "zeros": round(zeros, 4), "score": round(float(np.mean(scores)), 4),
                   "lowest": round(min(scores), 4), "highest": round(max(scores), 4),
                   "divergence": round(float(np.mean(alike)), 5), "seeds": len(scores),
                   "seconds": round(float(np.median(seconds)), 2)}  # fmt: skip


def judged(task: Task, net: nn.Module) -> Any:
    """A function from a model to its score on the task's held-out examples and how far its outputs are from dense."""
    inputs, _ = task.split("val")
    dense = predict(net, inputs)

    def judge(model: nn.Module) -> tuple[float, float]:
        outputs = predict(model, inputs)
        return task.rate(outputs, "val").value, float(task.divergence(outputs, dense).mean())

    return judge


def signals(quick: bool) -> Iterator[dict[str, Any]]:
    """The two networks on MNIST-1D."""
    x, y = mnist1d.fresh(96, 7) if quick else tuple(part[:3500] for part in mnist1d.signals()[:2])
    held = mnist1d.fresh(64 if quick else 4000, 43)
    whole = Task("signals", train=(x, y), val=held, test=held)
    for network, net in (("MLP", MLP()), ("CNN", CNN()))[1 if quick else 0 :]:
        net = pretrained(net, f"mnist1d-{network.lower()}")
        tasks = [part(whole, 32 if quick else 256, seed, held) for seed in ((0,) if quick else (0, 1, 2))]
        judge = judged(tasks[0], net)
        yield {"network": network, "method": "dense", "sparsity": 0.0, "score": round(judge(net)[0], 4)}
        points = [(s, "elements") for s in ((0.5,) if quick else (0.5, 0.6, 0.7, 0.8, 0.9))]
        yield from rows(network, net, tasks, judge, points, {}, allocation="erk", where="*",
                        examples=256, rounds=1 if quick else 4, gradients=256)  # fmt: skip


def images() -> Iterator[dict[str, Any]]:
    """ResNet-20 on digits. OBC, which costs the cube of a kernel's inputs, at two sparsities."""
    net, whole = digits.digits()
    held = tuple(part[::2] for part in whole.split("test"))
    tasks = [part(whole, 128, 0, held)]
    judge = judged(tasks[0], net)
    yield {"network": "ResNet-20", "method": "dense", "sparsity": 0.0, "score": round(judge(net)[0], 4)}
    points = [(s, "elements") for s in (0.5, 0.6, 0.7, 0.8, 0.9)]
    yield from rows("ResNet-20", net, tasks, judge, points, {"OBC": {0.5, 0.6, 0.8}}, allocation="erk", where="*",
                    examples=128, rounds=1, gradients=128)  # fmt: skip


def texts() -> Iterator[dict[str, Any]]:
    """MiniLM: its 36 linear layers, on texts cut at 32 tokens."""
    net, whole = sentences()

    def short(inputs: Any) -> Any:
        return {name: value[:, :TOKENS].contiguous() for name, value in inputs.items()}

    (free, _), (inputs, targets) = whole.split("train"), whole.split("test")
    cut = Task("texts", train=(short(free), None), val=(short(free), None), loss="cosine", metric=whole.metric)
    task = part(cut, 128, 0, (short(take(inputs, slice(0, 300))), targets[:300]))
    judge = judged(task, net)
    yield {"network": "MiniLM", "method": "dense", "sparsity": 0.0, "score": round(judge(net)[0], 4)}
    points = [(0.5, "elements"), (0.6, "elements"), (0.7, "elements"), (0.5, "2:4")]
    dear = {"OBC": {0.5, 0.6, 0.7}, "SparseGPT + Reconstruct": {0.5, 0.6, 0.7}}
    yield from rows("MiniLM", net, [task], judge, points, dear, allocation="uniform", where="layers.*",
                    examples=128, rounds=1, gradients=64)  # fmt: skip


def measure(quick: bool) -> dict[str, Any]:
    """A row for each network, sparsity and method."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for source in (signals(quick),) if quick else (signals(quick), images(), texts()):
        for row in source:
            print(*row.values(), flush=True)
            rows.append(row)
    held = {(row["network"], row["sparsity"], row.get("pattern"), row["method"]): row["score"] for row in rows}
    points = sorted({key[:3] for key in held if key[1]})
    best = [{"network": network, "sparsity": sparsity, "pattern": pattern, "best": max(
        (key for key in held if key[:3] == (network, sparsity, pattern)), key=held.__getitem__)[3]}
        for network, sparsity, pattern in points]  # fmt: skip

    def wins(a: str, b: str) -> str:
        pairs = [(held[(*point, a)], held[(*point, b)]) for point in points
                 if (*point, a) in held and (*point, b) in held]  # fmt: skip
        return f"{sum(x > y for x, y in pairs)} of {len(pairs)}"

    return {
        "claim": "Without a step of training, weights that make up for what goes keep more of a network than choosing "
                 "well what goes does.",
        "baseline": "magnitude and Wanda, the same zeros in every layer, no update of the weights",
        "rows": rows,
        "best": best,
        "above": {f"{a} above {b}": wins(a, b) for a, b in (
            ("SparseGPT", "magnitude"), ("SparseGPT", "Wanda"), ("magnitude + Reconstruct", "magnitude"),
            ("SparseGPT + Reconstruct", "SparseGPT"), ("OBC", "SparseGPT"), ("OBC", "magnitude + Reconstruct"),
            ("WoodFisher", "magnitude"), ("SparseGPT", "magnitude + Reconstruct"))},
        "caveats": "One network of each kind. Seconds are those of a shared processor. WoodFisher takes one round on "
                   "ResNet-20 and MiniLM and four on the small networks; on MiniLM its gradients are those of random "
                   "projections, since there are no labels.",
    }  # fmt: skip
