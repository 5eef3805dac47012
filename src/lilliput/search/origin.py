"""Origin: the TARGET of a command (an embedded task, a function, an ONNX file), read and found again."""

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from lilliput.task import Task


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
        raise ValueError(
            "TARGET must be an embedded name, file.py:function, package.module:function or model.onnx, "
            f"got {target!r}. {near(target, TASKS)}"
        )
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
        raise ValueError(
            f"TARGET: {target} must return (model, task), but raised {type(error).__name__}: {error}"
        ) from error
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


def opened(target: str, shape: Sequence[str] = (), calib: str | Path | None = None) -> "tuple[nn.Module, Task]":
    """(model, task) of any TARGET, an ONNX file with its arrays too.

    Args:
        target: as on the command line.
        shape: fixed sizes of an ONNX file's inputs, as "name=8x128".
        calib: an npz with the inputs of an ONNX file.

    Raises:
        ValueError: as `resolve`, and for arrays without a file that they belong to.
    """
    if target.endswith(".onnx"):
        from lilliput.search.onnx_target import load_target

        return load_target(Path(target), None if calib is None else Path(calib), list(shape))
    if shape or calib:
        raise ValueError(
            f"shrink: --shape and --calib must come with a model.onnx, got {target}. A task brings its own arrays."
        )
    return resolve(target)


def found_again(given: Mapping[str, Any]) -> "tuple[nn.Module, Task]":
    """(model, task) of an earlier search, made again as the command line made them.

    Args:
        given: `target`, `cwd`, `shape` and `calib` as the search kept them.

    Raises:
        ValueError: where the search was started from Python, or its target is no longer there or raises.
    """
    target, here = given.get("target"), Path.cwd()
    if not target:
        raise ValueError(
            "finish: the network must be given, since this search was started from Python. Call "
            "lilliput.finish(folder, model, task)."
        )
    try:
        os.chdir(given["cwd"])
        return opened(str(target), given.get("shape") or (), given.get("calib"))
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(
            f"finish: the target of this search ({target}, in {given['cwd']}) must still be there, but: {error} The "
            "files in the folder are the best that was promised so far; to test them, put it back, or call "
            "lilliput.finish(folder, model, task)."
        ) from error
    finally:
        os.chdir(here)


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
        raise ValueError(f"TARGET: {place} must run, but raised {type(error).__name__}: {error}") from error
    return module
