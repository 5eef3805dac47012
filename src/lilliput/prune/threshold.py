"""SoftThreshold: zero what is smaller than a learnt threshold, and move the rest as much towards zero."""

import torch
from torch import Tensor

from lilliput.code.base import Code
from lilliput.stored.base import Stored
from lilliput.stored.plain import Plain
from lilliput.stored.sparse import Sparse


class SoftThreshold(Code):
    """Shrink every entry by a learnt threshold: W = sign(w) relu(|w| - a), with one a = g(s) = exp(s + shift) for the
    tensor.

    theta = (w, s): dW/dw is 1 where W is not zero and else 0, dW/ds = -a sign(w) there. `shift` is a buffer by which a
    rule steers how many entries are zero, whatever s has learnt (0 leaves it alone). Encoding W adds sign(W) a, so that
    decoding gives W again.

    Args:
        start: The first s, the logarithm of a weight's size.

    Example:
        >>> SoftThreshold().decode(torch.tensor([3.0, -0.5, -2.0]), torch.tensor(0.0))
        tensor([ 2., -0., -1.])

    Source:
        Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade and Farhadi, Soft threshold weight reparameterization for
        learnable sparsity, ICML 2020, arXiv:2002.03231, equations 2 to 4, with g = exp.
    """

    shift: Tensor

    def __init__(self, start: float = -10.0) -> None:
        super().__init__()
        self.start = start
        self.register_buffer("shift", torch.zeros(()))

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        s = torch.full((), self.start, dtype=weight.dtype, device=weight.device)
        return weight + weight.sign() * (s + self.shift).exp(), s

    def decode(self, *theta: Tensor) -> Tensor:
        weight, s = theta
        return weight.sign() * torch.relu(weight.abs() - (s + self.shift).exp())

    def pack(self, *theta: Stored) -> Stored:
        decoded = self.decode(*(torch.from_numpy(part.decode().copy()) for part in theta)).numpy()
        return Sparse(decoded != 0, Plain(decoded)) if (decoded == 0).any() else Plain(decoded)
