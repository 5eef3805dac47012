"""Roundings: which level each weight gets, once the grid is known. One function a rule.

A rounding takes weights (out, d), d the values of one output, with the scale and the zero point of each (broadcastable
to them) and the levels of the grid, and returns a level for each weight. Its keyword-only arguments name the statistics
that it needs; `lilliput.statistics.calibrate` supplies them. A tensor that lacks one, since its inputs cannot be seen,
is rounded to nearest. Weights that are zero, such as pruned ones, must stay zero.
"""

from collections.abc import Callable

from torch import Tensor

from lilliput.quant.grids import Levels
from lilliput.registry import register

Rounding = Callable[..., Tensor]


@register("rounding")
def nearest(weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """The nearest level: the least error of each weight alone. Needs no data.

    Example:
        >>> import torch
        >>> one, none = torch.ones(1, 1), torch.zeros(1, 1)
        >>> nearest(torch.tensor([[0.4, 0.6, -9.0]]), one, none, Levels(-7, 7, True))
        tensor([[ 0.,  1., -7.]])
    """
    return (weight / scale + zero).round().clamp(levels.low, levels.high)


@register("rounding")
def stochastic(weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels, *, noise: Tensor) -> Tensor:
    """One of the two nearest levels, drawn such that the weight is met on average. Needs no data.

    Source: Gupta, Agrawal, Gopalakrishnan and Narayanan, Deep learning with limited numerical precision, ICML 2015,
        arXiv:1502.02551, section 3.
    """
    return (weight / scale + zero + noise.reshape(weight.shape)).floor().clamp(levels.low, levels.high)
