"""Schedules: pure functions of the step. Any float setting of a rule or of `Train` takes a number or one of these."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up to `peak`, then half a cosine down to `final`.

    v(t) = final + (peak - final) (1 + cos(pi u)) / 2, u = (t - w) / (T - w), with w = warmup * T steps of warm-up.

    Source: Loshchilov and Hutter, SGDR, ICLR 2017, arXiv:1608.03983, equation 5 (one cycle, no restart).

    >>> Cosine(1.0, warmup=0.0)(0, 100)
    1.0
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
class Linear:
    """A straight line from `first` to `last` over the whole training.

    >>> Linear(0.0, 1.0)(50, 100)
    0.5
    """

    first: float
    last: float

    def __call__(self, step: int, steps: int) -> float:
        return self.first + (self.last - self.first) * min(1.0, step / max(1, steps))


@dataclass(frozen=True)
class Cubic:
    """The gradual sparsity schedule: s(t) = last + (first - last) (1 - u)^3 between the fractions `begin` and `end`.

    Source: Zhu and Gupta, To prune, or not to prune, 2017, arXiv:1710.01878, equation 1.

    >>> Cubic(0.9)(75, 100)
    0.9
    """

    last: float
    first: float = 0.0
    begin: float = 0.0
    end: float = 0.75

    def __call__(self, step: int, steps: int) -> float:
        u = (step / max(1, steps) - self.begin) / max(1e-9, self.end - self.begin)
        return self.last + (self.first - self.last) * (1 - min(1.0, max(0.0, u))) ** 3


Schedule = Cosine | Linear | Cubic


def at(value: "float | Schedule", step: int, steps: int) -> float:
    """The value of a number or schedule at `step` of `steps`."""
    return value if isinstance(value, int | float) else value(step, steps)
