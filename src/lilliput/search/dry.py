"""--dry-run: print what a search would try, how long it takes, and what stays unchanged with the reasons."""

import time
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from lilliput.code.adopt import adopted
from lilliput.code.base import copy_model
from lilliput.distill.logits import Distill
from lilliput.search import ask
from lilliput.search.candidates import first_steps
from lilliput.search.check import check, place
from lilliput.search.climb import WORK
from lilliput.search.phases import target
from lilliput.search.work import batch_size_for
from lilliput.stage import Reference
from lilliput.task import Task
from lilliput.train import Train, fit


def plan(model: nn.Module, task: Task, **asked: Any) -> dict[str, Any]:
    """The plan of a search as plain data; nothing is written, and nothing trained but a few steps to time them.

    Raises:
        ValueError: For what a search would refuse too.
    """
    device = place(asked["device"])
    model = adopted(model)
    task = task.against(model)
    check(model, task)
    content = target(model).plan(model, task)
    trials = asked["trials"]
    if trials is None:
        took = f"at most {ask.seconds(asked['budget']):.0f} s in all"
    elif not any(p.requires_grad for p in model.parameters()):
        took = "some seconds: nothing is trained"
    else:
        steps = WORK * first_steps(task) * trials
        seconds = _step(model, task, device) * steps
        took = (
            f"about {seconds:.0f} s of training on one core: {trials} structures, at most {steps:.0f} steps in all; "
            "exports and measurements come on top"
        )
    return {"task": repr(task), "time": took, **content}


def _step(model: nn.Module, task: Task, device: torch.device) -> float:
    """Seconds of one training step of the dense network."""
    stage = Train(steps=1000, lr=1e-4, rules=(Distill(),), batch_size=batch_size_for(task))
    seconds: list[float] = []

    def stop(step: int) -> bool:
        seconds.append(time.monotonic())
        return step >= 6

    fit(stage, model, task, Reference(copy_model(model), task, device=device), stop=stop)
    return (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)


def show(planned: dict[str, Any], console: Console) -> None:
    """Print a plan for people."""
    console.print(f"{planned['task']}; {planned['values']:,} values", highlight=False, markup=False)
    console.print(f"time: {planned['time']}", highlight=False, markup=False)
    rows = Table(title="would be tried", title_justify="left", show_header=False)
    for name, text in planned["tried"].items():
        rows.add_row(name, escape(text))
    console.print(rows)
    if planned["left_alone"]:
        table = Table("what", "why", title="left alone", title_justify="left")
        for item in planned["left_alone"]:
            table.add_row(escape(item["name"]), escape(item["reason"]))
        console.print(table)
