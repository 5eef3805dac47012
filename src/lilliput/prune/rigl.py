"""RigL: sparse training that grows weights where the gradient is largest."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.names import theta
from lilliput.prune.sparse import SET
from lilliput.rule import Rule, State


@dataclass(frozen=True)
class RigL(SET, Rule):
    """Grow the dropped weights of the largest gradient |dL/dW|; drop the smallest weights, as `SET` does.

    The gradient is that of the update step alone, and reaches all entries only then.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(8, 8); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with RigL(0.5, every=2).attached(net, sgd, steps=4):
        ...     for _ in range(4): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Evci, Gale, Menick, Castro and Elsen, Rigging the lottery, ICML 2020, arXiv:1911.11134, algorithm 1.
    """

    straight: ClassVar[bool] = True

    @torch.no_grad()
    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        """Keep the dense gradient where it will be asked for, and train the kept entries only."""
        due, state = self.due(step, steps), dict(state)
        for name, code in self.masked(model).items():
            gradient = theta(model, name).grad
            if gradient is not None:
                if due:
                    state[f"gradient {name}"] = gradient.clone()
                gradient.mul_(code.mask)
        return state

    def growth(self, state: State, model: nn.Module, name: str, step: int) -> Tensor:
        held = state.get(f"gradient {name}")  # none where the loss does not reach
        return torch.zeros_like(theta(model, name)).float() if held is None else held.float().abs()

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        state = super().on_step(state, model, step, steps)
        return {key: value for key, value in state.items() if not key.startswith("gradient ")}
