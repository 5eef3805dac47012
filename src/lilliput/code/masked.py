"""Masked: keep some entries of a tensor, drop the others."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.code.base import Code
from lilliput.stored.base import Stored
from lilliput.stored.sparse import Sparse


class _Straight(torch.autograd.Function):
    """m * theta forward; backward as if m were one."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, mask: Tensor) -> Tensor:
        return theta * mask

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[0], None


class Masked(Code):
    """Keep the entries of a tensor under a mask and drop the others: W = m * theta, m boolean and of W's shape.

    theta keeps its dense shape while training, so that a rule can move the mask; stored are the kept entries and their
    positions (a bitmap or index gaps, whichever is smaller).

    Args:
        mask: W's shape, True or nonzero where an entry is kept.
        block: the shape that the pattern keeps together, which needs one position.
        straight: let gradients reach dropped entries too, as methods need that ask which ones would help.

    Example:
        >>> code = Masked(torch.tensor([[True, False]]))
        >>> code.decode(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 0.]])
    """

    inner = (0,)
    mask: Tensor

    def __init__(self, mask: Tensor, block: tuple[int, ...] | None = None, straight: bool = False) -> None:
        super().__init__()
        self.block, self.straight = block, straight
        self.register_buffer("mask", mask.bool())

    @classmethod
    def made(cls, settings: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> "Masked":
        if "mask" not in buffers:
            raise TypeError("Masked: a mask must be given, and a recipe holds none. Use a stage that makes one: Prune.")
        return cls(buffers["mask"].clone(), **settings)

    def refuses(self, weight: Tensor) -> str | None:
        return (
            None
            if weight.shape == self.mask.shape
            else (f"the mask has the shape {tuple(self.mask.shape)}, the tensor {tuple(weight.shape)}")
        )

    def encode(self, weight: Tensor) -> Tensor:
        return weight * self.mask

    def decode(self, *theta: Tensor) -> Tensor:
        mask = self.mask.view(torch.uint8)  # as bytes: three times faster than as booleans
        if self.straight and torch.is_grad_enabled():
            straight: Tensor = _Straight.apply(theta[0], mask)  # type: ignore[no-untyped-call]
            return straight
        return theta[0] * mask

    @property
    def sparsity(self) -> float:
        """The fraction of entries that is zero."""
        return 1 - int(self.mask.sum()) / max(1, self.mask.numel())

    def pack(self, *theta: Stored) -> Stored:
        return Sparse(np.asarray(self.mask.cpu().numpy()), theta[0], self.block)
