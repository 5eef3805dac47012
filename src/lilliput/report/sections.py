"""Collect the sections of a report below its plot, as plain data for the template."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.report import formats
from lilliput.report import summary as summaries
from lilliput.report.formats import Quality, Summary, known
from lilliput.report.plan import every_point
from lilliput.report.summary import cost
from lilliput.report.terms import TERMS


def figures(summary: Summary, point: Mapping[str, Any] | None, quality: Quality) -> list[dict[str, str]]:
    """The four numbers under the verdict: what it is now, how much better, what it was."""
    if point is None:
        return []
    dense, out, asked = summary["dense"], [], summaries.question(summary)
    rows = (
        ("onnx_bytes", "onnx", "model.onnx", formats.size, "smaller", "larger", "as large"),
        ("packed_bytes", "lil", "model.lil", formats.size, "smaller", "larger", "as large"),
        ("latency_ms", "latency", "latency, one input", formats.milliseconds, "faster", "slower", "as fast"),
        ("engine_ms", "engine", "latency in the engine", formats.milliseconds, "faster", "slower", "as fast"),
        ("peak_bytes", "memory", "memory of a run", formats.size, "less", "more", "as much"),
        ("engine_peak_bytes", "memory", "memory in the engine", formats.size, "less", "more", "as much"),
    )
    for key, term, label, text, better, worse, same in sorted(rows, key=lambda row: row[0] not in asked.keys):
        # The file as given, in the runtime that it ran in.
        before = cost(dense, {"packed_bytes": "onnx_bytes", "engine_ms": "latency_ms"}.get(key, key))
        after = cost(point, key)
        if after is not None:
            change = formats.compared(formats.ratio(before, after), better, worse, same).replace(" times", "×")
            tone = "worse" if worse in change else "better"
            out.append(
                {"term": term, "label": label, "now": text(after), "change": change, "was": text(before), "tone": tone}
            )
    split, label = ("test", "held-out test") if known(point.get("test")) else ("val", "validation")
    drop = quality.drop(dense.get(split), point.get(split))
    change = "" if drop is None else "unchanged" if drop == 0 else quality.points(abs(drop))
    if drop:
        change += " lower" if (drop > 0) == quality.higher_is_better else " higher"
    now, was = quality.score(point.get(split)), quality.score(dense.get(split))
    tone = "better" if drop is not None and drop < 0 else "worse"
    return [
        *out,
        {"term": "", "label": f"{quality.metric}, {label}", "now": now, "change": change, "was": was, "tone": tone},
    ]


def interval(summary: Summary, quality: Quality) -> dict[str, Any] | None:
    """The losses as rows over one axis; positions in percent of the axis."""
    losses = (
        ("validation", "ring", "drop_val"),
        ("corrected", "dot", "drop_corrected"),
        ("bound", "bar", "drop_bound"),
        ("test", "diamond", "drop_test"),
    )
    shown = [
        (term, mark, float(summary[key]), [float(end) for end in summary.get(f"{key}_interval") or () if known(end)])
        for term, mark, key in losses
        if known(summary.get(key))
    ]
    if not shown:
        return None
    limit = summaries.floor(summary)
    reach = [0.0, *([] if limit is None else [limit]), *(drop for _, _, drop, _ in shown)]
    reach += [end for *_, ends in shown for end in ends]
    pad = 0.09 * (max(reach) - min(reach)) or 0.001
    start, end = min(reach) - pad, max(reach) + pad
    step = 10.0 ** math.floor(math.log10((end - start) / 3))
    step *= next(multiple for multiple in (1, 2, 5, 10) if (end - start) / (multiple * step) <= 6)

    def at(value: float) -> float:
        return round(100 * (value - start) / (end - start), 3)

    rows: list[dict[str, Any]] = [
        {
            "term": term,
            "label": TERMS[term][0],
            "mark": mark,
            "x": at(drop),
            "text": quality.points(drop),
            "span": [at(end) for end in ends] if len(ends) == 2 else None,
            "note": _sure(summary) if term == "bound" else quality.interval(ends).removeprefix("95% interval "),
        }
        for term, mark, drop, ends in shown
    ]
    unit = 100 if quality.rate else 1
    decimals = max(0, -math.floor(math.log10(step * unit) + 1e-9))
    ticks = [i * step for i in range(math.ceil(start / step), math.floor(end / step) + 1)]
    return {
        "rows": rows,
        "zero": at(0.0),
        "floor": None if limit is None else at(limit),
        "ticks": [(at(tick), formats.signed(f"{tick * unit:.{decimals}f}")) for tick in ticks],
        "alt": "; ".join(" ".join(filter(None, (row["label"], row["text"], row["note"]))) for row in rows),
    }


def _sure(summary: Summary) -> str:
    return f"with {100 * summary['sure']:g}%" if known(summary.get("sure")) else ""


def layers(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a layer: the dense model's in its order, with what became of each, then those that are new."""
    now = {layer["name"]: layer for layer in after}
    pairs = [(layer, now.pop(layer["name"], None)) for layer in before] + [(None, layer) for layer in now.values()]
    rows = []
    for old, new in pairs:
        some = new or old or {}
        rows.append(
            {
                "name": some["name"],
                "kind": some.get("kind") or "",
                "state": "removed" if after and new is None else "new" if old is None and before else "",
                "left_alone": (new or {}).get("left_alone"),
                "cells": [_change(old, new, key, text) for key, text in _COLUMNS],
            }
        )
    return rows


def _shape(value: Sequence[int]) -> str:
    return " × ".join(map(str, value)) if value else formats.MISSING


_COLUMNS = (
    ("shape", _shape),
    ("values", formats.count),
    ("bits", lambda value: f"{value:g}"),
    ("sparsity", lambda value: formats.percent(value) if value else "0%"),
    ("rank", str),
    ("share_of_time", lambda value: formats.percent(value, 1)),
)


def _change(
    old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, key: str, text: Any
) -> tuple[str, str, float | None]:
    """(before, after, the number to sort by); the first is empty where nothing changed."""
    was, now = (
        formats.MISSING if layer is None or layer.get(key) is None else str(text(layer[key])) for layer in (old, new)
    )
    value = (new or old or {}).get(key)
    number = float(value) if value is not None and known(value) else None
    if new is None:
        return (was, "", number)
    same = was == now or old is None or (key == "rank" and was == formats.MISSING)
    return ("" if same else was, now, number)


def shares(shares: Mapping[str, float]) -> list[dict[str, Any]]:
    names = {"train": "training", "calibrate": "calibration", "measure": "measurement", "other": "everything else"}
    out, x = [], 0.0
    for key, share in shares.items():
        if known(share) and share > 0:
            out.append(
                {
                    "key": key,
                    "name": names.get(key, key),
                    "x": round(100 * x, 3),
                    "width": round(100 * share, 3),
                    "text": formats.percent(share, 1),
                }
            )
            x += share
    return out


def _promise(summary: Summary, quality: Quality) -> str:
    """What the floor was checked on."""
    if not known(summary.get("sure")):  # before format 2 had a bound
        draws = formats.count(summary.get("draws") or 1000)
        return (
            f"The whole choice was repeated on {draws} bootstrap draws of the validation split, and each winner was "
            "scored on the examples its draw left out; the floor is checked on that loss."
        )
    sure, bound = f"{100 * summary['sure']:g}%", summary.get("drop_bound")
    most = f": {quality.points(bound)} here" if known(bound) else ""
    return (
        f"The floor is checked on what a point loses at most with a probability of {sure}{most}. That comes from the "
        "validation examples on which it and the dense model differ, and from the points that it was chosen among."
    )


def measured(summary: Summary, point: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How the numbers came about, as pairs of a term and a sentence; what is unknown is left out."""
    machine, dense, out = summary.get("machine") or {}, summary["dense"], []
    parts = [machine.get("cpu"), f"{machine['cores']} cores" if machine.get("cores") else None, machine.get("os")]
    out.append(("Machine", ", ".join(str(part) for part in parts if part)))
    if known(machine.get("load_before")) and known(machine.get("load_after")):
        out.append(("Load", f"{machine['load_before']:.2f} before, {machine['load_after']:.2f} after"))
    if dense.get("runtime"):
        threads = dense.get("threads")
        out.append(
            (
                "Runtime",
                f"{dense['runtime']}"
                + (f", {threads} thread{'s' * (threads != 1)}" if threads else "")
                + ", one input at a time, the models' runs interleaved",
            )
        )
    medians = []
    for name, entry in (("dense", dense), ("this model" if summary.get("met", True) else "nearest", point or {})):
        for key, where in (("latency", ""), ("engine", " in the engine")):
            if known(entry.get(f"{key}_ms")):
                spread = list(entry.get(f"{key}_iqr_ms") or [])
                between = (
                    f" (quartiles {formats.number(spread[0])} to {formats.number(spread[1])})"
                    if len(spread) == 2
                    else ""
                )
                medians.append(f"{name}{where} {formats.milliseconds(entry[f'{key}_ms'])}{between}")
    out.append(("Latency, median", "; ".join(medians)))
    splits = ", ".join(f"{formats.count(n)} {name}" for name, n in (summary.get("examples") or {}).items())
    out.append(
        (
            "Data",
            f"{splits}. " * bool(splits)
            + "Decisions read the validation split"
            + ("; the test split was read once, after the choice." if known(summary.get("drop_test")) else "."),
        )
    )
    if known(summary.get("drop_corrected")):
        more = summary.get("examples_for_half_interval")
        tail = f" Half this interval would take about {formats.count(more)} validation examples." if known(more) else ""
        out.append(("Choice", f"{_promise(summary, Quality.of(summary))}{tail}"))
    agreement = (point or {}).get("agreement") or {}
    if agreement:
        out.append(
            (
                "Agreement with torch",
                f"outputs differ by at most {formats.number(agreement.get('max_abs'), 2)}, "
                f"{formats.number(agreement.get('mean_abs'), 2)} on average; "
                f"{formats.percent(agreement.get('changed'), 2)} of the predictions change",
            )
        )
    out.append(
        ("Versions", ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items()))
    )
    seed, commit = summary.get("seed"), summary.get("commit")
    out.append(("Seed", "" if seed is None else str(seed)))
    out.append(("Commit", str(commit or "")))
    return [(term, text) for term, text in out if text]


def _bytes(value: float | None) -> str:
    return f"{formats.count(value)} B" if known(value) else formats.MISSING


_POINTS = (
    ("packed_bytes", "lil", "model.lil", _bytes),
    ("onnx_bytes", "onnx", "model.onnx", _bytes),
    ("latency_ms", "latency", "latency", formats.milliseconds),
    ("engine_ms", "engine", "in the engine", formats.milliseconds),
    ("peak_bytes", "memory", "memory", _bytes),
    ("engine_peak_bytes", "memory", "memory in the engine", _bytes),
    ("macs", "macs", "multiply-adds", formats.count),
    ("values", "values", "values", formats.count),
)


def table(summary: Summary, quality: Quality) -> dict[str, Any]:
    """Every point with a score, dearest first: what the chart shows, for those who cannot hover.

    Returns:
        "columns" as (term, heading, whether the rows are sorted by it) and "rows" with "cells" of (text, number).
    """
    points = [point for point in every_point(summary) if known(point.get("val"))]
    asked, dense = summaries.question(summary).keys, summary["dense"]
    columns = [
        column
        for column in _POINTS
        if any(cost(point, column[0]) for point in points) and (column[0] != "macs" or "macs" in asked)
    ]
    first = next((key for key, *_ in columns if key in asked), None)
    points.sort(key=lambda point: -(cost(point, first) or 0) if first else 0)
    bounds = [point.get("drop_bound", point.get("bound")) for point in points]
    judged = any(map(known, bounds))
    dense_chosen = (summary.get("chosen") or {}).get("name") == "dense"
    rows = []
    for point, bound in zip(points, bounds, strict=True):
        drop = None if point["kind"] == "dense" else quality.drop(dense.get("val"), point.get("val"))
        cells = [(quality.score(point["val"]), point["val"]), (quality.bare(drop), drop)]
        cells += [(formats.MISSING, None) if drop is None else (quality.bare(bound), bound)] if judged else []
        cells += [(text(value := cost(point, key)), value) for key, *_, text in columns]
        tag = {"tried": "", "dense": "chosen" if dense_chosen else "", "front": "on the front"}
        rows.append(dict(point, cells=cells, tag=tag.get(point["kind"], point["kind"])))
    heads = [("", quality.metric, False), ("loss", "loss", False), *([("bound", "at most", False)] if judged else [])]
    return {"columns": heads + [(term, name, key == first) for key, term, name, _ in columns], "rows": rows}
