"""A grid and a rounding."""

from torch import Tensor

from lilliput.quant.grids import Levels
from lilliput.registry import register


@register("grid")
def tapered(bits: int, symmetric: bool) -> Levels:
    """One level fewer at the far end, or at both ends around zero; of two bits all levels."""
    less = bits > 2
    top = 2 ** (bits - 1) - 1 - less
    return Levels(-top, top, True) if symmetric else Levels(0, 2**bits - 1 - less, False)


@register("rounding")
def toward_zero(weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """The next level between the weight and zero: no weight grows. Needs no data."""
    return ((weight / scale).trunc() + zero).clamp(levels.low, levels.high)
