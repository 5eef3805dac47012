"""Structured pruning: whole channels go, and the network is faster in any runtime without one that knows zeros.

Each score removes the same fraction of every layer's channels (so all cost the same), or the lowest of the whole
network, then everything trains for the same steps at the same rate. Random channels and the same architecture trained
from random numbers for as long are the baselines that a score has to beat. The full size takes minutes of one core.

Sources: H. Li et al., Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710; Z. Liu et al., Learning
efficient convolutional networks through network slimming, ICCV 2017, arXiv:1708.06519; Y. He et al., Filter pruning via
geometric median, CVPR 2019, arXiv:1811.00250; P. Molchanov et al., Importance estimation for neural network pruning,
CVPR 2019, arXiv:1906.10771; Z. Liu et al., Rethinking the value of network pruning, ICLR 2019, arXiv:1810.05270 (from
scratch).
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import nn

import lilliput
from lilliput.cost.measure import latency
from lilliput.data.digits import digits
from lilliput.data.mnist1d import mnist1d_cnn
from lilliput.export.onnx import Session, trace
from lilliput.graph.students import reset
from lilliput.graph.widths import Sizes
from lilliput.prune.channels import PruneChannels
from lilliput.prune.slimming import Slimming
from lilliput.runtimes.engine import EngineSession
from lilliput.stage import Reference

SCORES = ("random", "l1", "l2", "geometric_median", "taylor")


def pruned(model: nn.Module, task: lilliput.Task, settings: dict[str, Any], seed: int) -> nn.Module:
    return PruneChannels(seed=seed, **settings)(model, task, None)


def size(model: nn.Module, task: lilliput.Task) -> dict[str, int]:
    size = Sizes(model, task.example, ())({})
    return {"macs": size.macs, "values": size.values}


def variants(batch_norms: bool, sparsity: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """A name and the settings of each way to choose channels."""
    for score in (*SCORES, "batchnorm_scale") if batch_norms else SCORES:
        yield score, {"sparsity": sparsity, "score": score, "where": "*"}
    for score in ("l2", "taylor", *(["batchnorm_scale"] if batch_norms else [])):
        yield f"{score}, global", {"sparsity": sparsity, "score": score, "allocation": "global"}


def trained(model: nn.Module, task: lilliput.Task, steps: int, rate: float, seed: int, rules: Any = ()) -> nn.Module:
    stage = lilliput.Train(steps, lr=lilliput.Cosine(rate), rules=rules, seed=seed)
    return stage(model, task, Reference(model, task))


def study(
    name: str,
    make: Callable[[], tuple[nn.Module, lilliput.Task]],
    levels: tuple[float, ...],
    steps: int,
    rate: float,
    seeds: int,
    quick: bool,
) -> list[dict[str, Any]]:
    """The rows of one network."""
    model, task = make()
    batch_norms = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    dense = task.score(model, "test").value
    rows = [
        {
            "network": name,
            "sparsity": 0.0,
            "score": "none",
            "accuracy": round(dense, 4),
            "seeds": 1,
            **size(model, task),
        }
    ]
    timed = {"dense": model}
    slim = trained(model, task, steps, rate, 0, (Slimming(1e-3),)) if batch_norms else None
    for sparsity in levels:
        ways = list(variants(batch_norms, sparsity))
        ways += (
            [
                (
                    "batchnorm_scale, global, slimmed",
                    {"sparsity": sparsity, "score": "batchnorm_scale", "allocation": "global"},
                )
            ]
            if slim is not None
            else []
        )
        for score, settings in [*(ways[:2] if quick else ways), ("from scratch", {"sparsity": sparsity})]:
            after, before = [], []
            for seed in range(seeds):
                small = pruned(slim if score.endswith("slimmed") and slim is not None else model, task, settings, seed)
                if score == "from scratch":
                    small = reset(small, seed)
                before.append(task.score(small, "test").value)
                small = trained(small, task, steps, rate, seed)
                after.append(task.score(small, "test").value)
            row = {
                "network": name,
                "sparsity": sparsity,
                "score": score,
                "accuracy": round(mean(after), 4),
                "before_training": round(mean(before), 4),
                "seeds": seeds,
                **size(small, task),
            }
            if seeds > 1:
                row["accuracy_std"] = round(stdev(after), 4)
            rows.append(row)
            if score in ("l2", "l2, global") or (quick and score == "l1"):
                timed[f"{sparsity} {score}"] = small
    times: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        protos = {key: trace(net, task.example).proto for key, net in timed.items()}
        runs: dict[str, dict[str, Any]] = {
            "onnxruntime": {key: Session(proto) for key, proto in protos.items()},
            "engine": {
                key: EngineSession(proto, out=Path(folder, str(i)), tune=not quick)
                for i, (key, proto) in enumerate(protos.items())
            },
        }
        for runtime, sessions in runs.items():
            times[runtime] = latency(sessions, task.example, seconds=0.1 if quick else 5.0, clock=time.process_time)
    for row in rows:
        key = "dense" if row["score"] == "none" else f"{row['sparsity']} {row['score']}"
        for runtime, measured in times.items():
            if key in measured:
                row |= {
                    f"{runtime}_us": round(1e3 * measured[key].median_ms, 1),
                    f"{runtime}_times_faster": round(measured[key].ratio, 2),
                }
    return rows


def measure(quick: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    if quick:
        rows = study("mnist1d-cnn", mnist1d_cnn, (0.5,), 10, 3e-3, 1, True)
    else:
        rows = study("mnist1d-cnn", mnist1d_cnn, (0.3, 0.6), 400, 3e-3, 3, False)
        rows += study("digits", digits, (0.3, 0.6), 40, 3e-3, 1, False)
    return {
        "claim": "whole channels can go, chosen by a score, with everything that is joined to them; what is left is a "
        "dense network that is faster in every runtime",
        "baseline": "random channels, and the smaller architecture trained from random numbers for as many steps "
        "(from scratch); the dense network",
        "protocol": "PruneChannels on the trained network, then the same steps of AdamW for every row, cosine from "
        "3e-3; accuracy on the test split, the mean over seeds; processor time of one core at batch one, "
        "all candidates of a network in turns, ratios to the dense network in the same runtime",
        "rows": rows,
    }
