"""Network: a torch module as the target: structures, trainings and codes are proposed for it."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

from lilliput.encode import Encode
from lilliput.graph.fold import fold_batchnorm
from lilliput.proposal import Known
from lilliput.quant.half import Half
from lilliput.quant.quantize import Quantize
from lilliput.recipe import Recipe, plain
from lilliput.search import arithmetic, bare, codes, sensitivity, teacher, untrained
from lilliput.search.climb import climb
from lilliput.search.job import Job, Pieces, Target
from lilliput.search.lessons import Lesson, lessons
from lilliput.search.points import Point, parameters
from lilliput.search.pool import Pool
from lilliput.search.space import Space, offers
from lilliput.search.work import Shared, warm
from lilliput.stage import Stage, calibration
from lilliput.task import Task

SOON = 20.0
"""Times what scoring val takes: with less time left, what lies between 8 bits and rate and distortion is made first."""


class Network(Target):
    """A torch module. Its weights are trained, its layers removed and narrowed, its tensors coded."""

    def __init__(self) -> None:
        self.lessons: list[Lesson] = []
        self.pool: Pool | None = None

    def begin(self, job: Job, pool: Pool) -> None:
        self.pool = pool
        if job.question.train and not _frozen(job):
            device, timed = str(job.runner.reference.device), job.clock.budget_s is not None
            records = str(job.store.folder.resolve()) if pool.local else None
            pool.share(Shared(job.model, job.task, job.seed, device, timed, records, job.question.file))
            for _ in range(pool.workers):
                pool.submit(warm)
            self.lessons = lessons(job, pool)

    def dense(self, job: Job) -> Point:
        point = job.press.point(job.model, "dense", "dense", [], job.runner.start)
        if self.pool is not None and self.lessons and job.clock.budget_s is not None:
            # Without a clock nothing may depend on who had the file when.
            self.pool.put(teacher.FILE, point.proto.SerializeToString())
        return point

    def look(self, job: Job) -> None:
        job.show.phase("what each technique costs on each layer", 2)
        with job.clock.on("calibrate"):
            limit = 20.0 if job.clock.budget_s is None else 0.01 * job.clock.budget_s
            job.known.harm = job.remember(
                f"sensitivity-{job.runner.start}",
                "sensitivity",
                lambda: {"table": sensitivity.measure(job.model, job.task, calibration(job.task, 64), seconds=limit)},
            )["table"]
        job.show.advance(f"{len(job.known.harm)} tensors")

    def first(self, job: Job) -> list[Point]:
        return _eight_bits(job)

    def untrained(self, job: Job, alone: bool) -> Pieces:
        alone = alone or bool(_frozen(job))
        if job.clock.remaining() < SOON * job.took["score"]:
            yield from _stored(job, "4 bits", lambda folded: Quantize(4))
        yield from chain(bare.points(job), arithmetic.points(job), untrained.points(job, not alone))
        if not any(job.lost(point) <= 0 for point in job.points[1:]):  # what is safe, where 8 bits are not
            yield from _half(job)

    def trained(self, job: Job, pool: Pool, beside: Iterator[float]) -> None:
        if reason := _frozen(job) or ("" if job.question.train else "it was not asked for"):
            job.known.skip("training", reason)
            return
        with job.clock.on("calibrate"):
            space = Space.of(job.runner, job.known, job.taught)
        job.show.advance(f"{len(space.axes)} methods have something to offer")
        climb(job, space, pool, self.lessons, beside)

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
