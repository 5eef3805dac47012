"""Summary: what a search found, as the plain data of summary.json."""

import shlex
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lilliput.cost.measure import machine, profile
from lilliput.record import commit, versions
from lilliput.search import parts
from lilliput.search.account import by_axis, misses, unfinished
from lilliput.search.choose import Choice, examples_for, examples_to_promise, front
from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.task import Task

FORMAT = 2
Plain = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """What summary.json holds. Keys keep their meaning from one version to the next; `format` rises when one changes.

    Args:
        format: the version of these keys.
        floor: what may be lost, in points of the metric; None where a limit turned the question round.
        file: which file is deployed, "lil" or "onnx": `max_bytes`, the objective "size" and the front are about it (an
            older summary has no such key: its `max_bytes` were about model.onnx).
        runtime: what it runs in, "ort" or "engine"; None for the better of both.
        met: whether a point was found that meets the question.
        dense: the dense network, a row of numbers and its layers.
        chosen: the point that was handed over, likewise.
        front: what no other measured point beats on (score, bytes of the asked file, and what else is asked).
        nearest: the point that came nearest, where none was chosen.
        drop_val: what the chosen (or nearest) point loses on val, uncorrected.
        drop_corrected: the same without the luck of having been chosen: what is to be expected of it.
        drop_corrected_interval: the central 95% of `drop_corrected`.
        drop_bound: what it loses at most with the probability `sure`; the floor is checked on it.
        near: points that cannot be promised but are cheaper, each with the floor that it could be promised for
            (`drop_bound`) and how many validation examples might show that it keeps this one.
        drop_test: what it loses on test, which was read once, after the choice.
        drop_test_interval: the central 95% of `drop_test`.
        worst_class: what each class and group may lose, in points of the metric; None where only the average counts.
        parts: what each class and group loses, the one that loses most first (lilliput.search.parts).
        changed: the examples that get another answer than the dense network's; None where outputs are no classes.
        left_alone: name and reason of what no technique could change.
        points: everything that was tried.
        steps_per_s: optimizer steps a second of training.
        shares: the fraction of the wall time that went on training, calibration and measuring.
        history: what was handed over when: `at_s`, `name`, `val`, `price`, `drop`, and how it came about.
        axes: what each axis took and brought (lilliput.search.account).
        misses: the nearest cheaper points that may not be promised, with the floor that would allow each.
        unfinished: what ran out of time, with the budget that would do; None where nothing did.
        hashes: the SHA-256 of each file.
        finished: whether the search has ended, so that test was read.
        ended: why it ended early, such as "Ctrl-C"; empty where it did not.
    """

    task: str
    metric: str
    higher_is_better: bool
    seed: int
    floor: float | None
    objective: str
    max_bytes: int | None
    max_latency_ms: float | None
    max_peak_bytes: int | None
    file: str
    runtime: str | None
    budget_s: float | None
    trials: int | None
    met: bool
    machine: Plain
    versions: dict[str, str]
    commit: str | None
    command: str
    dense: Plain
    chosen: Plain | None
    front: list[Plain]
    nearest: Plain | None
    drop_val: float | None
    drop_corrected: float | None
    drop_corrected_interval: list[float] | None
    drop_bound: float | None
    sure: float
    near: list[Plain]
    optimism: float
    drop_test: float | None
    drop_test_interval: list[float] | None
    worst_class: float | None
    parts: list[Plain]
    changed: Plain | None
    examples: dict[str, int]
    draws: int
    augmentations: int
    examples_for_half_interval: int | None
    left_alone: list[dict[str, str]]
    sensitivity: dict[str, dict[str, float]]
    points: list[Plain]
    damaged: list[str]
    steps_per_s: float
    wall_s: float
    shares: dict[str, float]
    files: dict[str, int]
    history: list[Plain]
    axes: list[Plain]
    misses: list[Plain]
    unfinished: Plain | None
    hashes: dict[str, str]
    finished: bool
    ended: str
    format: int = FORMAT

    def data(self) -> Plain:
        """The summary as plain data, its format first."""
        return {"format": self.format, **asdict(self)}


def summarize(
    job: Job,
    best: list[Point],
    rivals: list[Point],
    choice: Choice,
    winner: Point | None,
    tests: Plain,
    load: Any,
    finished: bool = True,
) -> Summary:
    """Summarize a search before its files are written.

    Args:
        best: the measured points, the dense one first.
        rivals: those among which `choice` chose.
        winner: the chosen one, or None.
        tests: what the test split said: `dense`, `chosen`, `interval`.
        load: the machine's load before the measurement.
        finished: whether the search has ended; while it goes on, layers are not timed.
    """
    task, dense, clock, question = job.task, job.dense, job.clock, job.question
    floor = None if question.floor is None else question.floor.points(dense.score.value)

    def row(point: Point) -> Plain:
        fields = point.row()
        if point in rivals:
            i = rivals.index(point)
            fields |= {
                "drop_val": rounded(choice.drops[i]),
                "drop_corrected": rounded(choice.corrected[i]),
                "drop_corrected_interval": _bounds(choice, i),
                "drop_bound": _finite(choice.bound[i]),
                "eligible": bool(choice.eligible[i]),
            }
        return fields

    costs = [(job.lost(p), *question.asked(p.costs)) for p in best]
    nearest = winner or (dense if choice.safest is None else rivals[choice.safest])
    i = rivals.index(nearest) if nearest in rivals else None
    here = machine()
    chosen = None if winner is None else row(winner) | {"layers": layers(winner, task.example, finished)}
    first = row(dense) | {"layers": layers(dense, task.example, finished)}
    split = "test" if tests else "val"
    before, after = tests.get("scores") or (dense.score, (winner or dense).score)
    if tests and chosen is not None:
        first["test"], chosen["test"] = rounded(tests["dense"]), rounded(tests["chosen"])
    return Summary(
        task=task.name,
        metric=task.metric_name,
        higher_is_better=task.higher_is_better,
        seed=job.seed,
        floor=floor,
        objective=question.objective,
        max_bytes=question.max_bytes,
        max_latency_ms=question.max_latency_ms,
        max_peak_bytes=question.max_peak_bytes,
        file=question.file,
        runtime=question.runtime,
        budget_s=clock.budget_s,
        trials=job.trials,
        met=winner is not None,
        machine={**here, "load_before": load, "load_after": here["load"]},
        versions=versions(),
        commit=commit(),
        command=job.command or _command(),
        dense=first,
        chosen=chosen,
        front=[row(best[k]) for k in front(costs)],
        nearest=None if winner is not None else row(nearest),
        drop_val=None if i is None else rounded(choice.drops[i]),
        drop_corrected=None if i is None else rounded(choice.corrected[i]),
        drop_corrected_interval=None if i is None else _bounds(choice, i),
        drop_bound=None if i is None else _finite(choice.bound[i]),
        sure=choice.sure,
        near=[
            row(rivals[k]) | {"examples_to_promise": examples_to_promise(choice, k, floor or 0.0, dense.score.units)}
            for k in choice.near
        ],
        optimism=rounded(choice.optimism),
        drop_test=rounded(task.loss_of(tests["dense"], tests["chosen"])) if tests else None,
        drop_test_interval=tests.get("interval"),
        worst_class=None if question.worst is None else question.worst_points(dense.score.value),
        parts=parts.rows(task, split, before, after, question.sure) if winner is not None else [],
        changed=parts.changed(task, split, before, after) if winner is not None else None,
        examples=_examples(task),
        draws=choice.draws,
        augmentations=task.draws,
        examples_for_half_interval=None if i is None else examples_for(dense.score, choice.interval[i]),
        left_alone=[{"name": name, "reason": reason} for name, reason in job.known.skipped],
        sensitivity=job.known.harm,
        points=job.attempts,
        damaged=job.store.damaged,
        steps_per_s=round(job.steps_per_s, 2),
        wall_s=round(clock.now, 2),
        shares=clock.shares(),
        files={},
        history=job.history,
        axes=by_axis(job.attempts, job.history),
        misses=_misses(job, rivals, choice),
        unfinished=unfinished(job.attempts, clock.now, clock.budget_s),
        hashes={},
        finished=finished,
        ended=job.ended,
    )


def layers(point: Point, example: Any, timed: bool = True) -> list[Plain]:
    """What is known of each stored tensor of two and more dimensions, with its layer's share of the time."""
    if not timed:
        return point.layers
    proto = point.proto if point.structure is None else point.structure.fill(point.stored)
    shares = profile(proto, example)
    return [layer | {"share_of_time": shares.get(layer["name"])} for layer in point.layers]


def _misses(job: Job, rivals: list[Point], choice: Choice) -> list[Plain]:
    """The nearest points that may not be promised, with the keys of their files."""
    rows = misses(job.question, job.dense.costs, [p.costs for p in rivals], choice, job.dense.score.value)
    near = [rivals[row.pop("place")] for row in rows]
    return [{"name": point.name, "key": point.key, **row} for point, row in zip(near, rows, strict=True)]


def rounded(value: Any) -> float:
    """A number as a summary holds it."""
    return round(float(value), 6)


def _finite(value: Any) -> float | None:
    """A number as a summary holds it, None where nothing is known."""
    return rounded(value) if np.isfinite(value) else None


def _bounds(choice: Choice, point: int) -> list[float] | None:
    low, high = (_finite(edge) for edge in choice.interval[point])
    return None if low is None or high is None else [low, high]


def _examples(task: Task) -> dict[str, int]:
    """How many examples each split holds, and how many training ones calibrate."""
    counts = {split: task.size(split) for split in task.splits}
    return counts | {"calibration": min(256, counts["train"])}


def _command() -> str:
    """The call that repeats a search that was started from Python."""
    argv = [sys.argv[0].rpartition("/")[2], *sys.argv[1:]] if sys.argv and sys.argv[0] else ["python"]
    return shlex.join(argv)
