"""Finish a search: measure the best points in one run, choose, read the test split once, write the files."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lilliput.cost.measure import latency, machine
from lilliput.export.guard import flags
from lilliput.onnx.session import Session
from lilliput.search import engine
from lilliput.search.choose import Choice, choose, front, interval
from lilliput.search.files import write_folder
from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.search.summary import Summary, rounded, summarize

MEASURED = 14
SECONDS_EACH = 0.5
SETTLED = 0.02  # the width of a ratio's interval, as a fraction of it, at which measuring ends


@dataclass(frozen=True)
class Result:
    """Hold what a search found.

    Args:
        met: Whether the question was met.
        folder: Where the files are.
        found: The summary.
        model: The chosen network, with its codes, or None where nothing meets the question.

    Example:
        >>> import lilliput
        >>> result = lilliput.shrink(model, task, floor="1%", budget="5m")  # doctest: +SKIP
        >>> result.met, result.chosen["packed_bytes"]  # doctest: +SKIP
        (True, 9120)
    """

    met: bool
    folder: Path
    found: Summary
    model: nn.Module | None

    @property
    def summary(self) -> dict[str, Any]:
        """Return what summary.json holds."""
        return self.found.data()

    @property
    def front(self) -> list[dict[str, Any]]:
        """Return the Pareto front of (validation score, bytes, latency)."""
        return self.found.front

    @property
    def chosen(self) -> dict[str, Any] | None:
        """Return the chosen point, or None where nothing meets the question."""
        return self.found.chosen


def conclude(job: Job) -> Result:
    """Measure, choose, read test, write the folder."""
    task, dense = job.task, job.dense
    job.show.phase("measuring the survivors side by side", 3)
    load_before = machine()["load"]
    best = _front(job)
    compiled = _measure(job, best)
    job.show.advance()
    # Under a floor the dense network is a rival too: it loses nothing, whatever cannot be promised of the others, and
    # compiled it may be faster than it was.
    rivals = best if job.question.floor is not None or dense.engine is not None else best[1:] or best
    choice = _choose(job, rivals)
    winner = None if choice.winner is None else rivals[choice.winner]
    job.show.advance()
    with job.clock.on("measure"):
        tests = _test(job, winner) if winner is not None and task.has("test") else {}
    summary = summarize(job, best, rivals, choice, winner, tests, load_before)
    handed = best.index(winner or dense)
    if handed in compiled:
        kept = {"engine": engine.keep(job, best[handed], compiled[handed], job.folder / "engine")}
        first, chosen = summary.dense, summary.chosen
        summary = replace(summary, dense=first | kept) if chosen is None else replace(summary, chosen=chosen | kept)
    summary = write_folder(job, winner, summary)
    job.show.advance()
    return Result(winner is not None, job.folder, summary, None if winner is None else winner.model)


def _front(job: Job) -> list[Point]:
    """The dense point, then at most MEASURED others: fronts of the loss and what may be asked, peeled in turn."""
    unique: dict[tuple[int, int, float], Point] = {}
    for point in job.points[1:]:
        unique.setdefault((point.packed_bytes, point.onnx_bytes, point.divergence), point)
    rest, chosen = list(unique.values()), list[Point]()
    while rest and len(chosen) < MEASURED:
        layer = [rest[i] for i in front([_axes(job, p) for p in rest])]
        chosen += sorted(layer, key=job.lost)
        rest = [point for point in rest if point not in layer]
    return [job.dense, *chosen[:MEASURED]]


def _axes(job: Job, point: Point) -> tuple[float, ...]:
    """What a point must be beaten on: its loss, the asked file, and what a run costs where a run is asked for."""
    run = job.question.priced_by_runtime
    return (job.lost(point), float(point.costs[job.question.file_key]), *((engine.work(point),) if run else ()))


def _measure(job: Job, best: list[Point]) -> dict[int, Any]:
    """Time the points in one interleaved run; returns the compiled ones, by place, where the engine has a say."""
    with job.clock.on("measure"):
        sessions: dict[str, Any] = {str(i): Session(point.proto) for i, point in enumerate(best)}
        job.clock.reserved_s = 0.0
        asked = job.question.for_latency and job.question.runtime != "ort"
        compiled = engine.sessions(job, best, job.clock.remaining(0.9)) if asked else {}
        sessions |= {f"engine {i}": session for i, session in compiled.items()}
        seconds = max(2 * SECONDS_EACH, min(12.0, SECONDS_EACH * len(sessions), job.clock.remaining(0.97)))
        times = latency(sessions, job.task.example, seconds=seconds, clock=time.thread_time, settled=SETTLED)
        if job.question.for_memory:
            engine.weigh(job, best, compiled)
    for i, point in enumerate(best):
        point.latency, point.engine = times[str(i)], times.get(f"engine {i}")
        point.flags += flags(point.proto, job.dense.proto, point.latency, job.dense.latency or times["0"])
    return compiled


def _choose(job: Job, rivals: list[Point]) -> Choice:
    question, dense = job.question, job.dense
    others = [point for point in job.points if not any(point is rival for rival in [dense, *rivals])]
    compared = [*rivals, *others]  # what was not measured cannot win, but it was compared on the same examples
    return choose(
        job.task,
        dense.score,
        [point.score for point in compared],
        [point.price(question) for point in compared],
        floor=None if question.floor is None else question.floor.points(dense.score.value),
        sure=question.sure,
        fits=[question.fits(point.costs) for point in rivals] + [False] * len(others),
        divergence=[point.divergence for point in compared],
        seed=job.seed,
    )


def _test(job: Job, winner: Point) -> dict[str, Any]:
    """The test split, read once, after the choice: both scores, and the interval of the drop where one is known."""
    task = job.task
    dense = task.score(Session(job.dense.proto), "test")
    chosen = dense if winner is job.dense else task.score(Session(winner.proto), "test")
    between = interval(task, dense, chosen, job.seed)
    scores: dict[str, Any] = {"dense": dense.value, "chosen": chosen.value}
    return scores if between is None else scores | {"interval": [rounded(x) for x in between]}
