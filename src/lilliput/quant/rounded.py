"""Rounded: a tensor on a grid that weighs the harm against the bits, and how it is stored."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lilliput.quant.descent import Rate, choose, descend
from lilliput.quant.grids import levels as grid_of
from lilliput.quant.ranges import fit
from lilliput.statistics.harm import Metric
from lilliput.statistics.hessian import damped
from lilliput.stored.base import Stored
from lilliput.stored.grid import Grid, half
from lilliput.stored.sparse import Sparse

DAMP = 0.01  # of the mean of H's diagonal
RATE = 0.2  # lambda in squared steps of the mean output error; at many bits ln 4 / 12 = 0.116 is best, at few more
LEAST = 1e-3  # of the mean: what an output counts at least
COUPLED = 2304  # inputs of an output that make up for one another; the time grows with their cube
MOST_BITS = 8  # that the entropy coder takes

Level = int | float
"""The bits of a grid whose range is fitted to the values; or, as a float, the mean step of an entropy-coded grid."""


@dataclass(frozen=True)
class Rounded:
    """A tensor as integers times a step.

    Args:
        levels: integers, as floats, (out, d).
        scale: the step of each row, (out, 1), exact in float16.
        per: "tensor" or "channel": whether all rows have one step.
        bits: of the grid.
        shape: of the tensor.
    """

    levels: Tensor
    scale: Tensor
    per: str
    bits: int
    shape: tuple[int, ...]

    def decode(self) -> Tensor:
        """The tensor."""
        return (self.levels * self.scale).view(self.shape)

    @property
    def mask(self) -> Tensor:
        """Where it is not zero."""
        return (self.levels != 0).view(self.shape)

    def stored(self) -> Stored:
        """The smaller of two kinds: all integers, or the positions of those that are not zero and these."""
        axes = (1,) * (len(self.shape) - 1)
        scale = self.scale if self.per == "channel" else self.scale[:1]
        codes = self.levels.view(self.shape).to(torch.int64).numpy()
        grid = Grid(codes, self.bits, scale.reshape(-1, *axes).numpy())
        if 2 * int(np.count_nonzero(codes)) > codes.size:
            return grid
        sparse = Sparse(codes != 0, grid)
        return sparse if sparse.storage().bits < grid.storage().bits else grid


def rounded(
    weight: Tensor, metric: Metric, per: str | Sequence[str], levels: Sequence[Level], sweeps: int = 2
) -> list[Rounded]:
    """Round a tensor on several grids, all those with a step side by side.

    Args:
        weight: the tensor.
        metric: what a change of it costs. With a full second moment the weights of a row make up for one another.
        per: "tensor" for one step, or "channel" for one an output: then the outputs that count more have finer ones;
            of all levels, or of each.
        levels: of each grid, its bits or its mean step.
        sweeps: how often every integer is looked at again.

    Returns:
        One for each level.

    Example:
        >>> form = Metric(torch.ones(1, 1), torch.eye(2)[None], torch.ones(1, 2), (1, 2))
        >>> [r.decode().tolist() for r in rounded(torch.tensor([[0.9, 2.1]]), form, "tensor", [1.0])]
        [[[1.0, 2.0]]]
    """
    if not levels:
        return []
    flat = weight.detach().float().reshape(len(metric.rows), -1)
    weights = metric.rows.clamp_min(LEAST * float(metric.rows.mean()) + 1e-30)
    mean = weights.log().mean().exp()
    even = {"tensor": torch.ones_like(weights), "channel": (mean / weights).sqrt()}
    kinds = [per] * len(levels) if isinstance(per, str) else list(per)
    scales, prices, most = [], [], []
    for kind, level in zip(kinds, levels, strict=True):
        coded = isinstance(level, float)
        scale = _exact(level * even[kind] if coded else _fitted(flat, kind, int(level)))
        scales.append(scale)
        prices.append(RATE * mean * level**2 / (weights * scale.square()) if coded else torch.zeros_like(weights))
        most.append(2.0 ** ((MOST_BITS if coded else level) - 1) - 1)
    found = _descended(flat, metric, torch.stack(scales), torch.stack(prices), torch.tensor(most), sweeps)
    return [
        Rounded(each, scale, kind, _least(each) if isinstance(level, float) else level, metric.shape)
        for kind, level, each, scale in zip(kinds, levels, found, scales, strict=True)
    ]


def _fitted(flat: Tensor, per: str, bits: int) -> Tensor:
    """The steps of a grid of that many bits, (out, 1)."""
    grid = grid_of("uniform", bits, True, "Squeeze")
    scale, _ = fit(flat if per == "channel" else flat.reshape(1, -1), grid, "mse", "Squeeze")
    return scale.expand(len(flat), 1)


def _least(levels: Tensor) -> int:
    """The fewest bits that hold integers."""
    return max(2, int(levels.abs().max()).bit_length() + 1) if levels.numel() else 2


def _exact(scale: Tensor) -> Tensor:
    """Steps as they are stored."""
    return torch.from_numpy(half(scale.clamp(2.0**-14, 65504.0).numpy()))


def _descended(flat: Tensor, metric: Metric, scale: Tensor, price: Tensor, most: Tensor, sweeps: int) -> list[Tensor]:
    """Integers for each of several scales (k, out, 1). A price is in units of what is left of a weight's second moment
    once the other weights have made up for it, in the geometric mean.
    """
    if not metric.coupled:
        moment = metric.moment.clamp_min(LEAST * float(metric.moment.mean()) + 1e-30)
        typical = moment.log().mean().exp()
        return [_alone(flat / s, typical * p / moment, m) for s, p, m in zip(scale, price, most, strict=True)]
    hessian, _ = damped(metric.moment, DAMP)
    groups, d = hessian.shape[:2]
    count, k = len(flat) // groups, len(scale)
    done = []
    for i, matrix in enumerate(hessian):
        rows, parts = slice(i * count, (i + 1) * count), []
        settings = scale[:, rows].reshape(-1, 1), price[:, rows].reshape(-1, 1), most.repeat_interleave(count)[:, None]
        for first in range(0, d, COUPLED):
            at = slice(first, first + COUPLED)
            stacked = flat[rows, at].repeat(k, 1)
            parts.append(descend(stacked, matrix[at, at], *settings, parts=k, sweeps=sweeps))
        done.append(torch.cat(parts, 1).reshape(k, count, d))
    return list(torch.cat(done, 1))


def _alone(wanted: Tensor, price: Tensor, most: Tensor) -> Tensor:
    """Every integer for itself."""
    levels = wanted.round().clamp(-most, most)
    for _ in range(2):
        levels = choose(wanted, price, Rate.of(levels.reshape(-1, 1), 1), most)
    return levels
