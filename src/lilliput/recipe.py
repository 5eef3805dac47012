"""Recipe: a tuple of stages, as plain data both ways, and the key under which each prefix is stored."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import textwrap
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lilliput import registry
from lilliput.code.spec import Spec
from lilliput.stage import Stage
from lilliput.task import Task, source

VALUES = tuple(registry.NOUNS.values())
"""The families whose members a recipe holds by name."""


@dataclass(frozen=True)
class Recipe:
    """Hold stages in the order in which they are applied.

    A class of your own is written as "module:Name" and imported when the recipe is read, so a recipe from elsewhere can
    run code as any Python file can.

    Args:
        stages: frozen dataclasses of plain values; rules and schedules among their settings are written the same way.

    Example:
        >>> from lilliput import Prune
        >>> Recipe((Prune(0.5),)).data()
        [{'stage': 'Prune', 'sparsity': 0.5}]
    """

    stages: tuple[Stage, ...] = ()

    @classmethod
    def of(cls, stages: Iterator[Stage]) -> "Recipe":
        """A recipe of any iterable of stages."""
        return cls(tuple(stages))

    def __add__(self, stage: Stage) -> "Recipe":
        return Recipe((*self.stages, stage))

    def __len__(self) -> int:
        return len(self.stages)

    def data(self) -> list[dict[str, Any]]:
        """Plain data: one dictionary a stage, settings that have their default left out."""
        return [plain(stage) for stage in self.stages]

    @classmethod
    def parse(cls, data: list[dict[str, Any]]) -> "Recipe":
        """A recipe from plain data.

        Raises:
            KeyError: for a stage that is not known or cannot be imported.
            ValueError: for a setting that the stage does not have, and for a name that several stages have.
            TypeError: for a class that is no dataclass.
        """
        return cls(tuple(_object(item) for item in data))

    def toml(self) -> str:
        """The recipe as TOML: one [[stages]] table each."""
        return "\n".join(f"[[stages]]\n{_table(stage)}" for stage in self.data()) or "stages = []\n"

    @classmethod
    def read(cls, path: str | Path) -> "Recipe":
        """A recipe from a TOML or JSON file."""
        text = Path(path).read_text(encoding="utf-8")
        try:
            data = json.loads(text) if str(path).endswith(".json") else tomllib.loads(text)
        except ValueError as error:
            raise ValueError(f"Recipe: {path} must be TOML (or JSON, where its name ends so), but: {error}.") from error
        stages = data.get("stages") if isinstance(data, dict) else data
        if not isinstance(stages, list):
            raise ValueError(
                f"Recipe: {path} must hold a list of stages, got {type(stages).__name__}. "
                "Write one [[stages]] table for each."
            )
        return cls.parse(stages)

    def describe(self) -> str:
        """A short line for people."""
        return " -> ".join(_short(stage) for stage in self.stages) or "dense"


def plain(value: Any) -> Any:
    """A stage, rule or schedule as a dictionary with its type under "stage"; anything plain as it is.

    The type is its name in the registry, or "module:Name" for a class that the registry does not know or where several
    have the name.
    """
    if isinstance(value, Spec):
        return value.data()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = {}
        for field in dataclasses.fields(value):
            mine = getattr(value, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if mine != default and mine is not None:
                kept[field.name] = plain(mine)
        return {"stage": registry.written(type(value), VALUES), **kept}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def _kind(name: str) -> Any:
    kind = registry.resolve(VALUES, name, "Recipe")
    if not dataclasses.is_dataclass(kind):
        raise TypeError(
            f"Recipe: a stage must be a frozen dataclass, got {name!r}. Decorate it with @dataclass(frozen=True)."
        )
    return kind


def _object(value: Any) -> Any:
    if isinstance(value, dict):
        settings = dict(value)
        if "code" in settings and "stage" not in settings:
            return Spec.of(settings)
        if "stage" not in settings:
            raise ValueError(f'Recipe: each table must name its stage, got {sorted(settings)}. Add stage = "...".')
        kind = _kind(settings.pop("stage"))
        known = {field.name for field in dataclasses.fields(kind)}
        if unknown := set(settings) - known:
            raise ValueError(f"Recipe: {kind.__name__} takes {sorted(known)}, got {sorted(unknown)}.")
        return kind(**{name: _object(item) for name, item in settings.items()})
    if isinstance(value, list):
        return tuple(_object(item) for item in value)
    return value


def _table(data: dict[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in data.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)


def _short(stage: Stage) -> str:
    data = plain(stage)
    name = data.pop("stage")
    shown = [f"{key}={item}" if not isinstance(item, list | dict) else key for key, item in data.items()]
    return f"{name}({', '.join(shown)})"


def weights_hash(model: nn.Module) -> str:
    """A hash of every tensor of a model and of its forward source: where every key starts."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in sorted(kinds, key=lambda kind: str(kind.__qualname__)):
        if not kind.__module__.startswith("torch."):
            digest.update(_digest(kind).encode())
    return digest.hexdigest()


def start_key(model: nn.Module, task: Task, seed: int) -> str:
    """The key of the empty recipe: weights, forward source, task, seed, torch's minor version."""
    version = ".".join(torch.__version__.split("+")[0].split(".")[:2])
    return _hash(weights_hash(model), task.fingerprint, str(seed), version)


def next_key(key: str, stage: Stage) -> str:
    """The key of a prefix one stage longer: its plain data, and the versions and sources of what it uses."""
    return _hash(key, json.dumps(plain(stage), sort_keys=True), json.dumps(sorted(versions(stage))))


def versions(value: Any) -> set[str]:
    """Name and version of every method that a stage uses; where there is no version, the source instead.

    A class that no registry lists has no versions to rely on: its author is still writing it. Nor have functions and
    networks. A setting that is named after a family, such as `score` or `net`, holds a name of it.
    """
    if isinstance(value, tuple):
        return {each for item in value for each in versions(item)}
    if isinstance(value, Spec):
        code = value.kind()
        version = f"{value.code} {code.version}"
        return {f"{version} {_digest(code)}" if ":" in value.code else version}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return set()
    kind, name = type(value), registry.written(type(value), VALUES)
    used = {f"{kind.__name__} {getattr(value, 'version', 1)}"}
    if ":" in name:
        used.add(f"{name} {_digest(kind)}")
    for field in dataclasses.fields(value):
        mine = getattr(value, field.name)
        used |= versions(mine)
        if isinstance(mine, str) and field.name in registry.FAMILIES:
            with contextlib.suppress(KeyError):
                used.add(f"{field.name} {mine} {_digest(registry.lookup(field.name, mine))}")
    return used


_PARSING = threading.Lock()  # Python 3.11 may raise SystemError when two threads parse at once (CPython issue 106905)


def _digest(thing: Any) -> str:
    """A hash of what the source of a function or class computes: without comments and docstrings."""
    with _PARSING:
        return _digest_of(thing)


@functools.cache
def _digest_of(thing: Any) -> str:
    try:
        tree = ast.parse(textwrap.dedent(source(thing)))
    except SyntaxError:  # it stands inside an expression
        return _hash(source(thing))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return _hash(ast.unparse(tree))


def _hash(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
