"""Lottery tickets: train, prune, return to the early weights, and repeat."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from lilliput.code.base import copy_model
from lilliput.code.names import theta
from lilliput.prune import patterns
from lilliput.prune.masks import Allocation, attach_masks, masks, put_
from lilliput.prune.prune import Prune
from lilliput.stage import Reference, Stage
from lilliput.task import Task
from lilliput.train import Train, fit


@dataclass(frozen=True)
class Lottery(Stage):
    """Find a winning ticket: masks found by training and pruning in rounds, on the weights from before the training.

    Round k of n trains the ticket so far, drops the smallest of its trained weights until a share

        1 - (1 - sparsity)^(k / n)

    is zero, and puts those that are left back to what they were at the start or a little after it. What comes out has
    the last masks and the early weights: train it to see what it is worth, `(Lottery(0.9), Train(1000))`.

    Args:
        sparsity: The fraction that is zero in the end, in [0, 1).
        rounds: n.
        training: The training of each round.
        rewind: The fraction of a training after which the weights are kept to return to. 0 is the beginning, the
            paper's; deep networks need a little more (linear mode connectivity).
        pattern: As in `Prune`.
        allocation: As in `Prune`.
        where: As in `Prune`.

    Raises:
        ValueError: As `Prune` does, for less than one round, and for a rewind outside [0, 1).

    Example:
        >>> x = torch.randn(8, 4); task = Task("lot", (x, x.argmax(1)), (x, x.argmax(1)))
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> ticket = Lottery(0.75, rounds=2, training=Train(3))(net, task, Reference(net, task))
        >>> kept = ticket[0].weight != 0
        >>> bool((ticket[0].weight[kept] == net[0].weight[kept]).all()), int(kept.sum() + (ticket[2].weight != 0).sum())
        (True, 16)

    Source:
        Frankle and Carbin, The lottery ticket hypothesis, ICLR 2019, arXiv:1803.03635, section 1 (iterative pruning);
        Frankle, Dziugaite, Roy and Carbin, Linear mode connectivity and the lottery ticket hypothesis, ICML 2020,
        arXiv:1912.05671, algorithm 2 (rewinding).
    """

    sparsity: float
    rounds: int = 5
    training: Train = field(default_factory=lambda: Train(1000))
    rewind: float = 0.0
    pattern: str = "elements"
    allocation: Allocation = "global"
    where: str = "*"

    def __post_init__(self) -> None:
        self._round(self.rounds)
        if self.rounds < 1 or not 0 <= self.rewind < 1:
            raise ValueError(
                f"Lottery: rounds must be at least 1 and rewind in [0, 1), got rounds={self.rounds}, "
                f"rewind={self.rewind}."
            )

    def _round(self, k: int) -> Prune:
        """What is dropped after round k."""

        def amount(last: float) -> float:
            return last if k == self.rounds else 1 - (1 - last) ** (k / self.rounds)

        if isinstance(self.allocation, str):
            return Prune(amount(self.sparsity), pattern=self.pattern, allocation=self.allocation, where=self.where)
        return Prune(pattern=self.pattern, allocation=tuple((name, amount(last)) for name, last in self.allocation))

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        early = copy_model(model).eval()
        if until := round(self.rewind * self.training.steps):
            early = fit(replace(self.training, until=until), model, task, reference)
        ticket = model
        for k in range(1, self.rounds + 1):
            ticket = self._rewound(self._round(k)(self.training(ticket, task, reference), task, reference), early)
        return ticket

    @torch.no_grad()
    def _rewound(self, pruned: nn.Module, early: nn.Module) -> nn.Module:
        by_name, ticket = masks(pruned), copy_model(early)
        pattern = patterns.parse(self.pattern)
        put_(attach_masks(ticket, by_name, pattern), {name: code.mask for name, code in by_name.items()}, pattern)
        for name, code in by_name.items():
            theta(ticket, name).mul_(code.mask)
        return ticket
