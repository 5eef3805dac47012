"""Choosing: which point of a search to hand over, corrected for the optimism of having chosen among many.

A search over many points on few examples certifies losers: the smallest point that seems to meet the floor is, more
often than not, one that was lucky on these examples. So the whole choice is repeated on bootstrap draws of the
validation examples, and each winner is scored on the examples that its draw left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lilliput.task import Score, Task

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """Hold what was chosen and how sure it is. All drops are in points of the metric, positive is worse.

    Args:
        winner: The index of the chosen point, or None where nothing meets the question.
        drops: The drop of each point.
        corrected: The corrected drop of each point.
        interval: The central 95% of each point's corrected drop over the draws, (points, 2).
        optimism: How much better a winner looks on the examples that it was chosen on.
        eligible: Which points meet the floor.
        draws: How often the choice was repeated.
    """

    winner: int | None
    drops: Floats
    corrected: Floats
    interval: Floats
    optimism: float
    eligible: NDArray[np.bool_]
    draws: int = 0


def choose(
    task: Task,
    dense: Score,
    scores: Sequence[Score],
    price: Sequence[float],
    *,
    floor: float | None,
    fits: Sequence[bool] | None = None,
    divergence: Sequence[float] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Choice:
    """Choose the cheapest point whose corrected drop meets the floor; without a floor, the best point that fits.

    With D_p the drop of point p over all examples, w(b) the winner on bootstrap draw b, and D_p(b), D_p(-b) the drop on
    the draw and on what it left out: optimism = mean over b of max(0, D_w(b)(-b) - D_w(b)(b)); corrected_p = D_p +
    optimism; p is eligible when corrected_p <= floor.

    Args:
        task: Gives the direction of the metric.
        dense: The score of the dense network.
        scores: The score of each point.
        price: What is to be small (bytes, milliseconds), for each point.
        floor: How much may be lost, in points of the metric; None for no floor.
        fits: Which points may win at all.
        divergence: The mean divergence from the dense outputs, which ranks points of equal price, and all points where
            there is no floor.
        draws: How many bootstrap draws there are.
        seed: The seed of the draws.

    Returns:
        The choice.

    Source:
        Efron and Tibshirani, An introduction to the bootstrap, 1993, chapter 17 (optimism, the .632 family).
    """
    count = len(scores)
    if not count:
        none = np.zeros(0)
        return Choice(None, none, none, np.zeros((0, 2)), 0.0, np.zeros(0, bool))
    able = np.ones(count, bool) if fits is None else np.asarray(fits, bool)
    cheap = np.asarray(price, float)
    tie = np.zeros(count) if divergence is None else np.asarray(divergence, float)
    drops = np.array([task.loss_of(dense.value, score.value) for score in scores])
    inside, outside = _resampled(task, dense, scores, draws, seed)

    def pick(row: Floats, limit: float | None) -> int | None:
        allowed = able if limit is None else able & (row <= limit + 1e-12)
        if not allowed.any():
            return None
        candidates = np.flatnonzero(allowed)
        order = (
            np.lexsort((tie[candidates], cheap[candidates]))
            if limit is not None
            else np.lexsort((cheap[candidates], row[candidates], tie[candidates]))
        )
        return int(candidates[order[0]])

    gaps = []
    for row, left_out in zip(inside, outside, strict=True):
        winner = pick(row, floor)
        if winner is not None and np.isfinite(left_out[winner]):
            gaps.append(left_out[winner] - row[winner])
    optimism = max(0.0, float(np.mean(gaps))) if gaps else 0.0
    corrected = drops + optimism
    interval = np.quantile(inside, [0.025, 0.975], axis=0).T + optimism
    eligible = able if floor is None else able & (corrected <= floor + 1e-12)
    return Choice(pick(corrected, floor), drops, corrected, interval, optimism, eligible, len(inside))


def _resampled(task: Task, dense: Score, scores: Sequence[Score], draws: int, seed: int) -> tuple[Floats, Floats]:
    """Drops of every point on `draws` bootstrap draws and on the examples that each left out, (draws, points)."""
    generator = np.random.default_rng(seed)
    if dense.outcomes is not None and all(score.outcomes is not None for score in scores):
        gap = np.stack([_losses(task, dense, score) for score in scores], 1)  # (n, points), positive is worse
        n = len(gap)
        inside, outside = np.empty((draws, len(scores))), np.empty((draws, len(scores)))
        for b in range(draws):
            counts = np.bincount(generator.integers(0, n, n), minlength=n).astype(float)
            out = (counts == 0).astype(float)
            inside[b] = counts @ gap / n
            outside[b] = out @ gap / max(1.0, out.sum())
        return inside, outside
    n, draws = dense.units, min(draws, 200)
    inside, outside = np.empty((draws, len(scores))), np.empty((draws, len(scores)))
    for b in range(draws):
        index = generator.integers(0, n, n)
        unseen = np.setdiff1d(np.arange(n), index)
        for rows, target in ((index, inside), (unseen, outside)):
            base = dense.resampled(rows) if len(rows) else np.nan
            target[b] = [task.loss_of(base, score.resampled(rows) if len(rows) else np.nan) for score in scores]
    defined = np.isfinite(inside).all(1)  # a metric may have no value on a draw: AUC without a positive example
    if not defined.any():
        return np.array([[task.loss_of(dense.value, score.value) for score in scores]]), outside[:1] * np.nan
    return inside[defined], outside[defined]


def _losses(task: Task, dense: Score, score: Score) -> Floats:
    assert dense.outcomes is not None and score.outcomes is not None
    difference: Floats = dense.outcomes - score.outcomes
    return difference if task.higher_is_better else -difference


def examples_for(task: Task, dense: Score, score: Score, interval: Floats) -> int | None:
    """How many validation examples would halve the interval's width, which shrinks with the root of their number."""
    width = float(interval[1] - interval[0])
    return None if width <= 0 else 4 * dense.units


def unbeaten(costs: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points that no other is at most equal to on every axis and smaller on one; equal ones stay."""
    points = np.asarray(costs, float)
    return [i for i, p in enumerate(points) if not any(bool((q <= p).all() and (q < p).any()) for q in points)]


def front(costs: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points that no other beats, the first of equal ones; all axes are to be small."""
    points = np.asarray(costs, float)
    return [i for i in unbeaten(costs) if not any(bool((points[j] == points[i]).all()) for j in range(i))]
