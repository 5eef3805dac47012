"""Network: a torch module as the target: structures, trainings and codes are proposed for it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.encode import Encode
from lilliput.errors import StoreError
from lilliput.graph.fold import fold_batchnorm
from lilliput.proposal import Known
from lilliput.quant.half import Half
from lilliput.quant.quantize import Quantize
from lilliput.recipe import Recipe, plain
from lilliput.search import arithmetic, codes, engine, sensitivity
from lilliput.search.explore import RUNGS, explore
from lilliput.search.job import FAILURES, Job, Target
from lilliput.search.pace import Pace, batch_size_for
from lilliput.search.points import Point, parameters
from lilliput.search.refine import refine, tails
from lilliput.search.space import Space, offers, structure
from lilliput.stage import Stage, calibration
from lilliput.task import Task


class Network(Target):
    """A torch module. Its weights are trained, its layers removed and narrowed, its tensors coded."""

    def dense(self, job: Job) -> Point:
        return job.press.point(job.model, "dense", "dense", [], job.runner.start)

    def look(self, job: Job) -> None:
        job.show.phase("what each technique costs on each layer", 2)
        with job.clock.on("calibrate"):
            limit = 20.0 if job.clock.budget_s is None else 0.04 * job.clock.budget_s
            job.known.harm = job.remember(
                f"sensitivity-{job.runner.start}",
                "sensitivity",
                lambda: {"table": sensitivity.measure(job.model, job.task, calibration(job.task, 64), seconds=limit)},
            )["table"]
        job.show.advance(f"{len(job.known.harm)} tensors")

    def untrained(self, job: Job) -> list[Point]:
        points = [*_eight_bits(job), *arithmetic.points(job)]
        safe = any(job.lost(point) <= 0 for point in points)
        return points if safe else [*points, *_half(job)]

    def trained(self, job: Job, pool: ThreadPoolExecutor) -> None:
        if reason := _frozen(job):
            job.known.skip("training", reason)
            return
        with job.clock.on("calibrate"):
            space = Space.of(job.runner, job.known)
        job.show.advance(f"{len(space.axes)} methods have something to offer")
        pace = Pace(job, batch_size_for(job.task))
        if reason := _too_slow(job, space, pace):
            job.known.skip("training", reason)
            return
        budget = job.clock.budget_s
        asked = job.trials or (12 if budget is None or budget >= 60 else 4)
        finals = max(1, min(3 if asked >= 6 else 2, asked))
        wanted = tails(job, space)
        if job.question.for_latency and budget is not None:
            job.clock.reserved_s = engine.RESERVED * budget
        with job.clock.on("train"):
            _teach(job, pool)
        share = asked / 16 + (asked // 3) * (RUNGS[1] - RUNGS[0]) + finals * (1 - RUNGS[1]) + finals * len(wanted) * 0.2
        pace.set_slot(0.88 * job.workers * job.clock.remaining(0.93) / share)
        refine(job, pace, pool, explore(job, space, pace, pool, asked, finals), wanted)

    def tensors(self, job: Job, point: Point) -> dict[str, Tensor]:
        model = job.model if point.model is None else point.model
        return dict(model.state_dict())

    def recipe(self, job: Job, point: Point) -> str:
        if point.model is None and point is not job.dense:
            return arithmetic.NO_RECIPE
        return Recipe.parse(point.recipe).toml()

    def plan(self, model: nn.Module, task: Task) -> dict[str, Any]:
        known = Known()
        tried = offers(model, task, known) | codes.offered(model, task)
        tried["training"] = "distilled from the dense network throughout"
        return {
            "values": parameters(model),
            "tried": tried,
            "left_alone": [{"name": name, "reason": reason} for name, reason in known.skipped],
        }


def _eight_bits(job: Job) -> list[Point]:
    """The dense network with 8-bit weights."""
    return _stored(job, "8 bits", lambda folded: Quantize(8))


def _half(job: Job) -> list[Point]:
    """The dense network in 16-bit floats: half the bytes for next to nothing, where 8 bits lose something."""

    def stage(folded: nn.Module) -> Stage:
        small = [name for name, p in folded.named_parameters() if p.numel() and float(p.detach().abs().max()) < 65504]
        return Encode(Half(), where=",".join(small))

    return _stored(job, "float16", stage)


def _stored(job: Job, how: str, stage: Callable[[nn.Module], Stage]) -> list[Point]:
    """The dense network stored by a stage that is made for its folded form."""
    name = f"same structure, {how} without training"
    try:
        with job.clock.on("calibrate"):
            folded = fold_batchnorm(job.model, job.task.example)
            made = stage(folded)
            model = made(folded, job.task, job.runner.reference)
        recipe = [{"stage": "FoldBatchNorm"}, plain(made)]
        return [job.press.point(model, "dense", name, recipe, job.runner.key(Recipe.parse(recipe)))]
    except arithmetic.REFUSALS as error:
        job.failed(name, error)
        return []


def _frozen(job: Job) -> str:
    """Why nothing can be trained, or an empty text."""
    if job.task.examples < 2:
        return "one example is too few to train on"
    return "" if any(p.requires_grad for p in job.model.parameters()) else "no parameter may be trained"


def _too_slow(job: Job, space: Space, pace: Pace) -> str:
    """Why the budget holds too few steps to train a student at all, or an empty text."""
    if job.trials is not None:
        return ""
    reason = ""
    for choice in space.starters()[:3]:  # one structure that cannot be trained does not speak for all
        try:
            small = structure(space.plan(choice))
            speed = pace.speed(job.runner.make(small), f"speed-{job.runner.key(small)}")
        except StoreError:
            raise
        except FAILURES as error:
            reason = f"a step of it raised {type(error).__name__}: {error}"
            continue
        steps = speed * job.clock.remaining(0.6) * job.workers
        if steps >= 3000:
            return ""
        return f"{max(0.0, steps):.0f} steps fit into the budget, too few to train a student"
    return reason


def _teach(job: Job, pool: ThreadPoolExecutor) -> None:
    """The dense network's outputs on every (example, augmentation), side by side."""
    reference, count = job.runner.reference, job.task.examples
    chunks = [(index, draw) for draw in range(job.task.draws) for index in torch.arange(count).split(512)]
    job.show.phase("the dense network's outputs", len(chunks))
    for draw in range(job.task.draws):
        reference.prepare(draw)
    for _ in pool.map(lambda chunk: reference.outputs(job.task.batch(*chunk)), chunks):
        job.show.advance()
