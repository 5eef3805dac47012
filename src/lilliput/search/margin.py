"""Margins: how much more than what it was seen to lose a point may really lose, from paired outcomes and its rivals."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaincc, gammaincinv, ndtri

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
"""Where the distribution of the gains is read; the losses' is exact, so that few places do."""
HALF = 0.5
"""Jeffreys' prior for a count: half an event that was not seen."""


@dataclass(frozen=True)
class Pairs:
    """Each point's losses against the dense network on the same examples.

    Args:
        drops: (points,) what each loses on average, positive is worse.
        noise: (points, points), the covariance of these averages from one set of examples to the next.
        losses: (points, 2), how many independent losses of one size vary as a point's losses do, and that size.
        gains: (points, 2), the same of its gains.
        count: The number of examples.
    """

    drops: Floats
    noise: Floats
    losses: Floats
    gains: Floats
    count: int

    @classmethod
    def of(cls, differences: Floats, unit: float = 1.0) -> "Pairs":
        """Read them off the differences of outcomes.

        Args:
            differences: (examples, points), positive where a point is worse than the dense network.
            unit: The size of a loss where no point shows one.
        """
        count = len(differences)
        losses, gains = (_events(np.maximum(side, 0)) for side in (differences, -differences))
        seen = np.concatenate([side[side[:, 1] > 0, 1] for side in (losses, gains)])
        usual = float(np.median(seen)) if len(seen) else unit
        for own, other in ((losses, gains), (gains, losses)):  # what did not happen would have had the other's size
            own[:, 1] = np.where(own[:, 1] > 0, own[:, 1], np.where(other[:, 1] > 0, other[:, 1], usual))
        mean = differences.mean(0)
        noise = (differences.T @ differences) / count**2 - np.outer(mean, mean) / count
        noise += np.diag(HALF * (losses[:, 1] ** 2 + gains[:, 1] ** 2)) / count**2
        return cls(mean, noise, losses, gains, count)

    @property
    def known(self) -> Mask:
        """Which points can be judged."""
        return np.ones(len(self.drops), bool)

    @property
    def same(self) -> Mask:
        """Which points have the dense network's outcome on every example."""
        none: Mask = self.losses[:, 0] + self.gains[:, 0] == 0
        return none

    def bound(self, sure: float) -> Floats:
        """What each point loses at most with the probability `sure`, where nothing was chosen, (points,).

        The numbers of examples that a point loses and gains are Poisson; with Jeffreys' prior their rates are gamma
        distributed, and the drop D over n examples is the difference:

            n D ~ s Gamma(k + 1/2) - t Gamma(l + 1/2)

        with k losses of the size s and l gains of the size t; outcomes of several sizes count as as many events of one
        size as have the same sum and the same sum of squares. It holds for k = l = 0 too: then D is at most 1.03/n with
        a probability of 90%, and 3/n with 99%.

        Args:
            sure: In (0, 1).
        """
        if sure < HALF:  # what is lost least is what is gained most: the exact side is the one that is asked for
            return -Pairs(-self.drops, self.noise, self.gains, self.losses, self.count).bound(1 - sure)
        (k, size), (back, worth) = self.losses.T, self.gains.T
        gained = worth[:, None] * gammaincinv(back[:, None] + HALF, (1 + NODES) / 2)
        centre = size * (k + HALF) - worth * (back + HALF)
        spread = np.sqrt(size**2 * (k + HALF) + worth**2 * (back + HALF))
        low, high = centre - spread, centre + 9 * spread
        for _ in range(18):
            middle = (low + high) / 2
            above = gammaincc(k[:, None] + HALF, np.maximum(middle[:, None] + gained, 0) / size[:, None]) @ WEIGHTS / 2
            low, high = np.where(above > 1 - sure, middle, low), np.where(above > 1 - sure, high, middle)
        # Events vary more than differences that are much the same for every example.
        events = size**2 * k + worth**2 * back
        real = np.maximum(events - self.count * self.drops**2, 0)
        narrower = np.sqrt(np.divide(real, events, out=np.ones_like(real), where=events > 0))
        found: Floats = (centre + narrower * (high - centre)) / self.count
        return found


@dataclass(frozen=True)
class Draws:
    """Each point's loss against the dense network where the metric is no mean: it was measured again on draws.

    Args:
        drops: (points,) what each loses over all examples, positive is worse.
        noise: (points, points), the covariance over the draws; infinite for points that are not known.
        known: Which points have a value on at least half of the draws, so that something can be said of them.
        count: The number of examples.
    """

    drops: Floats
    noise: Floats
    known: Mask
    count: int

    @classmethod
    def of(cls, drops: Floats, drawn: Floats, count: int, unit: float) -> "Draws":
        """Read them off the draws.

        Args:
            drops: (points,) over all examples.
            drawn: (draws, points) the drops on each draw, NaN where the metric has no value.
            count: The number of examples.
            unit: The size of a score; its n-th part is the least that is not known of any point.
        """
        defined = np.isfinite(drawn)
        known = defined.mean(0) >= HALF
        whole = defined[:, known].all(1)
        known &= whole.sum() > 1
        noise = np.full((len(drops), len(drops)), np.inf)
        if known.any():
            among = np.ix_(known, known)
            noise[among] = np.cov(drawn[whole][:, known], rowvar=False).reshape(known.sum(), known.sum())
            noise[among] += np.eye(known.sum()) * (unit / count) ** 2
        return cls(drops, noise, known, count)

    @property
    def same(self) -> Mask:
        """None: what does not differ on these draws may differ on others."""
        return np.zeros(len(self.drops), bool)

    def bound(self, sure: float) -> Floats:
        """What each point loses at most with the probability `sure`, where nothing was chosen, (points,)."""
        found: Floats = self.drops + deviations(sure) * np.sqrt(np.diag(self.noise))
        return np.where(self.known, found, np.inf if sure > HALF else -np.inf)


def _events(amounts: Floats) -> Floats:
    """(number, size) of equal events that have the sum and the sum of squares of these amounts, by column."""
    total, squares = amounts.sum(0), (amounts**2).sum(0)
    size = np.divide(squares, total, out=np.zeros_like(total), where=total > 0)
    number = np.divide(total, size, out=np.zeros_like(total), where=size > 0)
    return np.stack([number, size], 1)


def luck(drops: Floats, noise: Floats, price: Floats) -> tuple[Floats, Floats]:
    """How much of each point's drop is luck, judged by the points that it was compared with, and what noise remains.

    A point that was picked because it lost little lost little partly by chance. How much, the others tell: where the
    drops around x have the density f and vary by the variance s^2 from chance, the expected drop is x + s^2 (log f)'
    (x), whatever the true drops are like. A point below the crowd is moved towards it, by nearly all of its distance
    where the crowd is no wider than chance makes it; a point that stands alone, or in a crowd that is much wider than
    chance, is not moved. f is a normal density fitted around each point, with a kernel twice as wide as the standard
    error of the paired difference and half a rival spread evenly over the whole line. Cheaper points lose more, so the
    others are first moved along the line that fits drop and rank of price around the point. A rival that differs from
    the point on few examples shares its luck and counts for as little.

    Args:
        drops: (points,).
        noise: (points, points), their covariance from one set of examples to the next.
        price: (points,), what is to be small.

    Returns:
        What is to be added to each drop (negative for one that had bad luck), and the standard error that is left.

    Source:
        B. Efron, Tweedie's formula and selection bias, JASA 2011, equation 1.4; N. Hjort and M. Jones, Locally
        parametric nonparametric density estimation, Annals of Statistics 1996, section 5.
    """
    own = np.diag(noise)
    both = own[:, None] + own[None]
    apart = np.maximum(both - 2 * noise, 0)
    np.fill_diagonal(apart, 1)
    width = 4 * apart
    gap = drops[None] - drops[:, None]  # [p, q]: how much more q loses than p
    rank = np.unique(price, return_inverse=True)[1].astype(float)
    cheaper = rank[:, None] - rank[None]
    counts = np.clip(apart / both, 0, 1)
    near = counts * np.exp(-HALF * gap**2 / width)
    np.fill_diagonal(near, 1)
    gap = gap - _slope(near, cheaper, gap)[:, None] * cheaper
    near = counts * np.exp(-HALF * gap**2 / width)
    np.fill_diagonal(near, 0)
    np.fill_diagonal(counts, 0)
    even = HALF * counts.sum(1) / max(1, len(drops) - 1)
    even = np.where(even > 0, even, HALF)
    total = near.sum(1)
    kernel = np.divide((near * width).sum(1), total, out=4 * 2 * own, where=total > 0)
    chance = kernel / 8  # the paired difference of two points varies by the chance of both
    mean = (near * gap).sum(1) / (total + even)
    spread = ((near * gap**2).sum(1) + even * kernel) / (total + even) - mean**2
    curvature = np.clip(1 / spread - 1 / kernel, 0, 1 / chance)
    left = np.maximum(own - chance**2 * curvature, np.maximum(own - chance, 0))
    return chance * mean / spread, np.sqrt(left)


def _slope(weight: Floats, x: Floats, y: Floats) -> Floats:
    """The slope of a weighted line for each row, where it rises."""
    total = weight.sum(1)
    mean_x, mean_y = (weight * x).sum(1) / total, (weight * y).sum(1) / total
    varies = (weight * x**2).sum(1) - total * mean_x**2
    together = (weight * x * y).sum(1) - total * mean_x * mean_y
    slope = np.divide(together, varies, out=np.zeros_like(together), where=varies > 1e-9)
    rising: Floats = np.maximum(0, slope)
    return rising


def deviations(sure: float) -> float:
    """The number of standard errors below which a normal variable lies with the probability `sure`."""
    return float(ndtri(sure))
