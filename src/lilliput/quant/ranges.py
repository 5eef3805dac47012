"""Ranges: how large the step of a grid is. One function a rule, from rows of values (n, k) and the levels of a grid to
(scale, zero_point), each (n, 1).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lilliput.quant.grids import Levels
from lilliput.registry import lookup, register

Range = Callable[[Tensor, Levels], tuple[Tensor, Tensor]]
BLOCK = 32768


@register("range")
def minmax(rows: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Take the whole range of each row: no clipping.

    Args:
        rows: Values (n, k), each row with a step of its own.
        levels: Those of the grid.

    Returns:
        The scale and the zero point of each row, both (n, 1).

    Example:
        >>> minmax(torch.tensor([[-3.5, 1.0]]), Levels(-7, 7, symmetric=True))[0]
        tensor([[0.5000]])

    Source:
        Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
        2018, arXiv:1712.05877, section 3.1.
    """
    return levels.steps(rows.amin(1, True), rows.amax(1, True))


@register("range")
def percentile(rows: Tensor, levels: Levels, share: float = 0.999) -> tuple[Tensor, Tensor]:
    """Take the range that holds the central part of each row's values.

    Zeros are left out: pruned ones would pull the range together, and zero is exact on any grid.

    Args:
        rows: Values (n, k), each row with a step of its own.
        levels: Those of the grid.
        share: How much of the values lies inside on either side, in (0.5, 1].

    Returns:
        The scale and the zero point of each row, both (n, 1).

    Example:
        >>> rows = torch.linspace(-1, 1, 2001)[None].index_fill(1, torch.tensor(0), -100.0)
        >>> percentile(rows, Levels(-100, 100, symmetric=True))[0].round(decimals=2)
        tensor([[0.0100]])

    Source:
        McKinstry et al., Discovering low-precision networks close to full-precision networks for efficient embedded
        inference, 2018, arXiv:1809.04191.
    """
    ends = torch.tensor([1 - share, share], dtype=rows.dtype, device=rows.device)
    low, high = rows.masked_fill(rows == 0, torch.nan).nanquantile(ends, dim=1).nan_to_num(0.0).unsqueeze(-1).unbind(0)
    return levels.steps(low, high)


@register("range")
def mse(rows: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Take the fraction of each row's range, of forty tried, whose squared rounding error is least.

    Args:
        rows: Values (n, k), each row with a step of its own.
        levels: Those of the grid.

    Returns:
        The scale and the zero point of each row, both (n, 1).

    Example:
        >>> rows = torch.cat([torch.rand(1, 1000), torch.tensor([[9.0]])], dim=1)
        >>> bool(mse(rows, Levels(-7, 7, symmetric=True))[0] < 9 / 7)
        True

    Source:
        Nagel et al., A white paper on neural network quantization, 2021, arXiv:2106.08295, equation 8.
    """
    low, high = rows.amin(1, True), rows.amax(1, True)
    tried = [levels.steps(low * part, high * part) for part in torch.linspace(1.0, 0.2, 40).tolist()]
    errors = torch.zeros(len(tried), len(rows), 1, device=rows.device)
    # Blocks that stay in the cache, for all forty grids: eight times faster on a large table.
    height, width = max(1, BLOCK // rows.shape[1]), BLOCK
    for top in range(0, len(rows), height):
        part = slice(top, top + height)
        for block in rows[part].split(width, dim=1):
            x = torch.empty_like(block)
            for (scale, zero), error in zip(tried, errors, strict=True):
                torch.div(block, scale[part], out=x)
                if levels.symmetric:
                    x.round_().clamp_(levels.low, levels.high)
                else:
                    x.add_(zero[part]).round_().clamp_(levels.low, levels.high).sub_(zero[part])
                x.mul_(scale[part]).sub_(block)
                error[part] += torch.linalg.vecdot(x, x)[:, None]
    best = errors.argmin(0)[None]
    scale, zero = (torch.stack(parts).gather(0, best)[0] for parts in zip(*tried, strict=True))
    return scale, zero


@register("range")
def pairs(rows: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Take the least range that holds the sum of any two neighbours 2k and 2k + 1 of one sign, and each of them alone.

    For weights that a CPU multiplies in pairs, adding the two products in 16 bits: with 8 bits, 255 times the sum of
    two neighbouring levels then never exceeds 32767, and steps are finer than on a grid that is reduced as a whole.

    Args:
        rows: Values (n, k), each row with a step of its own.
        levels: Those of the grid.

    Returns:
        The scale and the zero point of each row, both (n, 1).

    Example:
        >>> pairs(torch.tensor([[3.0, 4.0, -5.0, 1.0]]), Levels(-7, 7, symmetric=True))[0]
        tensor([[1.]])

    Source:
        No paper: what `vpmaddubsw` needs.
    """
    even, odd = rows[:, 0::2], rows[:, 1::2]
    if even.shape[1] > odd.shape[1]:
        odd = torch.cat([odd, torch.zeros_like(even[:, :1])], dim=1)
    # A sum of one sign: |a| + |b| where the signs agree, else the larger of the two.
    sums = torch.maximum((even + odd).abs(), torch.maximum(even.abs(), odd.abs())).amax(1, True)
    return levels.steps(-sums, sums)


def fit(rows: Tensor, levels: Levels, rule: str, who: str = "Uniform") -> tuple[Tensor, Tensor]:
    """Fit the steps of a grid to rows of values by the named rule.

    Args:
        rows: Values (n, k), each row with a step of its own.
        levels: Those of the grid.
        rule: The name of a registered range.
        who: What an error message begins with.

    Returns:
        The scale and the zero point of each row, both (n, 1).

    Raises:
        KeyError: for an unknown rule.
        ValueError: for values that are not finite.
    """
    function: Range = lookup("range", rule, who)
    if not rows.isfinite().all():
        raise ValueError(f"{who}: weights must be finite, got NaN or infinity. Check the training that made them.")
    with torch.no_grad():
        return function(rows.float(), levels)
