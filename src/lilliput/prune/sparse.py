"""Sparse training, sparse from the first step to the last: static masks, and SET, whose masks evolve."""

import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.code.names import theta
from lilliput.prune import patterns
from lilliput.prune._masking import Masking, check_number
from lilliput.prune.masks import Allocation, regrow_
from lilliput.rule import Rule, State
from lilliput.stage import Reference
from lilliput.task import Task


def noise(name: str, shape: torch.Size, seed: int, step: int) -> Tensor:
    """Draw uniform numbers in [0, 1) that are a function of the tensor's name, the seed and the step alone.

    Args:
        name: The tensor's name.
        shape: The shape of the result.
        seed: The seed.
        step: The step of the training.

    Returns:
        The numbers, float32.

    Example:
        >>> bool((noise("fc.weight", torch.Size([3]), 0, 1) == noise("fc.weight", torch.Size([3]), 0, 1)).all())
        True
    """
    generator = torch.Generator().manual_seed((seed * 1000003 + zlib.crc32(name.encode())) * 1000003 + step)
    return torch.rand(shape, generator=generator)


@dataclass(frozen=True)
class StaticSparse(Masking, Rule):
    """Train with a random mask from the first step to the last: what every other sparse training has to beat.

    Args:
        sparsity: The fraction that is zero, in [0, 1).
        pattern: As in `Prune`.
        allocation: As in `Prune`. The usual one of sparse training is "erk"; "global" means nothing for random masks.
        where: As in `Prune`.
        seed: The seed of the masks.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(4, 4)
        >>> state = StaticSparse(0.75).begin(net, None, None, 10)
        >>> int((net.weight == 0).sum())
        12

    Source:
        Liu, Chen, Chen, Shen, Mocanu, Wang and Pechenizkiy, The unreasonable effectiveness of random pruning, ICLR
        2022, arXiv:2202.02643, section 3.
    """

    sparsity: float = 0.9
    allocation: Allocation = "erk"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.sparsity, type(self).__name__)
        super().__post_init__()

    @torch.no_grad()
    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        state = super().begin(model, task, reference, steps)
        masked = self.masked(model)
        self.keep_(
            {name: noise(name, code.mask.shape, self.seed, 0) for name, code in masked.items()}, model, self.sparsity
        )
        for name, code in masked.items():
            theta(model, name).mul_(code.mask)
        return state


@dataclass(frozen=True)
class SET(StaticSparse, Rule):
    """Drop the smallest weights of each tensor every so often, and grow as many random ones from zero.

    This is sparse evolutionary training. Each tensor stays exactly as sparse as it began.

    Args:
        fraction: The fraction of the kept weights that moves at the first update. It falls as half a cosine to none at
            `until`.
        every: Steps between updates; 0 for forty updates in all.
        until: The fraction of the training after which masks stay.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(8, 8); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with SET(0.5, every=1).attached(net, sgd, steps=4):
        ...     for _ in range(4): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Mocanu, Mocanu, Stone, Nguyen, Gibescu and Liotta, Scalable training of artificial neural networks with adaptive
        sparse connectivity, Nature Communications 2018, arXiv:1707.04780, algorithm 1. The falling fraction: Dettmers
        and Zettlemoyer, Sparse networks from scratch, 2019, arXiv:1907.04840.
    """

    fraction: float = 0.3
    every: int = 0
    until: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.fraction <= 1 or not 0 < self.until <= 1:
            raise ValueError(
                f"{type(self).__name__}: fraction must be in [0, 1] and until in (0, 1], got "
                f"fraction={self.fraction}, until={self.until}."
            )

    def growth(self, state: State, model: nn.Module, name: str, step: int) -> Tensor:
        """Return the score >= 0 by which dropped entries come back, the highest first."""
        return noise(name, theta(model, name).shape, self.seed, step + 1)

    def due(self, step: int, steps: int) -> bool:
        """Tell whether the masks move after this step."""
        every = self.every or max(1, round(self.until * steps / 40))
        return (step + 1) % every == 0 and step + 1 < self.until * steps

    @torch.no_grad()
    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        if not self.due(step, steps):
            return state
        # What is not trained keeps its mask: nothing would grow there.
        masked = {name: code for name, code in self.masked(model).items() if theta(model, name).requires_grad}
        pattern = patterns.parse(self.pattern)
        moving = self.fraction * (1 + math.cos(math.pi * (step + 1) / (self.until * steps))) / 2
        new = {}
        for name, code in masked.items():
            weight, kept = theta(model, name).float(), code.mask
            sparsity = code.sparsity
            survivors = pattern.of(name)(weight.abs() * kept, 1 - (1 - sparsity) * (1 - moving)) & kept
            # What stays comes first, then what grows best; what was just dropped may come back only after the rest.
            growth = self.growth(state, model, name, step)
            growth = growth / growth.max().clamp_min(1e-30)
            ranked = torch.where(
                survivors,
                3.0 + weight.abs() / weight.abs().max().clamp_min(1e-30),
                torch.where(kept, growth - 1, growth),
            )
            new[name] = pattern.of(name)(ranked, sparsity)
        return {**state, **regrow_(model, masked, new, pattern)}
