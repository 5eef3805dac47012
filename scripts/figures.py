"""The figures of the documentation, drawn by matplotlib from the records in results/.

python scripts/figures.py    # writes docs/images/prune-*.svg
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from lilliput import evidence

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
Record = dict[str, Any]
# Each has a contrast of at least 4.5 on white, and on the dark page, which inverts lightness.
INK, GRID, BLUE, RED = "#5a6270", "#9ca5b355", "#2f6fed", "#c9412f"
PALETTE = (BLUE, RED, "#1f8058", "#986114", "#7c4af0", "#0b788b", "#c2417d")


def panels(count: int, **settings: Any) -> tuple[Any, list[Axes]]:
    """Two panels in a row, together as wide as a page of the documentation, so that labels keep their size there."""
    rows, columns = -(-count // 2), min(count, 2)
    figure, axes = plt.subplots(rows, columns, figsize=(3.55 * columns, 3.1 * rows), squeeze=False, **settings)
    for place in axes.flat[count:]:
        place.set_axis_off()
    return figure, list(axes.flat)


def clean(axes: Axes, x: str, y: str, title: str = "") -> None:
    """No frame, a light grid, ink that reads on white and on black."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.grid(color=GRID, linewidth=0.8)
    axes.tick_params(colors=INK, labelsize=9)
    axes.set_xlabel(x, color=INK, fontsize=9)
    axes.set_ylabel(y, color=INK, fontsize=9)
    axes.set_title(title, color=INK, fontsize=10)


def line(axes: Axes, x: list[float], rows: Iterable[tuple[float, list[float]]], name: str, colour: str) -> None:
    """Means with their intervals."""
    means, intervals = zip(*rows, strict=True)
    axes.plot(x, means, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=name)
    axes.fill_between(x, [low for low, _ in intervals], [high for _, high in intervals], color=colour, alpha=0.12, lw=0)


def save(figure: Any, name: str) -> None:
    """An SVG that is the same each time it is drawn."""
    if figure.get_layout_engine() is None:
        figure.tight_layout()
    figure.savefig(IMAGES / f"{name}.svg", transparent=True, metadata={"Date": None})
    plt.close(figure)


def legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def training(record: Record) -> None:
    """Held-out accuracy of each method that trains, against its zeros."""
    shown = ("Taylor", "global magnitude", "RigL", "AC/DC", "Top-KAST", "static", "random")
    networks = list(dict.fromkeys(row["network"] for row in record["rows"]))
    figure, axes = panels(len(networks))
    for place, network in zip(axes, networks, strict=False):
        rows = {row["method"]: row for row in record["rows"] if row["network"] == network}
        for method, colour in zip(shown, PALETTE, strict=True):
            columns = [c for c in ("80%", "90%", "95%", "98%") if method in rows and c in rows[method]]
            if columns:
                line(
                    place,
                    [float(c[:-1]) for c in columns],
                    [(rows[method][c], rows[method][f"{c} interval"]) for c in columns],
                    method,
                    colour,
                )
        place.axhline(rows["dense"]["dense"], color=INK, linewidth=1, linestyle=":")
        clean(place, "zeros, %", "held-out accuracy", network)
    legend(axes[0])
    save(figure, "prune-training")


def methods(record: Record) -> None:
    """Mean held-out accuracy of each way of making zeros against the time it takes; filled on the front."""
    overhead = json.loads((ROOT / "results" / "bench" / "overhead.json").read_text(encoding="utf-8"))
    points = evidence.load("fine-tuning").standing(record, overhead)
    best = evidence.front(points)
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for method, (gain, cost) in points.items():
        axes.scatter(
            100 * cost, gain, s=34, edgecolors=BLUE, facecolors=BLUE if method in best else "none", linewidths=1.4
        )
        place = (5, 3 if method in best else -11)
        axes.annotate(method, (100 * cost, gain), fontsize=8, color=INK, textcoords="offset points", xytext=place)
    clean(axes, "time of the rule, % of a dense training step", "mean held-out accuracy")
    axes.margins(x=0.15)
    save(figure, "prune-methods")


def lottery(record: Record) -> None:
    """Winning tickets against random ones."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    x = [float(row["zeros"][:-1]) for row in record["rows"]]
    for kind, colour in zip(record["kinds"], PALETTE, strict=False):
        line(axes, x, [(row[kind], row[f"{kind} interval"]) for row in record["rows"]], kind, colour)
    axes.axhline(sum(record["dense"]) / len(record["dense"]), color=INK, linewidth=1, linestyle=":")
    clean(axes, "zeros, %", "held-out accuracy")
    legend(axes)
    save(figure, "prune-lottery")


def front(record: Record) -> None:
    """Score against time in the engine; what lies on the front is filled, with the fraction that was removed."""
    networks = list(dict.fromkeys(row["network"] for row in record["rows"]))
    figure, axes = panels(len(networks))
    for place, network in zip(axes, networks, strict=False):
        rows = [row for row in record["rows"] if row["network"] == network]
        for kind, colour in zip(dict.fromkeys(row["what goes"] for row in rows), (INK, *PALETTE), strict=False):
            for first, row in enumerate(row for row in rows if row["what goes"] == kind):
                place.scatter(
                    row["engine_ms"],
                    row["score"],
                    s=34,
                    edgecolors=colour,
                    linewidths=1.4,
                    facecolors=colour if row["front"] else "none",
                    label=None if first else kind,
                )
                if row["front"]:
                    place.annotate(
                        f"{row['sparsity']:.0%}",
                        (row["engine_ms"], row["score"]),
                        fontsize=8,
                        color=INK,
                        textcoords="offset points",
                        xytext=(0, 6),
                        ha="center",
                    )
        best = sorted((row["engine_ms"], row["score"]) for row in rows if row["front"])
        place.step(*zip(*best, strict=True), where="post", color=GRID, linewidth=1.4, zorder=0)
        place.set_xscale("log")
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter("{x:g}")
        place.xaxis.set_minor_formatter(NullFormatter())
        clean(place, "ms in the engine", "held-out score", network)
        place.margins(y=0.1)
        legend(place)
    save(figure, "prune-front")


def channels(record: Record) -> None:
    """Accuracy after a short fine-tuning against the multiply-accumulates that are left, by score."""
    networks = list(dict.fromkeys(row["network"] for row in record["rows"]))
    figure, axes = panels(len(networks))
    for place, network in zip(axes, networks, strict=False):
        rows = [row for row in record["rows"] if row["network"] == network]
        dense = rows[0]["macs"]
        for score, colour in zip(
            ("l1", "l2", "geometric_median", "taylor", "random", "from scratch"), PALETTE, strict=False
        ):
            points = [rows[0], *(row for row in rows if row["score"] == score)]
            place.plot(
                [row["macs"] / dense for row in points],
                [row["accuracy"] for row in points],
                marker="o",
                markersize=3.5,
                linewidth=1.6,
                color=colour,
                label=score.replace("_", " "),
            )
        clean(place, "multiply-accumulates, of dense", "held-out accuracy", network)
    legend(axes[0])
    save(figure, "prune-structured")


def seam(record: Record) -> None:
    """Weights kept against the accuracy gained over the full network, which may name any class."""
    figure, axes = plt.subplots(figsize=(5, 3.2))
    kinds = dict.fromkeys(row["masks"] for row in record["rows"])
    for kind, colour in zip(kinds, PALETTE, strict=False):
        rows = [row for row in record["rows"] if row["masks"] == kind]
        axes.scatter(
            [row["weights_kept"] for row in rows],
            [100 * row["over_unrestricted"] for row in rows],
            s=26,
            color=colour,
            label=kind,
        )
    axes.axhline(0, color=INK, linewidth=1, linestyle=":")
    axes.axvline(0.15, color=INK, linewidth=1, linestyle=":")
    clean(axes, "weights kept, of all", "points over the full network")
    legend(axes)
    save(figure, "prune-seam")


def noise(record: Record) -> None:
    """The share of active units in each layer after each training."""
    rows = [row for row in record["rows"] if "narrow" not in row["training"]]
    figure, axes = plt.subplots(figsize=(6, 2.8))
    names = [f"{row['network']}, {row['training']}" for row in rows]
    for layer in range(2):
        found = [(i, shares[layer]) for i, row in enumerate(rows) if len(shares := layers(row)) > layer]
        axes.barh(
            [i + 0.36 * layer - 0.18 * (len(layers(rows[i])) - 1) for i, _ in found],
            [x for _, x in found],
            0.34,
            color=PALETTE[layer],
            label=f"layer {layer + 1}",
        )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    clean(axes, "active units, of all", "")
    legend(axes)
    save(figure, "prune-noise")


def layers(row: Record) -> list[float]:
    """The active share of each layer of a row, which is a list or a text that joins them."""
    held = row["active_by_layer"]
    return [float(x) for x in (held.replace(",", " ").split() if isinstance(held, str) else held)]


def reconstruction(record: Record) -> None:
    """Score without any training, against zeros, by method."""
    rows = [row for row in record["rows"] if row.get("pattern", "elements") == "elements"]
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = panels(len(networks))
    colours = dict(zip(dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"), PALETTE, strict=False))
    for place, network in zip(axes, networks, strict=False):
        for method, colour in colours.items():
            points = sorted(
                (row["sparsity"], row["score"]) for row in rows if (row["network"], row["method"]) == (network, method)
            )
            if points:
                place.plot(
                    *zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.6, color=colour, label=method
                )
        clean(place, "zeros, of all weights", "held-out score", network)
    legend(axes[0])
    save(figure, "prune-reconstruction")


def criteria(record: Record) -> None:
    """Accuracy of every criterion with every pattern, pruned gradually."""
    rows = record["rows"]
    names, forms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("criterion", "pattern"))
    table = {(row["criterion"], row["pattern"]): row["gradual"] for row in rows}
    figure, axes = plt.subplots(figsize=(6, 3.6))
    rows = [[table[name, form] for form in forms] for name in names]
    axes.imshow(rows, cmap="Blues", aspect="auto", vmin=0, vmax=2)  # light enough for dark numbers
    for (name, form), value in table.items():
        axes.annotate(
            f"{value:.2f}", (forms.index(form), names.index(name)), ha="center", va="center", fontsize=8, color="black"
        )
    axes.set_xticks(range(len(forms)), forms)
    axes.set_yticks(range(len(names)), names)
    clean(axes, "", "")
    axes.grid(visible=False)
    save(figure, "prune-scores")


def patterns(record: Record) -> None:
    """How many times faster than dense each kind of layer is in the engine, by pattern."""
    kinds = list(dict.fromkeys(row["layer"] for row in record["rows"]))
    shown = ("elements", "block 4x1", "block 16x1", "block 1x16", "column", "channel")
    figure, axes = panels(len(kinds), layout="constrained")
    for place, kind in zip(axes, kinds, strict=False):
        for pattern, colour in zip(shown, PALETTE, strict=False):
            found = [
                row
                for row in record["rows"]
                if (row["layer"], row["pattern"]) == (kind, pattern) and row["sparsity"] >= 0.8
            ]
            place.plot(
                [100 * row["sparsity"] for row in found],
                [row["times_dense"] for row in found],
                marker="o",
                markersize=3.5,
                linewidth=1.6,
                color=colour,
                label=pattern,
            )
        clean(place, "zeros, %", "times faster than dense", kind)
        place.set_ylim(0)
        place.set_xticks((80, 85, 90, 95))
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9, labelcolor=INK)
    save(figure, "prune-patterns")


def once(record: Record) -> None:
    """Score of each task after transfer against the encoder's time in the engine, sparse and small."""
    figure, axes = panels(2)
    for place, task in zip(axes, ("package", "pairs"), strict=True):
        for row in (row for row in record["rows"] if row["encoder"] == "dense" or "8 bits" in row["encoder"]):
            colour = INK if row["encoder"] == "dense" else BLUE if "sparse" in row["encoder"] else RED
            low, high = row[f"{task}_interval"]
            place.errorbar(
                row["engine_ms"],
                row[task],
                [[row[task] - low], [high - row[task]]],
                fmt="o",
                markersize=4,
                color=colour,
                elinewidth=1,
                alpha=0.8,
            )
            place.annotate(
                row["encoder"],
                (row["engine_ms"], row[task]),
                fontsize=8,
                color=INK,
                textcoords="offset points",
                xytext=(5, -11 if "sparse" in row["encoder"] else 4),
            )
        clean(place, "ms in the engine", "held-out score", f"task: {task}")
        place.margins(x=0.2)
    save(figure, "prune-once")


FIGURES: dict[str, Callable[[Record], None]] = {
    "jaxpruner": training,
    "mnist1d": lottery,
    "pruning-front": front,
    "structured": channels,
    "seam": seam,
    "sparse-noise": noise,
    "reconstruction": reconstruction,
    "sparsity-survey": criteria,
    "engine/patterns": patterns,
    "prune-once": once,
    "fine-tuning": methods,
}


def main() -> None:
    """Draw what there are records of."""
    plt.rcParams |= {"svg.hashsalt": "lilliput", "svg.fonttype": "none", "font.family": "sans-serif"}
    for name, draw in FIGURES.items():
        path = ROOT / "results" / f"{name}.json"
        if path.exists():
            draw(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
