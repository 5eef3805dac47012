"""The registry: every method there is, by family and name, in lilliput and in the packages that join it.

Classes whose bases lead to a noun (Stage, Rule, Code, Stored, Task, Finding, Schedule) belong to its family by that
alone. Everything else, a function or a class, joins under `@register(family)`. Listing reads the source and imports
nothing: the command line, the documentation and recipes know all methods before torch is loaded.

A package from elsewhere joins by an entry point in its pyproject.toml, whose value is a package or a module:

    [project.entry-points."lilliput.methods"]
    mine = "my_package"
"""

import importlib
import operator
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

from lilliput.errors import near
from lilliput.registry.entry import FAMILIES, METHODS, NOUNS, Entry, Key, collision, first, live
from lilliput.registry.source import read, sources

__all__ = [
    "FAMILIES",
    "METHODS",
    "NOUNS",
    "Entry",
    "entries",
    "find",
    "lookup",
    "methods",
    "register",
    "resolve",
    "written",
]

T = TypeVar("T")


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
        if key in live and _place(live[key]) != _place(thing):
            raise collision(key, _file(live[key]), _file(thing))
        live[key] = thing
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


def lookup(families: str | tuple[str, ...], name: str, who: str = "registry") -> Any:
    """The object of that name, imported.

    Args:
        families: the family to look in, or several.
        name: its name there.
        who: what an error message begins with, such as the method whose setting the name is.

    Raises:
        KeyError: for an unknown name, with near misses.
        ValueError: where objects of several of these families have the name.

    Example:
        >>> lookup("schedule", "Linear")(0.0, 1.0)(50, 100)
        0.5
    """
    return find(families, name, who).load()


def find(families: str | tuple[str, ...], name: str, who: str = "registry") -> Entry:
    """The entry of that name: `lookup` without the import."""
    wanted = (families,) if isinstance(families, str) else families
    table = _table()
    matches = [table[family, name] for family in wanted if (family, name) in table]
    if not matches:
        what = " or ".join(wanted) if len(wanted) < 4 else "method"
        known = [entry.name for entry in table.values() if entry.family in wanted]
        raise KeyError(f"{who}: {what} must be a known {what}, got {name!r}. {near(name, known)}")
    if len({(entry.module, entry.attribute) for entry in matches}) > 1:
        places = " and ".join(f"a {entry.family} in {entry.file}" for entry in matches)
        raise ValueError(
            f"{who}: {name!r} must name one object, but is {places}. "
            f'Write "module:Name", as in "{matches[0].module}:{matches[0].attribute}".'
        )
    return matches[0]


def written(kind: type, families: str | tuple[str, ...]) -> str:
    """How plain data names a class: by its name in these families, or as "module:Name" where that is not it.

    Example:
        >>> from lilliput.schedule import Linear
        >>> written(Linear, "schedule"), written(dict, "schedule")
        ('Linear', 'builtins:dict')
    """
    try:
        entry = find(families, kind.__name__)
    except (KeyError, ValueError):
        entry = None
    if entry and (entry.module, entry.attribute) == _place(kind):
        return entry.name
    return f"{kind.__module__}:{kind.__qualname__}"


def resolve(families: str | tuple[str, ...], name: str, who: str = "registry") -> Any:
    """The class that `written` has named; "module:Name" is imported.

    Args:
        families: the family to look in, or several.
        name: its name there, or "module:Name".
        who: what an error message begins with.

    Raises:
        KeyError: for an unknown name, and for a class that cannot be imported, with what to do.
        ValueError: where objects of several of these families have the name.

    Example:
        >>> resolve("schedule", "Linear") is resolve("schedule", "lilliput.schedule:Linear")
        True
    """
    place, colon, attribute = name.partition(":")
    if not colon:
        try:
            return lookup(families, name, who)
        except KeyError as error:
            raise KeyError(f"{error.args[0]} What another package brings needs that package installed.") from error
    try:
        return operator.attrgetter(attribute)(importlib.import_module(place))
    except (ImportError, AttributeError) as error:
        raise KeyError(
            f"{who}: a class must be one that can be imported, got {name!r}: {error}. Install the package that has it, "
            f"or start Python in the folder of {place.partition('.')[0]}.py."
        ) from error


def _place(thing: Any) -> tuple[str, str]:
    return thing.__module__, thing.__qualname__


def _file(thing: Any) -> str:
    return str(getattr(sys.modules.get(thing.__module__), "__file__", None) or thing.__module__)


@cache
def _table() -> dict[Key, Entry]:
    """What source declares, and what was registered in this process beside it."""
    table = dict(_declared())
    for (family, name), thing in live.items():
        known, file = table.get((family, name)), _file(thing)
        if known is None:
            summary = first(getattr(thing, "__doc__", None))
            table[family, name] = Entry(family, name, thing.__module__, thing.__qualname__, summary, file)
        elif known.module != thing.__module__ and known.file != file:  # `python -m` runs a listed file as __main__
            raise collision((family, name), known.file, file)
    return table


@cache
def _declared() -> dict[Key, Entry]:
    table: dict[Key, Entry] = {}
    for entry in read(sources()):
        key = entry.family, entry.name
        if key in table:
            raise collision(key, table[key].file, entry.file)
        table[key] = entry
    return table
