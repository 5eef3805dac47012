"""Rounds: prune a little at a time, computing the score anew on what is left."""

from dataclasses import dataclass

from torch import nn

from lilliput.prune.prune import Prune
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class Rounds(Stage):
    """Prune in `rounds` rounds without training, each by the score of the network that the last round left.

    After round k of n the sparsity is 1 - (1 - s)^(k / n), s the final one: each round drops the same share of what is
    left. One round at a high sparsity may drop a whole layer's connections; in many rounds what remains of a layer
    scores higher and higher. The default is iterative synaptic flow; with score="snip" it is iterative SNIP.

    Args:
        sparsity: s, the fraction that is zero in the end, in [0, 1).
        rounds: n.
        score: As in `Prune`.
        pattern: As in `Prune`.
        allocation: As in `Prune`.
        where: As in `Prune`.
        seed: As in `Prune`.

    Raises:
        ValueError: As `Prune` does, and for less than one round.

    Example:
        >>> import torch
        >>> x = torch.randn(4, 8); task = Task("shape", train=x, val=x)
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> int(sum((layer.weight == 0).sum() for layer in Rounds(0.9, rounds=10)(net, task, None)[::2]))
        72

    Source:
        Tanaka, Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively conserving synaptic
        flow, NeurIPS 2020, arXiv:2006.05467, algorithm 1; de Jorge, Sanyal, Behl, Torr, Rogez and Dokania, Progressive
        skeletonization, ICLR 2021, arXiv:2006.09081.
    """

    sparsity: float
    rounds: int = 100
    score: str = "synflow"
    pattern: str = "elements"
    allocation: str = "global"
    where: str = "*"
    seed: int = 0

    def __post_init__(self) -> None:
        self._round(self.sparsity)
        if self.rounds < 1:
            raise ValueError(f"Rounds: rounds must be at least 1, got {self.rounds}.")

    def _round(self, sparsity: float) -> Prune:
        return Prune(sparsity, self.score, self.pattern, self.allocation, self.where, seed=self.seed)

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        for k in range(1, self.rounds + 1):
            model = self._round(1 - (1 - self.sparsity) ** (k / self.rounds))(model, task, reference)
        return model
