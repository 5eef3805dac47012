"""Work: what a worker does for a search: build a structure, train it, code it and train it on. The parent decides."""

import math
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import realize
from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.stages import FoldBatchNorm
from lilliput.layout import channels_last
from lilliput.recipe import Recipe
from lilliput.runner import Runner
from lilliput.search import parts, rate
from lilliput.search.choose import evidence
from lilliput.search.desk import Desk
from lilliput.search.job import finite
from lilliput.search.points import judged, parameters
from lilliput.search.teacher import outputs
from lilliput.store import Store
from lilliput.task import Score, Task, call, length, take
from lilliput.train import Train

Kept = tuple[dict[str, Any], dict[str, Tensor] | None]
MOST = 4000  # steps of a training that has a time limit
FEW = 16  # examples that a forward pass is timed on
BACKWARD = 3.5  # seconds of a training step, in forward passes of its batch
DRAWS = 60  # of the examples, where a metric that is no mean is bounded
OFFERS = 0.15  # of a coded copy's time, for measuring what codes cost on each tensor
LEAST = 2.0  # seconds that it may take at any rate


@dataclass(frozen=True)
class Shared:
    """What all workers of a search read.

    Args:
        model: the dense network.
        task: as the search uses it.
        seed: of the search.
        device: where to train.
        timed: whether a clock has a say.
        records: the folder of the search's store, where all workers are on its machine.
        file: what is deployed, "lil" or "onnx".
    """

    model: nn.Module
    task: Task
    seed: int
    device: str
    timed: bool = True
    records: str | None = None
    file: str = "lil"


@dataclass(frozen=True)
class Asked:
    """A training that a worker is asked for.

    Args:
        before: the stages that were done.
        results: what those of their trainings gave that another stage follows, by their place among the stages.
        dense: the dense network's score on val.
        training: what to do; its steps are those of a search without a clock. None where nothing is trained.
        bits: the mean bits that weights are stored in first; None leaves them as they are.
        seconds: how long it may take; None where steps are counted.
        sure: the confidence that bounds hold with.
        worst: what each class and group may lose, against the floor; None where only the average counts.
    """

    before: Recipe
    results: dict[int, Kept]
    training: Train | None
    dense: Score
    bits: float | None = None
    seconds: float | None = None
    sure: float = 0.9
    worst: float | None = None


@dataclass(frozen=True)
class Made:
    """What a training gave.

    Args:
        recipe: all stages.
        result: of this training, the recipe's last stage, as the store keeps it; None where nothing was trained.
        steps: of this training.
        seconds: that it took.
        drop: what the network loses on val, in points of the metric.
        bound: what it may lose on examples that nobody has seen.
    """

    recipe: Recipe
    result: Kept | None
    steps: int
    seconds: float
    drop: float
    bound: float


@dataclass(frozen=True)
class Size:
    """How large a structure is: its parameters, their tensors, and seconds of a forward pass of one example."""

    values: int
    tensors: int
    forward_s: float


class Memory(Store):
    """A store in main memory: what a worker was given, and what it hands back.

    Args:
        desk: where the dense network's outputs lie that all workers read.
        records: the search's folder, for the checkpoints of long trainings, where this machine has it.
    """

    def __init__(self, desk: Desk, records: str | None) -> None:
        self.desk = desk
        self.disk = None if records is None else Store(records)
        self.held: dict[str, Kept] = {}
        self.damaged: list[str] = []

    def record(self, key: str) -> dict[str, Any] | None:
        return self.held[key][0] if key in self.held else None

    def tensors(self, key: str) -> dict[str, Tensor] | None:
        if key.startswith("outputs-"):
            known: dict[str, Tensor] | None = self.desk.get(lesson(key))
            return known
        return self.held[key][1] if key in self.held else None

    def put(self, key: str, record: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        own = None if tensors is None else {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self.held[key] = record, own

    def checkpoint(self, key: str) -> dict[str, Any] | None:
        return None if self.disk is None else self.disk.checkpoint(key)

    def keep_checkpoint(self, key: str, checkpoint: dict[str, Any]) -> None:
        if self.disk is not None:
            self.disk.keep_checkpoint(key, checkpoint)

    def drop_checkpoint(self, key: str) -> None:
        if self.disk is not None:
            self.disk.drop_checkpoint(key)


def lesson(key: str) -> str:
    """Under what name workers find the dense network's outputs under an augmentation, by their key in a store."""
    return f"outputs-{key.rpartition('-')[2]}"


def warm(desk: Desk) -> None:
    """Import what the first training would wait for: an optimizer loads half of torch's compiler."""
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)


def size(desk: Desk, structure: Recipe) -> Size:
    """How large a structure is."""
    return size_of(_runner(desk, structure, {}), structure)


def size_of(runner: Runner, structure: Recipe) -> Size:
    """How large a structure is, in this process."""
    model = runner.make(structure)
    few = take(runner.task.probe("train").inputs, slice(0, FEW))
    with torch.no_grad():
        call(model, few)
        began = time.perf_counter()
        call(model, few)
    took = (time.perf_counter() - began) / length(few)
    return Size(parameters(model), sum(p.dim() > 1 for p in model.parameters()), took)


def teach(desk: Desk, draw: int, first: int, last: int) -> Any:
    """The dense network's outputs for training examples under an augmentation.

    Args:
        draw: the number of the augmentation.
        first: the first example.
        last: behind the last one.
    """
    runner = _runner(desk, Recipe(), {})
    runner.task.prepare(draw)  # every worker needs these inputs when it trains
    return outputs(desk, runner.reference.model, runner.task.batch(torch.arange(first, last), draw).inputs)


def train(desk: Desk, asked: Asked, smaller: int = 0) -> Made:
    """Do a training on top of what was done before.

    Args:
        desk: the worker's.
        asked: the training.
        smaller: how often its batch is halved, where it has killed a worker.

    Raises:
        Diverged: where the loss or the outputs are no numbers.
        InterruptedError: where the parent ends it.
    """
    began = time.monotonic()
    runner = _runner(desk, asked.before, asked.results)
    recipe = asked.before
    if asked.bits is not None and asked.bits < 32:
        allowed = float("inf") if asked.seconds is None else max(LEAST, OFFERS * asked.seconds)
        offers = _offers(desk, runner, recipe, allowed)
        recipe = Recipe((*recipe.stages, FoldBatchNorm(), *rate.stages(offers, asked.bits)))
    training = asked.training
    if training is not None:
        limit = None if asked.seconds is None else max(0.1, asked.seconds - (time.monotonic() - began))
        most = training if asked.seconds is None else replace(training, steps=MOST)
        if smaller:
            most = replace(most, batch_size=max(1, (most.batch_size or runner.task.batch_size) >> smaller))
        steps = 0

        def halt(step: int) -> bool:
            nonlocal steps
            steps = step
            desk.report(step)
            if desk.stopped:
                raise InterruptedError("the search needs its worker for something else")
            return False

        model = runner.make(recipe + most, halt, limit)
        kept = runner.store.held[runner.key(recipe + most)]  # type: ignore[attr-defined]
        recipe += replace(most, steps=steps)
    else:
        model, kept, steps = runner.make(recipe), None, 0
    score, given = judged(runner.task, model)
    finite(given)
    return Made(
        recipe,
        kept,
        steps,
        time.monotonic() - began,
        runner.task.loss_of(asked.dense.value, score.value),
        bound(runner.task, asked.dense, score, asked.sure, asked.worst),
    )


def _offers(desk: Desk, runner: Runner, recipe: Recipe, seconds: float) -> rate.Offers:
    """What the tensors of a network may be stored as; kept for the next level that is asked for."""
    key = runner.key(recipe)
    if desk.kept.get("offers", ("",))[0] != key:
        folded = fold_batchnorm(realize(runner.make(recipe)), runner.task.example)
        desk.kept["offers"] = key, rate.offers(folded, runner.task, file=desk.thing.file, seconds=seconds)
    offers: rate.Offers = desk.kept["offers"][1]
    return offers


def bound(task: Task, dense: Score, score: Score, sure: float, worst: float | None = None) -> float:
    """What a network that was not chosen loses at most on examples that nobody has seen, in points of the metric.

    Args:
        task: says which way the metric runs.
        dense: the dense network's score.
        score: the network's score on the same examples.
        sure: the confidence.
        worst: what each class and group may lose, against the floor; the bound is of the one that loses most beside
            what it may, where that is more.

    Returns:
        The bound; what it was seen to lose where nothing more is known.
    """
    drop = task.loss_of(dense.value, score.value)
    least = float(evidence(task, dense, [score], DRAWS).bound(sure)[0])
    least = least if math.isfinite(least) else drop
    return least if worst is None else max(least, float(parts.bounds(task, dense, [score], sure)[0]) / max(worst, 1e-9))


def batch_size_for(task: Task) -> int:
    """A batch that keeps one core busy without starving the optimizer of steps."""
    return min(128, max(8, task.examples // 20)) if task.batch_size == 64 else task.batch_size


def _runner(desk: Desk, recipe: Recipe, results: dict[int, Kept]) -> Runner:
    """The worker's runner, knowing the results that it is given."""
    if "runner" not in desk.kept:
        shared: Shared = desk.thing
        store = Memory(desk, shared.records)
        layout = partial(_layout, desk.kept, shared.timed)
        desk.kept["runner"] = Runner(shared.model, shared.task, store, shared.seed, device=shared.device, layout=layout)
    runner: Runner = desk.kept["runner"]
    # Keys are the worker's own: they hash sources, which a function that came as bytes may not have.
    held = {runner.key(Recipe(recipe.stages[: place + 1])): result for place, result in results.items()}
    runner.store.held = held  # type: ignore[attr-defined]
    return runner


def _layout(kept: dict[Any, Any], timed: bool, model: nn.Module, task: Task, batch_size: int | None) -> bool:
    """Whether channels are last while a structure trains, found once for as many parameters."""
    key = "channels last", parameters(model)
    if key not in kept:
        kept[key] = channels_last(model, task, batch_size, timed)
    found: bool = kept[key]
    return found
