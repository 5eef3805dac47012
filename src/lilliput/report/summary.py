"""Describe a summary in words: its chosen point, the cost, the floor, and the result in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lilliput.report.formats import Quality, Summary, compared, count, duration, known, milliseconds, ratio, size, times
from lilliput.search.ask import Floor
from lilliput.search.question import FILES, Question


def question(summary: Summary) -> Question:
    """What was asked; an older summary's limit on bytes was about model.onnx, its objective about model.lil."""

    def most(key: str) -> Any:
        return summary[key] if known(summary.get(key)) else None

    old = "file" not in summary and known(summary.get("max_bytes"))
    return Question(
        str(summary.get("objective") or "size"),
        None if floor(summary) is None else Floor(float(summary["floor"])),
        most("max_bytes"),
        most("max_latency_ms"),
        most("max_peak_bytes"),
        "onnx" if old else str(summary.get("file") or "lil"),
        summary.get("runtime"),
    )


def written(question: Question, what: str, value: float | None) -> str:
    """A cost with its unit, to three digits."""
    if what == "latency":
        return milliseconds(value)
    return f"{count(value)} multiply-adds" if what == "macs" else size(value)


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
    asked = question(summary)
    if asked.limits:
        return min(front, key=lambda point: asked.excess(point))
    sign = 1 if Quality.of(summary).higher_is_better else -1
    return max(front, key=lambda point: sign * point["val"])


def gains(summary: Summary, point: Mapping[str, Any]) -> str:
    """`91 times smaller as model.lil (25 times as model.onnx) and 10.2 times faster`, what was asked first.

    Each is against the dense network as it was given: its ONNX file, in ONNX Runtime.
    """
    asked = question(summary)
    parts = {"size": _smaller(summary, point, asked), "latency": _faster(summary, point, asked)}
    if asked.objective in ("macs", "memory"):
        change = ratio(asked.before(summary["dense"]), asked.price(point))
        what = {"macs": "multiply-adds", "memory": "memory"}[asked.objective]
        parts[asked.objective] = compared(change, f"less {what}", f"more {what}", f"as much {what}")
        parts[asked.objective] = f"needs {parts[asked.objective]}" if parts[asked.objective] else ""
    order = sorted(parts, key=lambda what: what != asked.objective)
    said = [parts[what] for what in order if parts[what]]
    if said and said[0].startswith("needs "):
        return said[0] + (f", is {' and '.join(said[1:])}" if said[1:] else "")
    return ("is " if said else "is done") + " and ".join(said)


def _smaller(summary: Summary, point: Mapping[str, Any], asked: Question) -> str:
    given, other = summary["dense"].get("onnx_bytes"), {"lil": "onnx", "onnx": "lil"}[asked.file]
    text = compared(ratio(given, cost(point, asked.file_key)), "smaller", "larger", "as large")
    beside = ratio(given, cost(point, FILES[other])) if asked.file == "lil" else None
    if not text:
        return compared(ratio(given, cost(point, FILES[other])), "smaller", "larger", "as large")
    return f"{text} as model.{asked.file}" + (
        f" ({times(beside)} times as model.{other})" if beside is not None and beside >= 1.05 else ""
    )


def _faster(summary: Summary, point: Mapping[str, Any], asked: Question) -> str:
    given = cost(summary["dense"], "latency_ms")
    in_engine = ratio(given, cost(point, "engine_ms"))
    if asked.runtime == "engine" and in_engine is not None:
        return compared(in_engine, "faster", "slower", "as fast") + " in lilliput's engine"
    text = compared(ratio(given, cost(point, "latency_ms")), "faster", "slower", "as fast")
    if in_engine is not None and in_engine >= 1.05 and asked.runtime is None:
        text += f" ({times(in_engine)} times in lilliput's engine)" if text else f"{times(in_engine)} times faster"
    return text


def verdict(summary: Summary) -> str:
    """The result in one sentence.

    A loss on the test split is quoted with the test split's own interval; the interval of the corrected validation
    loss is quoted with that loss only, since one number's interval says nothing about another.
    """
    quality, task, asked = Quality.of(summary), str(summary["task"]), question(summary)
    point, met = shown(summary), bool(summary.get("met", True))
    if point is None:
        return f"No point of {task} could be finished; the files written are the dense model's."
    fits = " and ".join(written(asked, what, most) for what, most in asked.limits)
    if met and not asked.limits and point.get("name") == "dense" and not known(point.get("engine_ms")):
        return _unpromised(summary, quality, asked)
    if met:
        drop, where = summary.get("drop_test"), "on data it was not tuned on"
        bounds, score = summary.get("drop_test_interval"), point.get("test")
        if not known(drop):
            drop, bounds, where = *_corrected(summary, point), "on validation data, corrected for the choice"
            score = point.get("val")
        if asked.limits:
            comparison = f" and {quality.lost(drop, bounds)}" if drop is not None else ""
            best = f"The best {task} within {fits} scores {quality.score(score)} {where}"
            return f"{best}{comparison}; it {gains(summary, point)}."
        comparison = f", and {quality.lost(drop, bounds)} {where}" if drop is not None else ""
        return f"{task} {gains(summary, point)}{comparison}{_beside_floor(drop, floor(summary), quality)}."
    name = str(point.get("name") or "unnamed")
    if asked.limits:
        needs = " and ".join(written(asked, what, asked.cost(what, point)) for what, _ in asked.limits)
        return f"Nothing that was tried makes {task} fit within {fits}; the nearest ({name}) needs {needs}."
    drop, bounds = _corrected(summary, point)
    nearest = f"; the nearest ({name}) {quality.lost(drop, bounds)}" if drop is not None else ""
    return f"Nothing that was tried keeps {task} within {quality.points(floor(summary))} of the dense model{nearest}."


def request(summary: Summary) -> str:
    """What was asked, in one sentence.

    Example:
        >>> request({"task": "tiny", "dense": {"val": 0.9}, "floor": 0.01, "sure": 0.9, "budget_s": 300})
        'The smallest model.lil that loses at most 1.0 point on new data with a probability of 90%, found within 5 min.'
    """
    asked, quality = question(summary), Quality.of(summary)
    names = {"macs": "fewest multiply-adds", "memory": "least memory", "latency": "lowest latency"}
    most = names.get(asked.objective)
    what = f"The network with the {most}" if most else f"The smallest model.{asked.file}"
    where = {"ort": " in ONNX Runtime", "engine": " in lilliput's engine"}.get(asked.runtime or "", "")
    if asked.limits:
        units = {"size": f"of model.{asked.file}", "latency": f"for one input{where}", "memory": f"of memory{where}"}
        said = " and ".join(f"{written(asked, cost, most)} {units[cost]}" for cost, most in asked.limits)
        text = f"The best {quality.metric} within {said}"
    else:
        text = what + (where if asked.objective in ("latency", "memory") else "")
        text += "" if asked.floor is None else f" that {quality.bounded(floor(summary))} on new data"
        text += f" with a probability of {100 * summary['sure']:g}%" if known(summary.get("sure")) else ""
    if known(summary.get("worst_class")):
        text += f", and in no class or group more than {quality.points(summary['worst_class'])}"
    if known(summary.get("budget_s")):
        return f"{text}, found within {duration(summary['budget_s'])}."
    return f"{text}, found among {count(summary['trials'])} structures." if known(summary.get("trials")) else f"{text}."


def answer(summary: Summary) -> str:
    """Whether what was asked was met, and what is promised.

    Example:
        >>> answer({"task": "tiny", "dense": {"val": 0.9}, "floor": 0.01, "met": False})
        'No. The files are those of the dense network.'
    """
    quality, point = Quality.of(summary), shown(summary)
    if point is None or not summary.get("met", True):
        return "No. The files are those of the dense network."
    if question(summary).limits:
        return "Yes."
    if point.get("name") == "dense" and not known(point.get("engine_ms")):
        return "Only by the dense network, which loses nothing: no cheaper one could be promised to keep the floor."
    sure, bound = summary.get("sure"), summary.get("drop_bound")
    if not (known(sure) and known(bound)):
        return "Yes."
    return f"Yes. On new data it {quality.bounded(bound)} with a probability of {100 * float(sure or 0):g}%."


def _unpromised(summary: Summary, quality: Quality, asked: Question) -> str:
    """The sentences where the dense network is all that can be promised, with the next best and what it would take."""
    said = f"Nothing cheaper than the dense {summary['task']} could be promised to keep the floor of "
    said += f"{quality.points(floor(summary))}, so the files are the dense network's."
    allowing = {row.get("key"): row["floor"] for row in summary.get("misses") or ()}  # rounded up to what can be typed
    for point in (summary.get("near") or ())[:1]:
        needed = quality.points(allowing.get(point.get("key"), point["drop_bound"]))
        words = {"size": ("smaller", "larger", "as large"), "latency": ("faster", "slower", "as fast")}
        price = compared(
            ratio(asked.before(summary["dense"]), asked.price(point)),
            *words.get(asked.objective, ("cheaper", "dearer", "as cheap")),
        )
        said += f" With a floor of {needed} it would be {price} ({point['name']})"
        more = point.get("examples_to_promise")
        said += f"; about {more:,} validation examples might show that it keeps this floor." if known(more) else "."
    return said


def _beside_floor(drop: float | None, floor: float | None, quality: Quality) -> str:
    """Whether the loss that a sentence names lies within the floor that was asked for."""
    if drop is None or floor is None:
        return ""
    if drop <= floor + 1e-12:
        return f", within the floor of {quality.points(floor)}"
    return f", which is more than the floor of {quality.points(floor)} that validation data promised"


def floor(summary: Summary) -> float | None:
    """The floor in units of the metric, or None for a question without one."""
    turned = any(known(summary.get(key)) for key in ("max_bytes", "max_latency_ms", "max_peak_bytes"))
    value = summary.get("floor")
    return None if turned or value is None or not known(value) else float(value)


def _corrected(summary: Summary, point: Mapping[str, Any]) -> tuple[float | None, Any]:
    if known(summary.get("drop_corrected")):
        return summary["drop_corrected"], summary.get("drop_corrected_interval")
    return Quality.of(summary).drop(summary["dense"].get("val"), point.get("val")), None
