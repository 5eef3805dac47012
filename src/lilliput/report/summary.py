"""Describe a summary in words: its chosen point, the cost, the floor, and the result in one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lilliput.report.formats import Quality, Summary, compared, known, milliseconds, ratio, size, times


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
