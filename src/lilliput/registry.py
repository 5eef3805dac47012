"""The registry: every method there is, listed from the folders without importing them.

A family is a folder; a method is a public class or function in one of its files. There is no second list.
"""

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lilliput.errors import near

FAMILIES = (
    "code",
    "prune",
    "graph",
    "quant",
    "factor",
    "distill",
    "adapt",
    "share",
    "sparse",
    "embed",
    "spike",
    "evolve",
    "analyse",
)
KINDS = ("Stage", "Rule", "Code", "Finding")
CORE = ("train", "schedule")


@dataclass(frozen=True)
class Entry:
    """A method: its family, the module that holds it, its name, what nouns it is, and its first sentence."""

    family: str
    module: str
    name: str
    kinds: tuple[str, ...]
    summary: str
    has_loss: bool

    def load(self) -> Any:
        """Import the method."""
        return getattr(importlib.import_module(self.module), self.name)


@cache
def methods() -> tuple[Entry, ...]:
    """Every Code, Stage, Rule and Finding of every family, in order of family and file."""
    return tuple(entry for entry in _entries() if entry.kinds)


@cache
def _entries() -> tuple[Entry, ...]:
    root = Path(__file__).parent
    found: list[Entry] = []
    for core in CORE:
        found += _read(core, f"lilliput.{core}", root / f"{core}.py")
    for family in FAMILIES:
        for file in sorted((root / family).glob("*.py")):
            if not file.stem.startswith("_") and (family, file.stem) != ("code", "base"):
                found += _read(family, f"lilliput.{family}.{file.stem}", file)
    return tuple(found)


def _read(family: str, module: str, file: Path) -> Iterator[Entry]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
            yield Entry(
                family,
                module,
                node.name,
                tuple(kind for kind in KINDS if kind in bases),
                summary,
                any(
                    isinstance(item, ast.AnnAssign)
                    and isinstance(item.target, ast.Name)
                    and item.target.id == "has_loss"
                    and isinstance(item.value, ast.Constant)
                    and item.value.value is True
                    for item in node.body
                ),
            )


def lookup(name: str) -> Any:
    """The class of that name: a method, or a plain value that a method holds (a schedule).

    Raises KeyError with near misses.
    """
    known = {entry.name: entry for entry in _entries()}
    if name not in known:
        raise KeyError(f"registry: a method must be a known name, got {name!r}. {near(name, known)}")
    return known[name].load()
