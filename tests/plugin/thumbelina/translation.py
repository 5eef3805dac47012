"""A rule with a scheduled loss and a learnable extra."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.reference import Reference
from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.task import Batch, Task


@dataclass(frozen=True)
class LearnedTranslation(Rule):
    """Add weight * mean (V y - y_dense)^2 to the loss: V, a matrix learned along, translates what the student says."""

    weight: float | Schedule = 1.0

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        if reference is None:
            raise ValueError("LearnedTranslation: a reference must be given, got None. Pass the dense model.")
        example = reference.sample()
        with torch.no_grad():
            size = model(example).shape[-1]
        translate = nn.Linear(size, size, bias=False)
        nn.init.eye_(translate.weight)
        return {"translate": translate}

    def loss(
        self,
        state: State,
        model: nn.Module,
        step: int,
        steps: int,
        batch: Batch,
        output: Any,
        reference: Reference | None,
    ) -> Tensor:
        assert reference is not None
        translated: Tensor = state["translate"](output)
        return at(self.weight, step, steps) * (translated - reference.outputs(batch)).square().mean()
