"""Deliver: the folder holds the best point at any time. Each new point is kept, and handed over where it wins."""

import dataclasses
import time
from typing import Any

from lilliput.cost.measure import latency, machine
from lilliput.errors import told
from lilliput.onnx.session import Session
from lilliput.search import engine, shelf
from lilliput.search.choose import Choice, choose
from lilliput.search.files import write_folder
from lilliput.search.job import FAILURES, Job, finite_or_none
from lilliput.search.points import Point
from lilliput.search.summary import rounded, summarize

NEAR = 2.0
"""How far beyond a floor or limit, in parts of it, a point may be to be compared with."""
QUICK_S = 0.1
"""Seconds for which a new point is timed beside the dense network, where time is asked for."""


def arrived(job: Job, point: Point) -> None:
    """Weigh a new point by what is asked, keep it, and write the folder anew where it is the best that is promised.

    Args:
        job: the search; the point is its last.
        point: the new point.
    """
    with job.clock.on("measure"):
        weigh(job, point)
        shelf.put(job, point)
        if point is job.dense:
            hand_over(job, point, decide(job, [point]), [point])  # the first that there is
            return
        if job.lack(point) > 0 or (job.handed is not None and not better(job, point, job.handed)):
            return
        began = time.monotonic()
        rivals = able(job)
        choice = decide(job, rivals)
        job.took["choose"] = time.monotonic() - began
        winner = None if choice.winner is None else rivals[choice.winner]
        if winner is not None and winner is not job.handed and (job.handed is None or better(job, winner, job.handed)):
            hand_over(job, winner, choice, rivals)


def better(job: Job, point: Point, other: Point) -> bool:
    """Whether a point answers the question better than another that answers it too."""
    if other is job.dense:
        return True
    if job.question.floor is None:
        return (point.divergence, point.price(job.question)) < (other.divergence, other.price(job.question))
    return point.price(job.question) < other.price(job.question)


def able(job: Job) -> list[Point]:
    """The points that may be handed over: those near what is asked, else the best of the others.

    Under a floor the dense network is one of them: it loses nothing, whatever cannot be promised of the others.
    """
    near = [point for point in job.points[1:] if job.lack(point) < NEAR and shelf.at_hand(point)]
    points = near or shelf.contenders(job, shelf.HELD)
    return [job.dense, *points] if job.question.floor is not None or not points else points


def decide(job: Job, rivals: list[Point]) -> Choice:
    """Choose among points that can be handed over.

    Args:
        job: gives the question and the dense network.
        rivals: the points, which come first in the choice. What else was made cannot win, but it was compared on the
            same examples.
    """
    question, dense = job.question, job.dense
    others = [point for point in job.points if not any(point is rival for rival in (dense, *rivals))]
    compared, worst = [*rivals, *others], job.worst([point.score for point in rivals])
    kept = worst <= question.points(dense.score.value) + 1e-12
    return choose(
        job.task,
        dense.score,
        [point.score for point in compared],
        [point.price(question) for point in compared],
        floor=None if question.floor is None else question.floor.points(dense.score.value),
        sure=question.sure,
        fits=[question.fits(p.costs) and bool(ok) for p, ok in zip(rivals, kept, strict=True)] + [False] * len(others),
        divergence=[point.divergence for point in compared],
        seed=job.seed,
    )


def hand_over(job: Job, point: Point, choice: Choice, rivals: list[Point]) -> None:
    """Write a point's files to the folder, with a summary of the search so far, and note when that was."""
    dense, began = job.dense, time.monotonic()
    note(job, point)
    winner = None if choice.winner is None else point
    best = [dense] if point is dense else [dense, point]
    summary = summarize(job, best, rivals, choice, winner, {}, machine()["load"], finished=False)
    write_folder(job, point, summary)
    job.took["write"] = time.monotonic() - began
    job.show.best(said(job, point))


def note(job: Job, point: Point) -> None:
    """Note that a point is handed over, in the history that the summary shows and a resumed search continues."""
    row = {key: value for key, value in point.about.items() if key in ("kind", "axes")}
    row |= {"at_s": round(job.spent_s + job.clock.now, 2), "name": point.name, "key": point.key}
    row["val"] = rounded(point.score.value)
    price = point.price(job.question)
    row |= {"price": finite_or_none(price), "drop": rounded(job.lost(point))}
    job.history.append(row)
    job.tell("best", row)
    job.handed = point
    job.store.put("history", {"kind": "history", "start": job.runner.start, "rows": job.history})


def said(job: Job, point: Point) -> str:
    """A point in one line: its name, score and price, and how many times less that is than the dense network's."""
    question = job.question
    price, before = point.price(question), question.before(job.dense.costs)
    text = f"{question.measure} {question.written(price)}"
    if 0 < price < before and point is not job.dense:
        text += f", {before / price:.1f} times {'faster' if question.objective == 'latency' else 'less'}"
    return f"{text}; {job.task.metric_name} {point.score.value:.4f}: {point.name}"


def weigh(job: Job, point: Point) -> None:
    """Fill in the costs of a new point that only a run tells, where the question asks for them.

    Times are those of the dense network at its first measurement, divided by how many times faster the point is in a
    run in which both took turns: another load of the machine does not change them.
    """
    question = job.question
    try:
        if question.for_latency:
            made = job.forge.sessions(point.proto) if job.forge is not None else []
            sessions: dict[str, Any] = {"dense": Session(job.dense.proto), "it": Session(point.proto)}
            sessions |= {"engine": made[0]} if made else {}
            with job.quiet():
                times = latency(sessions, job.task.example, seconds=QUICK_S * len(sessions), clock=time.thread_time)
            if job.dense.latency is None:
                job.dense.latency = times["dense"]
            if point is not job.dense:
                point.latency = _beside(times["it"], job.dense.latency.median_ms)
            if made:
                point.engine = _beside(times["engine"], job.dense.latency.median_ms)
        if question.for_memory:
            engine.weigh(job, [point], {})
    except FAILURES as error:
        job.known.skip("measuring", f"{point.name}: {told(error)}")


def _beside(measured: Any, dense_ms: float) -> Any:
    scale = dense_ms / measured.ratio / measured.median_ms
    return dataclasses.replace(
        measured, median_ms=measured.median_ms * scale, q1_ms=measured.q1_ms * scale, q3_ms=measured.q3_ms * scale
    )
