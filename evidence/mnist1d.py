"""Lottery tickets on MNIST-1D (2024): in seconds, masks found by training beat random masks of the same size.

The perceptron is trained, its smallest weights go, those that are left return to their random beginnings, and again, up
to 98% zeros. At every stage three sparse networks are trained alike: the ticket; a random ticket, whose masks are drawn
with as many zeros in each layer; and the ticket's masks with other beginnings.

Sources: S. Greydanus and D. Kobak, Scaling down deep learning with MNIST-1D, ICML 2024, arXiv:2011.14439, section 3.1;
J. Frankle and M. Carbin, The lottery ticket hypothesis, ICLR 2019, arXiv:1803.03635, sections 2 and 4.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lilliput
from lilliput.code.base import codes, copy_model
from lilliput.code.names import theta
from lilliput.data import mnist1d
from lilliput.evidence import each, interval
from lilliput.nets.mnist1d import MLP
from lilliput.prune.lottery import Lottery
from lilliput.schedule import Cosine

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
KINDS = {
    "winning": "the ticket",
    "random masks": "as many zeros in each layer, anywhere",
    "new weights": "the ticket's masks, other random weights",
}


@cache
def work(quick: bool) -> tuple[lilliput.Task, Tensor, Tensor]:
    """The task without augmentation, and signals that judge."""
    x, y, held, labels = mnist1d.signals()
    task = lilliput.Task("mnist1d", (x[:3500], y[:3500]), (x[3500:], y[3500:]), batch_size=100)
    return task, *((held, labels) if quick else mnist1d.fresh())


def fresh(seed: int) -> nn.Module:
    """The perceptron with random weights."""
    torch.manual_seed(seed)
    return MLP()


def one(job: tuple[int, int, tuple[float, ...]]) -> list[dict[str, Any]]:
    """All tickets of one seed."""
    seed, steps, sparsities = job
    torch.set_num_threads(1)
    task, x, y = work(steps < 100)
    training = lilliput.Train(steps, Cosine(5e-3, warmup=0.15), batch_size=100, weight_decay=5e-4, seed=seed)

    def accuracy(ticket: nn.Module) -> float:
        net = lilliput.realize(training(ticket, task, reference)).eval()
        with torch.no_grad():
            return float((net(x).argmax(1) == y).double().mean())

    start = fresh(seed)
    reference = lilliput.Reference(copy_model(start), task)
    rows, ticket = [{"seed": seed, "sparsity": 0.0, "kind": "dense", "accuracy": accuracy(start)}], start
    for sparsity in sparsities:
        ticket = Lottery(sparsity, rounds=1, training=training, allocation="normalized")(ticket, task, reference)
        zeros = tuple((name, chain[0].sparsity) for name, chain in codes(ticket).items())
        other = copy_model(ticket)
        with torch.no_grad():
            for name, value in fresh(seed + 1000).named_parameters():
                theta(other, name).copy_(value)
        tickets = {
            "winning": ticket,
            "new weights": other,
            "random masks": lilliput.Prune(None, "random", allocation=zeros, seed=seed)(start, task, None),
        }
        rows += [
            {"seed": seed, "sparsity": sparsity, "kind": kind, "accuracy": accuracy(net)}
            for kind, net in tickets.items()
        ]
    return rows


def measure(quick: bool) -> dict[str, Any]:
    """Every seed, and how often the ticket wins."""
    given = [(0, 5, (0.9,))] if quick else [(seed, 2100, SPARSITIES) for seed in range(6)]
    if quick:
        found = one(given[0])
    else:
        found = [row for rows in each(one, given) for row in rows]
    at = {(row["sparsity"], row["kind"], row["seed"]): row["accuracy"] for row in found}
    seeds = sorted({row["seed"] for row in found})
    dense = [at[0.0, "dense", seed] for seed in seeds]
    rows = []
    for sparsity in sorted({row["sparsity"] for row in found} - {0.0}):
        row: dict[str, Any] = {"zeros": f"{sparsity:.0%}"}
        for kind in KINDS:
            values = [at[sparsity, kind, seed] for seed in seeds]
            row |= {kind: round(float(np.mean(values)), 4), f"{kind} interval": interval(values)}
        row["ahead of random masks"] = interval(
            [at[sparsity, "winning", seed] - at[sparsity, "random masks", seed] for seed in seeds]
        )
        rows.append(row)
    return {
        "claim": "the winning ticket beats random tickets at 90% zeros and above",
        "baseline": f"dense {float(np.mean(dense)):.4f}; random masks; the ticket's masks with other weights; "
        f"{len(seeds)} seeds, 10,000 held-out signals",
        "rows": rows,
        "dense": [round(value, 4) for value in dense],
        "kinds": KINDS,
        "runs": [[row["sparsity"], row["kind"], row["seed"], round(row["accuracy"], 4)] for row in found],
    }
