"""shrink: search for the smallest or fastest network that loses no more than a floor allows.

The search proposes structures (what every registered method offers), trains them against the dense network's outputs
for short, lets the promising ones train on, stores the best in fewer bits with training through the rounding, scores
every artifact in the runtime it is for, and chooses the smallest that can be promised to keep the floor.
"""

from pathlib import Path

import torch
from torch import nn

from lilliput.code.base import copy_model
from lilliput.proposal import Known
from lilliput.runner import Runner
from lilliput.search import ask
from lilliput.search.check import check, place
from lilliput.search.finish import Result
from lilliput.search.job import Job
from lilliput.search.phases import cheaper, search, target
from lilliput.search.points import Clock, Press
from lilliput.search.progress import Silent
from lilliput.search.question import question
from lilliput.store import Store
from lilliput.task import Task

COMPARED = 256
"""Examples on which an artifact is compared with the model that it came from; it is scored on all of val."""


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
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int | str | None = None,
    show: Silent | None = None,
    command: str | None = None,
    device: str = "cpu",
) -> Result:
    """Make a network as small, or as fast, as a floor on its quality on data that it was not tuned on allows.

    Args:
        model: a trained network; it is not changed.
        task: what must be preserved.
        floor: what may be lost: points of the metric ("1%" or 0.01), or a fraction of the dense score ("0.5r").
        objective: "size" (bytes of the file), "latency" (one thread, batch 1), "macs" or "memory" (peak of one run).
        budget: wall time of the whole search in seconds, or such as "90s" or "5m".
        trials: try that many structures instead; the result then depends on nothing but the seed.
        max_bytes: the best score whose file has at most as many bytes, instead of a floor.
        max_latency_ms: the best score that takes at most as many milliseconds, instead of a floor.
        max_peak: the best score that needs at most as many bytes of memory, instead of a floor.
        file: what is deployed: "lil" (model.lil) or "onnx" (model.onnx). Sizes are this file's.
        runtime: where it runs: "ort" (ONNX Runtime) or "engine"; the better of both without one.
        sure: how probable it must be that the floor is kept on new data: 0.9 or "90%", from 50% to 99%.
        seed: of the search and of every training.
        out: the folder for model.onnx, model.lil, model.safetensors, recipe.toml, report.html, summary.json, records/.
        resume: continue the search in `out`.
        workers: how many processes train, or "ray://HOST" for a Ray cluster; as many as cores and memory allow.
        show: what a person sees of the search (lilliput.search.progress).
        command: the call that the summary names.
        device: where to train, such as "cuda"; artifacts are scored and measured on the processor.

    Returns:
        The result; `result.met` says whether the floor was met (the nearest points are in `result.front`).

    Raises:
        ValueError: for settings out of range, before anything is written.

    Example:
        >>> import lilliput
        >>> from lilliput.data.digits import digits
        >>> result = lilliput.shrink(*digits(), floor="1%", budget="2m")  # doctest: +SKIP
        >>> result.chosen["packed_bytes"]  # doctest: +SKIP
        9120
    """
    asked = question(objective, floor, max_bytes, max_latency_ms, max_peak, file, runtime, sure)
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
    task = task.against(model)
    check(model, task)
    folder = Path(out) if out is not None else Path(f"lilliput-{task.name}")
    if (folder / "records").exists() and any((folder / "records").iterdir()) and not resume:
        raise ValueError(
            f"shrink: {folder} must be empty or new, but holds an earlier search. Continue it with "
            "--resume, or choose another --out."
        )
    hands = ask.workers(workers)
    threads, random, fresh = torch.get_num_threads(), torch.get_rng_state(), not folder.exists()
    torch.set_num_threads(1)
    try:
        clock, store = Clock(budget_s), Store(folder / "records")
        task = cheaper(task, model, clock, store, hands)
        runner = Runner(model, task, store, seed, device=where)
        known = Known(objective, budget_s)
        job = Job(
            target=target(model),
            model=model,
            task=task,
            question=asked,
            clock=clock,
            trials=trials,
            seed=seed,
            folder=folder,
            store=store,
            runner=runner,
            press=Press(task, clock, compared=COMPARED),
            workers=hands,
            show=show or Silent(),
            command=command or "",
            known=known,
        )
        result = search(job, fresh)
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)
    from lilliput.report.page import write as write_report  # its plots cost half a second to import

    write_report(folder)
    return result
