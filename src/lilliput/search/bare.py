"""Bare: smaller structures that need no training, of tables that training data hardly reads or that say little.

Methods whose class says `untrained` change so little that they may pay alone. Each gets a share of what may be lost, in
order, and takes its strongest option within it: options go from mild to strong, so twice the number is tried until it
loses too much, then what lies between. What was found is also where structures that are trained begin.
"""

from collections.abc import Iterator

from torch import nn

from lilliput.errors import StoreError
from lilliput.graph.fold import fold_batchnorm
from lilliput.proposal import Proposals, Refusal, proposals
from lilliput.quant.quantize import Quantize
from lilliput.recipe import Recipe, plain
from lilliput.search.job import FAILURES, Job
from lilliput.search.points import Point
from lilliput.search.space import Choice, identity, methods
from lilliput.stage import Stage
from lilliput.task import length, predict

SHARES = (0.75, 0.25)
"""Parts of the floor that structures without training may take; the first is where trained ones begin."""
FEW = 16  # examples that tell how long all of val takes
PART = 0.08  # of the budget, for each share


def points(job: Job) -> Iterator[Point]:
    """Networks of fewer rows, columns and tables in 8 bits, without training; `job.known.bare` is set."""
    offered = _offered(job)
    if not offered:
        return
    found: dict[Recipe, Choice] = {}
    for share in SHARES:
        choice = _remembered(job, offered, share)
        found.setdefault(_recipe(offered, choice), choice)
    job.known.bare = dict(next(iter(found.values())))
    for recipe in found:
        if recipe.stages and (point := _stored(job, recipe)) is not None:
            yield point


def _offered(job: Job) -> dict[str, Proposals]:
    offered = {}
    with job.clock.on("calibrate"):
        for method in methods("structure"):
            if getattr(method, "untrained", False):
                answer = proposals(method, job.model, job.task, job.known)
                if not isinstance(answer, Refusal):
                    offered[method.__name__] = answer
    return offered


def _remembered(job: Job, offered: dict[str, Proposals], share: float) -> Choice:
    key = f"bare-{share}-{job.runner.start}-{job.question.points(job.dense.score.value)}"
    kept: Choice = job.remember(key, "bare", lambda: {"choice": _choice(job, offered, share)})["choice"]
    return kept


def _recipe(offered: dict[str, Proposals], choice: Choice) -> Recipe:
    return Recipe(tuple(offered[name].options[number - 1] for name, number in choice.items() if number))


def _choice(job: Job, offered: dict[str, Proposals], share: float) -> Choice:
    """The strongest option of each method, one after the other, within a share of the floor."""
    dense = job.dense.score.value
    bound, budget = share * job.question.points(dense), job.clock.budget_s
    end = float("inf") if budget is None else job.clock.now + PART * budget - _seconds(job)
    choice: Choice = {}

    def holds(name: str, number: int, allowed: float) -> bool:
        if job.clock.now > end:
            return False
        try:
            model = job.runner.make(_recipe(offered, {**choice, name: number}))
            return job.task.loss_of(dense, job.task.score(model, "val").value) <= allowed
        except StoreError:
            raise
        except FAILURES:
            return False

    with job.clock.on("calibrate"):
        for place, (name, options) in enumerate(offered.items(), 1):
            low, high, allowed = 0, len(options) + 1, bound * place / len(offered)  # low holds, high does not
            while high - low > 1:
                number = min(max(2 * low, 1), len(options)) if high > len(options) else (low + high) // 2
                low, high = (number, high) if holds(name, number, allowed) else (low, number)
            choice[name] = low
    return choice


def _seconds(job: Job) -> float:
    """What it takes to score one structure."""
    few = job.task.calibration(FEW)
    began = job.clock.now
    predict(job.model, few)
    return (job.clock.now - began) * job.task.size("val") / length(few)


def _stored(job: Job, structure: Recipe) -> Point | None:
    """A structure in 8 bits."""
    stages = [stage for stage in structure.stages if isinstance(stage, Stage)]
    name = f"{', '.join(stage.label() for stage in stages)}, 8 bits without training"
    try:
        with job.clock.on("calibrate"):
            folded: nn.Module = fold_batchnorm(job.runner.make(structure), job.task.example)
            model = Quantize(8)(folded, job.task, job.runner.reference)
        recipe = [*structure.data(), {"stage": "FoldBatchNorm"}, plain(Quantize(8))]
        return job.press.point(model, identity(structure), name, recipe, job.runner.key(Recipe.parse(recipe)))
    except StoreError:
        raise
    except FAILURES as error:
        job.failed(name, error)
        return None
