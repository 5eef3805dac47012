"""Find the class of a stored kind by the tag in a file."""

from __future__ import annotations

from lilliput.errors import StoreError
from lilliput.registry import entries
from lilliput.stored.base import Stored


def find(tag: int | str) -> type[Stored]:
    """The class of a kind: one that was imported, else one that lilliput or an installed package registers.

    Args:
        tag: the number of a kind of lilliput's own, or the name of the class of another.

    Raises:
        StoreError: for a kind that is not there.
    """
    if tag not in Stored.kinds:
        for entry in entries("kind"):  # a class enters itself into `Stored.kinds` when it is imported
            if entry.name == tag if isinstance(tag, str) else entry.package == "lilliput":
                entry.load()
    if tag in Stored.kinds:
        return Stored.kinds[tag]
    raise StoreError(
        f"Stored: a tensor is stored in the kind {tag!r}, which is not known here. "
        "Install the package that defines it (or a newer lilliput), or import its module first."
    )
