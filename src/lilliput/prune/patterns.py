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


def _count(sparsity: float, units: int) -> int:
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
        return drop(score, _count(sparsity, score.numel()))


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
        order = rows.argsort(dim=1, stable=True)[:, : _count(sparsity, rows.shape[1])]
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
class Units(Pattern):
    """Blocks of entries that stay or go as one, by the mean of their scores; `block` gives their shape."""

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1,) * len(shape)

    def _means(self, score: Tensor) -> Tensor:
        """(n_0, n_1, ...): the mean score of every block, added up in float64, so that equal blocks tie."""
        block, dims = self.block(tuple(score.shape)), score.dim()
        split = [part for n, b in zip(score.shape, block, strict=True) for part in (n // b, b)]
        apart = score.reshape(split).permute(*range(0, 2 * dims, 2), *range(1, 2 * dims, 2)).flatten(dims)
        return apart.double().mean(dims).to(score.dtype)

    def _spread(self, units: Tensor, shape: torch.Size) -> Tensor:
        for axis, b in enumerate(self.block(tuple(shape))):
            if b > 1:
                units = units.repeat_interleave(b, axis)
        return units

    def pooled(self, score: Tensor) -> Tensor:
        return self._spread(self._means(score), score.shape)

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        self.check(tuple(score.shape))
        means = self._means(score)
        return self._spread(drop(means, _count(sparsity, means.numel())), score.shape)


@register("pattern", name="block")
@dataclass(frozen=True)
class Blocks(Units):
    """Drop blocks of `size` along the leading axes as one, by the mean of their scores.

    Args:
        size: The shape of a block; axes that it does not name have blocks of one.

    Raises:
        ValueError: For a shape that the block does not divide.

    Example:
        >>> Blocks((2, 1))(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])

    Source:
        Narang, Undersander and Diamos, Block-sparse recurrent neural networks, 2017, arXiv:1711.02782.
    """

    size: tuple[int, ...] = (1,)

    @classmethod
    def read(cls, *words: str) -> "Pattern":
        text = " ".join(words)
        if not re.fullmatch(r"\d+(x\d+)*", text) or not all(map(int, text.split("x"))):
            raise ValueError(f"block: the size must be as in 'block 4x1', got 'block {text}'.")
        return cls(tuple(map(int, text.split("x"))))

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*self.size, *(1,) * (len(shape) - len(self.size)))

    def check(self, shape: tuple[int, ...]) -> None:
        block = self.block(shape)
        if len(block) > len(shape) or any(n % b for n, b in zip(shape, block, strict=True)):
            name = "x".join(map(str, self.size))
            raise ValueError(
                f"block {name}: a block must divide the shape, got {tuple(shape)}. Leave this tensor out "
                "with where=, or choose a block that divides it."
            )


@register("pattern", name="channel")
@register("pattern", name="row")
@register("pattern", name="filter")
@register("pattern", name="neuron")
@dataclass(frozen=True)
class Channels(Units):
    """Drop whole outputs (first axis): rows, filters, neurons.

    A mask of whole outputs saves no arithmetic: lilliput.graph removes them.

    Example:
        >>> Channels()(torch.tensor([[4.0, 1.0], [3.0, 1.0]]), 0.5)
        tensor([[ True,  True],
                [False, False]])

    Source:
        Li, Kadav, Durdanovic, Samet and Graf, Pruning filters for efficient ConvNets, ICLR 2017, arXiv:1608.08710.
    """

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape[1:])


@register("pattern", name="column")
@dataclass(frozen=True)
class Columns(Units):
    """Drop whole inputs (second axis): all that an input neuron or channel is multiplied by.

    Raises:
        ValueError: For a tensor of fewer than two axes.

    Example:
        >>> Columns()(torch.tensor([[4.0, 1.0], [3.0, 2.0]]), 0.5)
        tensor([[ True, False],
                [ True, False]])

    Source:
        Wen, Wu, Wang, Chen and Li, Learning structured sparsity in deep neural networks, NIPS 2016, arXiv:1608.03665,
        section 3.2 (channels; columns of the lowered matrix are finer).
    """

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], 1, *shape[2:])

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ValueError(
                f"column: a weight must be (out, in, ...), got shape {tuple(shape)}. Leave this tensor "
                "out with where=, or use pattern='elements'."
            )


@register("pattern", name="kernel")
@dataclass(frozen=True)
class Kernels(Units):
    """Drop the kernel of an (out, in) pair of a convolution as one, such as all 3 x 3 of its entries.

    Raises:
        ValueError: For a tensor that is no convolution's weight.

    Example:
        >>> Kernels()(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), 0.5)
        tensor([[[False, False],
                 [ True,  True]]])

    Source:
        Mao, Han, Pool, Li, Liu, Wang and Dally, Exploring the regularity of sparse structure in convolutional neural
        networks, 2017, arXiv:1705.08922, section 3 (two-dimensional granularity).
    """

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, 1, *shape[2:])

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 3:
            raise ValueError(
                f"kernel: a convolution's weight (out, in, kh, kw) has kernels, got shape {tuple(shape)}. "
                "Leave this tensor out with where=, or use pattern='elements'."
            )


@register("pattern", name="head")
@dataclass(frozen=True)
class HeadRows(Units):
    """Drop the rows of one of `heads` equal groups: those that make the queries, keys or values of one attention head.

    In a weight that stacks queries, keys and values, write "head 3H" for H heads.

    Args:
        heads: The number of groups, which must divide the rows.

    Raises:
        ValueError: For a number of rows that `heads` does not divide.

    Example:
        >>> HeadRows(heads=2)(torch.tensor([[4.0], [3.0], [2.0], [1.0]]), 0.5).flatten()
        tensor([ True,  True, False, False])

    Source:
        Michel, Levy and Neubig, Are sixteen heads really better than one?, NeurIPS 2019, arXiv:1905.10650.
    """

    heads: int = 1

    @classmethod
    def read(cls, *words: str) -> "Pattern":
        if len(words) != 1 or not words[0].isdecimal() or not int(words[0]):
            raise ValueError(f"head: the number of heads must be as in 'head 4', got 'head {' '.join(words)}'.")
        return cls(heads=int(words[0]))

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // self.heads, *shape[1:])

    def check(self, shape: tuple[int, ...]) -> None:
        if shape[0] % self.heads:
            raise ValueError(
                f"head {self.heads}: {self.heads} heads must divide the rows, got shape {tuple(shape)}. "
                "Leave this tensor out with where=, or give the number of heads that it has."
            )


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
