"""Refine: a full training for each survivor, then its tails: fewer bits and zeros, trained through the rounding.

The next version of the search replaces this file. A tail's codes are chosen per tensor among what every registered code
proposes (lilliput.search.codes).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lilliput.code.base import pack, realize
from lilliput.distill.logits import Distill
from lilliput.errors import StoreError
from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.stages import FoldBatchNorm
from lilliput.graph.tables import tables
from lilliput.prune.prune import Prune
from lilliput.recipe import Recipe
from lilliput.rule import Rule
from lilliput.schedule import Cosine
from lilliput.search import codes, engine
from lilliput.search.job import FAILURES, Job
from lilliput.search.pace import Pace
from lilliput.search.space import Space, identity, name, structure, topology, training
from lilliput.train import Train

MOST_AT_ONCE = 0.6  # zeros that a short training recovers from; more are made while it trains
PATIENT = 600  # seconds of budget from which on zeros are made in more than one way
SPARSE: dict[str, Callable[[float], Rule]] = {
    "Taylor": lambda sparsity: Prune(sparsity, "taylor", allocation="normalized"),
    "global magnitude": lambda sparsity: Prune(sparsity, allocation="normalized"),
}
"""How more zeros are made: what lies on the measured front of accuracy and time, the most accurate first. The names are
those of the records, which a test holds them against."""


@dataclass(frozen=True)
class Tail:
    """What is done to a trained structure: how much of it is set to zero and how many bits its weights get.

    Args:
        bits: the mean width of weights; 32 leaves them as they are.
        sparsity: the fraction set to zero.
        trained: whether it is trained through the rounding.
        method: a name in SPARSE, where the zeros are made while it trains.
    """

    bits: float = 32.0
    sparsity: float = 0.0
    trained: bool = True
    method: str = "Taylor"

    def name(self) -> str:
        """The tail in a few words."""
        if self.bits >= 32:
            return "float32"
        text = f"{self.bits:g} bits" + (f", {self.sparsity:.0%} zeros" if self.sparsity else "")
        text += f" by {self.method}" if self.method != "Taylor" else ""
        return text if self.trained else text + " without training"


def tails(job: Job, space: Space) -> tuple[Tail, ...]:
    """The trained tails of every survivor: for size two widths and zeros, for time what the engine rewards."""
    if not job.question.for_latency:
        return (Tail(4), Tail(3), *(() if tables(job.model) else (Tail(4, 0.5),)))
    budget = job.clock.budget_s
    ways = tuple(SPARSE) if budget is None or budget >= PATIENT else tuple(SPARSE)[:1]
    return (Tail(4), *(Tail(8, sparsity, method=way) for sparsity in _rewarded(job, space) for way in ways))


def _rewarded(job: Job, space: Space) -> tuple[float, ...]:
    """The sparsities that the engine rewards on the structure that is tried first."""
    if job.dense.values > engine.MOST_VALUES:
        return ()
    try:
        plan = space.plan(space.starters()[0])
        plain = fold_batchnorm(realize(job.runner.make(structure(plan))).cpu(), job.task.example)
        graph = job.press.structure(plain, topology(plan), identity(structure(plan)))
        with job.clock.on("measure"):
            return engine.rewarded(graph, pack(plain), job.task.example)
    except StoreError:
        raise
    except FAILURES:
        return ()


def refine(job: Job, pace: Pace, pool: ThreadPoolExecutor, plans: list[Recipe], wanted: tuple[Tail, ...]) -> None:
    """A full training for each plan, then its tails, each of them a point."""
    job.show.phase("full training and quantizing of the survivors", len(plans) * (2 + len(wanted)))
    list(pool.map(lambda plan: _survivor(job, pace, plan, wanted), plans))


def _survivor(job: Job, pace: Pace, plan: Recipe, wanted: tuple[Tail, ...]) -> None:
    try:
        recipe = pace.trained(plan)
        with job.clock.on("train"):
            model = job.runner.make(recipe, job.halt(0.9))
        folded = fold_batchnorm(realize(model), job.task.example)
        _point(job, folded, plan, Tail(), recipe)
        with job.clock.on("calibrate"):
            offers = codes.offers(folded, job.task, seconds=max(2.0, 0.02 * min(job.clock.remaining(), 600)))
    except StoreError:
        raise
    except FAILURES as error:
        job.failed(name(plan), error)
        return
    for which in (Tail(8, trained=False), *wanted):
        _tail(job, pace, plan, recipe, folded, which, offers)


def _tail(
    job: Job, pace: Pace, plan: Recipe, recipe: Recipe, folded: nn.Module, which: Tail, offers: codes.Offers
) -> None:
    """One variant of a trained structure; skipped when the time is up."""
    title = f"{name(plan)}, {which.name()}"
    if which.trained and pace.slot_s is not None and job.clock.remaining(0.94) < 0.12 * pace.slot_s:
        job.failed(title, TimeoutError("the budget leaves no time to train it"))
        return
    try:
        _, steps = pace.steps(plan)
        stages = _stages(job, pace, plan, which, steps, folded, offers)
        whole = Recipe((*recipe.stages, *stages))
        with job.clock.on("train" if which.trained else "calibrate"):
            model = job.runner.make(whole, job.halt(0.95))
        if which.trained and job.clock.remaining(0.95) < 0:
            raise TimeoutError("the budget ended while it trained")
        _point(job, model, plan, which, whole)
    except StoreError:
        raise
    except FAILURES as error:
        job.failed(title, error)


def _stages(
    job: Job, pace: Pace, plan: Recipe, which: Tail, steps: int, folded: nn.Module, offers: codes.Offers
) -> tuple[Any, ...]:
    """The stages of a tail, behind a trained structure."""
    rules = training(plan).rules
    polish = Train(
        steps=steps,
        lr=Cosine(pace.lr(plan) / 4),
        rules=rules,
        supervised=training(plan).supervised,
        batch_size=pace.batch_size,
        weight_decay=0.0,
        seed=job.seed,
    )
    stages: list[Any] = [FoldBatchNorm()]
    if which.sparsity > MOST_AT_ONCE:  # gradually; 8 bits lose nothing after it
        zeros = SPARSE[which.method](which.sparsity)
        stages.append(replace(polish, lr=Cosine(pace.lr(plan)), rules=(zeros, Distill())))
    elif which.sparsity:
        stages.append(Prune(which.sparsity))
    if which.bits < 32:
        stages += codes.stages(folded, offers, which.bits)
        if which.trained and which.sparsity <= MOST_AT_ONCE:
            stages.append(polish)
    return tuple(stages)


def _point(job: Job, model: nn.Module, plan: Recipe, which: Tail, recipe: Recipe) -> None:
    title = f"{name(plan)}, {which.name()}"
    key = job.runner.key(recipe)
    job.add(job.press.point(model, topology(plan), title, recipe.data(), key, identity(structure(plan))))
