"""Masked: keep some entries of a tensor, drop the others."""

import numpy as np
import torch
from torch import Tensor

from lilliput.code.base import Code
from lilliput.code.stored import Grid, Plain, Sparse, Stored


class Masked(Code):
    """W = m * theta, with a boolean mask m of W's shape.

    theta keeps its dense shape while training, so that a rule can move the mask; stored are the kept entries and their
    positions (a bitmap or index gaps, whichever is smaller). `block` is the shape that the pattern keeps together.

    >>> code = Masked(torch.tensor([[True, False]]))
    >>> code.decode(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 0.]])
    """

    inner = (0,)
    mask: Tensor

    def __init__(self, mask: Tensor, block: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("mask", mask.bool())

    def encode(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def decode(self, *theta: Tensor) -> Tensor:
        return theta[0] * self.mask.view(torch.uint8)  # as bytes: three times faster than as booleans

    @property
    def sparsity(self) -> float:
        """The fraction of entries that is zero."""
        return 1 - float(self.mask.float().mean())

    def pack(self, *theta: Stored) -> Stored:
        values = theta[0] if isinstance(theta[0], Plain | Grid) else Plain(theta[0].decode())
        return Sparse(np.asarray(self.mask.cpu().numpy()), values, self.block)


def full(weight: Tensor) -> Masked:
    """A mask that keeps everything: where a gradual rule starts."""
    return Masked(torch.ones_like(weight, dtype=torch.bool))
