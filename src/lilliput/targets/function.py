"""A function of yours that returns (model, task), or the name of an embedded task."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.errors import told
from lilliput.targets import Given, about

if TYPE_CHECKING:
    from torch import nn

    from lilliput.task import Task

ABOUT = "an embedded name (see: lilliput tasks), file.py:function or package.module:function returning (model, task)"
OPTIONS = ()


def resolve(target: str) -> "tuple[nn.Module, Task]":
    """(model, task) of an embedded name, file.py:function or package.module:function.

    Raises:
        ValueError: For a target that is none of these, that raises, or that returns something else.
    """
    from torch import nn

    from lilliput.data import TASKS
    from lilliput.errors import near
    from lilliput.task import Task

    where = TASKS[target].target if target in TASKS else target
    place, _, name = where.rpartition(":")
    if not place:
        raise ValueError(f"TARGET must be {about()}, got {target!r}. {near(target, TASKS)}")
    module = _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(f"TARGET: {place} must have a function {name!r}. {near(name, known) if known else ''}".strip())
    try:
        returned = function()
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"TARGET: {target} must return (model, task), but raised {told(error)}") from error
    if not (
        isinstance(returned, tuple)
        and len(returned) == 2
        and isinstance(returned[0], nn.Module)
        and isinstance(returned[1], Task)
    ):
        shown = (
            tuple(type(part).__name__ for part in returned) if isinstance(returned, tuple) else type(returned).__name__
        )
        raise ValueError(f"TARGET: {target} must return (model, task), an nn.Module and a lilliput.Task, got {shown}.")
    return returned


def reads(target: str) -> bool:
    """Any that no other kind reads."""
    return True


def read(given: Given) -> "tuple[nn.Module, Task]":
    """(model, task) of an embedded task or a function."""
    return resolve(given.target)


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"TARGET: the module must be importable, got {place!r}: {error}.") from error
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"TARGET: the file must exist, got {place}.")
    stem = path.stem if path.stem not in sys.modules else f"target_{path.stem}"
    spec = importlib.util.spec_from_file_location(stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"TARGET: {place} must run, but raised {told(error)}") from error
    return module
