"""shrink: a network and a floor in, the smallest or fastest network that meets it out, with the proof.

The search proposes structures (what every registered method offers), trains them against the dense network's outputs
for short, lets the promising ones train on, stores the best in fewer bits with training through the rounding, scores
every artifact in the runtime it is for, and chooses with the optimism of having chosen taken off.
"""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from lilliput.code.base import copy_model
from lilliput.errors import ExportError, NotSupported, near
from lilliput.proposal import Known
from lilliput.search import ask
from lilliput.search.check import check, place
from lilliput.search.finish import Result, conclude
from lilliput.search.job import Job, Question, Target
from lilliput.search.network import Network
from lilliput.search.onnx_file import OnnxFile
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.pace import is_stochastic
from lilliput.search.points import Clock, Press
from lilliput.search.progress import Silent
from lilliput.store import Store
from lilliput.task import Task, length, predict, take
from lilliput.workshop import Workshop

OBJECTIVES = ("size", "latency", "macs")


def shrink(
    model: nn.Module,
    task: Task,
    floor: float | str = "1%",
    objective: str = "size",
    budget: float | str | None = "5m",
    *,
    trials: int | None = None,
    max_bytes: int | str | None = None,
    max_latency_ms: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    show: Silent | None = None,
    command: str | None = None,
    device: str = "cpu",
) -> Result:
    """Make a network as small, or as fast, as a floor on its quality on data that it was not tuned on allows.

    Args:
        model: a trained network; it is not changed.
        task: what must be preserved.
        floor: what may be lost: points of the metric ("1%" or 0.01), or a fraction of the dense score ("0.5r").
        objective: "size" (bytes of model.lil), "latency" (one thread, batch 1) or "macs".
        budget: wall time of the whole search in seconds, or such as "90s" or "5m".
        trials: try that many structures instead; the result then depends on nothing but the seed.
        max_bytes: the best score whose model.onnx has at most as many bytes, instead of a floor.
        max_latency_ms: the best score that takes at most as many milliseconds, instead of a floor.
        seed: of the search and of every training.
        out: the folder for model.onnx, model.lil, model.safetensors, recipe.toml, report.html, summary.json, records/.
        resume: continue the search in `out`.
        workers: how many trainings run side by side.
        show: what a person sees of the search (lilliput.search.progress).
        command: the call that the summary names.
        device: where to train, such as "cuda"; artifacts are scored and measured on the processor.

    Returns:
        The result; `result.met` says whether the floor was met (the nearest points are in `result.front`).

    Raises:
        ValueError: for settings out of range, before anything is written.

    Example:
        >>> import lilliput
        >>> from lilliput.data import digits
        >>> found = lilliput.shrink(*digits.load(), floor="1%", budget="2m")  # doctest: +SKIP
        >>> found.chosen["packed_bytes"]  # doctest: +SKIP
        9120
    """
    question = _question(objective, floor, max_bytes, max_latency_ms)
    if trials is not None and trials < 1:
        raise ValueError(f"shrink: trials must be at least 1, got {trials}.")
    budget_s = None if trials is not None or budget is None else ask.seconds(budget)
    if budget_s is None and trials is None:
        raise ValueError("shrink: a budget or a number of trials must be given, got neither. Write budget='5m'.")
    where = place(device)
    try:
        model = copy_model(model).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"shrink: the model must be one that copy.deepcopy copies, but that raised {error}. Build it "
            "anew instead of taking it from a graph with gradients."
        ) from error
    check(model, task)
    folder = Path(out) if out is not None else Path(f"lilliput-{task.name}")
    if (folder / "records").exists() and any((folder / "records").iterdir()) and not resume:
        raise ValueError(
            f"shrink: {folder} must be empty or new, but holds an earlier search. Continue it with "
            "--resume, or choose another --out."
        )
    count = workers or (1 if is_stochastic(model) else max(1, min(4, os.cpu_count() or 1)))
    threads, random, fresh = torch.get_num_threads(), torch.get_rng_state(), not folder.exists()
    torch.set_num_threads(1)
    try:
        clock, store = Clock(budget_s), Store(folder / "records")
        task = cheaper(task, model, clock, store, count)
        runner = Workshop(model, task, store, seed, device=where)
        known = Known(objective, budget_s)
        job = Job(
            target=target(model),
            model=model,
            task=task,
            question=question,
            clock=clock,
            trials=trials,
            seed=seed,
            folder=folder,
            store=store,
            runner=runner,
            press=Press(task, clock),
            workers=count,
            show=show or Silent(),
            command=command or "",
            known=known,
        )
        return search(job, fresh)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def target(model: nn.Module) -> Target:
    """What kind of network a search is given."""
    return OnnxFile(model) if isinstance(model, OnnxModel) else Network()


def search(job: Job, fresh: bool) -> Result:
    """Measure the dense network, look, make points without and with training, conclude.

    fresh: the folder did not exist before, so that it goes where nothing can be made of the model.
    """
    with job.show, ThreadPoolExecutor(job.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            job.show.phase("measuring the dense network", 1)
            _say_what_is_old(job)
            try:
                dense = job.target.dense(job)
            except (ExportError, NotSupported):
                if fresh:
                    shutil.rmtree(job.folder, ignore_errors=True)
                raise
            dense.distance = 0.0
            job.press.dense = dense
            job.points.append(dense)
            job.show.advance(f"{job.task.metric_name} {dense.score.value:.4f}, {ask.shown(dense.onnx_bytes)}")
            job.target.look(job)
            for point in job.target.untrained(job):
                job.add(point)
            job.target.trained(job, pool)
            result = conclude(job)
        except BaseException:
            job.stopped = True  # the other trainings end at their next step, their last checkpoints kept
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    from lilliput.report.page import write as write_page

    write_page(job.folder)
    return result


def _question(
    objective: str, floor: float | str, max_bytes: int | str | None, max_latency_ms: float | None
) -> Question:
    if objective not in OBJECTIVES:
        raise ValueError(
            f"shrink: objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}. "
            f"{near(objective, OBJECTIVES)}"
        )
    if max_latency_ms is not None and not max_latency_ms > 0:
        raise ValueError(f"shrink: max-latency-ms must be above 0, got {max_latency_ms}.")
    turned = max_bytes is not None or max_latency_ms is not None
    most = None if max_bytes is None else ask.size_bytes(max_bytes)
    return Question(objective, None if turned else ask.floor(floor), most, max_latency_ms)


def cheaper(task: Task, model: nn.Module, clock: Clock, store: Store, workers: int) -> Task:
    """The task with as many augmentations as the dense network can be run on within a tenth of the budget."""
    if task.augment is None:
        return task
    if clock.budget_s is None:
        return task.with_draws(min(task.draws, 4))
    kept = store.record("draws")
    if not kept:
        inputs, _ = task.split("train")
        few = take(inputs, slice(0, 64))
        predict(model, few)
        first = clock.now
        predict(model, few)
        each = (clock.now - first) / min(64, length(inputs))
        within = int(0.1 * clock.budget_s * workers / (each * task.examples + 1e-9))
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
