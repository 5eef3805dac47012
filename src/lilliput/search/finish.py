"""Finish a search: measure the best points in one run, choose, read the test split once, write the files."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from lilliput.cost.measure import latency, machine
from lilliput.export.guard import flags
from lilliput.onnx.session import Session
from lilliput.search import deliver, engine, shelf
from lilliput.search.choose import Choice, interval
from lilliput.search.files import write_folder
from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.search.summary import Summary, rounded, summarize

MEASURED = 14
SECONDS_EACH = 0.5
SETTLED = 0.02  # the width of a ratio's interval, as a fraction of it, at which measuring ends
RUNS = 20  # of a network at least, in a measurement
SESSION_S = 0.1  # to open one


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
    """Measure, choose, read test, write the folder. It takes no longer than `reserve` says, whatever was found."""
    task, dense = job.task, job.dense
    shelf.recall(job)
    job.show.phase("measuring the best side by side", 3)
    load_before = machine()["load"]
    best = [dense, *shelf.contenders(job, MEASURED)]
    if not job.question.for_latency:  # nothing that is measured enters the choice
        winner, choice, rivals = _chosen(job, deliver.able(job))
        best = _affordable(job, best, winner)
    compiled = _measure(job, best)
    job.show.advance()
    if job.question.for_latency:
        # Compiled, the dense network may be faster than it was.
        able = job.question.floor is not None or dense.engine is not None
        winner, choice, rivals = _chosen(job, best if able else best[1:] or best)
    job.show.advance()
    with job.clock.on("measure"):
        tests = _test(job, winner) if winner is not None and task.has("test") else {}
    _say_what_was_taken_back(job, winner, choice, rivals)
    if winner is not None and winner is not dense and (job.handed is None or winner is not job.handed):
        deliver.note(job, winner)
    summary = summarize(job, best, rivals, choice, winner, tests, load_before)
    point, folder = winner or dense, None
    place = next(i for i, other in enumerate(best) if other is point)
    if place in compiled:
        kept = {"engine": engine.described(job, point, compiled[place])}
        first, chosen = summary.dense, summary.chosen
        summary = replace(summary, dense=first | kept) if chosen is None else replace(summary, chosen=chosen | kept)
        folder = Path(compiled[place].engine.folder)
    summary = write_folder(job, point, summary, folder)
    job.show.advance()
    return Result(winner is not None, job.folder, summary, None if winner is None else shelf.model_of(job, winner))


def reserve(job: Job) -> float:
    """Seconds that the end of a search takes, from what its parts took when they were last done.

    Test is scored twice, as val was once; the choice, the folder and the report are as before or a little larger; the
    measurement has a slot. A third is added, since the machine may get busier.
    """
    task, took = job.task, job.took
    tests = 2 * took.get("score", 0.0) * task.size("test") / max(1, task.size("val")) if task.has("test") else 0.0
    parts = tests + took.get("choose", 0.0) + 2 * took.get("write", 0.0) + took.get("report", 0.0) + _slot(job)
    if job.forge is not None:  # the compiled network is scored on val; perhaps one is compiled yet
        parts += took.get("score", 0.0) + job.forge.expected_s()
    return 4 / 3 * parts


def _slot(job: Job) -> float:
    """Seconds for the last measurement: 3% of the budget, from half a second to twelve."""
    budget = job.clock.budget_s
    return 12.0 if budget is None else max(0.5, min(12.0, 0.03 * budget))


def _chosen(job: Job, rivals: list[Point]) -> tuple[Point | None, Choice, list[Point]]:
    """The point to hand over, or None, with the choice that it comes from."""
    choice = deliver.decide(job, rivals)
    return None if choice.winner is None else rivals[choice.winner], choice, rivals


def _say_what_was_taken_back(job: Job, winner: Point | None, choice: Choice, rivals: list[Point]) -> None:
    """Say in one line that a better point was handed over on the way, and why it is not the one that was chosen.

    Each new point is more evidence of how much of the others' scores is luck: what could be promised among ten may not
    be among thirty.
    """
    handed = job.handed
    if handed is None or handed not in rivals or winner is None or winner is handed:
        return
    if job.question.floor is not None and deliver.better(job, handed, winner):
        unit, bound = job.task.metric_name, float(choice.bound[rivals.index(handed)])
        job.show.say(
            f"{handed.name} was handed over before, and is not chosen: beside all points it may lose {bound:.2g} of "
            f"{unit}, more than the floor"
        )


def _affordable(job: Job, best: list[Point], winner: Point | None) -> list[Point]:
    """The dense network, the winner, and as many others as the slot has time to run often enough."""
    others = [point for point in best[1:] if point is not winner and shelf.at_hand(point)]
    each = RUNS * job.took.get("score", 0.0) / max(1, job.task.size("val"))
    room = len(others) if job.clock.budget_s is None else int(_slot(job) / max(each + SESSION_S, 1e-6))
    first = [job.dense] if winner is None or winner is job.dense else [job.dense, winner]
    return first + others[: max(0, room - len(first))]


def _measure(job: Job, best: list[Point]) -> dict[int, Any]:
    """Time the points in one interleaved run; returns the compiled ones, by place, where the engine has a say."""
    with job.clock.on("measure"):
        sessions: dict[str, Any] = {str(i): Session(point.proto) for i, point in enumerate(best)}
        asked = job.question.for_latency and job.question.runtime != "ort"
        compiled = engine.sessions(job, best, job.clock.left() - reserve(job)) if asked else {}
        sessions |= {f"engine {i}": session for i, session in compiled.items()}
        seconds = min(_slot(job), max(2 * SECONDS_EACH, SECONDS_EACH * len(sessions)))
        times = latency(sessions, job.task.example, seconds=seconds, clock=time.thread_time, settled=SETTLED)
        if job.question.for_memory:
            engine.weigh(job, best, compiled)
    for i, point in enumerate(best):
        point.latency, point.engine = times[str(i)], times.get(f"engine {i}")
        point.flags += flags(point.proto, job.dense.proto, point.latency, job.dense.latency or times["0"])
    return compiled


def _test(job: Job, winner: Point) -> dict[str, Any]:
    """The test split, read once, after the choice: both scores, and the interval of the drop where one is known."""
    task = job.task
    dense = task.score(Session(job.dense.proto), "test")
    chosen = dense if winner is job.dense else task.score(Session(winner.proto), "test")
    between = interval(task, dense, chosen, job.seed)
    scores: dict[str, Any] = {"dense": dense.value, "chosen": chosen.value, "scores": (dense, chosen)}
    return scores if between is None else scores | {"interval": [rounded(x) for x in between]}
