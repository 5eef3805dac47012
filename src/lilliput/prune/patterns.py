"""Patterns: which weights may be zero together. Each is a function (score, sparsity) -> mask, True where kept.

Counts are exact: round(sparsity * units) units are dropped, but never the last one of a tensor, those of the lowest
score first and of equal scores the first in C order. `pooled` gives every entry the score of its unit, so that an
allocation can compare tensors. A shape that a pattern does not divide raises ValueError.
"""

import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def drop(score: Tensor, count: int) -> Tensor:
    """A mask like `score` that is False at its `count` lowest entries, the first ones of equal scores.

    >>> drop(torch.tensor([2.0, 1.0, 1.0, 3.0]), 1)
    tensor([ True, False,  True,  True])
    """
    flat = score.flatten()
    if count <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    # Ten times faster than kthvalue, and this runs while training.
    threshold = float(np.partition(flat.detach().cpu().numpy(), count - 1)[count - 1])
    keep = flat >= threshold
    surplus = count - int(flat.numel() - keep.sum())
    keep[(flat == threshold).nonzero()[:surplus, 0]] = False
    return keep.view_as(score)


def _count(sparsity: float, units: int) -> int:
    return min(round(sparsity * units), units - 1)


@dataclass(frozen=True)
class Pattern:
    """Units of one entry each: any weight may go."""

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where the pattern does not divide a shape."""

    def pooled(self, score: Tensor) -> Tensor:
        """Every entry's score as an allocation should see it."""
        return score

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of the entries that are kept together, where it is more than one."""
        return None

    @property
    def most(self) -> float:
        """The highest sparsity that the pattern allows."""
        return 1.0

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        return drop(score, _count(sparsity, score.numel()))


@dataclass(frozen=True)
class Even(Pattern):
    """Equally many entries of every output (first axis), as Wanda prunes, and as an even load for kernels."""

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        rows = score.reshape(len(score), -1)
        order = rows.argsort(dim=1, stable=True)[:, : _count(sparsity, rows.shape[1])]
        return torch.ones_like(rows, dtype=torch.bool).scatter_(1, order, False).view_as(score)


@dataclass(frozen=True)
class NM(Pattern):
    """At most n of every m consecutive entries of an output stay. Below its full sparsity 1 - n/m the groups that lose
    least go first, so that a schedule can approach it.

    Source: Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378, section 3.
    """

    n: int
    m: int

    def check(self, shape: tuple[int, ...]) -> None:
        values = math.prod(shape[1:])
        if not 0 < self.n < self.m:
            raise ValueError(f"{self.n}:{self.m}: must keep n of m with 0 < n < m, got n={self.n}, m={self.m}.")
        if values % self.m:
            raise ValueError(f"{self.n}:{self.m}: groups of {self.m} must divide the {values} values of an output, got "
                             f"shape {tuple(shape)}. Leave this tensor out with where=, or use pattern='elements'.")

    @property
    def most(self) -> float:
        return 1 - self.n / self.m

    def _rank(self, groups: Tensor) -> Tensor:
        """Each entry's place in its group, the highest score 0, of equal scores the last in C order first."""
        return groups.flip(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).flip(1)

    def pooled(self, score: Tensor) -> Tensor:
        groups = score.reshape(-1, self.m)
        return groups.masked_fill(self._rank(groups) < self.n, torch.inf).view_as(score)

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        self.check(tuple(score.shape))
        groups = score.reshape(-1, self.m)
        low = self._rank(groups) >= self.n
        pruned = round(min(1.0, sparsity / self.most) * len(groups))
        intact = drop((groups * low).sum(1), pruned)
        return (~low | intact[:, None]).view_as(score)


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of `size` along the leading axes stay or go as one, by the mean of their scores.

    Source: Narang, Undersander and Diamos, Block-sparse recurrent neural networks, 2017, arXiv:1711.02782.
    """

    size: tuple[int, ...]

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.size, *(1,) * (len(shape) - len(self.size)))

    def check(self, shape: tuple[int, ...]) -> None:
        block = self.block(shape)
        if len(block) > len(shape) or any(n % b for n, b in zip(shape, block, strict=True)):
            name = "x".join(map(str, self.size))
            raise ValueError(f"block {name}: a block must divide the shape, got {tuple(shape)}. Leave this tensor out "
                             "with where=, or choose a block that divides it.")

    def _means(self, score: Tensor) -> Tensor:
        """(n_0, n_1, ...): the mean score of every block."""
        block = self.block(tuple(score.shape))
        split = [part for n, b in zip(score.shape, block, strict=True) for part in (n // b, b)]
        return score.reshape(split).mean(tuple(range(1, 2 * score.dim(), 2)))

    def _spread(self, units: Tensor) -> Tensor:
        for axis, b in enumerate(self.block(tuple(units.shape))):
            units = units.repeat_interleave(b, axis)
        return units

    def pooled(self, score: Tensor) -> Tensor:
        return self._spread(self._means(score))

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        self.check(tuple(score.shape))
        means = self._means(score)
        return self._spread(drop(means, _count(sparsity, means.numel())))


@dataclass(frozen=True)
class Channels(Pattern):
    """Whole outputs (first axis), by the mean of their scores. A mask saves no arithmetic: see lilliput.graph.

    Source: Li, Kadav, Durdanovic, Samet and Graf, Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710.
    """

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape[1:])

    def pooled(self, score: Tensor) -> Tensor:
        return score.reshape(len(score), -1).mean(1).reshape(-1, *(1,) * (score.dim() - 1)).expand_as(score)

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        means = score.reshape(len(score), -1).mean(1)
        kept = drop(means, _count(sparsity, len(means)))
        return kept.reshape(-1, *(1,) * (score.dim() - 1)).expand_as(score).clone()


def parse(text: str) -> Pattern:
    """A pattern from plain text: "elements", "even", "channel", "2:4", "block 4x1".

    Raises ValueError for any other text.

    >>> parse("2:4")(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 0.5)
    tensor([[ True, False,  True, False]])
    """
    simple = {"elements": Pattern(), "even": Even(), "channel": Channels()}
    if text in simple:
        return simple[text]
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        pattern = NM(int(match[1]), int(match[2]))
        pattern.check((1, pattern.m))
        return pattern
    if (match := re.fullmatch(r"block (\d+(?:x\d+)*)", text)) and "0" not in match[1].split("x"):
        return Blocks(tuple(map(int, match[1].split("x"))))
    raise ValueError(f"Prune: pattern must be 'elements', 'even', 'channel', 'N:M' such as '2:4' or a block such as "
                     f"'block 4x1', got {text!r}.")
