"""Numbers and sentences of a report: units, ratios, recipes and the verdict."""

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

    >>> count(1095545)
    '1,095,545'
    """
    return f"{value:,.0f}" if value is not None and known(value) else MISSING


def size(value: float | None) -> str:
    """Bytes in decimal units, three significant digits.

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

    >>> milliseconds(0.1031)
    '0.103 ms'
    """
    return f"{number(value)} ms" if known(value) else MISSING


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction as a percentage.

    >>> percent(0.55), percent(None)
    ('55%', '–')
    """
    return f"{100 * value:.{digits}f}%" if value is not None and known(value) else MISSING


def signed(text: str) -> str:
    """`text` of a number with a true minus sign, and no minus before a zero.

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

    >>> times(10.2036), times(91.42)
    ('10.2', '91')
    """
    return f"{value:.1f}" if value < 19.95 else f"{value:,.0f}"


def compared(value: float | None, better: str, worse: str, same: str) -> str:
    """A ratio in words, never flattering: `10.2 times faster`, `1.2 times slower`, or `same` within 5%.

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

        >>> Quality("accuracy", True, True).points(0.002)
        '0.2 points'
        """
        bare = self.bare(drop)
        if bare == MISSING or not self.rate:
            return bare
        return f"{bare} point" if bare == "1.0" else f"{bare} points"

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
        """`loses 0.2 points of accuracy (95% interval −0.1 to 0.5)`."""
        interval = self.interval(bounds)
        of = "" if self.metric == "score" else f" of {self.metric}" if self.rate else f" in {self.metric}"
        if self.bare(drop).strip("0.−") == "":
            verb, amount = "loses nothing measurable", of
        else:
            verb, amount = ("loses" if drop > 0 else "gains"), f" {self.points(abs(drop))}{of}"
        return f"{verb}{amount}" + (f" ({interval})" if interval else "")


def limit(summary: Summary) -> tuple[str, float] | None:
    """The question turned round: (key, bound) for `--max-bytes` or `--max-latency-ms`, None for a floor."""
    for setting, key in (("max_bytes", "onnx_bytes"), ("max_latency_ms", "latency_ms")):
        if known(summary.get(setting)):
            return key, float(summary[setting])
    return None


def cost(point: Mapping[str, Any], key: str) -> float | None:
    """A cost of a point; the short record of a tried point may name it `bytes` or `latency`."""
    value = point.get(key, point.get({"onnx_bytes": "bytes", "latency_ms": "latency"}.get(key, ""), None))
    return float(value) if value is not None and known(value) else None


def shown(summary: Summary) -> Mapping[str, Any] | None:
    """The point that the page describes: the chosen one, else the nearest of the front."""
    if summary.get("chosen"):
        chosen: Mapping[str, Any] = summary["chosen"]
        return chosen
    front: list[Mapping[str, Any]] = [point for point in summary.get("front") or () if known(point.get("val"))]
    if not front:
        return None
    bound = limit(summary)
    if bound:
        return min(front, key=lambda point: cost(point, bound[0]) or math.inf)
    sign = 1 if Quality.of(summary).higher_is_better else -1
    return max(front, key=lambda point: sign * point["val"])


def gains(summary: Summary, point: Mapping[str, Any]) -> str:
    """`25 times smaller (91 times packed) and 10.2 times faster`, each against the dense model's ONNX file."""
    dense = summary["dense"]
    smaller = compared(ratio(dense.get("onnx_bytes"), cost(point, "onnx_bytes")), "smaller", "larger", "as large")
    packed = ratio(dense.get("onnx_bytes"), cost(point, "packed_bytes"))
    if smaller and packed is not None and packed >= 1.05:
        smaller += f" ({times(packed)} times packed)"
    faster = compared(ratio(cost(dense, "latency_ms"), cost(point, "latency_ms")), "faster", "slower", "as fast")
    in_engine = ratio(cost(dense, "latency_ms"), cost(point, "engine_ms"))
    if in_engine is not None and in_engine >= 1.05:
        faster += f" ({times(in_engine)} times in lilliput's engine)" if faster else f"{times(in_engine)} times faster"
    return " and ".join(part for part in (smaller, faster) if part)


def verdict(summary: Summary) -> str:
    """The result in one sentence.

    A loss on the test split is quoted with the test split's own interval; the interval of the corrected validation
    loss is quoted with that loss only, since one number's interval says nothing about another.
    """
    quality, task, bound = Quality.of(summary), str(summary["task"]), limit(summary)
    point, met = shown(summary), bool(summary.get("met", True))
    if point is None:
        return f"No point of {task} could be finished; the files written are the dense model's."
    fits = "" if bound is None else (size if bound[0] == "onnx_bytes" else milliseconds)(bound[1])
    if met:
        drop, where = summary.get("drop_test"), "on data it was not tuned on"
        bounds, score = summary.get("drop_test_interval"), point.get("test")
        if not known(drop):
            drop, bounds, where = *_corrected(summary, point), "on validation data, corrected for the choice"
            score = point.get("val")
        if bound:
            comparison = f" and {quality.lost(drop, bounds)}" if drop is not None else ""
            best = f"The best {task} within {fits} scores {quality.score(score)} {where}"
            return f"{best}{comparison}; it is {gains(summary, point)}."
        comparison = f", and {quality.lost(drop, bounds)} {where}" if drop is not None else ""
        return f"{task} is {gains(summary, point)}{comparison}."
    name = str(point.get("name") or "unnamed")
    if bound:
        needs = (size if bound[0] == "onnx_bytes" else milliseconds)(cost(point, bound[0]))
        return f"Nothing that was tried makes {task} fit within {fits}; the nearest ({name}) needs {needs}."
    drop, bounds = _corrected(summary, point)
    nearest = f"; the nearest ({name}) {quality.lost(drop, bounds)}" if drop is not None else ""
    return f"Nothing that was tried keeps {task} within {quality.points(floor(summary))} of the dense model{nearest}."


def floor(summary: Summary) -> float | None:
    """The floor in units of the metric, or None for a question without one."""
    value = summary.get("floor")
    return float(value) if limit(summary) is None and known(value) else None  # type: ignore[arg-type]


def _corrected(summary: Summary, point: Mapping[str, Any]) -> tuple[float | None, Any]:
    if known(summary.get("drop_corrected")):
        return summary["drop_corrected"], summary.get("drop_corrected_interval")
    return Quality.of(summary).drop(summary["dense"].get("val"), point.get("val")), None


def setting(value: object) -> str:
    """One setting of a recipe as text.

    >>> setting({"rule": "Distil", "temperature": 4.0}), setting([16, 32]), setting(True)
    ('Distil(temperature 4)', '16, 32', 'yes')
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        title, rest = titled(value)
        return f"{title}({rest})" if title and rest else title or rest
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value))
    return MISSING if value is None else str(value)


def titled(step: Mapping[str, Any]) -> tuple[str, str]:
    """A stage or rule as (name, settings).

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
