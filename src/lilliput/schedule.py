"""Schedules: pure functions of the step. Any float setting of a rule or of `Train` takes a number or one of these."""

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """A setting that changes while training: a frozen dataclass of plain values, called as (step, steps) -> float.

    A class with this base is in the registry, so recipes hold it by its name.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Halving(Schedule):
        ...     first: float
        ...     def __call__(self, step: int, steps: int) -> float:
        ...         return self.first / 2 ** (step // 100)
        >>> Halving(0.1)(200, 1000)
        0.025
    """

    def __call__(self, step: int, steps: int) -> float:
        """The value at `step` (from 0) of `steps`."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Warm up linearly to `peak`, then fall to `final` by half a cosine.

    v(t) = final + (peak - final) (1 + cos(pi u)) / 2, u = (t - w) / (T - w), with w = warmup * T steps of warm-up.

    Args:
        peak: The highest value.
        warmup: The fraction of the training that warms up.
        final: The last value.

    Example:
        >>> Cosine(1.0, warmup=0.0)(0, 100)
        1.0

    Source:
        Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983, equation 5 (one cycle, no restart).
    """

    peak: float
    warmup: float = 0.05
    final: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        rise = self.warmup * steps
        if step < rise:
            return self.peak * (step + 1) / (rise + 1)
        u = (step - rise) / max(1.0, steps - rise)
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * min(1.0, u))) / 2


@dataclass(frozen=True)
class Linear(Schedule):
    """Go in a straight line from `first` to `last` over the whole training.

    Args:
        first: The first value.
        last: The last value.

    Example:
        >>> Linear(0.0, 1.0)(50, 100)
        0.5
    """

    first: float
    last: float

    def __call__(self, step: int, steps: int) -> float:
        return self.first + (self.last - self.first) * min(1.0, step / max(1, steps))


def between(part: float, begin: float, end: float) -> float:
    """Return how far `part` of a training has come from `begin` to `end`: 0 at the one, 1 at the other, and beyond."""
    return (part - begin) / max(1e-9, end - begin)


@dataclass(frozen=True)
class Cubic(Schedule):
    """Raise the sparsity gradually: s(t) = last + (first - last) (1 - u)^3 between the fractions `begin` and `end`.

    Args:
        last: The last value.
        first: The first value.
        begin: The fraction of the training at which the value begins to change.
        end: The fraction at which it has reached the last one.

    Example:
        >>> Cubic(0.9)(75, 100)
        0.9

    Source:
        Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1.
    """

    last: float
    first: float = 0.0
    begin: float = 0.0
    end: float = 0.75

    def __call__(self, step: int, steps: int) -> float:
        u = between(step / max(1, steps), self.begin, self.end)
        return self.last + (self.first - self.last) * (1 - min(1.0, max(0.0, u))) ** 3


@dataclass(frozen=True)
class Once(Schedule):
    """Jump from `first` to `last` at the fraction `when` of the training.

    Args:
        last: The value from then on.
        first: The value before.
        when: The fraction of the training.

    Example:
        >>> [Once(0.9, when=0.5)(step, 100) for step in (0, 49, 50)]
        [0.0, 0.0, 0.9]
    """

    last: float
    first: float = 0.0
    when: float = 0.0

    def __call__(self, step: int, steps: int) -> float:
        return self.first if step < self.when * steps else self.last


@dataclass(frozen=True)
class Steps(Schedule):
    """Prune iteratively: `rounds` jumps, each of which drops the same share of what is left.

    After round k of n it is 1 - (1 - first) ((1 - last) / (1 - first))^(k / n); the first round is at the fraction
    `begin` of the training, the last at `end`, and the others lie evenly between.

    Args:
        last: The last value.
        rounds: n.
        first: The first value.
        begin: The fraction of the training at which the first round is.
        end: The fraction at which the last round is.

    Example:
        >>> [round(Steps(0.75, rounds=2, begin=0.2, end=0.6)(step, 10), 3) for step in (1, 2, 5, 6)]
        [0.0, 0.5, 0.5, 0.75]

    Source:
        Han, Pool, Tran and Dally, Learning both weights and connections for efficient neural networks, NIPS 2015,
        arXiv:1506.02626, section 3.4 (iterative pruning).
    """

    last: float
    rounds: int = 5
    first: float = 0.0
    begin: float = 0.1
    end: float = 0.75

    def __call__(self, step: int, steps: int) -> float:
        u = between(step / max(1, steps), self.begin, self.end)
        k = 0 if u < -1e-9 else min(self.rounds, 1 + math.floor(u * (self.rounds - 1) + 1e-9))
        if k == self.rounds:
            return self.last
        left: float = (1 - self.first) * ((1 - self.last) / (1 - self.first)) ** (k / self.rounds)
        return 1 - left


@dataclass(frozen=True)
class Cyclic(Schedule):
    """Repeat the gradual schedule `rounds` times, each from `first` anew; `Prune` lets weights return.

    s(t) = last + (first - last) (1 - v)^3, v the fraction of its round between the fractions `begin` and `end` of the
    training; before them `first`, after them `last`.

    Args:
        last: The last value of each round.
        rounds: How many rounds there are.
        first: The first value of each round.
        begin: The fraction of the training at which the first round begins.
        end: The fraction at which the last round ends.

    Example:
        >>> [round(Cyclic(0.8, rounds=2, end=1.0)(step, 100), 2) for step in (0, 25, 49, 50, 75, 100)]
        [0.0, 0.7, 0.8, 0.0, 0.7, 0.8]

    Source:
        Srinivas, Kuzmin, Nagel, van Baalen, Skliar and Blankevoort, Cyclical pruning for sparse neural networks, CVPR
        workshops 2022, arXiv:2202.01290, section 3.
    """

    last: float
    rounds: int = 3
    first: float = 0.0
    begin: float = 0.0
    end: float = 0.75

    def __call__(self, step: int, steps: int) -> float:
        u = between(step / max(1, steps), self.begin, self.end)
        v = (max(0.0, u) * self.rounds + 1e-9) % 1 if u < 1 - 1e-9 else 1.0
        return self.last + (self.first - self.last) * (1 - v) ** 3


def at(value: float | Schedule, step: int, steps: int) -> float:
    """Return the value of a number or schedule at `step` of `steps`."""
    return value if isinstance(value, int | float) else value(step, steps)
