"""shrink: search for the smallest or fastest network that loses no more than a floor allows.

The search proposes structures (what every registered method offers), trains them against the dense network's outputs
for short, lets the promising ones train on, stores the best in fewer bits with training through the rounding, scores
every artifact in the runtime it is for, and chooses the smallest that can be promised to keep the floor.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput.code.adopt import adopted
from lilliput.errors import ExportError, NotSupported
from lilliput.onnx import exporter
from lilliput.proposal import Known
from lilliput.runner import Runner
from lilliput.search import ask
from lilliput.search.check import check, place
from lilliput.search.ending import Ending, Stopped
from lilliput.search.finish import Result
from lilliput.search.job import Job
from lilliput.search.lock import held
from lilliput.search.phases import augmentations, search, target
from lilliput.search.points import Clock, Press
from lilliput.search.progress import Silent, quiet_or_lines
from lilliput.search.question import Question, question
from lilliput.store import Store
from lilliput.targets import found_again
from lilliput.task import Task

COMPARED = 256
"""Examples on which an artifact is compared with the model that it came from; it is scored on all of val."""
ORIGIN = "origin"
"""The record that says what was asked of what, for `finish`."""


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
    max_peak: int | str | None = None,
    file: str = "lil",
    runtime: str | None = None,
    sure: float | str = 0.9,
    train: bool = True,
    worst_class: float | str | None = None,
    strip: bool | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int | str | None = None,
    show: Silent | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    command: str | None = None,
    device: str = "cpu",
    began: float | None = None,
    origin: dict[str, Any] | None = None,
) -> Result:
    """Make a network as small, or as fast, as a floor on its quality on data that it was not tuned on allows.

    Args:
        model: a trained network; it is not changed.
        task: what must be preserved.
        floor: what may be lost: points of the metric ("1%" or 0.01), or a fraction of the dense score ("0.5r").
        objective: "size" (bytes of the file), "latency" (one thread, batch 1), "macs" or "memory" (peak of one run).
        budget: wall time of the whole search in seconds, or such as "90s" or "5m". Ctrl-C and SIGTERM end it early:
            then too what was found is chosen from, tested and written (a second Ctrl-C ends at once).
        trials: try that many structures instead; the result then depends on nothing but the seed.
        max_bytes: the best score whose file has at most as many bytes, instead of a floor.
        max_latency_ms: the best score that takes at most as many milliseconds, instead of a floor.
        max_peak: the best score that needs at most as many bytes of memory, instead of a floor.
        file: what is deployed: "lil" (model.lil) or "onnx" (model.onnx). Sizes are this file's.
        runtime: where it runs: "ort" (ONNX Runtime) or "engine"; the better of both without one.
        sure: how probable it must be that the floor is kept on new data: 0.9 or "90%", from 50% to 99%.
        train: whether networks may be trained; without it tensors are stored by rate and distortion alone.
        worst_class: what each class, and each of the task's groups, may lose, such as "3%"; only the average counts
            without it.
        strip: whether model.onnx has no names but those of inputs and outputs, which saves bytes; as `file` asks for
            a small model.onnx without one.
        seed: of the search and of every training.
        out: the folder for model.onnx, model.lil, model.safetensors, recipe.toml, report.html, summary.json, records/.
        resume: continue the search in `out`.
        workers: how many processes train, or "ray://HOST" for a Ray cluster; as many as cores and memory allow.
        show: what a person sees of the search (lilliput.search.progress); without one a program sees nothing, and what
            would be shown is logged to `logging.getLogger("lilliput")`.
        callback: a function that is called with a dictionary whenever something happens: `event` is "tried" (a
            training, a point or a failure, as in summary.json's `points`), "best" (a better point was written to `out`)
            or "end" (the summary). See lilliput.track for TensorBoard, MLflow and Weights & Biases.
        command: the call that the summary names.
        device: where to train, such as "cuda"; artifacts are scored and measured on the processor.
        began: when the budget began, by time.monotonic(); now without one.
        origin: how `finish` finds model and task again: what `lilliput.targets.Given.plain` says, and `cwd`.

    Returns:
        The result; `result.met` says whether the floor was met (the nearest points are in `result.front`).

    Raises:
        ValueError: for settings out of range, before anything is written.
        StoreError: where another search works in the folder, or it cannot be written; what was there is still whole.

    Example:
        >>> import lilliput
        >>> from lilliput.data.digits import digits
        >>> result = lilliput.shrink(*digits(), floor="1%", budget="2m")  # doctest: +SKIP
        >>> result.chosen["packed_bytes"]  # doctest: +SKIP
        9120
    """
    asked = question(
        objective, floor, max_bytes, max_latency_ms, max_peak, file, runtime, sure, train, worst_class, strip
    )
    if trials is not None and trials < 1:
        raise ValueError(f"shrink: trials must be at least 1, got {trials}.")
    budget_s = None if trials is not None or budget is None else ask.seconds(budget)
    if budget_s is None and trials is None:
        raise ValueError("shrink: a budget or a number of trials must be given, got neither. Write budget='5m'.")
    clock, where = Clock(budget_s, began), place(device)
    exporter.begin()
    model = adopted(model)
    task = task.against(model)
    outputs = check(model, task, COMPARED)
    folder = Path(out) if out is not None else Path(f"lilliput-{task.name}")
    if (folder / "records").exists() and any((folder / "records").iterdir()) and not resume:
        raise ValueError(
            f"shrink: {folder} must be empty or new, but holds an earlier search. Continue it with "
            "--resume, or choose another --out."
        )
    fresh = not folder.exists()
    with held(folder), _alone():
        store = Store(folder / "records")
        given = {"trials": trials, "seed": seed, "workers": workers, "device": device, "budget_s": budget_s}
        store.put(ORIGIN, {"kind": "origin", "question": asked.data(), **given, "command": command, **(origin or {})})
        job = _job(model, task, asked, clock, store, folder, trials, seed, workers, where, show, command)
        job.press.expected, job.callback = outputs, callback
        return _run(job, fresh)


def finish(
    folder: str | Path, model: nn.Module | None = None, task: Task | None = None, show: Silent | None = None
) -> Result:
    """Choose among the points that a search has left in a folder, read test once, and write files and report.

    Nothing is trained or exported: it takes the seconds that scoring two files on the test split takes. It is for
    searches that were killed, and does what the end of the budget does.

    Args:
        folder: what `shrink` was given as `out`.
        model: the network that was shrunk; without it and the task they are made again as the command line made them.
        task: its task.
        show: what a person sees (lilliput.search.progress).

    Returns:
        The result. Its `model` is None: the network is in the files.

    Raises:
        ValueError: where the folder holds no search, or network and task cannot be found again.
        StoreError: where another process works in the folder, or it cannot be written.

    Example:
        >>> import lilliput
        >>> result = lilliput.finish("lilliput-digits")  # doctest: +SKIP
        >>> result.chosen["packed_bytes"]  # doctest: +SKIP
        9120
    """
    folder = Path(folder)
    if not (folder / "records").is_dir():
        raise ValueError(f"finish: {folder} must be a folder that `lilliput shrink` wrote, got none. Check its name.")
    with held(folder), _alone():
        store = Store(folder / "records")
        given = store.record(ORIGIN)
        if given is None:
            raise ValueError(f"finish: {folder} must say what was asked, and does not. Continue it with --resume.")
        if model is None or task is None:
            model, task = found_again(given)
        model = adopted(model)
        task = task.against(model)
        asked, clock = Question.read(given["question"]), Clock(given["budget_s"])
        settings = (given["trials"], int(given["seed"]), given["workers"], place(given["device"]))
        job = _job(model, task, asked, clock, store, folder, *settings, show, given["command"])
        clock.budget_s = None  # it takes what it takes
        return _run(job, fresh=False, finish_only=True)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One thread for torch inside, and the caller's random state back at the end."""
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def _job(
    model: nn.Module,
    task: Task,
    asked: Question,
    clock: Clock,
    store: Store,
    folder: Path,
    trials: int | None,
    seed: int,
    workers: int | str | None,
    device: torch.device,
    show: Silent | None,
    command: str | None,
) -> Job:
    hands = ask.workers(workers)
    taught = augmentations(task, model, clock, store, hands)
    return Job(
        target=target(model),
        model=model,
        task=task,
        question=asked,
        clock=clock,
        trials=trials,
        seed=seed,
        folder=folder,
        store=store,
        runner=Runner(model, task, store, seed, device=device),
        press=Press(task, clock, compared=COMPARED, strip=asked.nameless),
        workers=hands,
        show=show or quiet_or_lines(),
        command=command or "",
        known=Known(asked.objective, clock.budget_s),
        taught=taught,
        report=lambda: _report(folder),
    )


def _run(job: Job, fresh: bool, finish_only: bool = False) -> Result:
    """Run a search to its end; a new folder that came to nothing is removed."""
    with Ending() as ending:
        try:
            result = search(job, ending, finish_only)
        except (ExportError, ImportError, NotSupported, Stopped, ValueError) as error:
            if fresh and not job.points:
                shutil.rmtree(job.folder, ignore_errors=True)
            if isinstance(error, Stopped):
                raise KeyboardInterrupt(error.reason) from error
            raise
        job.report()
    job.tell("end", {**result.summary, "folder": str(job.folder)})
    return result


def _report(folder: Path) -> None:
    from lilliput.report.page import write  # its plots cost half a second to import

    write(folder)
