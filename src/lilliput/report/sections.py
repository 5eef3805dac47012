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


def figures(summary: Summary, point: Mapping[str, Any] | None, quality: Quality) -> list[dict[str, str]]:
    """The four numbers under the verdict: what it is now, how much better, what it was."""
    if point is None:
        return []
    dense, out, asked = summary["dense"], [], summaries.question(summary)
    rows = (
        ("onnx_bytes", "model.onnx", formats.size, "smaller", "larger", "as large"),
        ("packed_bytes", "model.lil", formats.size, "smaller", "larger", "as large"),
        ("latency_ms", "latency, one input", formats.milliseconds, "faster", "slower", "as fast"),
        ("engine_ms", "in lilliput's engine", formats.milliseconds, "faster", "slower", "as fast"),
        ("peak_bytes", "memory of a run", formats.size, "less", "more", "as much"),
        ("engine_peak_bytes", "memory in the engine", formats.size, "less", "more", "as much"),
    )
    for key, label, text, better, worse, same in sorted(rows, key=lambda row: row[0] not in asked.keys):
        # The file as given, in the runtime that it ran in.
        before = cost(dense, {"packed_bytes": "onnx_bytes", "engine_ms": "latency_ms"}.get(key, key))
        after = cost(point, key)
        if after is not None:
            change = formats.compared(formats.ratio(before, after), better, worse, same).replace(" times", "×")
            tone = "worse" if worse in change else "better"
            out.append({"label": label, "now": text(after), "change": change, "was": text(before), "tone": tone})
    split, label = ("test", "held-out test") if known(point.get("test")) else ("val", "validation")
    drop = quality.drop(dense.get(split), point.get(split))
    change = "" if drop is None else "unchanged" if drop == 0 else quality.points(abs(drop))
    if drop:
        change += " lower" if (drop > 0) == quality.higher_is_better else " higher"
    now, was = quality.score(point.get(split)), quality.score(dense.get(split))
    tone = "better" if drop is not None and drop < 0 else "worse"
    return [*out, {"label": f"{quality.metric}, {label}", "now": now, "change": change, "was": was, "tone": tone}]


def interval(summary: Summary, quality: Quality) -> dict[str, Any] | None:
    """The losses as rows over one axis; positions in percent of the axis."""
    losses = (
        ("validation, as chosen", "ring", "drop_val"),
        ("validation, corrected for the choice", "dot", "drop_corrected"),
        ("test, read once", "diamond", "drop_test"),
    )
    shown = [
        (label, mark, float(summary[key]), [float(end) for end in summary.get(f"{key}_interval") or () if known(end)])
        for label, mark, key in losses
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
            "label": label,
            "mark": mark,
            "x": at(drop),
            "text": quality.points(drop),
            "span": [at(end) for end in ends] if len(ends) == 2 else None,
            "note": quality.interval(ends).removeprefix("95% interval "),
        }
        for label, mark, drop, ends in shown
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


def _change(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, key: str, text: Any) -> tuple[str, str]:
    """(before, after) as text; the first is empty where nothing changed."""
    was, now = (
        formats.MISSING if layer is None or layer.get(key) is None else str(text(layer[key])) for layer in (old, new)
    )
    if new is None:
        return (was, "")
    return ("", now) if was == now or old is None or (key == "rank" and was == formats.MISSING) else (was, now)


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


def table(summary: Summary, quality: Quality) -> list[dict[str, Any]]:
    """Dense, chosen and the front as rows, largest first: what the plot shows, for those who cannot hover."""
    rows = [point for point in every_point(summary) if point["kind"] != "tried"]
    rows.sort(key=lambda point: -(cost(point, "onnx_bytes") or 0))
    return [dict(point, steps=formats.steps(point.get("recipe") or ())) for point in rows]
