"""The report of a job as one HTML file that works offline.

Nothing is fetched: Bokeh's script, the style and the data are inside the file, and a content security policy allows the
scripts by their hashes and no connection at all. All text that comes from a model or a task goes through Jinja's
escaping or, in the plot's tooltips, through Bokeh's.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lilliput.report import words
from lilliput.report.plan import every_point, plan, staircase
from lilliput.report.words import Quality, Summary, cost, known

_HERE = Path(__file__).parent
_FILES = {
    "model.onnx": "the chosen network for ONNX Runtime",
    "model.lil": "the same, packed bit by bit; lilliput.load reads it",
    "model.safetensors": "its weights, to train on",
    "recipe.toml": "the stages that made it",
    "engine/model.c": "the chosen network as a C program whose kernels skip the zeros",
    "engine/libmodel.so": "the same, compiled for this machine; lilliput.Engine loads its folder",
    "summary.json": "the numbers behind this page",
}
_TIP = """<div style="font:13px/1.45 system-ui,sans-serif;max-width:20rem;white-space:normal;color:var(--ink)">
<div style="font-weight:600">@name</div><div style="color:var(--muted)">@kind</div>
<div style="margin:.35em 0;font-variant-numeric:tabular-nums;white-space:pre-line">@facts</div>
<div style="color:var(--muted);white-space:pre-line">@recipe</div></div>"""


def page(source: str | Path | Summary) -> str:
    """The report of a job as HTML text.

    Args:
        source: the folder that the job wrote (it must hold ``summary.json``), or the summary itself.

    Raises:
        FileNotFoundError: the folder has no ``summary.json``.
        ValueError: ``summary.json`` is not JSON or lacks what the page is about.

    Example:
        >>> html = page({"task": "tiny", "dense": {"val": 0.9}, "front": [], "met": False})
        >>> "could be finished" in html
        True
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    summary, files = (source, source.get("files") or {}) if isinstance(source, Mapping) else _read(Path(source))
    if missing := [key for key in ("task", "dense") if not summary.get(key)]:
        raise ValueError(f"report: summary must have {' and '.join(missing)}, got {sorted(summary)}.")
    point, quality = words.shown(summary), Quality.of(summary)
    drawn = _plot(summary, quality)
    scripts = [_bokeh(), (_HERE / "page.js").read_text("utf-8")]
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # not sorted: Bokeh reads references in the order of its text
    environment.globals.update(w=words, q=quality)
    return environment.get_template("page.html").render(
        s=summary,
        dense=summary["dense"],
        point=point,
        met=bool(summary.get("met", True)),
        verdict=words.verdict(summary),
        style=(_HERE / "page.css").read_text("utf-8"),
        scripts=scripts,
        hashes=[_hash(text) for text in scripts],
        plot=drawn,
        figures=_figures(summary, point, quality),
        interval=_interval(summary, quality),
        layers=_layers(summary["dense"].get("layers") or [], (point or {}).get("layers") or []),
        measured=_measured(summary, point),
        shares=_shares(summary.get("shares") or {}),
        points=_table(summary, quality),
        in_engine=any(known(point.get("engine_ms")) for point in every_point(summary)),
        failed=_failed(summary),
        files=[(name, files[name], _FILES.get(name, "")) for name in sorted(files, key=_order)],
    )


def write(folder: str | Path) -> Path:
    """Write ``folder/report.html`` from ``folder/summary.json``, whole or not at all (by rename); returns its path."""
    folder = Path(folder)
    html = page(folder)
    target = folder / "report.html"
    handle, name = tempfile.mkstemp(prefix=".report-", suffix=".html", dir=folder)
    try:
        with open(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(html)
        os.chmod(name, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def _read(folder: Path) -> tuple[Summary, dict[str, int]]:
    path = folder / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"report: {folder} must hold summary.json, got none. Give the folder that `lilliput shrink --out` wrote."
        )
    try:
        summary = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"report: {path} must be JSON, got {error}. Run the job again with --resume.") from error
    if not isinstance(summary, dict):
        raise ValueError(f"report: {path} must hold an object, got {type(summary).__name__}. Run the job again.")
    files = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
    return summary, {name: files[name] for name in files if name != "report.html" and not name.startswith(".")}


def _order(name: str) -> tuple[int, str]:
    known_names = list(_FILES)
    return (known_names.index(name) if name in known_names else len(known_names), name)


@cache
def _bokeh() -> str:
    """Bokeh's core script, without widgets, tables, WebGL or MathJax."""
    from bokeh.util.paths import bokehjs_path

    text = (Path(bokehjs_path()) / "js" / "bokeh.min.js").read_text("utf-8")
    return text.replace("\r\n", "\n").split("//# sourceMappingURL")[0]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


# --- the plot -------------------------------------------------------------------------------------------------------


def _facts(point: Mapping[str, Any], summary: Summary, quality: Quality) -> str:
    drop = quality.drop(summary["dense"].get("val"), point.get("val"))
    lines = [f"{quality.metric} {quality.score(point.get('val'))}"]
    if drop is not None and point["kind"] != "dense":
        lines[0] += f", {quality.bare(abs(drop))} {'below' if drop >= 0 else 'above'} dense" if quality.rate else ""
    lines += [f"model.onnx {words.size(cost(point, 'onnx_bytes'))}, packed {words.size(cost(point, 'packed_bytes'))}"]
    lines += [f"latency {words.milliseconds(cost(point, 'latency_ms'))}"]
    return "\n".join(lines)


def _recipe(point: Mapping[str, Any]) -> str:
    lines = [f"{i}. {words.shortened(f'{title} {rest}'.strip())}" for i, (title, rest) in enumerate(_steps(point), 1)]
    status = ": ".join(str(point[key]) for key in ("status", "reason") if point.get(key))
    return "\n".join(lines or ([words.shortened(status)] if status and point.get("status") != "done" else []))


def _steps(point: Mapping[str, Any]) -> list[tuple[str, str]]:
    return words.steps(point.get("recipe") or ())


def _plot(summary: Summary, quality: Quality) -> dict[str, Any] | None:
    """The plot as a Bokeh JSON item, its three horizontal axes and its text alternative; None with nothing to draw."""
    from bokeh.embed import json_item
    from bokeh.models import (
        BoxZoomTool,
        ColumnDataSource,
        FixedTicker,
        HoverTool,
        InlineStyleSheet,
        NoOverlap,
        NumeralTickFormatter,
        PanTool,
        Range1d,
        ResetTool,
        Span,
    )
    from bokeh.plotting import figure

    drawn = plan(summary)
    if drawn is None:
        return None
    everything, axes, scale, sign, low, high, pad = (
        drawn.points,
        drawn.axes,
        drawn.scale,
        drawn.sign,
        drawn.low,
        drawn.high,
        drawn.pad,
    )
    first = next(iter(axes))
    plot = figure(
        name="front",
        height=400,
        sizing_mode="stretch_width",
        x_axis_type="log",
        min_border_right=16,
        x_range=Range1d(axes[first]["start"], axes[first]["end"]),
        y_range=Range1d(low - sign * pad, high + sign * pad),
        tools=[BoxZoomTool(), PanTool(), ResetTool()],
        toolbar_location="above",
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo, plot.toolbar.active_drag = None, None
    plot.toolbar.stylesheets = [InlineStyleSheet(css=".bk-divider, .bk-tool-overflow { display: none !important; }")]
    plot.xaxis.ticker = FixedTicker(ticks=axes[first]["ticks"])
    plot.xaxis.major_label_overrides = axes[first]["labels"]
    plot.xaxis.major_label_policy = NoOverlap(min_distance=10)
    plot.yaxis.ticker.desired_num_ticks = 6
    if quality.rate:
        plot.yaxis.formatter = NumeralTickFormatter(format="0.[00]")
    plot.xgrid.visible = False
    for axis in (plot.xaxis, plot.yaxis):
        axis.axis_line_color = axis.minor_tick_line_color = axis.major_tick_line_color = None
        axis.major_label_text_font, axis.major_label_text_font_size = "system-ui, sans-serif", "12px"
    if (floor := words.floor(summary)) is not None:
        height = scale * (summary["dense"]["val"] - sign * floor)
        plot.add_layout(Span(location=height, dimension="width", line_dash=[5, 4], line_width=1.2, name="floor"))
    for key in axes:
        stairs = staircase(everything, key, sign)
        plot.line(
            [x for x, _ in stairs],
            [scale * y for _, y in stairs],
            line_width=1.4,
            line_join="round",
            visible=key == first,
            name=f"stairs {key}",
        )
    shapes = {"tried": ("circle", 6), "front": ("circle", 10), "dense": ("square", 11)}
    shapes |= {"nearest": ("diamond", 18), "chosen": ("diamond", 18)}
    marks = []
    for kind, (marker, width) in shapes.items():
        group = [point for point in everything if point["kind"] == kind]
        if not group:
            continue
        data: dict[str, list[Any]] = {key: [cost(point, key) or math.nan for point in group] for key in axes}
        data["y"] = [scale * point["val"] for point in group]
        data["name"] = [str(point.get("name") or "unnamed") for point in group]
        data["kind"] = [{"tried": "tried", "front": "on the front"}.get(kind, kind)] * len(group)
        data["facts"] = [_facts(point, summary, quality) for point in group]
        data["recipe"] = [_recipe(point) for point in group]
        marks.append(
            plot.scatter(
                first,
                "y",
                source=ColumnDataSource(data),
                marker=marker,
                size=width,
                line_width=1.6,
                name=f"points {kind}",
            )
        )
    plot.add_tools(
        HoverTool(renderers=marks, tooltips=_TIP, limit=2, show_arrow=False, visible=False, point_policy="snap_to_data")
    )
    below = sum(sign * scale * point["val"] < sign * low for point in everything)
    return {
        "item": json_item(plot, "plot"),
        "axes": axes,
        "kinds": [kind for kind in reversed(shapes) if any(point["kind"] == kind for point in everything)],
        "below": below,
        "alt": f"{len(everything)} points, {quality.metric} on validation data against size or latency. "
        + words.verdict(summary),
    }


# --- the other sections ---------------------------------------------------------------------------------------------


def _figures(summary: Summary, point: Mapping[str, Any] | None, quality: Quality) -> list[dict[str, str]]:
    """The four numbers under the verdict: what it is now, how much better, what it was."""
    if point is None:
        return []
    dense, out = summary["dense"], []
    for key, label, text, better, worse, same in (
        ("onnx_bytes", "model.onnx", words.size, "smaller", "larger", "as large"),
        ("packed_bytes", "model.lil, packed", words.size, "smaller", "larger", "as large"),
        ("latency_ms", "latency, one input", words.milliseconds, "faster", "slower", "as fast"),
        ("engine_ms", "in lilliput's engine", words.milliseconds, "faster", "slower", "as fast"),
    ):
        # The file as given, in the runtime that it ran in.
        before = cost(dense, {"packed_bytes": "onnx_bytes", "engine_ms": "latency_ms"}.get(key, key))
        after = cost(point, key)
        if after is not None:
            change = words.compared(words.ratio(before, after), better, worse, same).replace(" times", "×")
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


def _interval(summary: Summary, quality: Quality) -> dict[str, Any] | None:
    """The losses as rows over one axis; positions in percent of the axis."""
    losses = (
        ("validation, as chosen", "ring", "drop_val"),
        ("validation, corrected for the choice", "dot", "drop_corrected"),
        ("test, read once", "diamond", "drop_test"),
    )
    found = [
        (label, mark, float(summary[key]), [float(end) for end in summary.get(f"{key}_interval") or () if known(end)])
        for label, mark, key in losses
        if known(summary.get(key))
    ]
    if not found:
        return None
    limit = words.floor(summary)
    reach = [0.0, *([] if limit is None else [limit]), *(drop for _, _, drop, _ in found)]
    reach += [end for *_, ends in found for end in ends]
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
        for label, mark, drop, ends in found
    ]
    unit = 100 if quality.rate else 1
    decimals = max(0, -math.floor(math.log10(step * unit) + 1e-9))
    ticks = [i * step for i in range(math.ceil(start / step), math.floor(end / step) + 1)]
    return {
        "rows": rows,
        "zero": at(0.0),
        "floor": None if limit is None else at(limit),
        "ticks": [(at(tick), words.signed(f"{tick * unit:.{decimals}f}")) for tick in ticks],
        "alt": "; ".join(" ".join(filter(None, (row["label"], row["text"], row["note"]))) for row in rows),
    }


def _layers(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
    return " × ".join(map(str, value)) if value else words.MISSING


_COLUMNS = (
    ("shape", _shape),
    ("values", words.count),
    ("bits", lambda value: f"{value:g}"),
    ("sparsity", lambda value: words.percent(value) if value else "0%"),
    ("rank", str),
    ("share_of_time", lambda value: words.percent(value, 1)),
)


def _change(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, key: str, text: Any) -> tuple[str, str]:
    """(before, after) as text; the first is empty where nothing changed."""
    was, now = (
        words.MISSING if layer is None or layer.get(key) is None else str(text(layer[key])) for layer in (old, new)
    )
    if new is None:
        return (was, "")
    return ("", now) if was == now or old is None or (key == "rank" and was == words.MISSING) else (was, now)


def _shares(shares: Mapping[str, float]) -> list[dict[str, Any]]:
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
                    "text": words.percent(share, 1),
                }
            )
            x += share
    return out


def _measured(summary: Summary, point: Mapping[str, Any] | None) -> list[tuple[str, str]]:
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
                    f" (quartiles {words.number(spread[0])} to {words.number(spread[1])})" if len(spread) == 2 else ""
                )
                medians.append(f"{name}{where} {words.milliseconds(entry[f'{key}_ms'])}{between}")
    out.append(("Latency, median", "; ".join(medians)))
    splits = ", ".join(f"{words.count(n)} {name}" for name, n in (summary.get("examples") or {}).items())
    out.append(
        (
            "Data",
            f"{splits}. " * bool(splits)
            + "Decisions read the validation split"
            + ("; the test split was read once, after the choice." if known(summary.get("drop_test")) else "."),
        )
    )
    if known(summary.get("drop_corrected")):
        draws = words.count(summary.get("draws") or 1000)
        more = summary.get("examples_for_half_interval")
        tail = f" Half this interval would take about {words.count(more)} validation examples." if known(more) else ""
        out.append(
            (
                "Choice",
                f"The whole choice was repeated on {draws} bootstrap draws of the validation split, and each "
                f"winner was scored on the examples its draw left out; the floor is checked on that loss.{tail}",
            )
        )
    agreement = (point or {}).get("agreement") or {}
    if agreement:
        out.append(
            (
                "Agreement with torch",
                f"outputs differ by at most {words.number(agreement.get('max_abs'), 2)}, "
                f"{words.number(agreement.get('mean_abs'), 2)} on average; "
                f"{words.percent(agreement.get('changed'), 2)} of the predictions change",
            )
        )
    out.append(
        ("Versions", ", ".join(f"{name} {version}" for name, version in (summary.get("versions") or {}).items()))
    )
    seed, commit = summary.get("seed"), summary.get("commit")
    out.append(("Seed", "" if seed is None else str(seed)))
    out.append(("Commit", str(commit or "")))
    return [(term, text) for term, text in out if text]


def _failed(summary: Summary) -> list[tuple[str, str]]:
    failed = [point for point in summary.get("points") or () if point.get("status") == "failed"]
    return [(str(point.get("name") or "unnamed"), str(point.get("reason") or "")) for point in failed]


def _table(summary: Summary, quality: Quality) -> list[dict[str, Any]]:
    """Dense, chosen and the front as rows, largest first: what the plot shows, for those who cannot hover."""
    rows = [point for point in every_point(summary) if point["kind"] != "tried"]
    rows.sort(key=lambda point: -(cost(point, "onnx_bytes") or 0))
    return [dict(point, steps=_steps(point)) for point in rows]
