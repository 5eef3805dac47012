"""The phases of a search, each a function of the job: look, make points without and with training, conclude."""

import shutil

from torch import nn

from lilliput.errors import ExportError, NotSupported
from lilliput.search import arithmetic, ask
from lilliput.search.cores import count_workers
from lilliput.search.finish import Result, conclude
from lilliput.search.forge import forging
from lilliput.search.hire import hire
from lilliput.search.job import Job, Target
from lilliput.search.network import Network
from lilliput.search.onnx_file import OnnxFile
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.points import Clock
from lilliput.store import Store
from lilliput.task import Task, length, predict, take

TAUGHT = 0.1  # of the budget, for the dense network's outputs


def target(model: nn.Module) -> Target:
    """What kind of network a search is given."""
    return OnnxFile(model) if isinstance(model, OnnxModel) else Network()


def search(job: Job, fresh: bool) -> Result:
    """Measure the dense network, look, make points without and with training, conclude.

    Args:
        job: The search as data.
        fresh: Whether the folder did not exist before; it is then removed where nothing can be made of the model.

    Returns:
        The result.
    """
    with (
        job.show,
        forging(job.question.for_latency and job.question.runtime != "ort", job.clock.budget_s) as job.forge,
        hire(job.model, job.workers, job.runner.reference.device.type) as pool,
    ):
        try:
            job.target.begin(job, pool)
            job.show.phase("measuring the dense network", 1)
            _say_what_is_old(job)
            try:
                dense = job.target.dense(job)
            except (ExportError, NotSupported):
                if fresh:
                    shutil.rmtree(job.folder, ignore_errors=True)
                raise
            dense.divergence = 0.0
            job.press.dense = dense
            job.points.append(dense)
            job.show.advance(f"{job.task.metric_name} {dense.score.value:.4f}, {ask.shown(dense.onnx_bytes)}")
            if job.question.floor is not None and not job.task.higher_is_better:
                job.show.say(job.question.floor.explained(job.task.metric_name, dense.score.value))
            job.target.look(job)
            for point in job.target.untrained(job):
                job.add(point)
            job.clock.reserved_s = arithmetic.reserved_s(job)
            job.target.trained(job, pool)
            job.clock.reserved_s = 0.0
            for point in arithmetic.trained(job) if job.question.for_latency else ():
                job.add(point)
            return conclude(job)
        except BaseException:
            job.stopped = True
            raise


def cheaper(task: Task, model: nn.Module, clock: Clock, store: Store, workers: int | str | None) -> Task:
    """The task with as many augmentations as the dense network can be run on within a part of the budget."""
    if task.draws < 2:
        return task
    if clock.budget_s is None:
        return task.with_draws(min(task.draws, 4))
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
        kept = {"kind": "draws", "draws": max(1, min(task.draws, within))}
        store.put("draws", kept)
    return task.with_draws(kept["draws"])


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
