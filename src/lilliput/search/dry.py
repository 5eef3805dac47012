"""--dry-run: what a search would try, how long it takes, what is left alone and why."""

import time
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lilliput.code.base import copy_model
from lilliput.graph import blocks_left, groups, left, removable
from lilliput.graph.stride import earlier_stride
from lilliput.search import post_onnx, units
from lilliput.search.check import check, place
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.shrink import RUNGS, poolable
from lilliput.search.space import batch_size_for, count_values, tables, training
from lilliput.stage import Reference
from lilliput.task import Task
from lilliput.train import fit


def plan(model: nn.Module, task: Task, **settings: Any) -> dict[str, Any]:
    """The plan of a search as plain data; nothing is written, and nothing trained but a few steps to time them.

    Raises ValueError for what a search would refuse too.
    """
    device = place(settings["device"])
    check(copy_model(model).cpu().eval(), task)
    found = _file(model) if isinstance(model, OnnxModel) else _network(model, task)
    trials = settings["trials"]
    if trials is None:
        took = f"at most {units.seconds(settings['budget']):.0f} s in all"
    elif isinstance(model, OnnxModel):
        took = "some seconds: nothing is trained"
    else:
        steps = max(160, min(30 * max(1, task.examples // batch_size_for(task)), 4000))
        short = trials * RUNGS[0] + max(1, trials // 3) * (1 + 2 * 0.2)
        seconds = _step(model, task, device) * steps * short
        took = (
            f"about {seconds:.0f} s of training on one core, {trials} structures, at most {steps} steps each; "
            "exports and measurements come on top"
        )
    return {"task": repr(task), "time": took, **found}


def _file(model: OnnxModel) -> dict[str, Any]:
    weights = post_onnx.channels(model.structure.proto)
    return {
        "values": sum(array.size for array in model.structure.weights.values()),
        "tried": {
            "bits": f"8, then {', '.join(map(str, post_onnx.MEANS))} on average by sensitivity, for "
            f"{', '.join(weights) or 'no tensor'}",
            "8-bit arithmetic": "where the matrix products are large enough to gain from it",
        },
        "left_alone": [{"name": "training", "reason": "an ONNX file has no parameters to train"}],
    }


def _network(model: nn.Module, task: Task) -> dict[str, Any]:
    example, found = task.example, groups(model, task.example)
    strides = (*earlier_stride(model, example)[:1], *poolable(model, example))[:1]
    kept = [*left(found), *blocks_left(model, example)]
    return {
        "values": count_values(model),
        "tried": {
            "fewer blocks": ", ".join(removable(model, example)) or "none can go",
            "an earlier stride": ", ".join(strides) or "no layer takes one",
            "fewer channels": ", ".join(g.name for g in found if g.removable) or "none can go",
            "fewer table rows": ", ".join(tables(model)) or "no table is most of the network",
            "bits": "8 without training; 4 and 3 on average, by sensitivity, with training",
            "training": "distilled from the dense network throughout",
        },
        "left_alone": [{"name": item.name, "reason": item.reason} for item in kept],
    }


def _step(model: nn.Module, task: Task, device: torch.device) -> float:
    """Seconds of one training step of the dense network."""
    if not any(p.requires_grad for p in model.parameters()):
        return 0.0
    stage = replace(training(1000, batch_size_for(task), 1e-4, 0, 0.0), rules=(), supervised=1.0)
    seconds: list[float] = []

    def stop(step: int) -> bool:
        seconds.append(time.monotonic())
        return step >= 6

    fit(stage, model, task, Reference(copy_model(model), task, device=device), stop=stop)
    return (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)


def show(found: dict[str, Any], console: Console) -> None:
    """Print a plan for people."""
    console.print(f"{found['task']}; {found['values']:,} values", highlight=False, markup=False)
    console.print(f"time: {found['time']}", highlight=False, markup=False)
    rows = Table(title="would be tried", title_justify="left", show_header=False)
    for name, text in found["tried"].items():
        rows.add_row(name, escape(text))
    console.print(rows)
    if found["left_alone"]:
        table = Table("what", "why", title="left alone", title_justify="left")
        for item in found["left_alone"]:
            table.add_row(escape(item["name"]), escape(item["reason"]))
        console.print(table)
