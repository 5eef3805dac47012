"""The phases of a search, each a function of the job: look, make points without and with training, conclude."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from torch import nn

from lilliput.search import arithmetic, ask
from lilliput.search.check import parted
from lilliput.search.cores import count_workers
from lilliput.search.deliver import arrived
from lilliput.search.ending import Ending, Stopped
from lilliput.search.finish import Result, conclude, reserve
from lilliput.search.forge import forging
from lilliput.search.hire import hire
from lilliput.search.job import Job, Target
from lilliput.search.network import Network
from lilliput.search.onnx_file import OnnxFile
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.points import Clock, Point
from lilliput.search.pool import Pool
from lilliput.search.shelf import restore
from lilliput.store import Store
from lilliput.task import Task, length, predict, take

TAUGHT = 0.1  # of the budget, for the dense network's outputs
MOST = 2  # augmentations for which it is asked: more have not made students better
SHORT = 1.5  # times what the search has taken until here
LEAST_S = 0.5
"""Seconds that a search has for points beyond the first, however small its budget is."""


def target(model: nn.Module) -> Target:
    """What kind of network a search is given."""
    return OnnxFile(model) if isinstance(model, OnnxModel) else Network()


def search(job: Job, ending: Ending, finish_only: bool = False) -> Result:
    """Measure the dense network, make points without and with training, and conclude, whatever ends the search.

    Args:
        job: The search as data.
        ending: What may end it early: a signal, or the time that the end of the search needs.
        finish_only: Choose among the points of an earlier run, and make no others.

    Returns:
        The result.

    Raises:
        ValueError: Where an earlier run is to be finished and has left nothing.
        Stopped: Where a signal came before there was anything to hand over.
    """
    job.arrived = arrived
    with (
        job.show,
        forging(job.question.for_latency and job.question.runtime != "ort", job.clock.budget_s) as job.forge,
        contextlib.nullcontext()
        if finish_only
        else hire(job.model, job.workers, job.runner.reference.device.type) as pool,
    ):
        if job.clock.budget_s is not None:
            job.show.ends(job.clock.remaining())
        try:
            with ending.search(float("inf")):
                if pool is not None:
                    job.target.begin(job, pool)
                _begin(job, finish_only)
                if pool is not None:
                    pool.complete()
            if pool is not None:
                with ending.search(max(LEAST_S, job.clock.remaining())):
                    _go_on(job, pool)
        except Stopped as stopped:
            _stop(job, pool, stopped.reason)
            if not job.points:
                raise
        except BaseException:
            _stop(job, pool, "an error")
            raise
        # What still trains would disturb what is measured.
        with contextlib.nullcontext() if pool is None or job.stopped else pool.paused():
            return conclude(job)


def _begin(job: Job, finish_only: bool) -> None:
    """The points of an earlier run, else the dense network and the same in 8 bits; both are handed over at once."""
    job.show.phase("measuring the dense network", 1)
    _say_what_is_old(job)
    made = None if finish_only else job.target.dense(job)
    if made is not None:
        if job.question.worst is not None:
            parted(job.task, made.score)
        made.divergence, job.press.dense = 0.0, made
    if not restore(job, made) and made is None:
        raise ValueError(
            f"finish: {job.folder} must hold points of this network and task, got none. Continue the search with "
            "--resume."
        )
    if not job.points and made is not None:
        job.add(made, kind="dense", score_s=round(job.press.scored_s, 4))
    dense = job.dense
    job.took["score"] = float(dense.about["score_s"])
    job.show.advance(f"{job.task.metric_name} {dense.score.value:.4f}, {ask.shown(dense.onnx_bytes)}")
    if job.question.floor is not None and not job.task.higher_is_better:
        job.show.say(job.question.floor.explained(job.task.metric_name, dense.score.value))
    if finish_only:
        return
    deque(_added(job, job.target.first), maxlen=0)
    began = job.clock.now
    job.report()
    job.took["report"] = job.clock.now - began
    job.clock.reserved_s = reserve(job)


def _go_on(job: Job, pool: Pool) -> None:
    job.target.look(job)
    # Where little is left, no training ends in time, and what needs none gets the machine.
    short = job.clock.remaining() < SHORT * job.clock.now
    untrained = _added(job, partial(job.target.untrained, alone=short or not job.question.train))
    if short:
        with pool.paused():
            deque(untrained, maxlen=0)
    elif job.clock.budget_s is None:  # no clock has a say in the order
        deque(untrained, maxlen=0)
    job.clock.reserved_s = reserve(job)
    job.target.trained(job, pool, untrained)
    deque(untrained, maxlen=0)
    job.clock.reserved_s = reserve(job)
    if job.question.for_latency:
        deque(_added(job, arithmetic.trained), maxlen=0)


def _added(job: Job, make: Callable[[Job], Iterable[Point | float]]) -> Iterator[float]:
    """Add points that need no training as they come, each with the time that it took.

    Pauses after each piece, with the seconds that the next may take: as long as that one, where nobody says.
    """
    began, spent = job.clock.now, 0.0
    for piece in make(job):
        took = job.clock.now - began
        spent += took
        if isinstance(piece, Point):
            job.add(piece, kind="untrained", seconds=round(spent, 2))
            spent = 0.0
        yield took if isinstance(piece, Point) else piece or took
        began = job.clock.now


def _stop(job: Job, pool: Pool | None, reason: str) -> None:
    """End the trainings, so that the end of the search has the machine to itself."""
    job.ended, job.stopped = reason, True
    if pool is not None:
        pool.close()
    job.show.say(f"ended by {reason}: choosing among {max(0, len(job.points) - 1)} points")


def augmentations(task: Task, model: nn.Module, clock: Clock, store: Store, workers: int | str | None) -> int:
    """Under how many augmentations the dense network can be run on every example within a part of the budget."""
    if task.draws < 2:
        return task.draws
    if clock.budget_s is None:
        return min(task.draws, MOST)
    workers = workers if isinstance(workers, int) else count_workers(model)
    kept = store.record("draws")
    if not kept:
        inputs = task.probe("train").inputs
        few = take(inputs, slice(0, 64))
        predict(model, few)
        first = clock.now
        predict(model, few)
        each = (clock.now - first) / min(64, length(inputs))
        within = int(TAUGHT * clock.budget_s * workers / (each * task.examples + 1e-9))
        kept = {"kind": "draws", "draws": max(1, min(task.draws, MOST, within))}
        store.put("draws", kept)
    return int(kept["draws"])


def _say_what_is_old(job: Job) -> None:
    """Say in one line that the store's earlier results are not used: another version, model, task or seed made them."""
    key = f"job-{job.runner.start}"
    if not job.store.record(key):
        old = sum(record.get("kind") in ("train", "rung", "point") for _, record in job.store.records())
        if old:
            reason = f"{old} results belong to another model, task, seed or version of lilliput: they are not used"
            job.known.skip("the records of an earlier search", reason)
            job.show.say(f"{job.folder / 'records'}: {reason}")
        job.store.put(key, {"kind": "job", "format": 2})
