"""Tables: the Pareto front for a terminal, and Markdown for RESULTS.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lilliput.report import formats
from lilliput.report.formats import Quality, Summary
from lilliput.report.summary import cost, floor, question, shown
from lilliput.search.question import FILES, Question

if TYPE_CHECKING:
    from rich.table import Table

Column = str | Callable[[Mapping[str, Any]], object]


WIDE = 130
"""Columns of a terminal from which on the other file is shown beside the asked one."""


def front(summary: Summary, width: int = 140) -> Table:
    """The dense model, the chosen point (or the nearest) and the rest of the front, dearest first, for rich.

    Each point takes one line: names that do not fit are cut, and stand in full in the report.

    Args:
        summary: of a search.
        width: of the terminal, in characters.

    Example:
        >>> table = front({"task": "tiny", "dense": {"val": 0.9, "onnx_bytes": 4000}, "front": []})
        >>> table.row_count
        1
    """
    from rich.table import Table
    from rich.text import Text

    quality, dense, described = Quality.of(summary), summary["dense"], shown(summary)
    asked = question(summary)
    front = summary.get("front") or ()
    rest = [point for point in front if not _same(point, described) and not _same(point, {"name": "dense"} | dense)]
    points = [dense, *([described] if described else []), *rest]
    columns = _columns(asked, points, width)
    rows, styles = [], []
    for point in sorted(points, key=lambda point: (point is not dense, -asked.price(point))):
        drop = quality.drop(dense.get("val"), point.get("val"))
        label = "dense" if point is dense else str(point.get("name") or "unnamed")
        kind = "" if point is not described else "chosen: " if summary.get("met", True) else "nearest: "
        cells = [quality.score(point.get("val")), formats.MISSING if point is dense else quality.bare(drop)]
        for _, key, text in columns:
            before = cost(dense, GIVEN.get(key, key))
            change = formats.ratio(before, cost(point, key))
            same = point is dense and key not in ("engine_ms", "engine_peak_bytes")
            cells += [text(cost(point, key)), "" if same or change is None else f"{formats.times(change)}x"]
        rows.append([kind, label, *cells])
        styles.append("bold" if point is described else "")
    headings = [quality.metric, "loss", *(part for heading, _, _ in columns for part in (heading, ""))]
    table = Table(title=Text(str(summary["task"])), box=None, header_style="dim", pad_edge=False)
    widths = [max(len(cell) for cell in column) for column in zip(headings, *(row[2:] for row in rows), strict=True)]
    table.add_column("point", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    room = max(16, width - sum(wide + 2 for wide in widths))  # numbers keep their room, names have what is left
    for (kind, label, *cells), style in zip(rows, styles, strict=True):
        named = kind + _cut(label, room - len(kind))
        table.add_row(*(Text(cell) for cell in (named, *cells)), style=style)  # Text: names are no markup
    return table


def _cut(text: str, room: int) -> str:
    """A name in as many characters: its middle is left out, since points differ at their ends."""
    return text if len(text) <= room else f"{text[: room - room // 2 - 1]}…{text[len(text) - room // 2 :]}"


GIVEN = {"packed_bytes": "onnx_bytes", "engine_ms": "latency_ms"}
"""What a cost is compared with: the file as it was given, in the runtime that it ran in."""


def _columns(
    asked: Question, points: Iterable[Mapping[str, Any]], width: int
) -> list[tuple[str, str, Callable[[float | None], str]]]:
    """(heading, key, as text) of the costs to show: the asked file, what else was asked, and what there is room for."""
    every: list[tuple[str, str, Callable[[float | None], str]]] = [
        ("model.lil", "packed_bytes", formats.size),
        ("model.onnx", "onnx_bytes", formats.size),
        ("latency", "latency_ms", formats.milliseconds),
        ("engine", "engine_ms", formats.milliseconds),
        ("memory", "peak_bytes", formats.size),
        ("engine's memory", "engine_peak_bytes", formats.size),
        ("MACs", "macs", formats.count),
    ]
    needed = {asked.file_key, *asked.keys}
    known = {key for _, key, _ in every if any(formats.known(point.get(key)) for point in points)}
    extra = ["latency_ms", *(["engine_ms", *FILES.values()] if width >= WIDE else [])]
    return [column for column in every if column[1] in needed or (column[1] in extra and column[1] in known)]


def _same(point: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    keys = ("name", "val", "onnx_bytes", "packed_bytes")
    return other is not None and all(point.get(key) == other.get(key) for key in keys)


def markdown(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, Column]) -> str:
    """A Markdown table: one row a record, one column an entry of `columns`.

    Args:
        rows: records or summaries.
        columns: heading -> dotted path into the row (``"dense.onnx_bytes"``), or a function of the row.

    Raises:
        ValueError: there are no columns.

    Example:
        >>> print(markdown([{"task": "a|b", "cost": {"bytes": 1200}}], {"task": "task", "bytes": "cost.bytes"}))
        | task | bytes |
        |---|--:|
        | a\\|b | 1,200 |
    """
    if not columns:
        raise ValueError("markdown: columns must name at least one column, got none. Give {heading: path}.")
    cells = [[_look(row, column) for column in columns.values()] for row in rows]
    numeric = [
        bool(cells) and all(formats.known(row[i]) or row[i] is None for row in cells) for i in range(len(columns))
    ]
    lines = [list(map(_escaped, columns)), ["--:" if right else "---" for right in numeric]]
    lines += [[_escaped(_text(cell)) for cell in row] for row in cells]
    head, rule, *body = lines
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "|".join(rule) + "|", *("| " + " | ".join(line) + " |" for line in body)]
    )


def results(summaries: Iterable[Summary]) -> str:
    """The table of RESULTS.md: one row a job, what went in, what came out, and what it lost.

    Ratios are against the dense model's ONNX file and its latency in the same run. The loss is the test split's where
    it was read, with its interval where the summary has one.
    """
    return markdown(
        summaries,
        {
            "job": "task",
            "floor": lambda s: Quality.of(s).points(floor(s)),
            "dense": lambda s: Quality.of(s).score(s["dense"].get("test", s["dense"].get("val"))),
            "result": lambda s: (
                Quality.of(s).score(_of(s).get("test", _of(s).get("val"))) if s.get("met", True) else "not met"
            ),
            "loss": _loss,
            "dense B": "dense.onnx_bytes",
            "model.onnx B": lambda s: _with_ratio(s, "onnx_bytes"),
            "model.lil B": lambda s: _with_ratio(s, "packed_bytes"),
            "ms": lambda s: _with_ratio(s, "latency_ms"),
            "point": lambda s: _of(s).get("name"),
        },
    )


def rivals(summaries: Iterable[Summary]) -> str:
    """What lilliput made beside what an engineer's fixed recipe made in as many processor seconds (bench/rival.py).

    Args:
        summaries: of jobs; those without a rival's record are left out.

    Returns:
        A table, one row a job; "" where no job has a rival.
    """
    rows = [summary for summary in summaries if "ours" in (summary.get("rival") or {})]
    if not rows:
        return ""
    return markdown(
        rows,
        {
            "job": "task",
            "asked": lambda s: (
                "speed" if s["objective"] == "latency" else "model.onnx" if s.get("file") == "onnx" else "model.lil"
            ),
            "floor": lambda s: Quality.of(s).points(floor(s)),
            "model.onnx B": "rival.ours.bytes",
            "rival's B": "rival.bytes",
            "of the rival's": "rival.ours.bytes_over_rival",
            "speed": lambda s: formats.times(s["rival"]["ours"]["speedup"]),
            "rival's speed": lambda s: formats.times(s["rival"]["speedup"]),
            "loss on test": lambda s: _held(s.get("held_out")),
            "rival's loss on test": lambda s: _held(s["rival"].get("held_out")),
            "rival": "rival.how",
        },
    )


def _held(lost: Mapping[str, Any] | None) -> str:
    if not lost:
        return ""
    kept = "" if lost["held"] else ", floor not held"
    return f"{lost['drop']:.4g} ± {lost['standard_error']:.2g}{kept}"


def reached(record: Mapping[str, Any]) -> str:
    """What a search reaches in which time against what it must reach, of the record that bench/anytime.py writes.

    Args:
        record: with "rows" by name, each with what it must reach, its median and its runs.
    """
    return markdown(
        [{"name": name, **row} for name, row in record["rows"].items()],
        {
            "search": "name",
            "must reach": "must",
            "median": lambda row: row["median"] if row["reached"] else f"{row['median']} (missed)",
            "runs": lambda row: ", ".join(str(run["value"]) for run in row["runs"].values()),
            "in time": lambda row: "yes" if row["in_time"] else "no",
            "load": lambda row: " ".join(
                f"{run['machine']['load']}→{run['load_after']}" for run in row["runs"].values()
            ),
        },
    )


def _of(summary: Summary) -> Mapping[str, Any]:
    return shown(summary) or {}


def _loss(summary: Summary) -> str:
    quality = Quality.of(summary)
    key = "drop_test" if formats.known(summary.get("drop_test")) else "drop_corrected"
    interval = quality.interval(summary.get(f"{key}_interval")).removeprefix("95% interval ")
    return quality.bare(summary.get(key)) + (f" ({interval})" if interval else "")


def _with_ratio(summary: Summary, key: str) -> str:
    now = cost(_of(summary), key)
    before = summary["dense"].get("onnx_bytes") if key == "packed_bytes" else cost(summary["dense"], key)
    change = formats.ratio(before, now)
    text = formats.number(now) if key == "latency_ms" else formats.count(now)
    return text + (f" ({formats.times(change)}x)" if change is not None else "")


def _look(row: Mapping[str, Any], column: Column) -> object:
    if callable(column):
        return column(row)
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _text(cell: object) -> str:
    if cell is None:
        return formats.MISSING
    if isinstance(cell, float):
        return formats.number(cell, 4)
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def _escaped(text: str) -> str:
    for mark in "\\`*_[]<>|":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
