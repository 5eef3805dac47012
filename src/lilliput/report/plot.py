"""Draw the Pareto front as an interactive plot, by Bokeh."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lilliput.report import formats
from lilliput.report import summary as summaries
from lilliput.report.formats import Quality, Summary
from lilliput.report.plan import plan, staircase
from lilliput.report.summary import cost

_TIP = """<div style="font:13px/1.45 system-ui,sans-serif;max-width:20rem;white-space:normal;color:var(--ink)">
<div style="font-weight:600">@name</div><div style="color:var(--muted)">@kind</div>
<div style="margin:.35em 0;font-variant-numeric:tabular-nums;white-space:pre-line">@facts</div>
<div style="color:var(--muted);white-space:pre-line">@recipe</div></div>"""


def _facts(point: Mapping[str, Any], summary: Summary, quality: Quality) -> str:
    drop = quality.drop(summary["dense"].get("val"), point.get("val"))
    lines = [f"{quality.metric} {quality.score(point.get('val'))}"]
    if drop is not None and point["kind"] != "dense":
        lines[0] += f", {quality.bare(abs(drop))} {'below' if drop >= 0 else 'above'} dense" if quality.rate else ""
    lines += [
        f"model.onnx {formats.size(cost(point, 'onnx_bytes'))}, model.lil {formats.size(cost(point, 'packed_bytes'))}"
    ]
    lines += [f"latency {formats.milliseconds(cost(point, 'latency_ms'))}"]
    return "\n".join(lines)


def _recipe(point: Mapping[str, Any]) -> str:
    lines = [
        f"{i}. {formats.shortened(f'{title} {rest}'.strip())}"
        for i, (title, rest) in enumerate(formats.steps(point.get("recipe") or ()), 1)
    ]
    status = ": ".join(str(point[key]) for key in ("status", "reason") if point.get(key))
    return "\n".join(lines or ([formats.shortened(status)] if status and point.get("status") != "done" else []))


def plot(summary: Summary, quality: Quality) -> dict[str, Any] | None:
    """The plot as a Bokeh JSON item, its three horizontal axes and its text alternative; None with nothing to draw."""
    drawn = plan(summary)
    if drawn is None:
        return None
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
    if (floor := summaries.floor(summary)) is not None:
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
        + summaries.verdict(summary),
    }
