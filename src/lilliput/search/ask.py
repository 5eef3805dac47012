"""Parse command-line values strictly: floors, times, sizes."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """What may be lost: `amount` points of the metric, or that fraction of the dense score when `relative`."""

    amount: float
    relative: bool = False

    def points(self, dense: float) -> float:
        """The floor in points of the metric."""
        return self.amount * abs(dense) if self.relative else self.amount

    def option(self, points: float, dense: float) -> tuple[float, str]:
        """A larger floor that allows a loss: in points, and as it is typed, in the unit of this one.

        Args:
            points: what is lost, in points of the metric.
            dense: the dense network's score.

        Returns:
            The floor, rounded up to two digits, and its text; an empty text where no floor may be that large.

        Example:
            >>> Floor(0.01).option(0.0104, 0.99), Floor(0.01, relative=True).option(0.006, 0.5)[1]
            ((0.011, '1.1%'), '1.2r')
        """
        share = points / abs(dense) if self.relative and dense else points
        if not 0 < share < 1:
            return points, ""
        digits = 1 - math.floor(math.log10(share))
        amount = round(math.ceil(share * 10**digits - 1e-9) / 10**digits, 12)
        if amount >= 1:
            return points, ""
        return Floor(amount, self.relative).points(dense), f"{100 * amount:g}" + ("r" if self.relative else "%")

    def explained(self, metric: str, dense: float) -> str:
        """Say what the floor allows for a metric that is better when it is smaller, which is in units of its own.

        Args:
            metric: its name.
            dense: the dense network's score.

        Example:
            >>> Floor(0.02).explained("mae", 0.5)
            'The floor allows mae to rise from 0.5 to 0.52. It is 0.02 in units of mae; write 2r for 2% of 0.5.'
        """
        allowed = f"The floor allows {metric} to rise from {dense:.4g} to {dense + self.points(dense):.4g}."
        share = f"{100 * self.amount:g}"
        if self.relative:
            return f"{allowed} It is {share}% of {dense:.4g}."
        return f"{allowed} It is {self.amount:g} in units of {metric}; write {share}r for {share}% of {dense:.4g}."


def floor(text: str | float, what: str = "floor") -> Floor:
    """A floor from "1%" (a point of accuracy: 0.01), "0.01", or "0.5r" (half a percent of the dense score).

    Raises:
        ValueError: Outside [0, 1).

    Example:
        >>> floor("1%"), floor("0.5r").relative
        (Floor(amount=0.01, relative=False), True)
    """
    match = re.fullmatch(r"\s*(-?(?:\d+\.?\d*|\.\d+))\s*(%|r|)\s*", str(text))
    amount = float(match[1]) / (100 if match[2] else 1) if match else float("nan")
    if isinstance(text, int | float):
        amount = float(text)
    if not 0 <= amount < 1:
        raise ValueError(
            f"shrink: {what} must be at least 0 and below 100%, got {text}. For one point of accuracy "
            "write 1%, for half a percent of the dense score 0.5r."
        )
    return Floor(amount, bool(match and match[2] == "r"))


def sure(text: str | float) -> float:
    """A probability from "90%", "90" or 0.9.

    Raises:
        ValueError: Below one half or above 0.99.

    Example:
        >>> sure("90%"), sure(0.8)
        (0.9, 0.8)
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(%|)\s*", str(text))
    value = float(match[1]) if match else 0.0
    if match and (match[2] or value > 1):
        value /= 100
    if not 0.5 <= value <= 0.99:
        raise ValueError(
            f"shrink: sure must be at least 50% and at most 99%, got {text}. It is how probable it must be that the "
            "floor is kept on new data; write 90%."
        )
    return value


def seconds(text: str | float) -> float:
    """Seconds from "90", "90s", "5m" or "1.5h".

    Example:
        >>> seconds("5m")
        300.0
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(s|m|h|)\s*", str(text))
    value = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if value <= 0:
        raise ValueError(f"shrink: budget must be a time such as 90s, 5m or 1h, got {text!r}.")
    return value


def size_bytes(text: str | float, setting: str = "max-bytes") -> int:
    """Bytes from "900", "64KB", "2MB" (thousands) or "64KiB" (1024s).

    Example:
        >>> size_bytes("2MB")
        2000000
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(B|kB|KB|MB|GB|KiB|MiB|GiB|)\s*", str(text))
    unit = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    value = int(float(match[1]) * unit[match[2]]) if match else 0
    if value <= 0:
        raise ValueError(f"shrink: {setting} must be a size such as 900KB or 2MB, got {text!r}.")
    return value


def workers(text: int | str | None) -> int | str | None:
    """What trains: a number of processes, a Ray cluster ("ray://HOST"), or None for as many as this machine holds.

    Raises:
        ValueError: For anything else.

    Example:
        >>> workers("2"), workers("ray://head"), workers(None)
        (2, 'ray://head', None)
    """
    if text is None or (isinstance(text, str) and re.fullmatch(r"ray://\S+", text)):
        return text
    if not re.fullmatch(r"\s*[1-9]\d*\s*", str(text)):
        raise ValueError(
            f"shrink: workers must be a number of processes, at least 1, or ray://HOST, got {text!r}. Leave it out for "
            "one process a core."
        )
    return int(text)


def shown(count: float) -> str:
    """Bytes for people.

    Example:
        >>> shown(1_095_545), shown(9800)
        ('1.10 MB', '9.8 kB')
    """
    if count >= 1e6:
        return f"{count / 1e6:.2f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"
    return f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count:.0f} B"
