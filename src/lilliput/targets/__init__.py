"""Targets: what may be shrunk from the command line. A file each says which names it reads and opens them.

A module here has `ABOUT`, which messages say; `OPTIONS`, the options that it takes; `reads(target)`, whether a TARGET
is one of its kind; and `read(given)`, which returns (model, task).
"""

import importlib
import os
import pkgutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lilliput.task import Task


@dataclass(frozen=True)
class Given:
    """A TARGET and the options that say what it does not say itself.

    Args:
        target: as on the command line.
        data: a file or folder with examples.
        label: the column of a table to be predicted.
        weights: a file with the network's tensors.
        calib: an npz with the inputs of an ONNX file.
        shape: fixed sizes of an ONNX file's inputs, as "name=8x128".
    """

    target: str
    data: str | None = None
    label: str | None = None
    weights: str | None = None
    calib: str | None = None
    shape: tuple[str, ...] = ()

    def plain(self) -> dict[str, Any]:
        """The options that were given, as plain data."""
        return {name: list(value) if name == "shape" else value for name, value in asdict(self).items() if value}

    @classmethod
    def of(cls, kept: dict[str, Any]) -> "Given":
        """What `plain` kept; other entries are left out."""
        known = {field.name: kept[field.name] for field in fields(cls) if kept.get(field.name)}
        return cls(**{**known, "shape": tuple(known.get("shape", ()))})


def opened(given: Given) -> "tuple[nn.Module, Task]":
    """(model, task) of any TARGET.

    Args:
        given: the target and its options.

    Raises:
        ValueError: for a target that nothing reads, that raises, or whose options belong to another kind.
        ImportError: with the line that installs it, where a package is missing.
    """
    kinds = list(_kinds())
    kind = next(module for module in kinds if module.reads(given.target))
    for name in given.plain():
        if name != "target" and name not in kind.OPTIONS:
            able = [module.ABOUT for module in kinds if name in module.OPTIONS]
            raise ValueError(
                f"shrink: --{name} must come with {' or '.join(able)}, got {given.target}. Leave it out, since this "
                "target brings what it needs."
            )
    found: tuple[nn.Module, Task] = kind.read(given)
    return found


def found_again(kept: dict[str, Any]) -> "tuple[nn.Module, Task]":
    """(model, task) of an earlier search, made again as the command line made them.

    Args:
        kept: `cwd` and what `Given.plain` kept.

    Raises:
        ValueError: where the search was started from Python, or its target is no longer there or raises.
    """
    target, here = kept.get("target"), Path.cwd()
    if not target:
        raise ValueError(
            "finish: the network must be given, since this search was started from Python. Call "
            "lilliput.finish(folder, model, task)."
        )
    try:
        os.chdir(kept["cwd"])
        return opened(Given.of(kept))
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"finish: the target of this search ({target}, in {kept['cwd']}) must still be there, but: {error} The "
            "files in the folder are the best that was promised so far; to test them, put it back, or call "
            "lilliput.finish(folder, model, task)."
        ) from error
    finally:
        os.chdir(here)


def about() -> str:
    """What a TARGET may be, in one line."""
    last, *others = reversed(list(_kinds()))
    return ", ".join(module.ABOUT for module in (last, *reversed(others)))


def _kinds() -> Iterator[ModuleType]:
    """The modules of this folder, functions last, which read whatever no other reads."""
    names = sorted(
        (entry.name for entry in pkgutil.iter_modules(__path__)), key=lambda name: (name == "function", name)
    )
    for name in names:
        module = importlib.import_module(f"{__name__}.{name}")
        if hasattr(module, "reads"):
            yield module
