"""Uniform: b-bit integers on a uniform grid, with a step size that is learnt along with the weights."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lilliput.code.base import Code
from lilliput.quant.grids import levels
from lilliput.quant.ranges import fit
from lilliput.quant.roundings import Rounding
from lilliput.registry import find
from lilliput.stored.base import Stored
from lilliput.stored.grid import Grid


class Uniform(Code):
    """Store a tensor on a uniform grid: W = s (clip(round(w / s) + z, low, high) - z).

    There is one step size s (and zero point z) per tensor, channel or group.

    theta = (w, log2 s): the gradient passes the rounding straight through (Bengio 2013), which gives the step size the
    gradient of learned step size quantization. s is rounded to float16, as it is stored.

    Args:
        bits: 2 to 8 (16 at most).
        per: "tensor", "channel" (first axis) or a group size dividing the values of an output.
        symmetric: whether z is zero.
        range: how s is fitted when attached, a rule of `lilliput.quant.ranges`.
        grid: which levels there are, a grid of `lilliput.quant.grids`.

    Raises:
        KeyError: for an unknown grid or range.
        ValueError: for bits out of range, and for a group that does not divide.

    Source:
        Jacob et al., CVPR 2018, arXiv:1712.05877, equation 1; Esser et al., Learned step size quantization, ICLR 2020,
        arXiv:1902.08153, equations 1 to 3.

    Example:
        >>> Uniform(2, per="tensor", range="minmax").decode(torch.tensor([[0.9, 0.2]]), torch.zeros(1, 1))
        tensor([[1., 0.]])
    """

    zero_point: Tensor

    def __init__(
        self,
        bits: int = 8,
        per: str | int = "channel",
        symmetric: bool = True,
        range: str = "mse",
        grid: str = "uniform",
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 16:
            raise ValueError(f"Uniform: bits must be from 2 to 16, got {bits}. For ternary weights use 2.")
        if not (isinstance(per, int) or per in ("tensor", "channel")):
            raise ValueError(f"Uniform: per must be 'tensor', 'channel' or a group size, got {per!r}.")
        self.bits, self.per, self.symmetric, self.range, self.grid = bits, per, symmetric, range, grid
        self._levels = levels(grid, bits, symmetric, "Uniform")
        find("range", range, "Uniform")
        self.register_buffer("zero_point", torch.zeros(()))

    def label(self) -> str:
        return f"{self.bits} bits"

    @classmethod
    def proposals(cls, tensor: Tensor, statistics: Mapping[str, Tensor]) -> "list[Code]":
        """Offer 8 to 2 bits; a tensor with very many rows shares one step size, which would outweigh its integers."""
        per = "tensor" if len(tensor) > 4096 else "channel"
        return [cls(bits, per) for bits in (8, 6, 4, 3, 2)]

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest level."""
        return self._levels.low, self._levels.high

    def _rows(self, weight: Tensor) -> Tensor:
        if self.per == "tensor":
            return weight.reshape(1, -1)
        if self.per == "channel":
            return weight.reshape(len(weight), -1)
        size = int(self.per)
        if (weight.numel() // len(weight)) % size:
            raise ValueError(
                f"Uniform: a group must divide the {weight.numel() // len(weight)} values of an output, "
                f"got {size}. Choose a divisor or per='channel'."
            )
        return weight.reshape(-1, size)

    def refuses(self, weight: Tensor) -> str | None:
        if not isinstance(self.per, int) or (weight.dim() and weight.numel() // len(weight) % self.per == 0):
            return None
        return f"groups of {self.per} do not divide the values of an output of the shape {tuple(weight.shape)}"

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        scale, self.zero_point = fit(self._rows(weight), self._levels, self.range)
        return weight, scale.clamp(2.0**-14, 65504.0).log2()

    @torch.no_grad()
    def rounded(self, weight: Tensor, rounding: Rounding, **statistics: Tensor) -> Tensor:
        """A weight that lies on the levels which a rounding gives it, so that decoding returns it unchanged.

        Args:
            weight: as `encode` takes it.
            rounding: see `lilliput.quant.roundings`.
            statistics: those that the rounding names, as they are measured.
        """
        rows = self._rows(weight.float())
        scale, zero = fit(rows, self._levels, self.range)
        scale, zero, rows = (part.expand_as(rows).reshape(len(weight), -1) for part in (scale, zero, rows))
        known = {name: _by_output(value, weight) for name, value in statistics.items()}
        rounded = rounding(rows, scale, zero, self._levels, **known)
        return ((rounded - zero) * scale).reshape(weight.shape).to(weight.dtype)

    def decode(self, *theta: Tensor) -> Tensor:
        weight, log_scale = theta
        zero = None if self.symmetric else self.zero_point
        rows = _Grid.apply(self._rows(weight).float(), log_scale, zero, *self.limits)  # type: ignore[no-untyped-call]
        decoded: Tensor = rows.reshape(weight.shape).to(weight.dtype)
        return decoded

    def pack(self, *theta: Stored) -> Stored:
        weight = torch.from_numpy(np.array(theta[0].decode()))
        scale = _scale(torch.from_numpy(np.array(theta[1].decode())))
        rows = self._rows(weight) / scale
        zero = None if self.symmetric else self.zero_point.to(torch.int64)
        x = rows if zero is None else rows + zero
        codes_ = x.clamp(*self.limits).round().to(torch.int64).reshape(weight.shape).numpy()
        if self.per == "tensor":
            shape: tuple[int, ...] = (1,) * weight.dim()
        elif self.per == "channel":
            shape = (len(weight),) + (1,) * (weight.dim() - 1)
        else:
            shape = (len(weight), -1, 1)
        group = self.per if isinstance(self.per, int) else None
        return Grid(
            codes_,
            self.bits,
            scale.reshape(shape).numpy(),
            None if zero is None else zero.reshape(shape).numpy(),
            group,
        )


def _by_output(value: Tensor, weight: Tensor) -> Tensor:
    """A statistic of a weight as roundings take it: (out, d), or as it is where it is a matrix for each group."""
    d = weight.numel() // len(weight)
    if value.dim() == 3 and value.shape[1:] == (d, d):
        return value
    return value.expand_as(weight).reshape(len(weight), d)


def _scale(log_scale: Tensor) -> Tensor:
    """The step size as it is stored: a float16 that is not too small to divide by."""
    return log_scale.clamp(-14, 15.99).exp2().half().float()


class _Grid(torch.autograd.Function):
    """Rows (n, k) on their grids. Written out, since it runs in every forward: a third of what autograd would take.

    With x = w / s + z, and inside where low < x < high: dW/dw = inside, dW/dlog2 s = ln 2 s (q - z - inside (x - z)).
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, log_scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
        scale = _scale(log_scale)
        x = rows / scale
        if zero is None:
            values = x.round().clamp_(low, high).mul_(scale)
        else:
            values = x.add_(zero).round().clamp_(low, high).sub_(zero).mul_(scale)
        ctx.save_for_backward(x, scale, zero, values)
        ctx.limits = (low, high)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, scale, zero, values = ctx.saved_tensors
        through = torch.ops.aten.hardtanh_backward(grad, x, *ctx.limits)
        moved = torch.linalg.vecdot(through, x if zero is None else x - zero)[:, None] * scale
        return through, (torch.linalg.vecdot(grad, values)[:, None] - moved) * math.log(2), None, None, None
