"""Network slimming: penalize the scales of batch norms, so that channels to remove get small scales."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.names import find
from lilliput.graph.slicing import BATCH_NORMS
from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.stage import Reference
from lilliput.task import Batch, Task


@dataclass(frozen=True)
class Slimming(Rule):
    """Add lambda * sum |gamma| over the scales of the batch norms to the loss, so that many of them become small.

        L = sum over (x, y) of l(f(x, W), y) + lambda * sum over gamma of |gamma|

    Then `PruneChannels(0.5, score="batchnorm_scale", allocation="global")` removes the channels of the smallest, and a
    training without this rule recovers what that cost.

    Args:
        strength: lambda, a number or a schedule of the step; the paper uses 1e-4 and 1e-5.
        where: Which batch norms: glob patterns on modules, separated by commas.

    Raises:
        ValueError: For a negative strength, and where no batch norm has a scale.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)); adam = torch.optim.AdamW(net.parameters())
        >>> x = torch.randn(8, 2)
        >>> with Slimming(0.5).attached(net, adam, steps=1) as rule:
        ...     y = net(x); added = rule.loss(None, y); (y.square().mean() + added).backward(); adam.step()
        >>> added.item()
        2.0

    Source:
        Liu, Li, Shen, Huang, Yan and Zhang, Learning efficient convolutional networks through network slimming, ICCV
        2017, arXiv:1708.06519, equation 1.
    """

    strength: float | Schedule = 1e-4
    where: str = "*"

    def __post_init__(self) -> None:
        if isinstance(self.strength, int | float) and self.strength < 0:
            raise ValueError(f"Slimming: strength must be at least 0, got {self.strength:g}. The paper uses 1e-4.")

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        if not self.scales(model):
            raise ValueError(
                "Slimming: the model must have batch norms with scales, got none that match "
                f"{self.where!r}. Without them use PruneChannels(score='l2')."
            )
        return {}

    def scales(self, model: nn.Module) -> list[Tensor]:
        """List the scales gamma that are penalized."""
        named = {f"{n}.weight" if n else "weight" for n, m in model.named_modules() if isinstance(m, BATCH_NORMS)}
        tensors = dict(model.named_parameters())
        return [
            tensors[name]
            for name in find(model, self.where, least_dim=1, who="Slimming")
            if name in named and name in tensors
        ]

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
        return at(self.strength, step, steps) * torch.stack([gamma.abs().sum() for gamma in self.scales(model)]).sum()
