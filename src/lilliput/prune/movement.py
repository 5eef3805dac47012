"""Movement pruning: keep the weights that training moves away from zero."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.names import theta
from lilliput.prune._masking import Masking
from lilliput.rule import Rule, State
from lilliput.schedule import at
from lilliput.stage import Reference
from lilliput.task import Task


@dataclass(frozen=True)
class Movement(Masking, Rule):
    """Train scores beside the weights, straight through the mask of those that score highest.

        W = m * w, m = the top of S,  S <- S - dL/dW * w  (the gradient of dL/dm = dL/dW * w)

    A weight scores high where steps move it away from zero, whatever its size. The gradient of S is dense: a dropped
    weight, which keeps its value, comes back once its score has risen. The step size of S scales all scores alike and
    changes no mask, so it is 1. Made for fine-tuning a trained network.

    Args:
        sparsity: A number s means Cubic(s, begin=0.1); or a schedule of the step.
        pattern: As in `Prune`.
        allocation: As in `Prune`.
        where: As in `Prune`.
        every: Steps between masks.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(8, 8); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with Movement(0.5).attached(net, sgd, steps=4):
        ...     for _ in range(4): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Sanh, Wolf and Rush, Movement pruning: adaptive sparsity by fine-tuning, NeurIPS 2020, arXiv:2005.07683,
        equations 2 and 3 and section 4 (hard movement pruning).
    """

    every: int = 5

    straight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"Movement: every must be at least 1 step, got {self.every}.")

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        state = super().begin(model, task, reference, steps)
        return {**state, **{f"score {name}": torch.zeros_like(theta(model, name)) for name in self.masked(model)}}

    def rated(self, state: State, model: nn.Module) -> dict[str, Tensor]:
        return {name: state[f"score {name}"] for name in self.masked(model)}

    @torch.no_grad()
    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        state = dict(state)
        for name, code in self.masked(model).items():
            weight = theta(model, name)
            if weight.grad is not None:
                state[f"score {name}"] = state[f"score {name}"] - weight.grad * weight
                weight.grad.mul_(code.mask)
        return state

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        if (step + 1) % self.every == 0 or step + 1 == steps:
            self.keep_(self.rated(state, model), model, at(self.schedule, step + 1, steps))
        return state
