"""Patterns of blocks: prune blocks of entries as one, by the mean of their scores."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.prune.patterns import Pattern, drop, dropped
from lilliput.registry import register


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
        return self._spread(drop(means, dropped(sparsity, means.numel())), score.shape)


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
