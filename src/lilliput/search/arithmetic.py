"""Arithmetic without a training step: products and convolutions in 8-bit integers where measuring says that it pays."""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnx import ModelProto

from lilliput.cost.measure import latency
from lilliput.errors import ExportError, NotSupported
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.quant.dynamic import dynamic, gain_ms
from lilliput.quant.static import observe
from lilliput.search.integers import integers
from lilliput.search.job import Job, Pieces
from lilliput.search.points import Point
from lilliput.stage import calibration
from lilliput.task import length, take

TOLERANCES = (0.002, 0.004, 0.01)
SHARE = 0.3  # of the budget, for finding out what pays, other work in between included
SHARE_EACH = 0.03  # of the budget, for a trained point
LOSES = 0.25  # points of a metric for the root of a mean divergence: where to begin, no more
RESERVED = 0.12  # of the budget, for the trained points at the most
TRAINED = 3  # points that are tried in integers
UNCOUNTED_S = 60.0  # the same where no seconds are counted
PAYS = 0.05  # of a run's time, which a file must save to be worth a trial beside another
HOPED = 0.7  # of the time in ONNX Runtime, for what is not compiled yet
EXAMPLES = 128
CHUNK = 16  # examples of a calibration run at most: the outputs of all operators are in memory at once
CHUNK_VALUES = 200_000  # of its inputs
REFUSALS = (ExportError, NotSupported, ValueError, KeyError)
NO_RECIPE = "# Made from the exported file: there are no stages that could be applied or trained again.\n"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A file that is faster than the dense one.

    Args:
        harm: the mean divergence from the dense outputs on calibration examples.
        time: of a run, as a fraction of the dense network's, as far as it is known.
        hoped: the same where it may be shorter in a runtime that it is not compiled for yet.
    """

    proto: ModelProto
    name: str
    recipe: list[dict[str, Any]]
    key: str
    harm: float
    time: float
    hoped: float = 1.0


def points(job: Job, of: Point | None = None, seconds: float | None = None) -> Pieces:
    """A point with operators in 8-bit integers: static where ranges are fixed, dynamic where found anew.

    First what is scored is the fastest that seems to keep the floor, by what it harms; then faster ones while they do,
    or else safer ones until one does. Nothing is done where no time is asked for: what is stored in 8 bits is as small
    without the arithmetic.

    Args:
        job: the search; points are given as they are made, not added.
        of: the dense point where none is given.
        seconds: for finding out what pays; a share of the budget otherwise.
    """
    if not job.question.for_latency:
        job.known.skip("8-bit arithmetic", "it saves time, and time is not asked for")
        return
    base = job.dense if of is None else of
    if seconds is None:
        seconds = UNCOUNTED_S if job.clock.budget_s is None else SHARE * job.clock.budget_s
    end = job.clock.now + seconds
    tried = yield from _static(job, base, end)
    yield max(0.0, end - job.clock.now)
    with job.clock.on("calibrate"):
        tried += _dynamic(job, base, end)
    for proto in (base.proto, *(candidate.proto for candidate in tried)):
        if job.forge is not None:
            job.forge.start(proto)
    timed: list[Candidate] = []
    for candidate in tried:
        yield max(0.0, end - job.clock.now)
        with job.clock.on("calibrate"):
            timed.append(_timed(job, base, candidate, end))
    alone = _timed(job, base, Candidate(base.proto, "", [], "", 0.0, 1.0), job.clock.now)
    found = worth(timed, alone.time)
    for candidate in timed:
        if candidate not in found:
            job.known.skip(candidate.name, f"it harms more than others, and takes {candidate.time:.0%} of the time")
    floor = job.question.points(job.dense.score.value)
    kept = base
    for point in _tried(job, found, floor):
        kept = point if job.lost(point) <= floor else kept
        yield point
    if job.forge is not None:
        job.forge.tune(kept.proto)


def _tried(job: Job, found: Sequence[Candidate], floor: float) -> Iterator[Point]:
    """Candidates, from the least harmful to the fastest, scored from the one that seems to keep the floor outwards."""
    place = max([i for i, c in enumerate(found) if LOSES * math.sqrt(c.harm) <= floor], default=0)
    way, first = 0, True
    while 0 <= place < len(found):
        if not first and job.clock.remaining(0.8) < job.press.scored_s:
            job.known.skip(found[place].name, "no time to score it")
            return
        first, holds = False, False
        for point in _point(job, found[place]):
            yield point
            holds = job.bound(point) <= floor
        step = 1 if holds else -1
        if way and step != way:
            return
        way, place = step, place + step


def reserved_s(job: Job) -> float:
    """The seconds that `trained` and the compiler need at the end of a search, once there is a point for them."""
    if not job.question.for_latency or job.clock.budget_s is None or not _small(job):
        return 0.0
    compiling = 0.0 if job.forge is None else 2 * job.forge.expected_s()
    return min(RESERVED * job.clock.budget_s, TRAINED * SHARE_EACH * job.clock.budget_s + compiling)


def trained(job: Job) -> Pieces:
    """The trained points that compute least of those within the floor, in integers, as many as there is time for."""
    for point in _small(job)[:TRAINED]:
        seconds = min(SHARE_EACH * (job.clock.budget_s or UNCOUNTED_S), job.clock.remaining(0.95))
        if seconds > job.press.scored_s:
            yield from points(job, point, seconds)


def _small(job: Job) -> list[Point]:
    """Points within the floor that compute less than the dense network, those that compute least first."""
    floor = job.question.points(job.dense.score.value)
    fit = [point for point in job.points if point.model is not None and job.lost(point) <= floor]
    return sorted((p for p in fit if p.macs < job.dense.macs), key=lambda point: (point.macs, job.lost(point)))


def worth(candidates: Sequence[Candidate], most: float = 1.0) -> list[Candidate]:
    """Those worth a trial, from the least harmful to the fastest: each must be faster by `PAYS` than all before it.

    Args:
        candidates: what there is.
        most: the time that the first must be faster than.

    Example:
        >>> times = {"a": (0.1, 0.6), "b": (0.2, 0.58), "c": (0.3, 0.4), "d": (0.0, 0.99)}
        >>> made = [Candidate(ModelProto(), name, [], name, *of, hoped=of[1]) for name, of in times.items()]
        >>> [candidate.name for candidate in worth(made)]
        ['a', 'c']
    """
    found: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda candidate: (candidate.harm, candidate.time)):
        if candidate.hoped <= (1 - PAYS) * min([most, *(other.time for other in found)]):
            found.append(candidate)
    return found


def _static(job: Job, base: Point, end: float) -> Generator[float, None, list[Candidate]]:
    """Convolutions and products whose inputs have fixed ranges, by groups of operators; pauses between the pieces."""
    inputs, proto = calibration(job.task, EXAMPLES), base.structure.fill(base.stored)
    title = f"{_named(job, base)}, static 8-bit arithmetic"
    try:
        yield 0.0
        session = Session(proto)
        size = sum(array[:1].size for array in session.feed(take(inputs, slice(0, 1))).values())
        chunk = max(1, min(CHUNK, CHUNK_VALUES // max(1, size)))
        runs: list[Any] = [session.feed(take(inputs, slice(i, i + chunk))) for i in range(0, length(inputs), chunk)]
        seen = observe(proto, runs)
        begin = job.forge.start if job.forge is not None else None
        found = yield from integers(seen, job.task, inputs, max(1.0, 0.6 * (end - job.clock.now)), begin)
    except REFUSALS as error:
        job.known.skip("static 8-bit arithmetic", str(error)[:200])
        return []
    return [
        Candidate(
            found.write(choice),
            f"{title} in {len(choice.names)} of {len(seen.sites)} operators",
            [*base.recipe, {"stage": "static int8", "range": found.rule, "operators": list(choice.names)}],
            f"{base.key}-static-{len(choice.names)}",
            choice.harm,
            choice.time,
        )
        for choice in dict.fromkeys([found.whole, *(c for c in found.choices if len(c.names) < len(seen.sites))])
    ]


def _dynamic(job: Job, base: Point, end: float) -> list[Candidate]:
    """Matrix products whose inputs get their levels anew in every run: fast where they are large (transformers)."""
    inputs, proto = calibration(job.task, 48), base.structure.fill(base.stored)
    session = Session(proto)
    runs: list[Any] = [session.feed(take(inputs, slice(i, i + 1))) for i in range(length(inputs))]
    found: list[Candidate] = []
    try:
        gain = gain_ms(proto, runs[:1])
        whole = latency({"dense": session}, job.task.example, seconds=0.3, clock=time.thread_time)["dense"].median_ms
        if gain < PAYS * whole:
            job.known.skip("dynamic 8-bit arithmetic", f"its products would save {max(0.0, gain / whole):.0%} of a run")
            return found
        before = session.predict(inputs, 1)
        for tolerance in TOLERANCES:
            if found and job.clock.now > end:
                break
            small = dynamic(proto, runs, tolerance=tolerance)
            made = Session(small)
            harm = float(job.task.divergence(made.predict(inputs, 1), before).mean().clamp_min(0))
            pair = {"dense": session, "small": made}
            times = latency(pair, job.task.example, seconds=1.0, clock=time.thread_time, settled=0.02)
            name = f"{_named(job, base)}, 8-bit arithmetic within {tolerance:g}"
            recipe = [*base.recipe, {"stage": "dynamic int8", "tolerance": tolerance}]
            key = f"{base.key}-dynamic-{tolerance}"
            found.append(Candidate(small, name, recipe, key, harm, 1 / times["small"].ratio))
    except REFUSALS as error:
        job.known.skip("dynamic 8-bit arithmetic", str(error)[:200])
    return found


def _timed(job: Job, base: Point, candidate: Candidate, end: float) -> Candidate:
    """The candidate with its time in the faster runtime that may be used, as a fraction of the base's in ONNX Runtime.

    Args:
        base: what the candidate was made of.
        end: until when to wait for the compiler.
    """
    here, proto = candidate.time, candidate.proto
    if job.forge is None:
        return replace(candidate, hoped=here)
    made = job.forge.sessions(proto, end - job.clock.now)
    if not made:
        return replace(candidate, hoped=here if job.forge.reason(proto) else HOPED * min(1.0, here))
    pair: dict[str, Any] = {"ort": Session(base.proto), "engine": made[0]}
    times = latency(pair, job.task.example, seconds=0.5, clock=time.thread_time, settled=0.02)
    there = 1 / times["engine"].ratio
    best = there if job.question.runtime == "engine" else min(here, there)
    return replace(candidate, time=best, hoped=best)


def _named(job: Job, base: Point) -> str:
    return "same structure" if base is job.dense else base.name


def _point(job: Job, candidate: Candidate) -> list[Point]:
    """The point of a written file, or none where it is refused."""
    proto = candidate.proto
    try:
        with job.clock.on("measure"):
            made = job.press.finished(
                proto, Structure(proto), {}, None, candidate.name, candidate.recipe, candidate.key, None
            )
            return [made]
    except REFUSALS as error:
        job.failed(candidate.name, error)
        return []
