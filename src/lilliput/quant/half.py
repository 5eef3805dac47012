"""Half: store weights as 16-bit floats, with a straight-through gradient."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.code.base import Code
from lilliput.stored.base import Stored
from lilliput.stored.plain import Plain


class _Half(torch.autograd.Function):
    """float16 and back, the gradient passed straight through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.half().to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Half(Code):
    """Store a tensor as sixteen-bit floats: W = float16(w), the gradient passed straight through. For biases.

    Example:
        >>> Half().decode(torch.tensor([1.0001]))
        tensor([1.])

    Source:
        No paper for the storage; the gradient: Bengio, Leonard and Courville, Estimating or propagating gradients
        through stochastic neurons for conditional computation, 2013, arXiv:1308.3432.
    """

    def decode(self, *theta: Tensor) -> Tensor:
        weight: Tensor = _Half.apply(theta[0])  # type: ignore[no-untyped-call]
        return weight

    def pack(self, *theta: Stored) -> Stored:
        return Plain(theta[0].decode().astype(np.float16))
