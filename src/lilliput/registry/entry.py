"""Entry: what the registry knows of an object, its family, name and file."""

import importlib
from dataclasses import dataclass
from typing import Any

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
    *("score", "pattern", "allocation", "range", "grid", "rounding", "loss", "metric", "statistic", "running"),
    *("net", "runtime"),
)
METHODS = ("Stage", "Rule", "Code", "Finding")

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
        return live[key] if key in live else getattr(importlib.import_module(self.module), self.attribute)


live: dict[Key, Any] = {}
"""What decorators have seen in this process: imported modules, and objects defined in a notebook or a script."""


def first(docstring: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((docstring or "").split("\n\n")[0].split())


def collision(key: Key, one: str, other: str) -> ValueError:
    """The error that two objects with the same name are."""
    return ValueError(
        f"registry: a {key[0]} must have a name of its own, but {key[1]!r} is in {one} and in {other}. "
        "Rename one of them."
    )
