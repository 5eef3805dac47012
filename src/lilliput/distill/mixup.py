"""Mixup: train on mixtures of two examples; with distillation the dense network is asked about each mixture."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.errors import NotSupported
from lilliput.reference import Reference
from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.task import Batch, Task, leaves, length, mapped, on, predict, take


@dataclass(frozen=True)
class Mixup(Rule):
    """Mix every example with another one of its batch, inputs and targets alike:

        x = lambda x_i + (1 - lambda) x_j,   y = lambda y_i + (1 - lambda) y_j,   lambda ~ Beta(alpha, alpha),

    with y one-hot for classes. One lambda and one order j are drawn for each step, from (seed, step) alone. Together
    with `Distill` the dense network is run on the same mixtures, so that student and teacher see one and the same input
    (function matching); there is no end of different inputs, which suits long distillations on few examples.

    Args:
        alpha: how much is mixed: little at 0.2, evenly at 1; a number or a schedule of the step; 0 mixes nothing.
        classes: how many classes integer targets have; 0: as many as the model has outputs on the task's example.
        seed: of the draws.

    Raises:
        ValueError: for a negative alpha, and for integer targets in a loop without a task when `classes` is 0.
        NotSupported: for inputs that are integers, such as the ids of words.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([0, 1])
        >>> batch = Mixup(1.0, classes=2).batch({}, nn.Identity(), 0, 1, Batch(x, y, torch.arange(2), 0))
        >>> bool((batch.inputs == batch.targets).all()), batch.index
        (True, None)

    Source:
        Zhang, Cisse, Dauphin and Lopez-Paz, mixup: Beyond empirical risk minimization, ICLR 2018, arXiv:1710.09412,
        section 1; with distillation: Beyer, Zhai, Royer, Markeeva, Anil and Kolesnikov, Knowledge distillation: A good
        teacher is patient and consistent, CVPR 2022, arXiv:2106.05237, section 3.
    """

    alpha: float | Schedule = 0.2
    classes: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not all(at(self.alpha, step, 1) >= 0 for step in (0, 1)) or self.classes < 0:
            raise ValueError(f"Mixup: alpha and classes must be at least 0, got {self.alpha} and {self.classes}.")

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        if task is None or self.classes:
            return {}
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        outputs = leaves(predict(model, on(task.example, device)))
        return {"classes": torch.tensor(outputs[0].shape[1] if len(outputs) == 1 and outputs[0].ndim == 2 else 0)}

    def batch(self, state: State, model: nn.Module, step: int, steps: int, batch: Batch) -> Batch:
        alpha = at(self.alpha, step, steps)
        if alpha == 0:
            return batch
        for leaf in leaves(batch.inputs):
            if not leaf.is_floating_point():
                raise NotSupported(f"Mixup: inputs must be floating-point tensors to be mixed, got {leaf.dtype}.")
        draws = np.random.default_rng((self.seed, step))
        share = float(draws.beta(alpha, alpha))
        count, labelled = length(batch.inputs), 0 if batch.targets is None else length(batch.targets)
        # Labelled examples come first in a batch, and are mixed among themselves.
        first, second = draws.permutation(labelled), labelled + draws.permutation(count - labelled)
        partner = torch.from_numpy(np.concatenate([first, second]))

        def mixed(values: Any) -> Any:
            others = take(values, partner[: length(values)])
            return mapped(lambda a, b: share * a + (1 - share) * b, values, others)

        targets = None if not labelled else mixed(mapped(lambda y: self._soft(y, state), batch.targets))
        return replace(batch, inputs=mixed(batch.inputs), targets=targets, index=None)

    def _soft(self, y: Tensor, state: State) -> Tensor:
        """Targets that can be mixed: numbers as they are, classes one-hot, yes or no as 1 or 0."""
        if y.is_floating_point():
            return y
        if not self.classes and "classes" not in state:
            raise ValueError("Mixup: classes must be given for integer targets without a task, got 0. Pass classes=.")
        classes = self.classes or int(state["classes"])
        if classes < 2:
            return y.float()
        if y.ndim > 1:
            raise NotSupported("Mixup: targets must be one class an example, or numbers, got labels of several places.")
        return F.one_hot(y, classes).float()
