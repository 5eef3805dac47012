"""Descent: integers for a layer's weights that weigh the error of its outputs against the bits that they take.

For the rows w of a layer, with H the second moment of its inputs, g what an error of the row's output costs, s a step
and R(q) the bits of an integer q under an entropy coder,

    minimise over integers q    sum over rows g (s q - w) H (s q - w)^T + lambda sum R(q).

Zero is the cheapest integer: how many zeros there are, and where, follows from lambda. Columns are first rounded one
after the other, the later ones making up for the error of the earlier ones (GPTQ) but with R in the choice; then each
integer in turn is set to its best value given all others, column by column, until little changes (coordinate descent).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

WIDTH = 32  # columns after which the rest of the matrix is updated at once


@dataclass(frozen=True)
class Rate:
    """Bits of an integer as the entropy coder sees it, by a law: `zero` for 0, else `first + slope |q|`; each (rows,).

    Example:
        >>> law = Rate.of(torch.tensor([[0.0], [1.0], [0.0], [-1.0]]), 1)
        >>> bool(law.zero[0] < law.first[0] + law.slope[0])
        True
    """

    zero: Tensor
    first: Tensor
    slope: Tensor

    @classmethod
    def of(cls, levels: Tensor, parts: int) -> "Rate":
        """The law that fits integers (d, rows), `parts` blocks of rows each having one of its own: a share of zeros,
        and magnitudes that fall geometrically.
        """
        each = levels.abs().unflatten(1, (parts, -1))
        count = each.shape[0] * each.shape[2]
        kept = each.count_nonzero((0, 2))
        share = (kept + 0.5) / (count + 1)
        above = (each.sum((0, 2)) - kept + 0.5) / (kept + 1)  # the mean magnitude beyond one
        fall = above / (1 + above)
        law = (-(1 - share).log2(), 1 - share.log2() - (1 - fall).log2() + fall.log2(), -fall.log2())
        return cls(*(part.float().repeat_interleave(each.shape[2]) for part in law))


def choose(wanted: Tensor, price: Tensor, rate: Rate, most: Tensor) -> Tensor:
    """The integers q that minimise (q - wanted)^2 + price R(q), |q| <= most.

    Args:
        wanted: (rows,).
        price: what a bit weighs against a squared error of one step, (rows,).
        rate: R.
        most: the largest integer, (rows,).
    """
    size = wanted.abs()
    near = torch.addcmul(size, price, rate.slope, value=-0.5).round_().clamp_min_(1).minimum(most)
    # What q rather than zero gains: size^2 - (size - q)^2 = q (2 size - q), less the bits.
    gain = near * (2 * size - near) - price * torch.addcmul(rate.first - rate.zero, rate.slope, near)
    return near.mul_(gain > 0).copysign_(wanted)


def descend(
    weight: Tensor, hessian: Tensor, scale: Tensor, price: Tensor, most: Tensor, parts: int = 1, sweeps: int = 3
) -> Tensor:
    """Round the rows of one group of a layer.

    Args:
        weight: (rows, d); `parts` blocks of rows are solved side by side, each with a rate of its own.
        hessian: H, (d, d), positive definite.
        scale: s, (rows, 1).
        price: lambda / (g s^2 h), (rows, 1): what a bit weighs against a squared error of one step, where h is what is
            left of H's diagonal once the other columns have made up for it: the geometric mean, det(H)^(1/d).
        most: the largest integer, (rows, 1).
        parts: how many blocks of rows there are.
        sweeps: how often every integer is looked at again.

    Returns:
        Integers, as floats, (rows, d).

    Example:
        >>> W, H = torch.tensor([[0.4, 0.4]]), torch.tensor([[1.0, 0.9], [0.9, 1.0]])
        >>> descend(W, H, torch.ones(1, 1), torch.zeros(1, 1), torch.full((1, 1), 7.0)).abs().sum().item()
        1.0
    """
    factor = torch.linalg.cholesky(hessian.double())
    price = price * float(factor.diagonal().log().mean().mul(2).exp())
    inverse = torch.cholesky_inverse(factor)
    # What the other columns can make up for least comes first, while all of them are still free.
    order = inverse.diagonal().argsort(stable=True)
    U = torch.linalg.cholesky(inverse[order][:, order], upper=True).float()
    hessian = hessian[order][:, order].float()
    wanted, price = (weight / scale).T[order].contiguous(), price[:, 0]
    most = most[:, 0]
    rate = Rate.of(wanted.round().clamp_(-most, most), parts)
    levels = _forward(wanted, U, price, rate, most)
    rate = Rate.of(levels, parts)  # the rate is known once there are integers
    levels = _forward(wanted, U, price, rate, most)
    error = hessian @ (levels - wanted)
    for _ in range(sweeps):
        rate = Rate.of(levels, parts)
        _sweep(levels, error, hessian, price, rate, most)
    return torch.empty_like(levels).index_copy_(0, order, levels).T


def _blocks(d: int) -> Iterator[tuple[int, int]]:
    return pairwise([*range(0, d, WIDTH), d])


def _forward(wanted: Tensor, U: Tensor, price: Tensor, rate: Rate, most: Tensor) -> Tensor:
    """Round column after column (here a row of `wanted`); an error moves those that follow."""
    wanted, levels = wanted.clone(), torch.empty_like(wanted)
    spread = U.diagonal()
    prices = spread.square()[:, None] * price
    for start, end in _blocks(len(wanted)):
        errors = torch.empty_like(wanted[start:end])
        for j in range(start, end):
            levels[j] = choose(wanted[j], prices[j], rate, most)
            error = torch.sub(wanted[j], levels[j], out=errors[j - start]).div_(spread[j])
            wanted[j:end].addr_(U[j, j:end], error, alpha=-1)
        wanted[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return levels


def _sweep(levels: Tensor, error: Tensor, hessian: Tensor, price: Tensor, rate: Rate, most: Tensor) -> None:
    """Set each column to its best integers given all others, in place; error = H (levels - wanted)."""
    curvature = hessian.diagonal()
    prices = price / curvature[:, None]
    for start, end in _blocks(len(levels)):
        part, before = error[start:end].clone(), levels[start:end].clone()
        for j in range(start, end):
            level = choose(levels[j] - part[j - start] / curvature[j], prices[j], rate, most)
            part.addr_(hessian[j, start:end], level - levels[j])
            levels[j] = level
        error.addmm_(hessian[:, start:end], levels[start:end] - before)
