"""Roundings: which level each weight gets, once the grid is known. One function a rule.

A rounding takes weights (out, d), d the values of one output, with the scale and the zero point of each (broadcastable
to them) and the levels of the grid, and returns a level for each weight. Its keyword-only arguments name the statistics
that it needs; calibration supplies them, each as (out, d), the layer-wise Hessian as (groups, d, d). A tensor that has
none, since its inputs cannot be seen, is rounded to nearest. Weights that are zero, such as pruned ones, must stay so.
"""

from collections.abc import Callable

from torch import Tensor

from lilliput.quant.grids import Levels
from lilliput.registry import register

Rounding = Callable[..., Tensor]


@register("rounding")
def nearest(weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels) -> Tensor:
    """Take the nearest level, which has the least error of each weight alone. Needs no data.

    Args:
        weight: (out, d), d the values of one output.
        scale: The steps, broadcastable to weight.
        zero: The zero points, likewise.
        levels: Those of the grid.

    Returns:
        A level for each weight, in its type.

    Example:
        >>> import torch
        >>> one, none = torch.ones(1, 1), torch.zeros(1, 1)
        >>> nearest(torch.tensor([[0.4, 0.6, -9.0]]), one, none, Levels(-7, 7, True))
        tensor([[ 0.,  1., -7.]])

    Source:
        Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
        2018, arXiv:1712.05877, equation 12.
    """
    return (weight / scale + zero).round().clamp(levels.low, levels.high)


@register("rounding")
def stochastic(weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels, *, noise: Tensor) -> Tensor:
    """Draw one of the two nearest levels such that the weight is met on average. Needs no data.

    Args:
        weight: (out, d), d the values of one output.
        scale: The steps, broadcastable to weight.
        zero: The zero points, likewise.
        levels: Those of the grid.
        noise: Uniform in [0, 1), (out, d).

    Returns:
        A level for each weight, in its type.

    Example:
        >>> import torch
        >>> one, none, noise = torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([[0.5, 0.8]])
        >>> stochastic(torch.tensor([[0.3, 0.3]]), one, none, Levels(-7, 7, True), noise=noise)
        tensor([[0., 1.]])

    Source:
        Gupta, Agrawal, Gopalakrishnan and Narayanan, Deep learning with limited numerical precision, ICML 2015,
        arXiv:1502.02551, section 3.
    """
    return (weight / scale + zero + noise).floor().clamp(levels.low, levels.high)
