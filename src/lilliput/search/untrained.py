"""Untrained: networks of the dense structure by rate and distortion, from large to small, around the floor."""

import math
import time
from dataclasses import dataclass, field
from typing import Literal

from lilliput.errors import StoreError
from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.stages import FoldBatchNorm
from lilliput.recipe import Recipe
from lilliput.search import rate
from lilliput.search.job import FAILURES, Job, Pieces
from lilliput.search.points import Point

File = Literal["lil", "onnx"]
START = {"lil": 20.0, "onnx": 7.0}  # times smaller: what most networks stand, by file
STRIDE = 1.7  # to the next, while all hold the floor or none does
BACK = 1.3  # to one that is safe, where the best is so close to the floor that it may be taken back at the end
SAFE = 0.8  # of the floor: below it a bound is not taken back
TRY = 10.0  # times what scoring val takes, that a network takes to be composed and judged
CLOSE = {True: 1.15, False: 1.04}  # when two ratios lie so close, what lies between them gains too little for its time
RATIOS = (1.5, 60.0)  # what is tried at most
SPARED = 0.5  # of the floor, left for the luck of having been chosen
MOST = 10  # networks
SHARE = {True: 0.25, False: 0.85}  # of the time that is left, where workers train beside, on the same cores, or not
EXAMPLES = (1024, 512, 256)  # that harms are measured on: the most that take no more than their part of PRICING, where
# nothing trains beside, else the fewest
MEASURING = 0.5  # that part
PASSES = 4.0  # what measuring takes, in passes of as many examples forwards
PRICING = {True: 0.1, False: 0.25}  # of that time, for what codes cost and harm


@dataclass
class Bracket:
    """The ratio at which the floor is reached lies between `low`, which holds it, and `high`, which does not.

    Where nothing but networks that may be taken back holds the floor, a smaller ratio comes before it is too late, so
    that there is something between them and 8 bits.
    """

    first: float
    close: float = CLOSE[True]
    low: float = 0.0
    high: float = math.inf
    back: float = math.inf
    safe: bool = False

    def next(self, late: bool = True) -> float | None:
        """The ratio to try; None where nothing is left to find.

        Args:
            late: whether there may be no time for another.
        """
        if not self.low and self.high == math.inf:
            return self.first
        if late and self.low and not self.safe and self.back == math.inf:
            self.back = self.low / BACK
            return self.back
        if self.high == math.inf:
            ratio = self.low * STRIDE
            return ratio if ratio <= RATIOS[1] else None
        if not self.low:
            ratio = self.high / STRIDE
            return ratio if ratio >= RATIOS[0] else None
        return math.sqrt(self.low * self.high) if self.high / self.low > self.close else None

    def saw(self, ratio: float, holds: bool, safe: bool = True) -> None:
        """Take a result in."""
        self.safe |= holds and safe
        if holds:
            self.low = max(self.low, ratio)
        else:
            self.high = min(self.high, ratio)


@dataclass
class _Size:
    """What a file has beside the tensors that are chosen for, and how their cost turns out against what was expected.

    Layers that see what the ones before them lost take a few percent more than they do alone.
    """

    beside: float
    factor: float = 1.0
    runs: list[tuple[dict[str, rate.Option], float]] = field(default_factory=list)

    def total(self, size: float) -> float:
        """What may be spent on tensors for a file of that size."""
        return (size - self.beside) / self.factor

    def saw(self, picked: dict[str, rate.Option], size: float) -> None:
        """Take a file's size in."""
        self.factor = (size - self.beside) / max(1.0, sum(option.cost for option in picked.values()))


def points(job: Job, training: bool) -> Pieces:
    """Points of the dense structure, without a training step, around the largest ratio that holds the floor.

    Args:
        job: the search.
        training: whether workers train beside, whose cores most of the budget is kept for.
    """
    question = job.question
    if question.objective in ("macs", "memory") and question.max_bytes is None:
        return
    left = max(0.0, job.clock.remaining())  # infinite where there is no budget
    until = job.clock.now + SHARE[training] * left
    pricing = PRICING[training] * left
    yield pricing
    try:
        with job.clock.on("calibrate"):
            folded = fold_batchnorm(job.model, job.task.example)
            count = EXAMPLES[-1] if training else _examples(job, pricing)
            known = rate.offers(folded, job.task, file=question.file, seconds=pricing, examples=count)
    except StoreError:
        raise
    except FAILURES as error:
        job.failed("same structure by rate and distortion", error)
        return
    yield 0.0
    dense, bytes_ = job.dense, question.file_key
    target: File = "onnx" if question.file == "onnx" else "lil"
    size = _Size(max(0.0, float(dense.costs[bytes_]) - sum(s.cost(target) for s in dense.stored.values())))
    # Where there is time for few, the first is one that is safe.
    several = until - job.clock.now >= 2 * TRY * job.took["score"]
    bracket, last = Bracket(START[target] / (1 if several else BACK), CLOSE[training]), 0.0
    if question.max_bytes is not None:
        bracket.first = dense.onnx_bytes / question.max_bytes
    for number in range(MOST):
        ratio = bracket.next(late=training or until - job.clock.now < 3 * last)
        if ratio is None or (number and until - job.clock.now < 1.3 * last):
            return
        began = time.monotonic()
        point = _point(job, known, size, ratio)
        last = time.monotonic() - began
        if point is None:
            bracket.saw(ratio, False)
            continue
        bracket.saw(ratio, _holds(job, point), _safe(job, point))
        yield point


def _examples(job: Job, seconds: float) -> int:
    """On how many examples harms are measured, of which more predict better; the fewest where no clock has a say."""
    if job.clock.budget_s is None:
        return EXAMPLES[-1]
    each = PASSES * job.took["score"] / job.task.size("val")
    return next((count for count in EXAMPLES if count * each <= MEASURING * seconds), EXAMPLES[-1])


def _holds(job: Job, point: Point) -> bool:
    """Whether a smaller network is worth a try: the floor holds with something to spare, or the limit does not yet."""
    if job.question.max_bytes is not None:
        return not job.question.fits(point.costs)
    return job.lost(point) <= SPARED * job.question.points(job.dense.score.value)


def _safe(job: Job, point: Point) -> bool:
    """Whether a network will hardly be taken back, beside all points of the search."""
    floor = job.question.floor
    return floor is None or job.bound(point) <= SAFE * job.question.points(job.dense.score.value)


def _point(job: Job, known: rate.Offers, size: _Size, ratio: float) -> Point | None:
    """The network that is `ratio` times smaller than the dense file, or None where it comes to nothing."""
    title = f"same structure, {ratio:.3g}x by rate and distortion, without training"
    try:
        with job.clock.on("calibrate"):
            picked = known.chosen(size.total(job.dense.onnx_bytes / ratio))
            model, stages = rate.composed(known, picked)
            recipe = Recipe((FoldBatchNorm(), *stages))
        point = job.press.point(model, "dense", title, recipe.data(), job.runner.key(recipe))
    except StoreError:
        raise
    except FAILURES as error:
        job.failed(title, error)
        return None
    made = point.costs[job.question.file_key]
    size.saw(picked, made)
    size.runs.append((picked, point.divergence))
    known.fit(size.runs)
    point.name = f"same structure, {job.dense.onnx_bytes / made:.3g}x by rate and distortion, without training"
    return point
