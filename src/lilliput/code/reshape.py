"""Reshape: a tensor that is stored under another shape."""

import math

from torch import Tensor

from lilliput.code.base import Code
from lilliput.stored.base import Stored
from lilliput.stored.einsum import LABELS, Einsum


class Reshape(Code):
    """Store a tensor in another shape: W = reshape(theta, the shape that was encoded), theta of the shape given.

    A layer that is built from a factor may need it in another shape than the codes that store it.

    Args:
        inside: the shape of theta.

    Example:
        >>> import torch
        >>> Reshape((4,)).encode(torch.ones(2, 2)).shape
        torch.Size([4])
    """

    inner = (0,)

    def __init__(self, inside: tuple[int, ...]) -> None:
        super().__init__()
        self.inside = inside

    def refuses(self, weight: Tensor) -> str | None:
        fits = weight.numel() == math.prod(self.inside)
        return None if fits else f"its {weight.numel()} values do not have the shape {self.inside}"

    def encode(self, weight: Tensor) -> Tensor:
        self._shape = tuple(weight.shape)
        return weight.reshape(self.inside)

    def decode(self, *theta: Tensor) -> Tensor:
        return theta[0].reshape(self._shape or theta[0].shape)

    def pack(self, *theta: Stored) -> Stored:
        shape = self._shape or theta[0].shape
        axes = LABELS[: len(theta[0].shape)]
        return theta[0].reshaped(shape) or Einsum((theta[0],), f"{axes}->{axes}", shape)
