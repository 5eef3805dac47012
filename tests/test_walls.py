"""The walls of src/lilliput: its rooms lie in one order, its files import each other in no circle, and none is long."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "lilliput"
MOST_LINES = 400

# From the bottom up. A file imports from its own room and from those of its line, and from those below; imports inside
# functions and under TYPE_CHECKING count. The package itself (lilliput/__init__.py) names everything and has no room.
ROOMS = (
    ("errors", "extras", "files", "schedule", "registry", "proposal"),
    ("stored",),
    ("task",),
    ("onnx",),
    ("cost",),
    ("code",),
    ("stage", "finding", "reference", "encode"),
    ("statistics",),
    ("train", "rule", "layout", "modes", "muon"),
    ("prune", "quant", "factor", "adapt", "share", "graph", "distill", "nets", "analyse", "data"),
    ("recipe", "store", "record", "runner"),
    ("export", "engine", "runtimes"),
    ("search",),
    ("targets",),
    ("report", "track"),
    ("shrinking",),
    ("evidence", "cli"),
)


def files() -> dict[str, Path]:
    """Every source file by its module's name."""
    files = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported(name: str, file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                yield from (found for found in (inside if inside in known else base,) if found in known)


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports."""
    known = files()
    return {name: set(imported(name, file, known)) - {name} for name, file in known.items() if name != "lilliput"}


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """The largest sets of modules of which each leads to each other (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in graph.get(name, ()):
            if other not in number:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == number[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(members) > 1:
                circles.append(tuple(sorted(members)))

    for name in graph:
        if name not in number:
            visit(name)
    return circles


def room(name: str) -> str:
    return name.split(".")[1]


def short(name: str) -> str:
    return name.removeprefix("lilliput.")


def arrows() -> set[str]:
    """Imports from a lower room to a higher one."""
    level = {each: i for i, line in enumerate(ROOMS) for each in line}
    pairs = ((name, other) for name, others in imports().items() for other in others if other != "lilliput")
    return {f"{short(name)} -> {short(other)}" for name, other in pairs if level[room(other)] > level[room(name)]}


def long_files() -> set[str]:
    counts = {
        file.relative_to(SOURCE).as_posix(): len(file.read_text("utf-8").splitlines()) for file in files().values()
    }
    return {name for name, count in counts.items() if count > MOST_LINES}


def test_every_file_has_a_room() -> None:
    known = {each for line in ROOMS for each in line} | {"_names"}
    assert sorted({room(name) for name in imports()} - known) == []


def test_files_import_each_other_in_no_circle() -> None:
    assert [" ".join(map(short, circle)) for circle in circles(imports())] == []


def test_no_room_imports_from_a_higher_one() -> None:
    assert arrows() == set()


def test_no_file_is_long() -> None:
    assert long_files() == set()


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"f2"}, "f2": {"f"}}
    assert sorted(circles(graph)) == [("a", "b", "c"), ("f", "f2")]


def test_imports_are_found_everywhere(tmp_path: Path) -> None:
    text = (
        "from typing import TYPE_CHECKING\nimport lilliput.a\nif TYPE_CHECKING:\n    from lilliput import b\n"
        "def f():\n    from lilliput.c import thing\n    from .d import other\n    from . import e\n"
    )
    (tmp_path / "x.py").write_text(text)
    known = {f"lilliput.{name}": tmp_path for name in "abcde"} | {"lilliput": tmp_path}
    assert sorted(imported("lilliput.x", tmp_path / "x.py", known)) == [f"lilliput.{name}" for name in "abcde"]
