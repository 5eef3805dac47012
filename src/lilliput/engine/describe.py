"""Describe a compiled folder in the output of `lilliput compile`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

SHOWN = 24


def described(folder: Path) -> Iterator[Any]:
    """A table of the layers and a line on each file, for people."""
    facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    table = Table(title=f"{escape(facts['model'])} for {facts['target']}", title_justify="left")
    for column in ("layer", "operator", "output", "non-zeros", "kernel", "bytes", "us"):
        table.add_column(
            column, justify="left" if column in ("layer", "operator", "output", "kernel") else "right", overflow="fold"
        )
    layers = facts["layers"]
    for layer in layers[:SHOWN]:
        kept = f"{layer['nonzeros']:,} of {layer['values']:,}" if layer.get("nonzeros") is not None else ""
        spent = f"{layer['ns'] / 1e3:.1f}" if layer.get("ns") else ""
        table.add_row(
            escape(layer["name"]), layer["op"], layer["output"], kept, layer["kernel"], f"{layer['bytes']:,}", spent
        )
    yield table
    if len(layers) > SHOWN:
        yield f"and {len(layers) - SHOWN} more layers, all in {folder / 'manifest.json'}"
    yield f"arena {facts['arena_bytes']:,} B (largest live set {facts['live_bytes']:,} B)"
    for path in sorted(folder.iterdir()):
        yield f"{path}  {path.stat().st_size:,} B"
