"""HardConcrete: a random gate on every entry while training, exactly zero or one much of the time."""

import math

import torch
from torch import Tensor

from lilliput.code.base import Code
from lilliput.prune.sparse import noise
from lilliput.stored.base import Stored
from lilliput.stored.plain import Plain
from lilliput.stored.sparse import Sparse

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


class HardConcrete(Code):
    """Multiply every entry by a random gate z in [0, 1]: W = w z.

    In training mode, with u uniform on (0, 1) anew at each step,

        s = sigmoid((log u - log(1 - u) + log alpha) / beta),  z = min(1, max(0, s (zeta - gamma) + gamma)),

    in eval mode z = min(1, max(0, sigmoid(log alpha) (zeta - gamma) + gamma)); beta = 2/3, gamma = -0.1, zeta = 1.1.

    theta = (w, log alpha / speed): an optimizer with one learning rate for all moves gates `speed` times as far. u is a
    function of (name, seed, step) alone. A rule counts the steps in the buffer `step`; where that is negative the gates
    are no longer drawn, but are those of the buffer `mask`.

    Args:
        name: The tensor's name, which the gates depend on.
        seed: The seed of the gates.
        start: The first probability of a gate to be open, in (0, 1).
        speed: How many times as far as a weight a gate moves in a step.

    Example:
        >>> code = HardConcrete().eval()
        >>> code.decode(torch.tensor([3.0, 3.0, 3.0]), torch.tensor([-1.0, 0.0, 1.0]))
        tensor([0.0000, 1.5000, 3.0000])

    Source:
        Louizos, Welling and Kingma, Learning sparse neural networks through L0 regularization, ICLR 2018,
        arXiv:1712.01312, equations 10 to 13.
    """

    mask: Tensor
    step: Tensor

    def __init__(self, name: str = "", seed: int = 0, start: float = 0.9, speed: float = 10.0) -> None:
        super().__init__()
        self.name, self.seed, self.start, self.speed = name, seed, start, speed
        self.register_buffer("mask", torch.ones((), dtype=torch.bool))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        self.mask = torch.ones_like(weight, dtype=torch.bool)
        log_alpha = math.log(self.start / (1 - self.start)) + BETA * math.log(-GAMMA / ZETA)
        return weight, torch.full_like(weight, log_alpha / self.speed)

    def decode(self, *theta: Tensor) -> Tensor:
        return theta[0] * self.gates(theta[1])

    def gates(self, scaled: Tensor) -> Tensor:
        """Compute z of every entry from log alpha / speed."""
        if int(self.step) < 0:
            return self.mask.to(scaled.dtype)
        log_alpha = self.speed * scaled
        if self.training:
            u = noise(self.name, scaled.shape, self.seed, int(self.step)).to(scaled).clamp(1e-6, 1 - 1e-6)
            s = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / BETA)
        else:
            s = torch.sigmoid(log_alpha)
        return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def opened(self, scaled: Tensor) -> Tensor:
        """Compute the probability that each gate is not zero: sigmoid(log alpha - beta log(-gamma / zeta))."""
        return torch.sigmoid(self.speed * scaled - BETA * math.log(-GAMMA / ZETA))

    def pack(self, *theta: Stored) -> Stored:
        decoded = self.decode(*(torch.from_numpy(part.decode().copy()) for part in theta)).numpy()
        return Sparse(decoded != 0, Plain(decoded)) if (decoded == 0).any() else Plain(decoded)
