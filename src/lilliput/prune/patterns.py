"""Patterns: which weights may be zero together. Each is a function (score, sparsity) -> mask, True where kept.

Counts are exact: round(sparsity * units) units are dropped, but never the last one of a tensor, those of the lowest
score first and of equal scores the first in C order. `pooled` gives every entry the score of its unit, so that an
allocation can compare tensors. A shape that a pattern does not divide raises ValueError. Weights are (out, in) or
(out, in, kh, kw): the first axis is the outputs, the second the inputs.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lilliput.registry import lookup, register


def drop(score: Tensor, count: int) -> Tensor:
    """Make a mask that is False at the `count` lowest scores, the first ones of equal scores.

    Args:
        score: Scores of any shape.
        count: How many entries to drop.

    Returns:
        A Boolean mask of the shape of the scores.

    Raises:
        ValueError: For a score that is NaN.

    Example:
        >>> drop(torch.tensor([2.0, 1.0, 1.0, 3.0]), 1)
        tensor([ True, False,  True,  True])
    """
    flat = score.flatten()
    if count <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    if bool(flat.isnan().any()):
        raise ValueError(
            "drop: scores must be numbers, got NaN: a weight or a gradient has become NaN. Train with a "
            "lower lr or clipped gradients, and check the data."
        )
    if flat.dtype == torch.bfloat16:  # numpy has no such type
        flat = flat.float()
    # Ten times faster than kthvalue, and this runs while training.
    threshold = float(np.partition(flat.detach().cpu().numpy(), count - 1)[count - 1])
    keep = flat >= threshold
    surplus = count - int(flat.numel() - keep.sum())
    keep[(flat == threshold).nonzero()[:surplus, 0]] = False
    return keep.view_as(score)


def dropped(sparsity: float, units: int) -> int:
    """How many of so many units are dropped: never the last one."""
    return min(round(sparsity * units), units - 1)


@register("pattern", name="elements")
@dataclass(frozen=True)
class Pattern:
    """Drop single entries: any weight may become zero.

    A pattern of your own is a class with this base under `@register("pattern")`, or, where every shape will do and
    units are single entries, a function (score, sparsity) -> mask.

    Example:
        >>> Pattern()(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])

    Source:
        No paper: the plain case.
    """

    @classmethod
    def read(cls, *words: str) -> "Pattern":
        """The pattern from the words after its name, such as "4x1" in "block 4x1"."""
        if words:
            raise ValueError(f"{cls.__name__}: this pattern must be one word, got {' '.join(words)!r} after it.")
        return cls()

    def of(self, name: str) -> "Pattern":
        """The pattern of the tensor of that name: the same one, unless the pattern depends on the kind of layer."""
        return self

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
        return drop(score, dropped(sparsity, score.numel()))


@register("pattern", name="even")
@dataclass(frozen=True)
class Even(Pattern):
    """Drop equally many entries of every output (first axis), as Wanda prunes; it also spreads the load evenly in
    kernels.

    Example:
        >>> Even()(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])

    Source:
        Sun, Liu, Bair and Kolter, A simple and effective pruning approach for large language models, ICLR 2024,
        arXiv:2306.11695, section 3 (comparison within each output).
    """

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        rows = score.reshape(len(score), -1)
        order = rows.argsort(dim=1, stable=True)[:, : dropped(sparsity, rows.shape[1])]
        return torch.ones_like(rows, dtype=torch.bool).scatter_(1, order, False).view_as(score)


@register("pattern", name="N:M")
@dataclass(frozen=True)
class NM(Pattern):
    """Keep at most n of every m consecutive entries of an output, or with `out` of m consecutive outputs of an input.

    Below its full sparsity 1 - n/m the groups that lose least go first, so that a schedule can approach it.

    Args:
        n: How many entries of a group stay.
        m: The size of a group, which must divide the axis.
        out: Whether groups lie along the outputs.

    Raises:
        ValueError: For a shape that m does not divide, and unless 0 < n < m.

    Example:
        >>> NM(2, 4)(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 0.5)
        tensor([[ True, False,  True, False]])

    Source:
        Mishra et al., Accelerating sparse deep neural networks, 2021, arXiv:2104.08378, section 3.
    """

    n: int
    m: int
    out: bool = False

    @classmethod
    def read(cls, *words: str) -> "NM":
        match = re.fullmatch(r"(\d+):(\d+)( out)?", " ".join(words))
        if not match:
            raise ValueError(f"N:M: must be as in '2:4' or '2:4 out', got {' '.join(words)!r}.")
        pattern = cls(int(match[1]), int(match[2]), bool(match[3]))
        pattern.check((pattern.m, pattern.m))
        return pattern

    def check(self, shape: tuple[int, ...]) -> None:
        values = shape[0] if self.out else math.prod(shape[1:])
        if not 0 < self.n < self.m:
            raise ValueError(f"{self.n}:{self.m}: must keep n of m with 0 < n < m, got n={self.n}, m={self.m}.")
        if values % self.m:
            what = "outputs of an input" if self.out else "values of an output"
            raise ValueError(
                f"{self.n}:{self.m}: groups of {self.m} must divide the {values} {what}, got "
                f"shape {tuple(shape)}. Leave this tensor out with where=, or use pattern='elements'."
            )

    @property
    def most(self) -> float:
        return 1 - self.n / self.m

    def _groups(self, score: Tensor) -> Tensor:
        """(groups, m)."""
        return (score.transpose(0, -1) if self.out else score).reshape(-1, self.m)

    def _back(self, groups: Tensor, shape: torch.Size) -> Tensor:
        if not self.out:
            return groups.view(shape)
        return groups.view(shape[-1], *shape[1:-1], shape[0]).transpose(0, -1).contiguous()

    def _rank(self, groups: Tensor) -> Tensor:
        """Each entry's place in its group, the highest score 0, of equal scores the last in C order first."""
        return groups.flip(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1).flip(1)

    def pooled(self, score: Tensor) -> Tensor:
        groups = self._groups(score)
        return self._back(groups.masked_fill(self._rank(groups) < self.n, torch.inf), score.shape)

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        self.check(tuple(score.shape))
        groups = self._groups(score)
        low = self._rank(groups) >= self.n
        pruned = round(min(1.0, sparsity / self.most) * len(groups))
        intact = drop((groups * low).sum(1), pruned)
        return self._back(~low | intact[:, None], score.shape)


@dataclass(frozen=True)
class Function(Pattern):
    """A pattern that is a plain function (score, sparsity) -> mask."""

    function: Callable[[Tensor, float], Tensor]

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        return self.function(score, sparsity)


def parse(text: str) -> Pattern:
    """Make a pattern from plain text: its name in the registry, then its settings.

    "elements": any weight. "even": equally many of every output. "2:4" (any N:M): along the inputs; "2:4 out": along
    the outputs. "block 4x1" (any size). "channel", with the other names "row", "filter" and "neuron": whole outputs.
    "column": whole inputs. "kernel": the kernels of a convolution. "head 4" (any number): the rows of attention heads.
    "engine": what the engine runs fastest, tensor by tensor.

    Args:
        text: The name of a pattern, with its numbers.

    Returns:
        The pattern: a function (score, sparsity) -> mask.

    Raises:
        KeyError: For an unknown name.
        ValueError: For settings that the pattern does not take.

    Example:
        >>> parse("2:4")(torch.tensor([[4.0, 1.0, 3.0, 2.0]]), 0.5)
        tensor([[ True, False,  True, False]])
        >>> parse("column")(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])
    """
    name, *words = text.split(" ")
    if ":" in name:
        name, words = "N:M", [name, *words]
    if text == "layer":
        raise ValueError(
            "Prune: pattern must say what is zero within a tensor, got 'layer'. A whole layer is not "
            "zeroed but taken out of the network: see lilliput.graph.blocks.remove_blocks."
        )
    made = lookup("pattern", name, "Prune")
    if isinstance(made, type):
        pattern: Pattern = made.read(*words)  # type: ignore[attr-defined]
        return pattern
    if words:
        raise ValueError(f"Prune: pattern {name!r} must be one word, got {text!r}.")
    return Function(made)
