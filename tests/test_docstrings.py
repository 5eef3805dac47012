"""Docstrings: every public name and every registered object says what it does, takes, returns and raises, by example.

Google style: a first sentence, then `Args:` (shapes, units), `Returns:`, `Raises:`, `Example:` (a doctest), `Source:`
(the paper). The source is read by griffe, which the API reference is made with, and nothing is imported.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe
import pytest

import lilliput
from lilliput import registry

SRC = Path(__file__).parents[1] / "src"
# Objects of these families come from a publication, or say in `Source:` that there is none.
FROM_PAPERS = ("score", "pattern", "allocation", "range", "grid", "rounding")
# So do the methods of these folders, which hold one paper a file.
ROOMS_OF_PAPERS = ("prune", "quant", "factor", "distill", "adapt", "share")
# Where the settings of a class are checked and its work begins: what these raise, the class raises.
ENTRY_POINTS = ("__init__", "__post_init__", "__call__", "begin", "encode")


def names() -> list[str]:
    """The dotted names of everything that must be documented."""
    names = {f"{module}.{name}" for name, module in lilliput._NAMES.items()}
    entries = (entry for family in registry.FAMILIES for entry in registry.entries(family))
    names |= {f"{entry.module}.{entry.attribute}" for entry in entries if entry.package == "lilliput"}
    return sorted(names)


@cache
def package() -> griffe.Module:
    loaded = griffe.load("lilliput", search_paths=[SRC], allow_inspection=False)
    assert isinstance(loaded, griffe.Module)
    return loaded


def found(name: str) -> griffe.Class | griffe.Function:
    thing = package()[name.removeprefix("lilliput.")]
    assert isinstance(thing, griffe.Class | griffe.Function), f"{name} is neither a class nor a function"
    return thing


def parameters(thing: griffe.Class | griffe.Function) -> set[str]:
    """The names that `Args:` must explain: not those that a class inherits from a base with a docstring of its own."""
    own = {parameter.name.lstrip("*") for parameter in thing.parameters} - {"self", "cls"}
    if isinstance(thing, griffe.Class) and "dataclass" in thing.labels:
        for base in thing.mro():
            if base.docstring and not any(part.startswith("_") for part in base.path.split(".")):
                own -= {parameter.name for parameter in base.parameters}
    return own


def raises(thing: griffe.Class | griffe.Function) -> bool:
    """Whether the body of a function, or of an entry point of a class, has a raise statement."""
    functions = [thing]
    if isinstance(thing, griffe.Class):
        functions = [thing.members[name] for name in ENTRY_POINTS if name in thing.members]
    return any(isinstance(node, ast.Raise) for function in functions for node in ast.walk(ast.parse(code(function))))


def code(thing: griffe.Object) -> str:
    lines = thing.source.split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] for line in lines)


def needs_source(name: str, thing: griffe.Class | griffe.Function) -> bool:
    """Whether this comes from a publication by its family or folder."""
    entries = [
        entry
        for family in registry.FAMILIES
        for entry in registry.entries(family)
        if f"{entry.module}.{entry.attribute}" == name
    ]
    methods = any(entry.family in ("stage", "rule", "code") and entry.room in ROOMS_OF_PAPERS for entry in entries)
    return methods or any(entry.family in FROM_PAPERS for entry in entries)


def problems(name: str) -> list[str]:
    """What is missing in a docstring, as sentences."""
    thing = found(name)
    if not thing.docstring:
        return ["it has no docstring"]
    first = thing.docstring.value.partition("\n\n")[0]
    sections = {section.kind.value: section for section in thing.docstring.parse("google", warnings=False)}
    titled = {
        section.title: section.value.contents
        for section in thing.docstring.parse("google", warnings=False)
        if isinstance(section, griffe.DocstringSectionAdmonition)
    }
    missing = []
    if not re.match(r"[A-Z`|(]", first) or not first.rstrip().endswith((".", ":", "?")) or "\n>>>" in first:
        missing.append("its first paragraph must be a sentence")
    args = sections.get("parameters")
    explained = {item.name.lstrip("*") for item in args.value} if args else set()
    if unexplained := sorted(parameters(thing) - explained):
        missing.append(f"Args: must explain {', '.join(unexplained)}")
    if isinstance(thing, griffe.Function):
        returned = str(thing.returns) if thing.returns else "None"
        if returned not in ("None", "NoReturn") and not {"returns", "yields"} & set(sections):
            missing.append("Returns: is missing")
    exception = any(str(base).endswith(("Error", "Exception")) for base in getattr(thing, "bases", ()))
    if raises(thing) and "raises" not in sections:
        missing.append("Raises: is missing, but its body raises")
    if not exception and ">>>" not in str(titled.get("Example", "")):
        missing.append("Example: with a doctest is missing")
    source = titled.get("Source", "")
    if needs_source(name, thing) and not re.search(r"\b(19|20)\d\d\b|[Nn]o paper", source):
        missing.append("Source: must name a publication with its year, or say that there is no paper")
    loose = re.search(r"^(>>>|Sources?: \S|Raises [A-Z])", thing.docstring.value, re.MULTILINE)
    if loose:
        missing.append(f"{loose[0]!r} must be in a section")
    return missing


@pytest.mark.parametrize("name", names())
def test_docstring_has_its_sections(name: str) -> None:
    missing = problems(name)
    assert not missing, f"{name}: {'; '.join(missing)}."


def documented(module: griffe.Module) -> Iterator[griffe.Class | griffe.Function]:
    """Every class, function and method of a package that has a docstring, those of its modules included."""
    for member in list(module.members.values()):
        if isinstance(member, griffe.Module):
            yield from documented(member)
        elif isinstance(member, griffe.Class | griffe.Function):
            yield from (thing for thing in (member, *member.members.values())
                        if isinstance(thing, griffe.Class | griffe.Function) and thing.docstring)  # fmt: skip


def test_args_explain_parameters_that_exist() -> None:
    """One parameter a line, under its own name; the API reference warns of anything else."""
    wrong = []
    for thing in documented(package()):
        known = {parameter.name.lstrip("*") for parameter in thing.parameters}
        for section in thing.docstring.parse("google", warnings=False):  # type: ignore[union-attr]
            if section.kind is griffe.DocstringSectionKind.parameters:
                names = [item.name.lstrip("*") for item in section.value]
                wrong += [f"{thing.path}: {name}" for name in names if name not in known]
    assert not wrong, "\n".join(wrong)
