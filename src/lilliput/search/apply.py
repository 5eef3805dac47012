"""lilliput run: apply one recipe, export, score and write its files."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import nn

from lilliput.code.adopt import adopted
from lilliput.code.state import describe
from lilliput.cost.measure import machine
from lilliput.errors import StoreError
from lilliput.export.guard import worst
from lilliput.export.save import write_bytes, write_files
from lilliput.export.state import state_bytes
from lilliput.onnx.compare import agreement
from lilliput.recipe import Recipe
from lilliput.record import commit, versions
from lilliput.runner import Runner
from lilliput.search.check import check, place
from lilliput.search.points import Clock, Press
from lilliput.store import Store
from lilliput.task import Task, leaves, length

COMPARED = 128
"""Examples on which the result is compared with the dense network and the artifact with the model it came from."""


def apply(
    model: nn.Module, task: Task, recipe: Recipe, folder: Path, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """The record of a recipe on a model; model.onnx, model.lil, model.safetensors and summary.json go to `folder`.

    Raises:
        ValueError: For a model or task that does not run, and whatever a stage raises; then nothing is written.
    """
    clock, where = Clock(None), place(device)
    model = adopted(model)
    task = task.against(model)
    dense = check(model, task, COMPARED)
    fresh = not folder.exists()
    try:
        runner = Runner(model, task, Store(folder / "records"), seed, device=where)
        made = runner.make(recipe)
        press = Press(task, clock, compared=COMPARED)
        point = press.point(made, "own", recipe.describe(), recipe.data(), runner.key(recipe))
    except (ValueError, TypeError, KeyError, ArithmeticError, RuntimeError) as error:
        if fresh and not isinstance(error, StoreError):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    filled, state = point.structure.fill(point.stored), state_bytes(made.state_dict(), made)
    write_files(folder, filled, point.stored, point.proto, state, recipe.toml())
    summary = {
        "format": 2,
        "task": task.name,
        "seed": seed,
        "recipe": recipe.data(),
        "codes": describe(made),
        **point.row(),
        "beside_dense": _beside(task, point.outputs, dense),
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "damaged": runner.store.damaged,
        "wall_s": round(clock.now, 3),
    }
    write_bytes(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _beside(task: Task, outputs: Any, dense: Any) -> dict[str, float]:
    """How far the outputs are from the dense network's, on the examples that those are known for."""
    rows = [
        agreement(a[: len(b)].numpy(), b.numpy(), task.class_axis(b))
        for a, b in zip(leaves(outputs), leaves(dense), strict=True)
    ]
    return worst(rows) | {"examples": length(dense)}
