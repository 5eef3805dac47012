"""SoftThreshold: what is smaller than a learnt threshold is zero, the rest is nearer to zero by as much."""

import torch
from torch import Tensor

from lilliput.code.base import Code
from lilliput.code.stored import Plain, Sparse, Stored


class SoftThreshold(Code):
    """W = sign(w) relu(|w| - a), with one threshold a = g(s) = exp(s + shift) for the tensor.

    theta = (w, s): dW/dw is 1 where W is not zero and else 0, dW/ds = -a sign(w) there. shift: a buffer by which a rule
    steers how many entries are zero, whatever s has learnt (0 leaves it alone). start: the first s. Encoding W adds
    sign(W) a, so that decoding gives W again.

    Source: Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade and Farhadi, Soft threshold weight reparameterization
    for learnable sparsity, ICML 2020, arXiv:2002.03231, equations 2 to 4, with g = exp.

    >>> SoftThreshold().decode(torch.tensor([3.0, -0.5, -2.0]), torch.tensor(0.0))
    tensor([ 2., -0., -1.])
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
