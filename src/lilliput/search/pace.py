"""Pace: how long each training of a search may be, from measured speed and the time that is left.

The next version of the search replaces this file; what it decides is kept in the store, so that a search that goes on
has the same recipes.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lilliput.recipe import Recipe
from lilliput.schedule import Cosine
from lilliput.search.job import Job
from lilliput.search.space import structure, timed
from lilliput.task import Task
from lilliput.train import Train, fit

TAIL = 0.17  # of a full training's time, for the training of a quantized variant


@dataclass
class Pace:
    """The time schedule of a job's trainings.

    Args:
        batch_size: examples a step.
        slot_s: seconds that a full training may take on one worker; None where steps are counted instead.
    """

    job: Job
    batch_size: int
    slot_s: float | None = None

    def steps(self, plan: Recipe) -> tuple[int, int]:
        """Steps of a plan's full training and of a tail: what fits its slot, or a number of epochs."""
        job, epoch = self.job, max(1, self.job.task.examples // self.batch_size)
        if job.clock.budget_s is None or self.slot_s is None:
            full = max(160, min(30 * epoch, 4000))
            return full, max(40, full // 5)
        small = structure(plan)
        speed = self.speed(job.runner.make(small), f"speed-{job.runner.key(small)}")
        return max(64, int(speed * self.slot_s)), max(24, int(TAIL * speed * self.slot_s))

    def lr(self, plan: Recipe) -> float:
        """The learning rate of a full training: low where the network is the dense one still."""
        return 1e-2 if any(stage.structural for stage in structure(plan).stages) else 2e-3

    def trained(self, plan: Recipe, until: float | None = None) -> Recipe:
        """A plan with its training's steps and rate, up to a fraction of its schedule."""
        full, _ = self.steps(plan)
        stop = None if until is None else max(1, int(full * until))
        stop = None if stop is None or stop >= full else stop
        return timed(plan, **settings(full, self.batch_size, self.lr(plan), self.job.seed), until=stop)

    def set_slot(self, seconds: float) -> None:
        """Decide how long a full training may take, once for this search and its continuations."""
        job = self.job
        if job.clock.budget_s is None:
            return
        key = f"slot-{job.clock.budget_s:g}-{job.workers}"
        self.slot_s = float(job.remember(key, "slot", lambda: {"seconds": round(seconds, 3)})["seconds"])

    def speed(self, model: nn.Module, key: str) -> float:
        """Steps a second of training, on one thread; measured once and kept."""
        return float(
            self.job.remember(key, "speed", lambda: {"steps_per_s": round(self._measured(model), 3)})["steps_per_s"]
        )

    def _measured(self, model: nn.Module) -> float:
        job = self.job
        with job.clock.on("train"):
            seconds = []
            first = job.clock.now

            def stop(step: int) -> bool:
                seconds.append(job.clock.now)
                return step >= 12 or job.clock.now - first > 4

            stage = replace(Train(steps=1), **settings(1000, self.batch_size, 1e-4, job.seed))
            fit(stage, model, job.task, job.runner.reference, stop=stop)
        if len(seconds) > 3:
            return (len(seconds) - 1) / max(1e-6, seconds[-1] - seconds[0])
        return 1 / max(1e-6, seconds[-1] - first)


def settings(steps: int, batch_size: int, lr: float, seed: int) -> dict[str, Any]:
    """The settings of a student's full training, on one cosine."""
    return {"steps": steps, "lr": Cosine(lr), "batch_size": batch_size, "weight_decay": 0.01, "seed": seed}


def batch_size_for(task: Task) -> int:
    """A batch that keeps one core busy without starving the optimizer of steps."""
    return min(128, max(8, task.examples // 20)) if task.batch_size == 64 else task.batch_size


def is_stochastic(model: nn.Module) -> bool:
    """Whether training draws from the global random state (dropout), so that trainings must not run side by side."""
    return any(
        (isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0)
        or (isinstance(m, nn.RNNBase | torch.nn.MultiheadAttention) and m.dropout > 0)
        for m in model.modules()
    )
