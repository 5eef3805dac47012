"""Read declarations from source without importing it: classes by their bases, and `@register`."""

import ast
import re
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from lilliput.registry.entry import FAMILIES, NOUNS, Entry, Key, first

GROUP = "lilliput.methods"
CLASS = re.compile(r"^class\s+(\w+)\s*\(([^)]*)\)", re.MULTILINE)
ALIAS = re.compile(r" as (\w+)")
REGISTER = re.compile(r"^@(?:\w+\.)*register\(", re.MULTILINE)


def sources() -> dict[str, Path]:
    """Every module of lilliput and of the packages that join, by its dotted name."""
    modules = dict(_modules("lilliput", Path(__file__).parents[1]))
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
        modules |= known
    return modules


def _modules(name: str, place: Path) -> Iterator[tuple[str, Path]]:
    """The modules of a package's folder, or the one of a file; `place` is either one's path without a suffix."""
    if not place.is_dir():
        if place.with_suffix(".py").is_file():
            yield name, place.with_suffix(".py")
        return
    for file in sorted(place.rglob("*.py")):
        parts = file.relative_to(place).with_suffix("").parts
        yield ".".join((name, *(parts[:-1] if parts[-1] == "__init__" else parts))), file


def read(sources: dict[str, Path]) -> Iterator[Entry]:
    """Every entry that these modules declare.

    Parsing all of the source would take most of a second. Words are compared first, and only files that define
    something with the name of a noun among the bases of its bases are parsed.
    """
    texts = {module: file.read_text(encoding="utf-8") for module, file in sources.items()}
    pairs = {module: [*_bases(text)] for module, text in texts.items()}
    names: set[str] = set(NOUNS)
    while more := {name for pairs_of in pairs.values() for name, bases in pairs_of if bases & names} - names:
        names |= more
    parsed = [
        _Module(module, str(sources[module]), _parsed(text, sources[module]))
        for module, text in texts.items()
        if REGISTER.search(text) or any(bases & names for _, bases in pairs[module])
    ]
    classes = {(module.name, name): described for module in parsed for name, described in module.classes.items()}
    for module in parsed:
        yield from module.entries(classes)


def _parsed(text: str, file: Path) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(
            f"registry: {file} must be Python, but line {error.lineno} is not: {error.msg}. "
            "Mend it, or remove the package that brings it."
        ) from error


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
            kinds = tuple(noun for noun in NOUNS if any(noun in one.nouns for one in chain))
            has_loss = "Rule" in kinds and any(one.has_loss for one in chain)
            keys = {*self._registered(node)}
            if not self._hidden(node.name):
                keys |= {(NOUNS[kind], node.name) for kind in kinds}
            for family, name in sorted(keys):
                summary = first(ast.get_docstring(node))
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
            same = [other for key, other in classes.items() if key[1] == name and key[0].partition(".")[0] == top]
            base = classes.get((module, name)) or (same[0] if len(same) == 1 else None)
            if base:
                yield from base.chain(classes)
