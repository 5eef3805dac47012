"""STE: straight-through magnitude pruning, in which all weights train and only the largest are used."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lilliput.code.names import theta
from lilliput.prune._masking import Masking
from lilliput.rule import Rule, State
from lilliput.schedule import at
from lilliput.stage import Reference
from lilliput.task import Task


@dataclass(frozen=True)
class STE(Masking, Rule):
    """Compute with the largest weights, and pass the gradient straight through the mask to all of them.

        W = m * w, m = the largest |w|;  w <- w - lr (dL/dW + decay (1 - m) w)

    A dropped weight comes back once its gradients have made it large. With decay > 0 dropped weights are pulled to
    zero, which keeps masks from flickering (SR-STE); with decay = 0 it is the plain straight-through estimator.

    Args:
        sparsity: A number s means Cubic(s, begin=0.1); `Once(s)` holds from the first step on, as in SR-STE.
        pattern: As in `Prune`; SR-STE was made for N:M.
        allocation: As in `Prune`.
        where: As in `Prune`.
        decay: The pull on dropped weights; SR-STE uses 2e-4 with SGD.
        every: Steps between masks.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(8, 8); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with STE(0.5, pattern="2:4").attached(net, sgd, steps=4):
        ...     for _ in range(4): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight.reshape(-1, 4) == 0).sum(1).max())
        2

    Source:
        Bengio, Leonard and Courville, Estimating or propagating gradients through stochastic neurons, 2013,
        arXiv:1308.3432; Lee et al., JaxPruner, 2023, arXiv:2304.14082; Zhou et al., Learning N:M fine-grained
        structured sparse neural networks from scratch, ICLR 2021, arXiv:2102.04010, equations 2 (STE) and 4 (SR-STE).
    """

    decay: float = 0.0
    every: int = 5

    straight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay >= 0 or self.every < 1:
            raise ValueError(
                f"STE: decay must be at least 0 and every at least 1 step, got decay={self.decay}, every={self.every}."
            )

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        state = super().begin(model, task, reference, steps)
        self.keep_(self.rated(state, model), model, at(self.schedule, 0, steps))
        return state

    @torch.no_grad()
    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        for name, code in self.masked(model).items() if self.decay else ():
            weight = theta(model, name)
            if weight.grad is not None:
                weight.grad.add_(weight * ~code.mask, alpha=self.decay)
        return state

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        if (step + 1) % self.every == 0 or step + 1 == steps:
            self.keep_(self.rated(state, model), model, at(self.schedule, step + 1, steps))
        return state
