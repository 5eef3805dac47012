"""Top-KAST: sparse forward passes with the largest weights, sparse backward passes to some more."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from lilliput.code.names import theta
from lilliput.prune import patterns
from lilliput.prune._masking import Masking
from lilliput.prune.masks import select
from lilliput.rule import Rule, State
from lilliput.schedule import at
from lilliput.stage import Reference
from lilliput.task import Task


@dataclass(frozen=True)
class TopKAST(Masking, Rule):
    """Compute with the largest weights, the set A, and train a larger set B: sparse forwards and backwards.

        A = top D of |w|, B = top D + M of |w|, D = 1 - sparsity;  w_B <- w_B - lr (dL/dW_B + decay r_B),
        r = w in A, w / D in B minus A

    A weight of B minus A has to grow against the exploration regulariser to enter A. Weights outside B stay as they
    are.

    Args:
        sparsity: The fraction that is zero, in [0, 1), or a schedule of the step.
        pattern: As in `Prune`.
        allocation: As in `Prune`.
        where: As in `Prune`.
        explore: M, the further fraction of weights that is trained until `until`; then B = A.
        decay: The strength of the regulariser, added to the gradient.
        every: Steps between new sets.
        until: The fraction of the training after which B = A.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(8, 8); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with TopKAST(0.5).attached(net, sgd, steps=4):
        ...     for _ in range(4): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Jayakumar, Pascanu, Rae, Osindero and Elsen, Top-KAST: Top-K always sparse training, NeurIPS 2020,
        arXiv:2106.03517, sections 2.1 to 2.3.
    """

    explore: float = 0.1
    decay: float = 1e-4
    every: int = 5
    until: float = 0.75

    straight: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.explore <= 1 or not self.decay >= 0 or self.every < 1:
            raise ValueError(
                f"TopKAST: explore must be in [0, 1], decay at least 0 and every at least 1, got "
                f"explore={self.explore}, decay={self.decay}, every={self.every}."
            )

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        return self._sets({**super().begin(model, task, reference, steps)}, model, 0, steps)

    def _sets(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        """A into the masks, B into the state as factors of 0 and 1; momenta start anew where B changes."""
        sparsity, rated = at(self.sparsity, step, steps), self.rated(state, model)
        self.keep_(rated, model, sparsity)
        more = max(0.0, sparsity - self.explore) if step < self.until * steps else sparsity
        wide = select(rated, more, self.allocation, patterns.parse(self.pattern), at(self.sparsity, 1, 1))
        for name, code in self.masked(model).items():
            trained = (wide[name] | code.mask).to(theta(model, name).dtype)
            state[f"pull {name}"] = trained * torch.where(code.mask, self.decay, self.decay / (1 - sparsity))
            state[f"fresh {name}"] = trained != state.get(f"trained {name}", trained)
            state[f"trained {name}"] = trained
        return state

    @torch.no_grad()
    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        state = dict(state)
        for name in [key.removeprefix("trained ") for key in state if key.startswith("trained ")]:
            weight = theta(model, name)
            if weight.grad is not None:
                weight.grad.mul_(state[f"trained {name}"]).addcmul_(weight, state[f"pull {name}"])
                # Weight decay and old momenta would move what is not trained.
                state[f"before {name}"] = weight.detach().clone()
        return state

    @torch.no_grad()
    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        state = dict(state)
        for key in [key for key in state if key.startswith("before ")]:
            name, before = key.removeprefix("before "), state.pop(key)
            weight = theta(model, name)
            weight.copy_(before.lerp_(weight, state[f"trained {name}"]))  # exact at 0 and 1
        if (step + 1) % self.every and step + 1 < steps:
            return state
        return self._sets(state, model, step + 1, steps)
