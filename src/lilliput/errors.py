"""Errors: the four failures that a caller may want to catch by name; everything else is a built-in exception."""

import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


class FloorNotMet(RuntimeError):
    """Raised when no point that was found loses less than the floor allows."""


class NotSupported(TypeError):
    """Raised for a model, operator or setting that lilliput leaves alone, named with the reason."""


class ExportError(RuntimeError):
    """Raised for an artifact that does not compute what the model computes, or could not be written."""


class StoreError(RuntimeError):
    """Raised for a file that is damaged, of another version, or cannot be written."""


def near(name: str, known: Iterable[str]) -> str:
    """Name the closest known names in a sentence, for the end of an error message."""
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"Known: {shown}."


def told(error: BaseException, most: int = 300) -> str:
    """An exception in a line: its type, what it says, and the line of the user's own code that it came through.

    Args:
        error: the exception; where it was raised from another, the line is looked for in that one too.
        most: characters of what it says.

    Example:
        >>> told(KeyError("x"))
        "KeyError: 'x'"
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:most]}" if lines else type(error).__name__
    place = _users(error)
    return f"{text} ({place})" if place else text


def _users(error: BaseException) -> str:
    """The innermost line of code that belongs neither to Python nor to an installed package; empty without one."""
    paths = sysconfig.get_paths()
    others = tuple(str(Path(paths[name]).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    others += (str(Path(__file__).resolve().parent), "<")
    own = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not (file if file.startswith("<") else str(Path(file).resolve())).startswith(others):
            own = f"{Path(file).name}, line {line}"
    return own or (_users(error.__cause__) if error.__cause__ is not None else "")
