"""Distillation of outputs: the student imitates what the dense network says."""

from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.stage import Reference
from lilliput.task import Batch
from lilliput.task.metrics import cosine


@dataclass(frozen=True)
class Distill(Rule):
    """Softened outputs: weight * T^2 KL(softmax(z_t / T) || softmax(z_s / T)), z_t the dense network's outputs.

    For a task that is no classification (cosine or squared-error loss) the distance of the outputs is taken instead.
    The dense outputs are computed once per (example, augmentation).

    Source: Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, arXiv:1503.02531, section 2.
    """

    weight: float | Schedule = 1.0
    temperature: float = 4.0

    def loss(
        self,
        state: State,
        model: nn.Module,
        step: int,
        steps: int,
        batch: Batch,
        output: Any,
        reference: Reference | None,
    ) -> Tensor | None:
        if reference is None:
            raise ValueError(
                "Distill: a reference must be given (the dense model with its outputs), got None. "
                "Pass reference=lilliput.Reference(dense, task)."
            )
        weight = at(self.weight, step, steps)
        if weight == 0:
            return None
        return weight * distance(
            output, reference.outputs(cast(Tensor, batch.index), batch.draw), self.temperature, reference.task.loss_name
        )


def distance(output: Tensor, dense: Tensor, temperature: float, loss: str) -> Tensor:
    """The mean distance of outputs (n, ...) from the dense ones, as the task's loss would have it."""
    if loss == "cross_entropy":
        t = temperature
        p = F.log_softmax(output / t, -1)
        return F.kl_div(p, F.log_softmax(dense / t, -1), reduction="batchmean", log_target=True) * t * t
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(output, dense.sigmoid())
    if loss == "cosine":
        return (1 - cosine(output, dense)).mean()
    return F.mse_loss(output, dense)
