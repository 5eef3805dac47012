"""What happened in a search, in sentences: why it ended, what it had no time for, what came near, what brought what."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lilliput.report import formats
from lilliput.report.formats import Quality, Summary, duration
from lilliput.report.summary import cost, floor, question, written

BEST_AXES = 3


def told(summary: Summary) -> list[str]:
    """The sentences, most important first; none about what did not happen.

    Example:
        >>> told({"task": "tiny", "dense": {"val": 0.9}, "finished": True, "ended": "Ctrl-C", "wall_s": 31.5})
        ['The search was ended by Ctrl-C after 31.5 s.']
    """
    parts = ended(summary), worst(summary), unfinished(summary), near(summary), brought(summary)
    return [text for text in parts if text]


def ended(summary: Summary) -> str:
    """Why the search ended early, or that it had not ended when this was written."""
    if not summary.get("finished", True):
        return (
            "The search had not ended when this was written: the test split was not read. "
            "`lilliput finish` chooses, tests and reports."
        )
    reason = summary.get("ended")
    if not reason or reason == "the end of the budget":
        return ""
    return f"The search was ended by {reason} after {formats.number(summary.get('wall_s'), 3)} s."


def worst(summary: Summary) -> str:
    """Which class or group loses most, and how many answers changed.

    Example:
        >>> row = {"part": "class 8", "split": "test", "examples": 97, "drop": 0.02, "bound": 0.05}
        >>> told = {"metric": "accuracy", "dense": {"val": 0.9}, "changed": {"count": 14, "of": 1000, "split": "test"}}
        >>> worst(told | {"parts": [row]})
        'Of the parts class 8 loses most: 2.0 points of its 97 test examples. 14 of 1,000 answers changed.'
    """
    said, rows, changed = [], summary.get("parts") or (), summary.get("changed")
    if rows and rows[0]["drop"] > 0:
        part, quality = rows[0], Quality.of(summary)
        split = {"val": "validation"}.get(part["split"], part["split"])
        lost = quality.points(part["drop"])
        said.append(f"Of the parts {part['part']} loses most: {lost} of its {part['examples']:,} {split} examples.")
    if changed:
        said.append(f"{changed['count']:,} of {changed['of']:,} answers changed.")
    return " ".join(said)


def unfinished(summary: Summary) -> str:
    """What ran out of time, and the budget that would do."""
    left = summary.get("unfinished")
    if left:
        points = "1 attempt" if left["count"] == 1 else f"{left['count']} attempts"
        return f"{points} ran out of time; a budget of {duration(left['budget_s'])} would do."
    late = next((one["reason"] for one in summary.get("left_alone") or () if one.get("name") == "training"), "")
    return f"Nothing was trained: {late}." if late else ""


def near(summary: Summary) -> str:
    """The nearest misses: `With --floor 1.1% it would be 53 times smaller, with 1.4% 80 times.`"""
    rows = misses(summary)
    if not rows or floor(summary) is None:
        return ""
    asked = question(summary)
    words = {"size": "smaller", "latency": "faster", "macs": "fewer multiply-adds", "memory": "less memory"}
    first, *rest = rows
    text = f"With --floor {first['option']} it would be {formats.times(first['times'])} times {words[asked.objective]}"
    return text + "".join(f", with {row['option']} {formats.times(row['times'])} times" for row in rest) + "."


def misses(summary: Summary) -> list[dict[str, Any]]:
    """The nearest misses as rows, each with its score and the validation examples that might be enough for it."""
    known, before = {point.get("key"): point for point in summary.get("near") or ()}, question(summary).before
    return [
        dict(known.get(row.get("key")) or {}, **row) | {"times": before(summary["dense"]) / row["price"]}
        for row in summary.get("misses") or ()
    ]


def why(summary: Summary) -> str:
    """Why there is no nearest miss below what was chosen; empty where there is one, or nothing was to be promised."""
    if summary.get("misses") or not summary.get("met", True) or floor(summary) is None or "near" not in summary:
        return ""
    if summary["near"]:
        return f"No {cheaper(summary)} point comes near the floor: see the column At most of the table of points."
    return f"No {cheaper(summary)} point was measured."


def cheaper(summary: Summary) -> str:
    """What a point is that costs less: smaller, faster or cheaper."""
    return {"size": "smaller", "latency": "faster"}.get(question(summary).objective, "cheaper")


def brought(summary: Summary) -> str:
    """Which axes brought most: `What made it smaller: Narrow 4.0 times in 2 min.`"""
    rows = [row for row in summary.get("axes") or () if row["times"] > 1.005][:BEST_AXES]
    parts = [f"{row['axis']} {formats.times(row['times'])} times in {duration(row['seconds'])}" for row in rows]
    return f"What made it {cheaper(summary)}: {', '.join(parts)}." if parts else ""


def axes(summary: Summary) -> list[dict[str, str]]:
    """Every axis as a row of text: what it took, what came of it, what it brought."""
    return [
        {
            "axis": str(row["axis"]),
            "tried": formats.count(row["tried"]),
            "done": formats.count(row["done"]),
            "time": duration(row["seconds"]) if row["seconds"] else formats.MISSING,
            "times": f"{formats.times(row['times'])}×" if row["times"] > 1.005 else formats.MISSING,
            "rate": (
                formats.number(row["log_gain_per_minute"], 2) if row.get("log_gain_per_minute") else formats.MISSING
            ),
        }
        for row in summary.get("axes") or ()
    ]


def refused(summary: Summary) -> list[tuple[str, str]]:
    """What was left alone, with the reasons."""
    return [(str(one.get("name")), str(one.get("reason"))) for one in summary.get("left_alone") or ()]


def history(summary: Summary) -> dict[str, Any] | None:
    """The history of the best as a staircase over time on a logarithmic axis of times; None with fewer than two steps.

    Positions are in percent of a box whose height is the largest gain.
    """
    asked, dense = question(summary), summary["dense"]
    before = asked.before({key: cost(dense, key) for key in dense})
    rows = [row for row in summary.get("history") or () if formats.known(row.get("price")) and row["price"] > 0]
    if len(rows) < 2 or not formats.known(before) or before <= 0:
        return None

    end = max(float(summary.get("wall_s") or 0.0), *(float(row["at_s"]) for row in rows)) or 1.0
    gains = [math.log(max(before / row["price"], 1.0)) for row in rows]
    top = max(gains) or 1.0
    points = [(100 * float(row["at_s"]) / end, 100 - 100 * gain / top) for row, gain in zip(rows, gains, strict=True)]
    path = f"M{points[0][0]:.2f} {points[0][1]:.2f}"
    path += "".join(f"H{x:.2f}V{y:.2f}" for x, y in points[1:]) + "H100"
    quality = Quality.of(summary)
    steps = [
        {
            "x": round(x, 2),
            "y": round(y, 2),
            "at": duration(float(row["at_s"])),
            "times": formats.times(before / row["price"]),
            "price": written(asked, asked.objective, row["price"]),
            "score": quality.score(row.get("val")),
            "name": str(row.get("name") or ""),
        }
        for (x, y), row in zip(points, rows, strict=True)
    ]
    return {
        "path": path,
        "steps": steps,
        "end": duration(end),
        "top": formats.times(math.exp(top)),
        "ticks": _ticks(top),
    }


def _ticks(top: float) -> list[tuple[float, str]]:
    """Heights of round numbers of times, in percent from the top."""

    marks = [mark * 10**power for power in range(5) for mark in (1, 2, 5)]
    kept = [mark for mark in marks if math.log(mark) <= top * 1.001]
    step = -(-len(kept) // 5)
    return [(round(100 - 100 * math.log(mark) / top, 2), f"{mark:g}×") for mark in kept[::step]]


def reasons(summary: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """Attempts that came to nothing, by reason: (reason, names, how many)."""
    rows: dict[str, list[str]] = {}
    for row in summary.get("points") or ():
        if row.get("status") not in (None, "done", "rung"):
            reason = str(row.get("reason") or row["status"])
            rows.setdefault(reason, []).append(str(row.get("name") or "unnamed"))
    return [(reason, "; ".join(names), len(names)) for reason, names in rows.items()]
