"""Grids: the integers that b bits stand for. One function a grid, from (bits, symmetric) to its levels.

A value is stored as an integer q, its level, and read back as s (q - z), with a step s and a zero point z per tensor,
channel or group. Levels are equally spaced; codebooks of other values are codes of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.registry import lookup, register


@dataclass(frozen=True)
class Levels:
    """The integers low .. high.

    Attributes:
        low: the lowest level.
        high: the highest one.
        symmetric: whether the zero point is always zero.
        step: the type that steps are stored in.

    Example:
        >>> Levels(-7, 7, symmetric=True).steps(torch.tensor([[-3.5]]), torch.tensor([[1.0]]))
        (tensor([[0.5000]]), tensor([[0.]]))
    """

    low: int
    high: int
    symmetric: bool
    step: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        if not (self.low <= 0 < self.high and (self.low < 0 or not self.symmetric)):
            raise ValueError(
                f"Levels: low must be at most 0 (below it without a zero point) and high above 0, got {self.low} and "
                f"{self.high}."
            )

    def steps(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The step and the zero point of a grid that reaches from `low` to `high`, in float32.

        Steps are rounded to the type that they are stored in first, so that zero points fit them. Zero is always
        a value of the grid.

        Args:
            low: of any shape.
            high: of the same shape.

        Returns:
            (scale, zero_point), both of that shape.
        """
        if self.symmetric:
            scale = torch.maximum((-low).clamp_min(1e-8) / -self.low, high.clamp_min(1e-8) / self.high)
            return self._stored(scale), torch.zeros_like(scale)
        low, high = low.clamp_max(0), high.clamp_min(0)
        scale = self._stored((high - low).clamp_min(1e-8) / (self.high - self.low))
        return scale, (self.low - low / scale).round().clamp(self.low, self.high)

    def _stored(self, scale: Tensor) -> Tensor:
        if self.step == torch.float16:
            scale = scale.clamp(2.0**-14, 65504)  # a step that is too small to divide by is none
        return scale.to(self.step).float()


Grid = Callable[[int, bool], Levels]


@register("grid")
def uniform(bits: int, symmetric: bool) -> Levels:
    """Use all levels of b bits: -(2^(b-1) - 1) .. 2^(b-1) - 1 where the zero point is zero, else 0 .. 2^b - 1.

    Args:
        bits: b, from 2 to 16.
        symmetric: Whether the zero point is always zero.

    Returns:
        The levels.

    Example:
        >>> uniform(4, True), uniform(4, False).high
        (Levels(low=-7, high=7, symmetric=True, step=torch.float16), 15)

    Source:
        Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
        2018, arXiv:1712.05877, section 2.1.
    """
    top = 2 ** (bits - 1) - 1
    return Levels(-top, top, True) if symmetric else Levels(0, 2**bits - 1, False)


@register("grid")
def reduced(bits: int, symmetric: bool) -> Levels:
    """Use half of the levels of b bits, so that sums of two products of 8-bit numbers keep within 16 bits.

    CPUs with AVX2 but without VNNI add two neighbouring products of unsigned and signed 8-bit numbers in 16 bits, which
    saturate for weights that use all levels: 255 (127 + 127) > 32767 >= 255 (64 + 64).

    Args:
        bits: b, from 2 to 16.
        symmetric: Whether the zero point is always zero.

    Returns:
        The levels.

    Example:
        >>> reduced(8, True).high
        64

    Source:
        No paper: the option reduce_range of runtimes.
    """
    top = 2 ** max(0, bits - 2)
    return Levels(-top, top, True) if symmetric else Levels(0, 2 * top - 1, False)


def levels(grid: str, bits: int, symmetric: bool, who: str) -> Levels:
    """The levels of a grid by name.

    Raises:
        KeyError: for an unknown grid.
        ValueError: where b bits cannot hold its levels.
    """
    function: Grid = lookup("grid", grid, who)
    levels, most = function(bits, symmetric), uniform(bits, symmetric)
    if levels.low < most.low or levels.high > most.high or levels.symmetric != symmetric:
        raise ValueError(
            f"{who}: the levels of grid {grid!r} must lie in [{most.low}, {most.high}] for {bits} bits, got "
            f"[{levels.low}, {levels.high}]. Use more bits."
        )
    return levels
