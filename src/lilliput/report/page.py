"""Write the report of a job as one HTML file that works offline.

Nothing is fetched: Bokeh's script, the style and the data are inside the file, and a content security policy allows the
scripts by their hashes and no connection at all. All text that comes from a model or a task goes through Jinja's
escaping or, in the plot's tooltips, through Bokeh's. Where Bokeh is not installed (the extra ``lilliput[report]``), the
page has a table in place of the chart, and says so.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from lilliput.extras import extra
from lilliput.files import recover
from lilliput.files import write as write_file
from lilliput.report import account, formats, sections
from lilliput.report import summary as summaries
from lilliput.report.formats import Quality, Summary, known
from lilliput.report.plan import plan
from lilliput.report.plot import plot
from lilliput.report.terms import TERMS

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
_MISS = "a nearest miss, which this floor would allow"


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
    point, quality = summaries.shown(summary), Quality.of(summary)
    lacks = lacking() if plan(summary) else ""
    drawn = None if lacks else plot(summary, quality)
    scripts = [*([_bokeh()] if drawn else []), (_HERE / "page.js").read_text("utf-8")]
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {}  # not sorted: Bokeh reads references in the order of its text
    environment.globals.update(w=formats, floor=summaries.floor, q=quality, terms=TERMS)
    return environment.get_template("page.html").render(
        s=summary,
        dense=summary["dense"],
        point=point,
        met=bool(summary.get("met", True)),
        asked=summaries.question(summary),
        verdict=summaries.verdict(summary),
        request=summaries.request(summary),
        answer=summaries.answer(summary),
        style=(_HERE / "page.css").read_text("utf-8"),
        scripts=scripts,
        hashes=[_hash(text) for text in scripts],
        plot=drawn,
        lacks=lacks,
        figures=sections.figures(summary, point, quality),
        interval=sections.interval(summary, quality),
        layers=sections.layers(summary["dense"].get("layers") or [], (point or {}).get("layers") or []),
        measured=sections.measured(summary, point),
        shares=sections.shares(summary.get("shares") or {}),
        points=sections.table(summary, quality),
        told=account.told({**summary, "misses": []}),  # they have a table of their own
        history=account.history(summary),
        brought=account.axes(summary),
        misses=(misses := account.misses(summary)),
        more=any(known(row.get("examples_to_promise")) for row in misses),
        why=account.why(summary),
        cheaper=account.cheaper(summary),
        refused=account.refused(summary),
        failed=account.reasons(summary),
        files=[
            (name, files[name], _FILES.get(name, _MISS if name.startswith("nearest/") else ""))
            for name in sorted(files, key=_order)
        ],
    )


def write(folder: str | Path) -> Path:
    """Write ``folder/report.html`` from ``folder/summary.json``, whole or not at all (by rename); returns its path.

    Raises:
        FileNotFoundError, ValueError: as `page`.
        StoreError: the file cannot be written.
    """
    folder = Path(folder)
    html = page(folder)
    target = folder / "report.html"
    write_file(target, lambda file: file.write(html.encode()))
    return target


def lacking() -> str:
    """Say what a page lacks here and what installs it; an empty text where it lacks nothing.

    Example:
        >>> lacking()
        ''
    """
    try:
        _bokeh()
    except ModuleNotFoundError as error:
        return f"{error}. After that, `lilliput report DIR` makes the page again, with its chart."
    return ""


def _read(folder: Path) -> tuple[Summary, dict[str, int]]:
    recover(folder)
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
    places = [entry for name in ("*", "engine/*", "nearest/*/*") for entry in folder.glob(name) if entry.is_file()]
    files = {entry.relative_to(folder).as_posix(): entry.stat().st_size for entry in places}
    return summary, {name: files[name] for name in files if name != "report.html" and not name.startswith(".")}


def _order(name: str) -> tuple[int, str]:
    known_names = list(_FILES)
    return (known_names.index(name) if name in known_names else len(known_names), name)


@cache
def _bokeh() -> str:
    """Bokeh's core script, without widgets, tables, WebGL or MathJax."""
    with extra("report", "The chart of report.html"):
        from bokeh.util.paths import bokehjs_path

    text = (Path(bokehjs_path()) / "js" / "bokeh.min.js").read_text("utf-8")
    return text.replace("\r\n", "\n").split("//# sourceMappingURL")[0]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()
