"""Choosing: which point of a search to hand over, so that it keeps the floor on examples that nobody has seen.

A search over many points on few examples certifies losers: the smallest point that seems to meet the floor is, more
often than not, one that was lucky on these examples. So each point has a margin of its own: how much more than it was
seen to lose it may lose in truth, from the examples on which it and the dense network differ, and how much of what was
seen is the luck of the chosen, from the points that it was compared with (margin.py).
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from lilliput.search.margin import Draws, Floats, Mask, Pairs, deviations, luck
from lilliput.task import Score, Task

SURE = 0.9
"""How sure a search is to keep the floor where nobody says."""
DRAWS = 200
"""How often a metric that is no mean is measured again."""


@dataclass(frozen=True)
class Choice:
    """Hold what was chosen and how sure it is. All drops are in points of the metric, positive is worse.

    Args:
        winner: The index of the chosen point, or None where nothing but the dense network meets the question.
        drops: The drop of each point on the examples that chose.
        corrected: The drop of each point without the luck of having been chosen: what is to be expected.
        interval: The central 95% of each point's corrected drop, (points, 2).
        bound: What each point loses at most with the probability `sure`: the smallest floor that it can be promised
            for; infinite where nothing is known.
        luck: What of the bound is there because the point was one of many.
        sure: The probability.
        eligible: Which points can be promised and fit.
        near: The points that cannot be promised and are cheaper than the winner, those that would be with the smallest
            floor first, each cheaper than the one before: what more may be lost buys.
        safest: The point that fits and needs the smallest floor; None where there is none.
        draws: How often the metric was measured again, 0 where it is a mean.
    """

    winner: int | None
    drops: Floats
    corrected: Floats
    interval: Floats
    bound: Floats
    luck: Floats
    sure: float
    eligible: Mask
    near: tuple[int, ...] = ()
    safest: int | None = None
    draws: int = 0

    @property
    def optimism(self) -> float:
        """The most that the drop of any point owes to the luck of having been chosen."""
        return float(np.max(self.corrected - self.drops, initial=0.0))


def choose(
    task: Task,
    dense: Score,
    scores: Sequence[Score],
    price: Sequence[float],
    *,
    floor: float | None,
    sure: float = SURE,
    fits: Sequence[bool] | None = None,
    divergence: Sequence[float] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Choice:
    """Choose the cheapest point that keeps the floor with the probability `sure`; without a floor, the best that fits.

    With D the drop that was seen, its bound is

        bound(D, sure) + max(0, luck - z (e - e'))

    where the first term judges the point alone, luck is what its rivals tell of its luck, and e' of its standard error
    e is left by what they tell; z standard errors hold with the probability `sure`. The rivals may make a point look
    worse, never better. A point with the outcomes of the dense network on every example had no luck, and the dense
    network itself loses nothing.

    Args:
        task: Gives the direction of the metric.
        dense: The score of the dense network.
        scores: The score of each point: of all that were compared on these examples, also those that cannot win.
        price: What is to be small (bytes, milliseconds), for each point.
        floor: How much may be lost, in points of the metric; None for no floor.
        sure: How probable it must be that no more is lost, in [0.5, 1).
        fits: Which points may win at all.
        divergence: The mean divergence from the dense outputs, which ranks points of equal price, and all points where
            there is no floor.
        draws: How often a metric that is no mean is measured again.
        seed: The seed of these draws.

    Returns:
        The choice.
    """
    count = len(scores)
    if not count:
        none = np.zeros(0)
        return Choice(None, none, none, np.zeros((0, 2)), none, none, sure, np.zeros(0, bool))
    able = np.ones(count, bool) if fits is None else np.asarray(fits, bool)
    cheap = np.asarray(price, float)
    tie = np.zeros(count) if divergence is None else np.asarray(divergence, float)
    itself = np.array([score is dense for score in scores])
    seen = evidence(task, dense, scores, draws, seed)
    moved, wider = _selection(seen, cheap, itself, sure)
    corrected, bound = seen.drops + moved, np.where(itself, 0.0, seen.bound(sure) + wider)
    interval = np.stack([np.where(itself, 0.0, seen.bound(edge) + moved) for edge in (0.025, 0.975)], 1)
    eligible = able if floor is None else able & (bound <= floor + 1e-12)
    candidates = np.flatnonzero(eligible)
    order = (tie, cheap) if floor is not None else (cheap, corrected, tie)
    best = candidates[np.lexsort([key[candidates] for key in order])] if len(candidates) else candidates
    winner = int(best[0]) if len(best) else None
    near = () if floor is None else _near(bound, cheap, able & ~eligible, np.inf if winner is None else cheap[winner])
    safest = int(np.argmin(np.where(able, bound, np.inf))) if able.any() else None
    repeated = draws if isinstance(seen, Draws) else 0
    return Choice(winner, seen.drops, corrected, interval, bound, wider, sure, eligible, near, safest, repeated)


def evidence(task: Task, dense: Score, scores: Sequence[Score], draws: int = DRAWS, seed: int = 0) -> Pairs | Draws:
    """What is known of the drop of each point: the outcomes side by side, or the metric on draws of the examples."""
    sign = 1 if task.higher_is_better else -1
    own, outcomes = dense.outcomes, [score.outcomes for score in scores if score.outcomes is not None]
    if own is not None and len(outcomes) == len(scores) and {len(each) for each in outcomes} == {len(own)}:
        return Pairs.of(sign * (own[:, None] - np.stack(outcomes, 1)), float(np.ptp(own)) or 1.0)
    base, *others = (_drawn(score, dense.units, draws, seed) for score in (dense, *scores))
    drawn = sign * (base[:, None] - np.stack(others, 1))
    drops = np.array([task.loss_of(dense.value, score.value) for score in scores])
    return Draws.of(drops, drawn, dense.units, max(1.0, abs(dense.value)))


def interval(task: Task, dense: Score, score: Score, seed: int = 0) -> tuple[float, float] | None:
    """The central 95% of what one point that nobody chose on these examples loses, or None where nothing is known."""
    if score is dense:
        return 0.0, 0.0
    seen = evidence(task, dense, [score], seed=seed)
    return (float(seen.bound(0.025)[0]), float(seen.bound(0.975)[0])) if seen.known[0] else None


def examples_for(dense: Score, interval: Floats) -> int | None:
    """How many validation examples would halve the interval's width, which shrinks with the root of their number."""
    width = float(interval[1] - interval[0])
    return 4 * dense.units if 0 < width < np.inf else None


def examples_to_promise(choice: Choice, point: int, floor: float, examples: int) -> int | None:
    """How many validation examples would let a point be promised if it went on losing what it is expected to lose.

    Args:
        point: Its index.
        floor: How much may be lost.
        examples: How many there were.

    Returns:
        The number, or None where it is expected to lose more than the floor.
    """
    expected, bound = float(choice.corrected[point]), float(choice.bound[point])
    if expected >= floor or not np.isfinite(bound):
        return None
    return int(np.ceil(examples * ((bound - expected) / (floor - expected)) ** 2))


def _selection(seen: Pairs | Draws, price: Floats, itself: Mask, sure: float) -> tuple[Floats, Floats]:
    """What is added to each point's drop, and to its bound, for the luck of having been chosen among the others."""
    moved, wider = np.zeros(len(price)), np.zeros(len(price))
    among = np.flatnonzero(seen.known & ~itself)
    if len(among):
        noise = seen.noise[np.ix_(among, among)]
        lucky, left = luck(seen.drops[among], noise, price[among])
        saved = deviations(sure) * (np.sqrt(np.diag(noise)) - left)
        judged = ~seen.same[among]
        moved[among] = np.where(judged, np.maximum(0, lucky), 0)
        wider[among] = np.where(judged, np.maximum(0, lucky - saved), 0)
    return moved, wider


def _near(bound: Floats, price: Floats, among: Mask, most: float) -> tuple[int, ...]:
    """The points below a price that no other beats on (bound, price), by bound."""
    places = np.flatnonzero(among & np.isfinite(bound))
    chosen = list[int]()
    for place in places[np.lexsort((price[places], bound[places]))]:
        if price[place] < most:
            chosen.append(int(place))
            most = price[place]
    return tuple(chosen)


_DRAWN: WeakKeyDictionary[Any, tuple[tuple[int, int, int], Floats]] = WeakKeyDictionary()
"""What was measured before, by the function that measures: a search chooses again after every new point."""


def _drawn(score: Score, units: int, draws: int, seed: int) -> Floats:
    """A metric on bootstrap draws of the examples, the same for every score: NaN where it has no value.

    A metric of the user's own may raise whatever it likes there: a draw without a positive example ends no search.
    """
    key, known = (units, draws, seed), _DRAWN.get(score.again) if score.again is not None else None
    if known is not None and known[0] == key:
        return known[1]
    generator, values = np.random.default_rng(seed), np.full(draws, np.nan)
    for draw in range(draws):
        with suppress(Exception):
            values[draw] = score.resampled(generator.integers(0, units, units))
    values[~np.isfinite(values)] = np.nan
    if score.again is not None:
        _DRAWN[score.again] = key, values
    return values


def unbeaten(costs: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points that no other is at most equal to on every axis and smaller on one; equal ones stay."""
    points = np.asarray(costs, float)
    return [i for i, p in enumerate(points) if not any(bool((q <= p).all() and (q < p).any()) for q in points)]


def front(costs: Sequence[Sequence[float]]) -> list[int]:
    """The indices of the points that no other beats, the first of equal ones; all axes are to be small."""
    points = np.asarray(costs, float)
    return [i for i in unbeaten(costs) if not any(bool((points[j] == points[i]).all()) for j in range(i))]
