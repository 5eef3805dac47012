"""Growing regularization: pull the weights to be pruned to zero, ever harder, before they are cut."""

from dataclasses import dataclass

import torch
from torch import nn

from lilliput.code.names import theta
from lilliput.prune import patterns
from lilliput.prune._masking import Masking
from lilliput.prune.masks import put_, select
from lilliput.rule import Rule, State
from lilliput.schedule import at
from lilliput.stage import Reference
from lilliput.task import Task


@dataclass(frozen=True)
class Growing(Masking, Rule):
    """Choose the weights to prune by magnitude, and let an L2 penalty on them alone grow until they are small.

        w <- w - lr (dL/dW + lambda_t (1 - m) w),  lambda_t from 0 to `most` in equal rises

    So the network moves what they did into the others before they are cut and the rest trains on (GReg-1).

    Args:
        sparsity: A number is chosen all at once, as in the paper. With a schedule of the step more and more weights are
            chosen, which suits a training from random weights.
        pattern: As in `Prune`.
        allocation: As in `Prune`.
        where: As in `Prune`.
        most: The last lambda.
        start: The fraction of the training at which they are chosen, 0 for a trained network.
        until: The fraction of the training at which they are cut.
        every: Steps between rises.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(8, 8); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with Growing(0.5).attached(net, sgd, steps=4):
        ...     for _ in range(4): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Wang, Qin, Zhang and Fu, Neural pruning via growing regularization, ICLR 2021, arXiv:2012.09243, section 3.1 and
        algorithm 1 (GReg-1).
    """

    most: float = 1.0
    start: float = 0.25
    until: float = 0.75
    every: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start <= self.until <= 1 or not self.most >= 0 or self.every < 1:
            raise ValueError(
                "Growing: 0 <= start <= until <= 1, most at least 0 and every at least 1 must hold, got "
                f"start={self.start}, until={self.until}, most={self.most}, every={self.every}."
            )

    def factor(self, step: int, steps: int) -> float:
        """Return lambda_t at a step."""
        first, last = self.start * steps, self.until * steps
        return self.most * min(1.0, ((step - first) // self.every + 1) * self.every / max(1.0, last - first))

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        state = super().begin(model, task, reference, steps)
        return state if round(self.start * steps) else self._choose(state, model, 0, steps)

    def _choose(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        """The smallest weights, beside those that were chosen before."""
        rated = {name: score * state.get(f"keep {name}", 1.0) for name, score in self.rated(state, model).items()}
        new = select(
            rated,
            at(self.sparsity, step, steps),
            self.allocation,
            patterns.parse(self.pattern),
            at(self.sparsity, 1, 1),
        )
        return {f"keep {name}": mask for name, mask in new.items()}

    @torch.no_grad()
    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        for key, kept in state.items():
            weight = theta(model, key.removeprefix("keep "))
            if weight.grad is not None:
                weight.grad.add_(weight * ~kept, alpha=self.factor(step, steps))
        return state

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        done, first, last = step + 1, round(self.start * steps), round(self.until * steps)
        rises = not isinstance(self.sparsity, int | float) and first < done < last and done % self.every == 0
        if rises or (done >= first and not state):  # later than first where a slow training gets shorter
            return self._choose(state, model, done, steps)
        if done in (last, steps):
            state, masked = self._choose(state, model, steps, steps), self.masked(model)
            put_(masked, {name: state[f"keep {name}"] for name in masked}, patterns.parse(self.pattern))
        return state
