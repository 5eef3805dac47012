"""Plan the plot of the Pareto front for every renderer: its points, axes and staircase."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lilliput.report import summary as summaries
from lilliput.report.formats import Quality, Summary, known
from lilliput.report.summary import cost

VIEWS = {"onnx_bytes": "model.onnx", "packed_bytes": "model.lil", "latency_ms": "latency, one input"}


@dataclass(frozen=True)
class Plan:
    """Points with their kind, the horizontal axes by cost, and the vertical axis from `low` to `high` (`scale` times
    the metric; `sign` is -1 where lower is better, and better is always drawn upwards)."""

    points: list[dict[str, Any]]
    axes: dict[str, dict[str, Any]]
    scale: float
    sign: int
    low: float
    high: float
    pad: float


def plan(summary: Summary) -> Plan | None:
    """The plan of the front's plot; None where the dense model's score or every cost is unknown."""
    quality = Quality.of(summary)
    points = [point for point in every_point(summary) if known(point.get("val"))]
    asked = summaries.question(summary).keys[0]
    views = {key: VIEWS[key] for key in sorted(VIEWS, key=lambda key: key != asked)}
    costs = {key: [x for point in points if (x := cost(point, key))] for key in views}
    axes = {
        key: {
            "title": VIEWS[key],
            "start": min(xs) / 1.25,
            "end": max(xs) * 1.25,
            "ticks": list(labels := _ticks(key)),
            "labels": labels,
        }
        for key, xs in costs.items()
        if xs
    }
    if not axes or not known(summary["dense"].get("val")):
        return None
    scale, sign = (100.0 if quality.rate else 1.0), 1 if quality.higher_is_better else -1
    values = [point["val"] for point in points]
    floor = summaries.floor(summary)
    values += [] if floor is None else [summary["dense"]["val"] - sign * floor]  # the floor's line is in the picture
    low, high = scale * _lowest(summary, quality, values), scale * max(values, key=lambda value: sign * value)
    return Plan(points, axes, scale, sign, low, high, pad=0.07 * abs(high - low) or 0.01 * abs(high) or 1.0)


def every_point(summary: Summary) -> list[dict[str, Any]]:
    """Every point once, dense first, with its kind: dense, chosen (or nearest), front, tried."""
    described = summaries.shown(summary)
    chosen = "chosen" if summary.get("met", True) else "nearest"
    dense = dict(summary["dense"], kind="dense", name=summary["dense"].get("name") or "dense")
    out, seen = [dense], {_identity(dense)}
    groups = [
        (chosen, [described] if described else []),
        ("front", summary.get("front") or []),
        ("tried", [*(summary.get("near") or []), *(summary.get("points") or [])]),  # the first knows more of a point
    ]
    for kind, points in groups:
        for point in points:
            if (key := _identity(point)) not in seen:
                seen.add(key)
                out.append(dict(point, kind=kind))
    return out


def _identity(point: Mapping[str, Any]) -> tuple[Any, ...]:
    return (point.get("name"), point.get("val"), cost(point, "onnx_bytes"), cost(point, "packed_bytes"))


def staircase(points: Sequence[Mapping[str, Any]], key: str, sign: int) -> list[tuple[float, float]]:
    """The best score that each cost buys, as the corners of a staircase; dense included."""
    corners: list[tuple[float, float]] = []
    finished = [point for point in points if point.get("status", "done") == "done" and known(point.get("val"))]
    usable = [(x, point["val"]) for point in finished if (x := cost(point, key))]
    for x, y in sorted(usable, key=lambda pair: (pair[0], -sign * pair[1])):
        if not corners or sign * y > sign * corners[-1][1]:
            if corners:
                corners.append((x, corners[-1][1]))
            corners.append((x, y))
    return corners


def _lowest(summary: Summary, quality: Quality, values: Sequence[float]) -> float:
    """The worst score worth drawing: twelve floors (or losses of the chosen point) below dense, so that a ruined
    point far below does not flatten the rest."""
    dense, sign = summary["dense"].get("val"), 1 if quality.higher_is_better else -1
    worst = min(values) if sign > 0 else max(values)
    losses = [summaries.floor(summary) or 0.0, quality.drop(dense, (summaries.shown(summary) or {}).get("val")) or 0.0]
    if not known(dense) or max(losses) <= 0:
        return worst
    bound = float(dense) - sign * 12 * max(losses)
    return max(worst, bound) if sign > 0 else min(worst, bound)


def _ticks(key: str) -> dict[float, str]:
    """Ticks at 1, 2 and 5 of every decade, with their labels."""
    low = -5 if key == "latency_ms" else 0
    ticks = [round(mantissa * 10.0**power, 9) for power in range(low, low + 13) for mantissa in (1, 2, 5)]
    return {tick: f"{tick:g} ms" if key == "latency_ms" else _bytes_tick(tick) for tick in ticks}


def _bytes_tick(value: float) -> str:
    power = min(3, int(math.log10(value) // 3))
    return f"{value / 1000**power:g} {('B', 'kB', 'MB', 'GB')[power]}"
