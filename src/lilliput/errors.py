"""The four failures that a caller may want to catch by name; everything else is a ValueError, TypeError or KeyError."""

from collections.abc import Iterable
from difflib import get_close_matches


class FloorNotMet(RuntimeError):
    """No point that was found loses less than the floor allows."""


class NotSupported(TypeError):
    """A model, operator or setting that lilliput leaves alone, named with the reason."""


class ExportError(RuntimeError):
    """An artifact that does not compute what the model computes, or could not be written."""


class StoreError(RuntimeError):
    """A file that is damaged, of another version, or cannot be written."""


def near(name: str, known: Iterable[str]) -> str:
    """A sentence naming the closest known names, for the end of an error message."""
    names = sorted(known)
    close = get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return f"Did you mean {', '.join(map(repr, close))}?"
    shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return f"Known: {shown}."
