"""The method table of the documentation, from the registry: a hook of mkdocs, or python scripts/methods.py."""

import sys
from collections.abc import Iterable
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from lilliput.registry import Entry, methods

MARKER = "<!-- methods: made by scripts/methods.py -->"


def tables(entries: Iterable[Entry]) -> str:
    """One table a family."""
    blocks = []
    for family, found in groupby(entries, key=lambda entry: entry.family):
        rows = "\n".join(f"| `{entry.name}` | {', '.join(entry.kinds)} | {loop(entry)} | {escaped(entry.summary)} |"
                         for entry in found)  # fmt: skip
        blocks.append(f"## {family}\n\n| method | is a | in your own loop | what it does |\n|---|---|---|---|\n{rows}")
    return "\n\n".join(blocks)


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


def on_page_markdown(markdown: str, **unused: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARKER, tables(methods())) if MARKER in markdown else markdown


if __name__ == "__main__":
    print(tables(methods()))
