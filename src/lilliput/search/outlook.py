"""Outlook: what the next training is worth, learned from what the trainings before it brought.

Every network that was judged has a bound: the most that it may lose, at the confidence that was asked for, in floors.
It is promised when its bound is at most 1. Three laws say how bounds move; each is a mean and a spread of logarithms
that begins at a weak prior and is learned while the search runs:

    a structure after a first training     log bound = base + slope log parameters
    twice the training                     log bound falls by `longer`
    a coded copy, or a smaller child       log bound rises by a law of its own

An option is worth the probability that it is promised, times the logarithm of how much cheaper it would be than what
is promised without it, for its time. Bounds are counted in floors and prices in prices of the dense network, so nothing
here knows the task.
"""

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any

NORMAL = NormalDist()
FADES = 0.9
"""What each further doubling of a training brings, against the one before it: a structure can do only so much."""
HASTE = 0.6
"""How much the time that an option takes counts against it: its worth is divided by seconds to this power. At 1 a
search snatches at what comes soon, at 0 it waits for the best of all; between them simulated searches
(tests/test_outlook.py) end with the smallest networks."""
ABOUT = 1.02
"""How far predicted prices are off."""
FIRST = 200.0
"""Steps of a first training that the prior speaks of."""
STEPS = 0.5
"""The power of the number of steps by which the bounds of first trainings fall."""
TAKEN_BACK = 0.15
"""By how much the logarithm of a promised point's bound may still change, beside points that are yet to be made."""
LEAST = 0.02
"""The smallest bound that is told from zero, in floors."""


@dataclass
class Law:
    """A change of a logarithm: its mean and spread, learned from a prior that counts for some observations.

    Args:
        mean: the prior's mean.
        spread: the prior's standard deviation of one observation.
        weight: how many observations the prior counts for.

    Example:
        >>> law = Law(0.0, 0.5, weight=1.0)
        >>> law.learn(1.0)
        >>> law.mean
        0.5
    """

    mean: float
    spread: float
    weight: float = 2.0
    _seen: list[float] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        self._prior = self.mean, self.spread

    def learn(self, change: float) -> None:
        """Take in an observation; one further off than three spreads counts as three, since bounds are noisy."""
        mean, spread = self._prior
        self._seen.append(min(max(change, mean - 3 * spread), mean + 3 * spread))
        total = self.weight + len(self._seen)
        self.mean = (self.weight * mean + sum(self._seen)) / total
        squares = self.weight * (spread**2 + mean**2) + sum(change**2 for change in self._seen)
        self.spread = math.sqrt(max(squares / total - self.mean**2, (spread / 3) ** 2))


@dataclass(frozen=True)
class Option:
    """Something that may be trained next, and what is expected of it.

    Args:
        what: what the caller knows it by.
        seconds: of one worker, until it can be handed over.
        price: what it would cost then, in prices of the dense network.
        bound: its expected bound then, in floors.
        spread: the standard deviation of the logarithm of that bound.
    """

    what: Any
    seconds: float
    price: float
    bound: float
    spread: float

    def promised(self, luck: float = 0.0) -> float:
        """The probability that its bound is at most the floor.

        Args:
            luck: what the choice will add to the bound, since the point is one of many, in floors.
        """
        return NORMAL.cdf(math.log(max(LEAST, 1 - luck) / max(self.bound, LEAST)) / self.spread)


Worth = Callable[[Option], float]


def cheaper(sure: float, promised: Iterable[tuple[float, float]] = (), luck: float = 0.0) -> Worth:
    """The worth of an option where a floor must hold: by how much it lowers the expected logarithm of the final price.

    What is promised now need not be at the end, beside more points. Where the best is close to the floor, one that is
    safer is worth something though it costs more.

    Args:
        sure: a price that will be promised in any case.
        promised: (price, bound) of the points that are promised now.
        luck: what the choice will add to the bound of an option, in floors.
    """
    # From the cheapest up: a price, and the probability that nothing up to that price is promised at the end.
    steps, none = [(-math.inf, 1.0)], 1.0
    for price, bound in sorted(promised):
        if price < sure:
            none *= 1 - NORMAL.cdf(-math.log(max(bound, LEAST)) / TAKEN_BACK)
            steps.append((math.log(price), none))
    ends = [*(place for place, _ in steps[1:]), math.log(sure)]

    def worth(option: Option) -> float:
        place = math.log(option.price)
        gain = sum(rest * max(0.0, end - max(at, place)) for (at, rest), end in zip(steps, ends, strict=True))
        return option.promised(luck) * gain

    return worth


def better(best: float, most: float) -> Worth:
    """The worth of an option where a price must hold.

    Args:
        best: the bound of the best point so far.
        most: the highest price.
    """
    return lambda option: max(0.0, math.log(best / option.bound)) if option.price <= ABOUT * most else 0.0


def choose(options: Iterable[Option], worth: Worth, seconds: float) -> Option | None:
    """The option that is worth most for its time among those that fit into it; None where none is worth anything."""
    fitting = [option for option in options if option.seconds <= seconds]
    chosen = max(fitting, key=lambda option: worth(option) / max(option.seconds, 1e-3) ** HASTE, default=None)
    return chosen if chosen is not None and worth(chosen) > 0 else None


@dataclass
class Outlook:
    """The laws of one search.

    Args:
        longer: what twice the training takes off the log bound, for each way of training.
        began: (log share of the parameters, log bound) of structures after a first training, the bound as if it had had
            FIRST steps.
    """

    longer: dict[Hashable, Law] = field(default_factory=dict)
    began: list[tuple[float, float]] = field(default_factory=list)

    def doubled(self, way: Hashable) -> Law:
        """What twice the training takes off the log bound, for a way of training."""
        return self.longer.setdefault(way, Law(0.5, 0.35))

    def trained(self, bound: float, doublings: float, way: Hashable = None) -> tuple[float, float]:
        """The expected bound after so many doublings of the training, and the spread of its logarithm."""
        law = self.doubled(way)
        taken = law.mean * (1 - FADES**doublings) / (1 - FADES)
        return bound * math.exp(-taken), 0.1 + law.spread * math.sqrt(doublings)

    def begin(self, share: float, bound: float, steps: float = FIRST) -> None:
        """Take in the bound of a structure after a first training."""
        self.began.append((math.log(share), math.log(bound) + STEPS * math.log(steps / FIRST)))

    def fresh(self, share: float, steps: float = FIRST) -> tuple[float, float]:
        """The expected bound of a structure after a first training, and the spread of its logarithm.

        A regression on the structures that were begun. Its prior: half the parameters, 1.5 times the bound. In the same
        time a slow structure has fewer steps than a fast one, and loses more.
        """
        bound, spread = self._fresh(share)
        return bound * (steps / FIRST) ** -STEPS, spread

    def _fresh(self, share: float) -> tuple[float, float]:
        slope, base, wide, weight = -0.6, 0.3, 0.8, 2.0
        if not self.began:
            return math.exp(base + slope * math.log(share)), wide
        xs, ys = zip(*self.began, strict=True)
        x, y = sum(xs) / len(xs), sum(ys) / len(ys)
        squares = sum((each - x) ** 2 for each in xs)
        products = sum((one - x) * (other - y) for one, other in self.began)
        # Many networks have a cliff, which few structures show. That size hardly matters is not believed of a few that
        # are much alike: noise says so too.
        stiff = 0.3 if products < slope * squares else 2.0
        slope = min(-0.05, (stiff * slope + products) / (stiff + squares))
        rest = sum((other - y - slope * (one - x)) ** 2 for one, other in self.began)
        spread = math.sqrt((weight * wide**2 + rest) / (weight + len(xs)))
        return math.exp(y + slope * (math.log(share) - x)), spread
