"""Track a search elsewhere: callbacks of `shrink` for TensorBoard, MLflow, and Weights & Biases.

Each makes a function for `shrink(..., callback=...)`. All of them keep what is tried (loss and price of each training
and point), each better point, and at the end what was chosen; none needs a network. A function of your own serves as
well: it is given a dictionary, whose `event` is "tried", "best" or "end".
"""

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lilliput.extras import extra

Callback = Callable[[dict[str, Any]], None]
SCORED = (
    "drop",
    "bound",
    "price",
    "packed_bytes",
    "onnx_bytes",
    "latency_ms",
    "engine_ms",
    "macs",
    "val",
    "test",
    "seconds",
    "steps",
)
"""What of an event is a number to be followed."""
ENDS = ("drop_corrected", "drop_bound", "drop_test", "wall_s")
FILES = ("model.onnx", "model.lil", "model.safetensors", "recipe.toml", "report.html", "summary.json")


def numbers(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an event, by names such as "best/price".

    Args:
        event: what `shrink` told.

    Example:
        >>> numbers({"event": "best", "name": "8 bits", "price": 9000.0, "drop": 0.001})
        {'best/drop': 0.001, 'best/price': 9000.0}
    """
    kind = str(event["event"])
    row = event if kind != "end" else {**(event.get("chosen") or {}), **{name: event.get(name) for name in ENDS}}
    names = SCORED if kind != "end" else (*SCORED, *ENDS)
    return {f"{kind}/{name}": float(row[name]) for name in names if isinstance(row.get(name), int | float)}


def tensorboard(folder: str | Path) -> Callback:
    """Write what happens as scalars of TensorBoard; a step is an event.

    Args:
        folder: where the event files go (`tensorboard --logdir FOLDER`).

    Raises:
        ModuleNotFoundError: unless tensorboard is installed.

    Example:
        >>> lilliput.shrink(model, task, callback=tensorboard("runs/mine"))  # doctest: +SKIP
    """
    with extra("tensorboard", "track"):
        from torch.utils.tensorboard import SummaryWriter
    writer, steps = SummaryWriter(str(folder)), itertools.count()

    def callback(event: dict[str, Any]) -> None:
        step = next(steps)
        for name, value in numbers(event).items():
            writer.add_scalar(name, value, step)
        if event["event"] != "tried":
            writer.add_text(f"{event['event']}/name", _name(event), step)
        if event["event"] == "end":
            writer.close()
        else:
            writer.flush()

    return callback


def mlflow(experiment: str | None = None, **settings: Any) -> Callback:
    """Log what happens to a run of MLflow: metrics, what was asked as parameters, the files as artifacts.

    Args:
        experiment: its name; the current one without it.
        settings: of `mlflow.start_run`; a run that is active already is used as it is.

    Raises:
        ModuleNotFoundError: unless mlflow is installed.

    Example:
        >>> lilliput.shrink(model, task, callback=mlflow("smaller"))  # doctest: +SKIP
    """
    with extra("mlflow", "track"):
        import mlflow as library
    steps = itertools.count()
    if experiment is not None:
        library.set_experiment(experiment)
    own = library.active_run() is None
    if own:
        library.start_run(**settings)

    def callback(event: dict[str, Any]) -> None:
        library.log_metrics({name.replace("/", "."): value for name, value in numbers(event).items()}, step=next(steps))
        if event["event"] == "end":
            library.log_params(_asked(event))
            for path in _files(event):
                library.log_artifact(str(path))
            if own:
                library.end_run()

    return callback


def wandb(**settings: Any) -> Callback:
    """Log what happens to a run of Weights & Biases: numbers, what was asked, and the result as an artifact.

    Args:
        settings: of `wandb.init`, such as `project="smaller"` or `mode="offline"`; a run that is active already is used
            as it is.

    Raises:
        ModuleNotFoundError: unless wandb is installed.

    Example:
        >>> lilliput.shrink(model, task, callback=wandb(project="smaller", mode="offline"))  # doctest: +SKIP
    """
    with extra("wandb", "track"):
        import wandb as library
    own = library.run is None
    run: Any = library.init(**settings) if own else library.run

    def callback(event: dict[str, Any]) -> None:
        run.log({**numbers(event), f"{event['event']}/name": _name(event)})
        if event["event"] == "end":
            run.config.update(_asked(event), allow_val_change=True)
            artifact = library.Artifact(str(event.get("task", "network")).replace("/", "-"), type="model")
            for path in _files(event):
                artifact.add_file(str(path))
            run.log_artifact(artifact)
            if own:
                run.finish()

    return callback


def _name(event: Mapping[str, Any]) -> str:
    return str((event.get("chosen") or event).get("name", "dense"))


def _asked(event: Mapping[str, Any]) -> dict[str, Any]:
    """What the summary says of the question."""
    names = ("task", "command", "objective", "floor", "sure", "budget_s", "seed", "met")
    return {name: event[name] for name in names if event.get(name) is not None}


def _files(event: Mapping[str, Any]) -> list[Path]:
    return [path for name in FILES if (path := Path(event["folder"], name)).exists()]
