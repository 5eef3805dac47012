"""SeaM (2023): a trained network keeps a tenth of its weights where only some of its classes are asked for.

Two trained networks, the convolutions on MNIST-1D and ResNet-20 on digits, are searched for what two classes, three
classes, or one class against the rest need; weights stay as they are. Masks over single weights are the paper's; masks
over channels give a module that is smaller in every runtime, and one row each trains it on a little. Every score is
that of the exported file in ONNX Runtime, on examples that no search saw: 1,000 drawn anew for each class of MNIST-1D,
the 1,000 test digits.

Source: B. Qi, H. Sun, X. Gao, H. Zhang, Z. Li and X. Liu, Reusing deep neural network models through model
re-engineering, ICSE 2023, arXiv:2304.00245.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lilliput
from lilliput.code.base import pack
from lilliput.data import pretrained
from lilliput.data.digits import digits
from lilliput.data.mnist1d import fresh, mnist1d_cnn
from lilliput.export.onnx import Session, trace
from lilliput.export.pack import size
from lilliput.graph import fold_batchnorm
from lilliput.graph.empty import remove_empty
from lilliput.nets.mnist1d import CNN
from lilliput.prune.seam import Seam, retention
from lilliput.prune.subproblem import restricted, subproblem
from lilliput.task import Task, predict

PAIRS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
QUANTILE = {3: 4.303, 5: 2.776}  # Student's t, 97.5%, with n - 1 degrees of freedom
SMALL = {"steps": 800, "lr": 0.02, "head_lr": 0.003, "alpha": 0.8, "batch_size": 128}
LARGE = {"steps": 200, "lr": 0.02, "alpha": 20.0, "batch_size": 16, "every": 40}


class Full:
    """The full network: exported, compiled, packed, and its answers to a sub-problem."""

    def __init__(
        self, name: str, model: nn.Module, task: Task, judge: Task, split: str, folder: str, tune: bool
    ) -> None:
        self.name, self.model, self.task, self.judge, self.split = name, model, task, judge, split
        self.make = partial(made, task=task, folder=folder, tune=tune)
        self.weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
        self.session, self.engine, self.bytes = self.make(fold_batchnorm(model, task.example))

    def scores(self, classes: tuple[int, ...], rest: bool) -> tuple[float, float]:
        """Its accuracy on the sub-problem when it may only name these classes, and when it may name any."""
        x, y = subproblem(self.judge, classes, rest).split(self.split)
        labels = torch.full((10,), len(classes) if rest else -1)
        labels[list(classes)] = torch.arange(len(classes))
        limited = predict(restricted(self.model, classes, rest), x).argmax(1)
        free = labels[predict(self.model, x).argmax(1)]
        return float(torch.eq(limited, y).float().mean()), float(torch.eq(free, y).float().mean())


def made(net: nn.Module, task: Task, folder: str, tune: bool) -> tuple[Session, lilliput.Engine, int]:
    """A plain network in ONNX Runtime, in the engine, and its packed bytes, zeros stored as a mask."""
    structure = trace(net, task.example)
    masked = lilliput.realize(net)
    for name, weight in net.named_parameters():
        if weight.dim() > 1 and bool((weight == 0).any()):
            lilliput.attach(masked, name, lilliput.Masked(weight != 0))
    session = Session(structure.proto)
    shapes = {name: value.shape for name, value in session.feed(task.example).items()}
    engine = lilliput.compile(structure.proto, tempfile.mkdtemp(dir=folder), tune=tune, shapes=shapes)
    return session, engine, size(structure, pack(masked)).size_bytes


def ratios(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor seconds a call of each function, the median of `rounds` in which all take turns."""
    spent: dict[str, list[float]] = {name: [] for name in runs}
    repeat = {}
    for name, run in runs.items():
        run()
        began = time.process_time()
        run()
        repeat[name] = max(1, int(1e-3 / max(time.process_time() - began, 1e-6)))
    for _ in range(rounds + 2):
        for name, run in runs.items():
            began = time.process_time()
            for _ in range(repeat[name]):
                run()
            spent[name].append((time.process_time() - began) / repeat[name])
    return {name: float(np.median(times[2:])) for name, times in spent.items()}


def row(
    full: Full, classes: tuple[int, ...], rest: bool, pattern: str, net: nn.Module, kept: int, rounds: int
) -> dict[str, Any]:
    """What one smaller module is: its score, its size, and how its time compares."""
    session, engine, packed = full.make(net)
    sub = subproblem(full.judge, classes, rest)
    inputs = sub.split(full.split)[0]
    outputs = torch.from_numpy(session.outputs(inputs))
    limited, free = full.scores(classes, rest)
    x = np.ascontiguousarray(inputs[:1].numpy())
    seconds = ratios({
        "engine full": partial(full.engine, x), "engine": partial(engine, x),
        "onnxruntime full": partial(full.session.run, full.session.feed(x)),
        "onnxruntime": partial(session.run, session.feed(x)),
    }, rounds)  # fmt: skip
    theirs: Tensor = torch.from_numpy(np.array(engine(x))) - outputs[:1]
    accuracy = sub.rate(outputs, full.split).value
    return {
        "network": full.name, "classes": " ".join(map(str, classes)) + (" or another" if rest else ""),
        "masks": pattern, "weights_kept": round(kept / full.weights, 4),
        "accuracy": round(accuracy, 4), "full_restricted": round(limited, 4), "full_unrestricted": round(free, 4),
        "over_restricted": round(accuracy - limited, 4), "over_unrestricted": round(accuracy - free, 4),
        "values": sum(p.numel() for p in net.parameters()),
        "full_values": sum(p.numel() for p in full.model.parameters()),
        "packed_bytes": packed, "full_packed_bytes": full.bytes,
        "onnxruntime_ratio": round(seconds["onnxruntime full"] / seconds["onnxruntime"], 2),
        "engine_ratio": round(seconds["engine full"] / seconds["engine"], 2),
        "onnxruntime_us": round(1e6 * seconds["onnxruntime"], 1), "engine_us": round(1e6 * seconds["engine"], 1),
        "largest_difference": float(f"{theirs.abs().max():.1g}"),
    }  # fmt: skip


def rows_of(
    full: Full, classes: tuple[int, ...], rest: bool, masks: str, settings: dict[str, Any], rounds: int, train: int = 0
) -> Iterator[dict[str, Any]]:
    """The rows of one search: the module with the network's own weights and, for `train` steps, trained on."""
    pattern = "channel" if masks == "channel" else "elements"
    start = "ones" if masks.endswith("ones") else "magnitude"
    net = Seam(classes, rest, pattern=pattern, start=start, **settings)(full.model, full.task, None)
    kept = round(retention(net) * full.weights)
    small = remove_empty(net, full.task.example)
    yield row(full, classes, rest, masks, small, kept, rounds)
    if train:
        sub = subproblem(full.task, classes, rest)
        small = lilliput.Train(train, lr=lilliput.Cosine(5e-4))(small, sub, lilliput.Reference(small, sub))
        yield row(full, classes, rest, f"{masks}, trained on", small, kept, rounds)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the pairs of each network and kind of masks: the mean and its 95% interval."""
    lines = []
    pairs = [one for one in rows if len(one["classes"].split()) == 2]
    for network, masks in dict.fromkeys((one["network"], one["masks"]) for one in pairs):
        group = [one for one in pairs if (one["network"], one["masks"]) == (network, masks)]
        line: dict[str, Any] = {"network": network, "masks": masks, "pairs": len(group)}
        for key in (
            "weights_kept",
            "accuracy",
            "over_restricted",
            "over_unrestricted",
            "onnxruntime_ratio",
            "engine_ratio",
            "packed_bytes",
        ):
            values = np.array([one[key] for one in group], float)
            line[key] = round(float(values.mean()), 4)
            if len(values) in QUANTILE:
                spread = QUANTILE[len(values)] * values.std(ddof=1) / len(values) ** 0.5
                line[f"{key}_interval"] = [round(float(values.mean() + way * spread), 4) for way in (-1, 1)]
        lines.append(line)
    return lines


def measure(quick: bool) -> dict[str, Any]:
    """A row for each network, sub-problem and kind of masks; `pairs` has the means over the pairs of classes."""
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        if quick:
            task = Task("few signals", fresh(400), fresh(200, seed=44))
            full = Full("mnist1d-cnn", pretrained(CNN(), "mnist1d-cnn"), task, task, "val", folder, False)
            rows += rows_of(full, (0, 1), False, "elements", {**SMALL, "steps": 20}, 3)
        else:
            model, task = mnist1d_cnn()
            full = Full("mnist1d-cnn", model, task, Task("fresh", fresh(), fresh(100, seed=44)), "train", folder, True)
            for pair in PAIRS:
                rows += rows_of(full, pair, False, "elements", SMALL, 40)
                rows += rows_of(full, pair, False, "elements from ones", SMALL, 40)
                rows += rows_of(full, pair, False, "channel", SMALL, 40, 400)
            for classes, rest in (((1, 4, 7), False), ((0, 5, 8), False), ((5,), True), ((8,), True)):
                rows += rows_of(full, classes, rest, "elements", SMALL, 40)
            model, task = digits()
            full = Full("digits", model, task, task, "test", folder, True)
            for pair in PAIRS[:3]:
                rows += rows_of(full, pair, False, "elements", LARGE, 20)
                rows += rows_of(full, pair, False, "channel", {**LARGE, "alpha": 2.0}, 20, 100)
            for classes, rest in (((1, 4, 7), False), ((5,), True)):
                rows += rows_of(full, classes, rest, "elements", LARGE, 20)
    return {
        "claim": "re-engineered to a part of its classes, a network keeps 10.11% of its weights on average and answers "
                 "no worse (the paper: 5.85% better)",
        "baseline": "the full network on the same examples, when it may only name the classes asked for (restricted) "
                    "and when it may name any (unrestricted); its time in the same runtime, one thread, batch 1, "
                    "interleaved, processor time (ratio = full / smaller); its packed bytes. Weights never change, but "
                    "in the rows that say trained on. weights_kept is of the full network's weights; values are those "
                    "of the plain module once empty channels are gone",
        "rows": rows, "pairs": summary(rows),
    }  # fmt: skip
