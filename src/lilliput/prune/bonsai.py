"""Bonsai: penalize every weight that is not zero about equally, and cut as far as the score does not fall."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model, holders
from lilliput.code.names import find, theta
from lilliput.prune import patterns
from lilliput.prune.masks import attach_masks, prunable
from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.stage import Reference, Stage
from lilliput.task import Batch, Task


@dataclass(frozen=True)
class Saturating(Rule):
    """Penalize weights by a function that rises steeply near zero and then hardly any more.

    A large weight then costs about what a small one does. The loss gains, for each tensor x of n entries,

        R(x) = 1/n sum_j (i T(x_j) + l |x_j|),   T(x) = tanh((|x| - t) s) - tanh(-t s).

    A logic gate needs large weights, which a plain L1 penalty would charge most; the little L1 that is left keeps a
    slope where the tanh is flat.

    Args:
        intensity: i, a number or a schedule of the step.
        threshold: t, in the units of a weight.
        steepness: s, one over that unit.
        l1: l.
        where: Which tensors, as in `Prune`.

    Raises:
        ValueError: For a negative intensity, threshold or l1, and for a steepness that is not positive.

    Example:
        >>> net = nn.Linear(8, 8); adam = torch.optim.Adam(net.parameters())
        >>> with Saturating(0.2).attached(net, adam, steps=1) as rule:
        ...     y = net(torch.ones(1, 8)); (y.sum() + rule.loss(None, y)).backward(); adam.step()

    Source:
        Casey Primozic, Growing bonsai networks with RNNs, 2023, "Sparsity-promoting regularizer" (R and T; the defaults
        are those of its listing; cprimozic.net/blog/growing-sparse-computational-graphs-with-rnns).
    """

    intensity: float | Schedule = 0.1
    threshold: float = 0.1
    steepness: float = 100.0
    l1: float = 0.001
    where: str = "*"

    def __post_init__(self) -> None:
        amounts = (at(self.intensity, 0, 1), at(self.intensity, 1, 1), self.threshold, self.l1)
        if not (all(value >= 0 for value in amounts) and self.steepness > 0):
            raise ValueError(
                f"Saturating: intensity, threshold and l1 must be at least 0 and steepness above 0, got {self}."
            )

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        find(model, self.where, who="Saturating")
        return {}

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
        intensity = at(self.intensity, step, steps)
        held = [holders(model, name)[0] for name in find(model, self.where, who="Saturating")]
        first, *others = [self.cost(getattr(module, attribute), intensity) for module, attribute in held]
        return sum(others, first)

    def cost(self, x: Tensor, intensity: float) -> Tensor:
        """Compute R of one tensor."""
        a, t, s = x.abs(), self.threshold, self.steepness
        cost: Tensor = (intensity * (((a - t) * s).tanh() + torch.tensor(t * s).tanh()) + self.l1 * a).mean()
        return cost


@dataclass(frozen=True)
class Clip(Stage):
    """Cut the weights nearest zero, then round the rest, each as far as the task's score on `val` does not fall.

    The highest threshold on |w| is taken at which the score holds, for the weights and then for the tensors of one
    dimension (biases, first states); then the coarsest grid, of multiples of 2, 1, 1/2, ... 2^-`bits`, on which both
    may lie. Where none will do, values stay as they are. What was cut stays cut in a training that follows.

    Args:
        where: Which tensors, as in `Prune`.
        tries: How many thresholds are tried, at even ranks of |w|.
        bits: The negative exponent of the finest grid.
        loss: How many points of the metric may be lost.

    Raises:
        ValueError: When there is no task to score by, and for tries below 1.

    Example:
        >>> x = torch.tensor([[1.0, 0.5], [-1.0, 0.5]]); y = torch.tensor([1, 0])
        >>> net = nn.Linear(2, 1, bias=False); net.weight.data = torch.tensor([[0.9, 0.01]])
        >>> Clip()(net, Task("sign", train=(x, y), val=(x, y)), None).weight.tolist()
        [[1.0, 0.0]]

    Source:
        Primozic, Growing bonsai networks with RNNs, 2023, "Pruning" (a threshold and a grid by trying them out).
    """

    where: str = "*"
    tries: int = 100
    bits: int = 6
    loss: float = 0.0

    def __post_init__(self) -> None:
        if self.tries < 1:
            raise ValueError(f"Clip: tries must be at least 1, got {self.tries}.")

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        if task is None:
            raise ValueError("Clip: a task must be given to score by, got None.")
        task = task.against(model if reference is None else reference.model)
        model = copy_model(model)
        pattern = patterns.parse("elements")
        weights, _ = prunable(model, self.where, pattern, "Clip")
        masked = attach_masks(model, weights, pattern)
        vectors = [name for name in find(model, self.where, least_dim=1, who="Clip") if theta(model, name).dim() == 1]
        dense = task.score(model).value

        def first(names: list[str], tried: list[Callable[[Tensor], Tensor]]) -> None:
            """Leave the tensors as the first of these functions makes them that keeps the score."""
            before = {name: theta(model, name).detach().clone() for name in names}
            for change in tried:
                _put(model, {name: change(value) for name, value in before.items()})
                if task.loss_of(dense, task.score(model).value) <= self.loss:
                    return
            _put(model, before)

        for names in (weights, vectors):
            if names:
                sizes = torch.cat([theta(model, name).detach().abs().flatten() for name in names]).sort().values
                ranks = torch.linspace(len(sizes) - 1, 0, min(self.tries, len(sizes))).long()
                first(names, [partial(_cut, t) for t in sizes[ranks].tolist()])
        first(weights + vectors, [partial(_rounded, 2.0**-k) for k in range(-1, self.bits + 1)])
        for name in weights:
            masked[name].mask.copy_(theta(model, name) != 0)
        return model


def _cut(threshold: float, x: Tensor) -> Tensor:
    return x * (x.abs() > threshold)


def _rounded(grid: float, x: Tensor) -> Tensor:
    return (x / grid).round() * grid


@torch.no_grad()
def _put(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give tensors new values, in place."""
    for name, value in values.items():
        theta(model, name).copy_(value)
