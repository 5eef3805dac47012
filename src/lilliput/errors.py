"""Errors: the four failures that a caller may want to catch by name; everything else is a built-in exception."""

from collections.abc import Iterable
from difflib import get_close_matches


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
