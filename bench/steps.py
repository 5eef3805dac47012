"""Training steps a second: what the search's workers do against bare loops on every core, and two workers against one.

A bare loop is forward, loss, backward and AdamW on batches that are ready. A worker's training is `Train` with the
dense network's cached outputs, as a search runs it, in a `Pool`. Both train the same network for a few seconds in turn,
so a change of the machine's load meets both.
"""

import multiprocessing
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import lilliput
from lilliput.nets.mnist1d import MLP
from lilliput.nets.resnet import ResNet
from lilliput.search.pool import Pool
from lilliput.train import fit

SECONDS = 8.0
PAIRS = 5
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "digits student": (ResNet, lambda: ResNet(widths=(8, 16, 32), blocks=(1, 1, 1)), (1, 28, 28)),
    "MLP": (MLP, lambda: MLP(hidden=64), (40,)),
}


def shared(name: str) -> tuple[nn.Module, lilliput.Task, lilliput.Reference]:
    """The student, a task of random arrays and the dense network's reference."""
    dense, student, shape = NETWORKS[name]
    torch.manual_seed(0)
    x, y = torch.randn(2048, *shape), torch.randint(0, 10, (2048,))
    task = lilliput.Task("random", train=(x, y), val=(x[:64], y[:64]), batch_size=64)
    return student(), task, lilliput.Reference(dense().eval(), task)


def bare(name: str, seconds: float) -> float:
    """Steps a second of a plain loop in this process."""
    torch.set_num_threads(1)
    model, task, _ = shared(name)
    x, y = task.probe("train").inputs.split(64), task.probe("train").targets.split(64)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3, fused=True)
    count, began = 0, 0.0
    while not began or time.monotonic() - began < seconds:
        if count == 5 and not began:  # what happens once is no part of a step
            count, began = 0, time.monotonic()
        loss = F.cross_entropy(model(x[count % len(x)]), y[count % len(x)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        count += 1
    return count / (time.monotonic() - began)


def searching(desk: Any, seconds: float) -> float:
    """Steps a second of a search's training in a worker."""
    model, task, reference = desk.thing
    seen = [0, 0.0]

    def stop(step: int) -> bool:
        if step == 40 and not seen[1]:  # the dense outputs of one round through the data are cached by then
            seen[:] = [step, time.monotonic()]
        seen[0] = step
        return bool(seen[1]) and time.monotonic() - seen[1] >= seconds

    fit(lilliput.Train(10**6, lr=1e-3, rules=(lilliput.Distill(),)), model, task, reference, stop=stop)
    return (seen[0] - 40) / (time.monotonic() - seen[1])


def _bare_into(queue: Any, name: str, seconds: float) -> None:
    queue.put(bare(name, seconds))


def on_every_core(name: str, cores: int) -> float:
    """The sum over bare loops, one on each core."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    running = [context.Process(target=_bare_into, args=(queue, name, SECONDS)) for _ in range(cores)]
    for process in running:
        process.start()
    found = [queue.get() for _ in running]
    for process in running:
        process.join()
    return float(sum(found))


def in_pool(pool: Pool) -> float:
    """The sum over the workers of a pool."""
    return float(sum(pool.map(searching, [SECONDS] * pool.workers)))


def against_bare(name: str) -> Callable[[int], dict[str, Any]]:
    """A measurement: workers on every core over bare loops on every core."""

    def measure(seed: int) -> dict[str, Any]:
        cores = os.cpu_count() or 1
        with Pool(shared(name), cores) as pool:
            in_pool(pool)
            pairs = [(in_pool(pool), on_every_core(name, cores)) for _ in range(PAIRS)]
        return summed(pairs, "search", "bare")

    return measure


def two_workers(name: str) -> Callable[[int], dict[str, Any]]:
    """A measurement: two workers over one."""

    def measure(seed: int) -> dict[str, Any]:
        with Pool(shared(name), 2) as two, Pool(shared(name), 1) as one:
            in_pool(two), in_pool(one)
            pairs = [(in_pool(two), in_pool(one)) for _ in range(PAIRS)]
        return summed(pairs, "two", "one")

    return measure


def summed(pairs: list[tuple[float, float]], first: str, second: str) -> dict[str, Any]:
    """The median ratio of pairs, and the median steps a second of each side."""
    ratios = [a / b for a, b in pairs]
    return {
        "value": round(float(np.median(ratios)), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        f"{first}_steps_per_s": round(float(np.median([a for a, _ in pairs])), 1),
        f"{second}_steps_per_s": round(float(np.median([b for _, b in pairs])), 1),
    }
