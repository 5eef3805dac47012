"""Format the numbers, scores and recipes of a report as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]
MISSING = "–"  # an en dash: the quantity does not apply or was not measured
_TITLES = ("stage", "rule", "code", "schedule", "name", "kind")


def known(value: object) -> bool:
    """Whether `value` is a finite number (a record of a failed point holds None, or NaN)."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and no exponent between 1e-4 and 1e7.

    Example:
        >>> number(0.0134567), number(1234.5), number(0), number(None), number(3.1e-6, 2)
        ('0.0135', '1,234', '0', '–', '3.1e-06')
    """
    if value is None or not known(value):
        return MISSING
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-4 or size >= 1e7:
        return f"{value:.{digits - 1}e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    return f"{value:,.{decimals}f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated.

    Example:
        >>> count(1095545)
        '1,095,545'
    """
    return f"{value:,.0f}" if value is not None and known(value) else MISSING


def size(value: float | None) -> str:
    """Bytes in decimal units, three significant digits.

    Example:
        >>> size(11984), size(1095545), size(612), size(20_000), size(999_999)
        ('12.0 kB', '1.10 MB', '612 B', '20.0 kB', '1.00 MB')
    """
    if value is None or not known(value):
        return MISSING
    scaled = float(value)
    for unit in ("B", "kB", "MB", "GB"):
        if scaled < 999.5 or unit == "GB":
            break
        scaled = float(f"{scaled / 1000:.3g}")  # rounded here, so that 999,999 is 1.00 MB and not 1.000
    return f"{scaled:.0f} B" if unit == "B" else f"{number(scaled)} {unit}"


def milliseconds(value: float | None) -> str:
    """Milliseconds with three significant digits; microseconds are written as decimals so that points compare.

    Example:
        >>> milliseconds(0.1031)
        '0.103 ms'
    """
    return f"{number(value)} ms" if known(value) else MISSING


def duration(seconds: float) -> str:
    """A time as it is typed.

    Example:
        >>> duration(42.3), duration(150), duration(600)
        ('42 s', '2.5 min', '10 min')
    """
    if seconds < 1:
        return f"{number(seconds, 1)} s"
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f}".removesuffix(".0") + " min"


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction as a percentage.

    Example:
        >>> percent(0.55), percent(None)
        ('55%', '–')
    """
    return f"{100 * value:.{digits}f}%" if value is not None and known(value) else MISSING


def signed(text: str) -> str:
    """`text` of a number with a true minus sign, and no minus before a zero.

    Example:
        >>> signed("-0.1"), signed("-0.0")
        ('−0.1', '0.0')
    """
    return text[1:] if text.startswith("-") and not text.strip("-0.") else text.replace("-", "−")


def ratio(before: float | None, after: float | None) -> float | None:
    """`before / after`, or None where either is unknown or zero."""
    if before is None or after is None or not (known(before) and known(after)) or before <= 0 or after <= 0:
        return None
    return before / after


def times(value: float) -> str:
    """A ratio as a person says it: one decimal below 20, none above.

    Example:
        >>> times(10.2036), times(91.42)
        ('10.2', '91')
    """
    return f"{value:.1f}" if value < 19.95 else f"{value:,.0f}"


def compared(value: float | None, better: str, worse: str, same: str) -> str:
    """A ratio in words, never flattering: `10.2 times faster`, `1.2 times slower`, or `same` within 5%.

    Example:
        >>> compared(10.2, "faster", "slower", "as fast"), compared(0.84, "faster", "slower", "as fast")
        ('10.2 times faster', '1.2 times slower')
    """
    if value is None:
        return ""
    if value >= 1.05:
        return f"{times(value)} times {better}"
    return f"{times(1 / value)} times {worse}" if value <= 1 / 1.05 else same


@dataclass(frozen=True)
class Quality:
    """How a metric is written: as a percentage with losses in points, or as it is.

    Accuracy, recall and the like (higher is better, between 0 and 1) read as `98.6%` and `0.2 points`; a perplexity
    or an error keeps its own unit.
    """

    metric: str
    rate: bool
    higher_is_better: bool

    @classmethod
    def of(cls, summary: Summary) -> Quality:
        higher = bool(summary.get("higher_is_better", True))
        value = summary["dense"].get("val")
        metric = str(summary.get("metric") or "score")
        rate = higher and known(value) and 0 <= value <= 1 and "cosine" not in metric
        return cls(metric, rate, higher)

    def score(self, value: float | None) -> str:
        """A score with its unit.

        Example:
            >>> Quality("accuracy", True, True).score(0.986)
            '98.6%'
        """
        if value is None or not known(value):
            return MISSING
        if not self.rate:
            return number(value, 4)
        return f"{100 * value:.{1 if abs(round(1000 * value) - 1000 * value) < 1e-6 else 2}f}%"

    def bare(self, drop: float | None) -> str:
        """A loss without its unit, to a tenth of a point where that is exact, else to a hundredth."""
        if drop is None or not known(drop):
            return MISSING
        if not self.rate:
            return signed(number(drop, 2))
        points = 100 * drop
        return signed(f"{points:.{1 if math.isclose(points, round(points, 1), abs_tol=1e-6) else 2}f}")

    def points(self, drop: float | None) -> str:
        """A loss with its unit.

        Example:
            >>> Quality("accuracy", True, True).points(0.002)
            '0.2 points'
        """
        bare = self.bare(drop)
        if bare == MISSING or not self.rate:
            return bare
        return f"{bare} point" if bare == "1.0" else f"{bare} points"

    def bounded(self, drop: float | None) -> str:
        """What a network does at most: an error rises, a score falls.

        Example:
            >>> Quality("accuracy", True, True).bounded(0.005), Quality("mse", False, False).bounded(0.42)
            ('loses at most 0.5 points of accuracy', 'raises mse by at most 0.42')
        """
        if not self.higher_is_better:
            return f"raises {self._named} by at most {self.points(drop)}"
        of = "" if self.metric == "score" else f" of {self.metric}"
        return f"loses at most {self.points(drop)}{of}"

    @property
    def _named(self) -> str:
        return "the score" if self.metric == "score" else self.metric

    def interval(self, bounds: Iterable[float] | None) -> str:
        """`95% interval −0.1 to 0.5`, or an empty string where there is none."""
        ends = list(bounds or ())
        if len(ends) != 2 or not all(map(known, ends)):
            return ""
        return f"95% interval {self.bare(ends[0])} to {self.bare(ends[1])}"

    def drop(self, dense: float | None, value: float | None) -> float | None:
        """What is lost against the dense model; negative when it gained."""
        if dense is None or value is None or not (known(dense) and known(value)):
            return None
        return dense - value if self.higher_is_better else value - dense

    def lost(self, drop: float, bounds: Iterable[float] | None = None) -> str:
        """`loses 0.2 points of accuracy (95% interval −0.1 to 0.5)`; of an error `raises mse by 0.2`."""
        interval = self.interval(bounds)
        of = "" if self.metric == "score" else f" of {self.metric}" if self.rate else f" in {self.metric}"
        if self.bare(drop).strip("0.−") == "":
            verb, amount = "loses nothing measurable", of
        elif not self.higher_is_better:
            verb, amount = ("raises" if drop > 0 else "lowers"), f" {self._named} by {self.points(abs(drop))}"
        else:
            verb, amount = ("loses" if drop > 0 else "gains"), f" {self.points(abs(drop))}{of}"
        return f"{verb}{amount}" + (f" ({interval})" if interval else "")


def setting(value: object) -> str:
    """One setting of a recipe as text.

    Example:
        >>> setting({"rule": "Distil", "temperature": 4.0}), setting([16, 32]), setting(True)
        ('Distil(temperature 4)', '16, 32', 'yes')
        >>> setting([["fc.weight", 3], ["fc.bias", 6]])
        'fc.weight 3, fc.bias 6'
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        title, rest = titled(value)
        return f"{title}({rest})" if title and rest else title or rest
    if isinstance(value, list | tuple):
        rows = [" ".join(map(setting, one)) if isinstance(one, list | tuple) else setting(one) for one in value]
        return ", ".join(rows)
    return MISSING if value is None else str(value)


def titled(step: Mapping[str, Any]) -> tuple[str, str]:
    """A stage or rule as (name, settings).

    Example:
        >>> titled({"stage": "Prune", "sparsity": 0.9, "score": "wanda"})
        ('Prune', 'sparsity 0.9, score wanda')
    """
    key = next((key for key in _TITLES if isinstance(step.get(key), str)), None)
    rest = ", ".join(f"{name} {setting(value)}" for name, value in step.items() if name != key and value is not None)
    return (str(step[key]) if key else "", rest)


def steps(recipe: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A recipe as its stages, in order."""
    return [titled(step) for step in recipe]


def shortened(text: str, length: int = 160) -> str:
    """`text`, cut with an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
