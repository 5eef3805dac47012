"""Tables of the documentation, from the registry, the engine and its record: a hook of mkdocs, or this script."""

import json
import sys
from collections.abc import Iterable
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import readme

from lilliput.engine import lower
from lilliput.registry import FAMILIES, METHODS, Entry, entries, methods

ROOT = Path(__file__).resolve().parents[1]
MARKER = "<!-- {}: made by scripts/methods.py -->"


def tables(listed: Iterable[Entry], linked: bool = False) -> str:
    """One table for each room of lilliput, such as prune; linked: with links to the API reference."""
    blocks = []
    for family, found in groupby(listed, key=lambda entry: entry.room):
        rows = "\n".join(
            f"| {name(entry, linked)} | {', '.join(entry.kinds)} | {loop(entry)} | {escaped(entry.summary)} |"
            for entry in found
        )
        blocks.append(f"## {family}\n\n| method | is a | in your own loop | what it does |\n|---|---|---|---|\n{rows}")
    return "\n\n".join(blocks)


def values(linked: bool = False) -> str:
    """One table for each family of what methods take by name: scores, patterns, schedules, networks and the like."""
    blocks = []
    for family in FAMILIES:
        listed = [entry for entry in entries(family) if not set(METHODS) & set(entry.kinds)]
        rows = "\n".join(f"| {name(entry, linked)} | {escaped(entry.summary)} |" for entry in listed)
        if listed:
            blocks.append(f"## family {family}\n\n| name | what it is |\n|---|---|\n{rows}")
    return "\n\n".join(blocks)


def name(entry: Entry, linked: bool) -> str:
    """A cell with the name of an entry. mkdocstrings resolves the link."""
    known = linked and entry.package == "lilliput"
    return f"[`{entry.name}`][{entry.module}.{entry.attribute}]" if known else f"`{entry.name}`"


def loop(entry: Entry) -> str:
    """What a training loop that is not ours has to do for this method."""
    if "Rule" not in entry.kinds:
        return "call it once" if "Stage" in entry.kinds else "attach it" if "Code" in entry.kinds else ""
    return "`attached`, and add its `loss`" if entry.has_loss else "`attached`"


def escaped(text: str) -> str:
    """Text that stays text in a cell of a Markdown table; what is between backticks is code already."""
    prose, code = text.split("`")[::2], text.split("`")[1::2]
    for mark in "\\*_[]<>|":
        prose = [part.replace(mark, "\\" + mark) for part in prose]
    return "".join(part for pair in zip_longest(prose, (f"`{part}`" for part in code), fillvalue="") for part in pair)


def operators() -> str:
    """The ONNX operators that the engine compiles, a row for each of its files."""
    files: dict[str, list[str]] = {}
    for op, lowering in lower.gather().items():
        files.setdefault(lowering.__module__, []).append(op)
    rows = "\n".join(
        f"| {escaped(sys.modules[module].__doc__.splitlines()[0].split(':')[0])} | "
        f"{', '.join(f'`{op}`' for op in sorted(found))} |"
        for module, found in sorted(files.items())
    )
    return (
        "| | operators |\n|---|---|\n" + rows + "\n\nOperators that ONNX itself defines by others are written "
        "out, so some that are not in this table compile too."
    )


def speed() -> str:
    """The engine's speed table, from its record."""
    path = ROOT / "results" / "engine" / "speed.json"
    if not path.exists():
        return "Run `python bench/engine.py`."
    return readme.speed(json.loads(path.read_text(encoding="utf-8")))


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Called by mkdocs for each page."""
    for name, make in {
        "methods": lambda: tables(methods(), linked=True),
        "values": lambda: values(linked=True),
        "operators": operators,
        "speed": speed,
    }.items():
        marker = MARKER.format(name)
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


if __name__ == "__main__":
    print(tables(methods()), values(), sep="\n\n")
