"""The registry: every method there is, by family and name, in lilliput and in the packages that join it.

Classes whose bases lead to a noun (Stage, Rule, Code, Stored, Task, Finding, Schedule) belong to its family by that
alone. Everything else, a function or a class, joins under `@register(family)`. Listing reads the source and imports
nothing: the command line, the documentation and recipes know all methods before torch is loaded.

A package from elsewhere joins by an entry point in its pyproject.toml, whose value is a package or a module:

    [project.entry-points."lilliput.methods"]
    mine = "my_package"
"""

import ast
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from lilliput.errors import near

NOUNS = {
    "Stage": "stage",
    "Rule": "rule",
    "Code": "code",
    "Finding": "finding",
    "Stored": "kind",
    "Task": "task",
    "Schedule": "schedule",
}
FAMILIES = (
    *NOUNS.values(),
    *(
        "score",
        "pattern",
        "allocation",
        "range",
        "grid",
        "rounding",
        "loss",
        "metric",
        "statistic",
        "running",
        "net",
        "runtime",
    ),
)
METHODS = ("Stage", "Rule", "Code", "Finding")
GROUP = "lilliput.methods"

T = TypeVar("T")
Key = tuple[str, str]


@dataclass(frozen=True)
class Entry:
    """One registered object, known without importing it.

    Attributes:
        family: what it is, one of `FAMILIES`.
        name: its name in that family.
        module: the module that defines it.
        attribute: its name in that module.
        summary: the first sentence of its docstring.
        file: the file that defines it.
        kinds: every noun that the class is, such as ("Stage", "Rule").
        has_loss: whether it is a rule that adds to the loss.
    """

    family: str
    name: str
    module: str
    attribute: str
    summary: str
    file: str
    kinds: tuple[str, ...] = ()
    has_loss: bool = False

    @property
    def package(self) -> str:
        """The top package that defines it: "lilliput", or one that joined."""
        return self.module.partition(".")[0]

    @property
    def room(self) -> str:
        """The folder of lilliput that holds it, or the package that brought it."""
        return self.module.split(".")[1] if self.package == "lilliput" else self.package

    def load(self) -> Any:
        """Import the object."""
        key = self.family, self.name
        return _live[key] if key in _live else getattr(importlib.import_module(self.module), self.attribute)


_live: dict[Key, Any] = {}
"""What decorators have seen in this process: imported modules, and objects defined in a notebook or a script."""


def register(family: str, name: str | None = None) -> Callable[[T], T]:
    """Add the decorated function or class to a family; it is returned unchanged.

    Write the family, and the name where there is one, as literals: listing reads them from the source.

    Args:
        family: one of `FAMILIES`.
        name: its name there; the object's own without one. An object may have several names: decorate it again.

    Raises:
        KeyError: for an unknown family.
        ValueError: where another object has the name already.

    Example:
        >>> @register("score", name="cubed (example)")
        ... def cubed(weight):
        ...     return weight.abs() ** 3
        >>> lookup("score", "cubed (example)") is cubed
        True
    """
    if family not in FAMILIES:
        raise KeyError(f"register: family must be a known family, got {family!r}. {near(family, FAMILIES)}")

    def keep(thing: T) -> T:
        key = family, name or thing.__name__  # type: ignore[attr-defined]
        # A cell that is run again, or a module that is reloaded, defines the same thing anew.
        if key in _live and _place(_live[key]) != _place(thing):
            raise _collision(key, _file(_live[key]), _file(thing))
        _live[key] = thing
        _table.cache_clear()
        return thing

    return keep


def entries(family: str) -> tuple[Entry, ...]:
    """Every entry of a family, in order of package and file.

    Raises:
        KeyError: for an unknown family.
        ValueError: where two objects have the same name.

    Example:
        >>> "Cosine" in [entry.name for entry in entries("schedule")]
        True
    """
    if family not in FAMILIES:
        raise KeyError(f"registry: family must be a known family, got {family!r}. {near(family, FAMILIES)}")
    return tuple(entry for entry in _table().values() if entry.family == family)


def methods() -> tuple[Entry, ...]:
    """Every Code, Stage, Rule and Finding, once each, in order of package and file."""
    return tuple(
        entry
        for entry in _table().values()
        if entry.family == next((NOUNS[kind] for kind in METHODS if kind in entry.kinds), None)
    )


def lookup(families: str | tuple[str, ...], name: str) -> Any:
    """The object of that name, imported.

    Args:
        families: the family to look in, or several.
        name: its name there.

    Raises:
        KeyError: for an unknown name, with near misses.
        ValueError: where objects of several of these families have the name.

    Example:
        >>> lookup("schedule", "Linear")(0.0, 1.0)(50, 100)
        0.5
    """
    return find(families, name).load()


def find(families: str | tuple[str, ...], name: str) -> Entry:
    """The entry of that name: `lookup` without the import."""
    wanted = (families,) if isinstance(families, str) else families
    table = _table()
    matches = [table[family, name] for family in wanted if (family, name) in table]
    if not matches:
        what = " or ".join(wanted) if len(wanted) < 4 else "method"
        known = [entry.name for entry in table.values() if entry.family in wanted]
        raise KeyError(f"registry: {what} must be a known name, got {name!r}. {near(name, known)}")
    if len({(entry.module, entry.attribute) for entry in matches}) > 1:
        places = " and ".join(f"a {entry.family} in {entry.file}" for entry in matches)
        raise ValueError(
            f"registry: {name!r} must name one object, but is {places}. "
            f'Write "module:Name", as in "{matches[0].module}:{matches[0].attribute}".'
        )
    return matches[0]


def _place(thing: Any) -> tuple[str, str]:
    return thing.__module__, thing.__qualname__


def _file(thing: Any) -> str:
    return str(getattr(sys.modules.get(thing.__module__), "__file__", None) or thing.__module__)


def _collision(key: Key, first: str, second: str) -> ValueError:
    return ValueError(
        f"registry: a {key[0]} must have a name of its own, but {key[1]!r} is in {first} and in {second}. "
        "Rename one of them."
    )


@cache
def _table() -> dict[Key, Entry]:
    """What source declares, and what was registered in this process beside it."""
    table = dict(_declared())
    for (family, name), thing in _live.items():
        known, file = table.get((family, name)), _file(thing)
        if known is None:
            summary = _first(getattr(thing, "__doc__", None))
            table[family, name] = Entry(family, name, thing.__module__, thing.__qualname__, summary, file)
        elif known.module != thing.__module__ and known.file != file:  # `python -m` runs a listed file as __main__
            raise _collision((family, name), known.file, file)
    return table


@cache
def _declared() -> dict[Key, Entry]:
    table: dict[Key, Entry] = {}
    for entry in _read(_sources()):
        key = entry.family, entry.name
        if key in table:
            raise _collision(key, table[key].file, entry.file)
        table[key] = entry
    return table


def _sources() -> dict[str, Path]:
    """Every module of lilliput and of the packages that join, by its dotted name."""
    found = dict(_modules("lilliput", Path(__file__).parent))
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: (point.module, point.name)):
        top, *rest = point.module.split(".")
        spec = find_spec(top)  # of the top package only: finding a module inside one would import the package
        places = [Path(place, *rest) for place in (spec and spec.submodule_search_locations) or ()]
        if spec and spec.origin and not rest and not places:
            places = [Path(spec.origin).with_suffix("")]
        known = {name: file for place in places for name, file in _modules(point.module, place)}
        if not known:
            who = point.dist.name if point.dist else point.name
            raise ValueError(
                f"registry: an entry point in {GROUP} must name an installed module, but {point.value!r} of {who} is "
                f"not one. Install {who} again, or remove it."
            )
        found |= known
    return found


def _modules(name: str, place: Path) -> Iterator[tuple[str, Path]]:
    """The modules of a package's folder, or the one of a file; `place` is either one's path without a suffix."""
    if not place.is_dir():
        if place.with_suffix(".py").is_file():
            yield name, place.with_suffix(".py")
        return
    for file in sorted(place.rglob("*.py")):
        parts = file.relative_to(place).with_suffix("").parts
        yield ".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts))), file


CLASS = re.compile(r"^class\s+(\w+)\s*\(([^)]*)\)", re.MULTILINE)
ALIAS = re.compile(r" as (\w+)")
REGISTER = re.compile(r"^@(?:\w+\.)*register\(", re.MULTILINE)


def _read(sources: dict[str, Path]) -> Iterator[Entry]:
    """Every entry that these modules declare.

    Parsing all of the source would take most of a second. Words are compared first, and only files that define
    something with the name of a noun among the bases of its bases are parsed.
    """
    texts = {module: file.read_text(encoding="utf-8") for module, file in sources.items()}
    pairs = {module: [*_bases(text)] for module, text in texts.items()}
    names: set[str] = set(NOUNS)
    while more := {name for found in pairs.values() for name, bases in found if bases & names} - names:
        names |= more
    parsed = [
        _Module(module, str(sources[module]), ast.parse(text, str(sources[module])))
        for module, text in texts.items()
        if REGISTER.search(text) or any(bases & names for _, bases in pairs[module])
    ]
    classes = {(module.name, name): found for module in parsed for name, found in module.classes.items()}
    for module in parsed:
        yield from module.entries(classes)


def _bases(text: str) -> Iterator[tuple[str, set[str]]]:
    """Each class with the words among its bases, and each other name that a class with bases may know one by."""
    classes = CLASS.findall(text)
    for name, bases in classes:
        yield name, set(re.findall(r"\w+", bases))
    for alias in ALIAS.finditer(text) if classes else ():
        before = text[max(0, alias.start() - 99) : alias.start()].split()[-1:]
        yield alias[1], {word.strip("(,") for word in before}


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements at the top of a module, those under an `if` or a `try` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _top(node.body)


class _Module:
    """A parsed module: what its names mean, and the classes at its top."""

    def __init__(self, name: str, file: str, tree: ast.Module) -> None:
        self.name, self.file, self.body = name, file, tree.body
        self.meaning: dict[str, str] = {}
        for node in _top(tree.body):
            if isinstance(node, ast.ImportFrom):
                self._import(node)
            elif isinstance(node, ast.Import):
                self.meaning |= {alias.asname: alias.name for alias in node.names if alias.asname}
        for item in self.body:
            if isinstance(item, ast.ClassDef):
                self.meaning[item.name] = f"{name}.{item.name}"
        self.classes = {item.name: _Class(self, item) for item in self.body if isinstance(item, ast.ClassDef)}

    def _import(self, node: ast.ImportFrom) -> None:
        origin = node.module or ""
        if node.level:
            here = self.name.split(".")
            up = node.level - 1 if Path(self.file).name == "__init__.py" else node.level
            origin = ".".join([*here[: len(here) - up], *([origin] if origin else [])])
        for alias in node.names:
            self.meaning[alias.asname or alias.name] = f"{origin}.{alias.name}"

    def dotted(self, node: ast.expr) -> str:
        """The full name of what a base or decorator refers to; "" where that is no name."""
        if isinstance(node, ast.Subscript):
            return self.dotted(node.value)
        if isinstance(node, ast.Attribute):
            return f"{self.dotted(node.value)}.{node.attr}"
        return self.meaning.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    def entries(self, classes: "dict[Key, _Class]") -> Iterator[Entry]:
        for node in self.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef):
                continue
            chain = list(self.classes[node.name].chain(classes)) if isinstance(node, ast.ClassDef) else []
            kinds = tuple(noun for noun in NOUNS if any(noun in found.nouns for found in chain))
            has_loss = "Rule" in kinds and any(found.has_loss for found in chain)
            keys = {*self._registered(node)}
            if not self._hidden(node.name):
                keys |= {(NOUNS[kind], node.name) for kind in kinds}
            for family, name in sorted(keys):
                summary = _first(ast.get_docstring(node))
                yield Entry(family, name, self.name, node.name, summary, self.file, kinds, has_loss)

    def _hidden(self, name: str) -> bool:
        """Whether a class is private, a noun itself, or abstract."""
        private = any(part.startswith("_") for part in (*self.name.split("."), name))
        noun = self.name.startswith("lilliput.") and name in NOUNS
        return private or noun or (name in self.classes and self.classes[name].abstract)

    def _registered(self, node: ast.ClassDef | ast.FunctionDef) -> Iterator[Key]:
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and self.dotted(call.func) == "lilliput.registry.register":
                values = dict(zip(("family", "name"), call.args, strict=False))
                values |= {word.arg: word.value for word in call.keywords if word.arg}
                given = {key: value.value for key, value in values.items() if isinstance(value, ast.Constant)}
                if given.keys() != values.keys() or given.get("family") not in FAMILIES:
                    raise ValueError(
                        f"register: family must be one of {', '.join(FAMILIES)}, as a literal, and so must the name, "
                        f"in {self.file}, line {call.lineno}."
                    )
                yield str(given["family"]), str(given.get("name") or node.name)


class _Class:
    """A class at the top of a module, before it is known what it is."""

    def __init__(self, module: _Module, node: ast.ClassDef) -> None:
        self.name = node.name
        bases = [module.dotted(base) for base in node.bases]
        self.nouns = {base.rpartition(".")[2] for base in bases if base.startswith("lilliput.")} & set(NOUNS)
        self.bases = [base.rpartition(".")[::2] for base in bases]
        functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        self.has_loss = any(item.name == "loss" for item in functions)
        self.abstract = bool({"abc.ABC", "typing.Protocol"} & set(bases)) or any(
            module.dotted(mark) == "abc.abstractmethod" for item in functions for mark in item.decorator_list
        )

    def chain(self, classes: "dict[Key, _Class]") -> "Iterator[_Class]":
        """This class and those it is made of, up to the nouns and not with them."""
        yield self
        for module, name in self.bases:
            top = module.partition(".")[0]
            if top == "lilliput" and name in NOUNS:
                continue
            # A package may export a class from another place than where it is defined.
            same = [found for key, found in classes.items() if key[1] == name and key[0].partition(".")[0] == top]
            base = classes.get((module, name)) or (same[0] if len(same) == 1 else None)
            if base:
                yield from base.chain(classes)


def _first(docstring: str | None) -> str:
    return " ".join((docstring or "").split("\n\n")[0].split())
