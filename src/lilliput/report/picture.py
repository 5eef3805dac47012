"""Draw the Pareto front as a picture for a README, by matplotlib (the extra ``lilliput[pictures]``).

python -m lilliput.report.picture DIR front.svg [--dark]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lilliput.extras import extra
from lilliput.report import formats
from lilliput.report import summary as summaries
from lilliput.report.formats import Quality, Summary, known
from lilliput.report.plan import plan, staircase
from lilliput.report.summary import cost

_COLOURS = {
    False: {
        "paper": "#ffffff",
        "line": "#e2e5ea",
        "ink": "#15181e",
        "muted": "#5a6270",
        "accent": "#2450d8",
        "front": "#5f83ee",
        "tried": "#a6aebb",
        "warn": "#a63f06",
    },
    True: {
        "paper": "#101216",
        "line": "#2b3038",
        "ink": "#e9ecf1",
        "muted": "#9ca5b3",
        "accent": "#8fabff",
        "front": "#6482d6",
        "tried": "#5c6675",
        "warn": "#ffa066",
    },
}


def picture(summary: Summary, path: str | Path, key: str = "onnx_bytes", dark: bool = False) -> Path:
    """Draw validation score against a cost, with the dense and the chosen point named; ``.svg`` or ``.png`` by suffix.

    Args:
        summary: the contents of ``summary.json``.
        path: where to write; the same summary gives the same SVG text.
        key: ``onnx_bytes``, ``packed_bytes`` or ``latency_ms``.
        dark: colours for a dark page.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: no finished point has that cost.
    """
    with extra("pictures", "picture"):
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedFormatter, FixedLocator
    drawn = plan(summary)
    if drawn is None or key not in drawn.axes:
        raise ValueError(f"picture: {key} must be known for some finished point, got none. Use another key.")
    path, colour, quality, axis = Path(path), _COLOURS[dark], Quality.of(summary), drawn.axes[key]
    settings: Any = {"svg.hashsalt": "lilliput", "font.size": 13, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8, 4), layout="constrained", facecolor=colour["paper"])
        axes = figure.add_subplot(facecolor=colour["paper"])
        axes.set_xscale("log")
        stairs = staircase(drawn.points, key, drawn.sign)
        axes.plot(
            [x for x, _ in stairs], [drawn.scale * y for _, y in stairs], color=colour["front"], linewidth=1.4, zorder=2
        )
        if (floor := summaries.floor(summary)) is not None:
            height = drawn.scale * (summary["dense"]["val"] - drawn.sign * floor)
            axes.axhline(height, color=colour["warn"], linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"floor, {quality.points(floor)} below dense",
                (1, height),
                xycoords=("axes fraction", "data"),
                color=colour["warn"],
                xytext=(0, -12),
                textcoords="offset points",
                ha="right",
                fontsize=12,
            )
        looks = {
            "tried": ("o", 14, colour["tried"], colour["paper"]),
            "front": ("o", 48, colour["paper"], colour["front"]),
            "dense": ("s", 60, colour["ink"], colour["paper"]),
            "chosen": ("D", 70, colour["accent"], colour["paper"]),
        }
        for point in drawn.points:
            x, kind = cost(point, key), "chosen" if point["kind"] == "nearest" else point["kind"]
            if x is None or not known(point["val"]):
                continue
            marker, area, fill, edge = looks[kind]
            y = drawn.scale * point["val"]
            axes.scatter(
                [x],
                [y],
                s=area,
                marker=marker,
                color=fill,
                edgecolors=edge,
                zorder=3 + list(looks).index(kind),
                linewidths=0.5 if kind == "tried" else 1.5,
            )
            if kind in ("dense", "chosen"):
                score, text = quality.score(point["val"]), formats.milliseconds if key == "latency_ms" else formats.size
                # Nothing is smaller and better than a point of the front: the room above and left of it is free.
                right = math.log(x / axis["start"]) > 0.24 * math.log(axis["end"] / axis["start"])
                axes.annotate(
                    f"{point['kind']}: {score}, {text(x)}",
                    (x, y),
                    xytext=(-7 if right else 7, 9),
                    textcoords="offset points",
                    ha="right" if right else "left",
                    color=colour["ink"],
                    bbox={"facecolor": colour["paper"], "edgecolor": "none", "pad": 1.5},
                )
        axes.set_xlim(axis["start"], axis["end"])
        axes.set_ylim(drawn.low - drawn.sign * drawn.pad, drawn.high + drawn.sign * 1.8 * drawn.pad)
        axes.xaxis.set_major_locator(FixedLocator(axis["ticks"]))
        axes.xaxis.set_major_formatter(FixedFormatter(list(axis["labels"].values())))
        axes.xaxis.set_minor_locator(FixedLocator([]))
        axes.set_xlabel(axis["title"], color=colour["muted"])
        axes.set_ylabel(f"{quality.metric} on validation{', %' if quality.rate else ''}", color=colour["muted"])
        axes.tick_params(length=0, colors=colour["muted"])
        axes.grid(axis="y", color=colour["line"], linewidth=0.8)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        metadata = {"Date": None, "Description": summaries.verdict(summary)} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=200, metadata=metadata, facecolor=colour["paper"])
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """The command of this module."""
    parser = argparse.ArgumentParser(
        description="Draw the front of a finished job.", epilog="example: picture out/ docs/front.svg"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--cost", default="onnx_bytes", choices=["onnx_bytes", "packed_bytes", "latency_ms"])
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args(arguments)
    summary = json.loads((given.folder / "summary.json").read_text("utf-8"))
    print(picture(summary, given.picture, given.cost, given.dark))


if __name__ == "__main__":
    main()
