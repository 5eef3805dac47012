"""Write files atomically: whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from lilliput.errors import StoreError


def write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Write a file whole or not at all: a temporary file beside it, synced, then renamed.

    Args:
        path: The file; its folder is made where there is none.
        fill: Called with the temporary file, open for bytes.

    Raises:
        StoreError: Where it cannot be written; what was there before is still in place.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "new", "file")
        >>> write(path, lambda file: file.write(b"whole"))
        >>> path.read_bytes()
        b'whole'
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            fill(file)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise StoreError(
            f"Store: {path} could not be written: {error.strerror or error}. What was there before is "
            "unharmed. Free some space or choose another folder with --out."
        ) from error


STAGED, COMMITTED = ".next", ".commit"


def write_set(folder: Path, contents: Mapping[str, bytes | Path | None], last: str) -> None:
    """Replace several files of a folder that belong together, so that a kill or a power cut leaves one whole set.

    All are written and synced beside it; one rename decides; then each is moved to its place. What is cut off after the
    decision is completed by `recover`, before it is forgotten.

    Args:
        folder: it is made where there is none.
        contents: by name, with `/` for a folder inside: bytes, a file to copy, or None for what is to go (files or
            folders that belonged to the earlier set).
        last: the name that is moved last, as the mark that the others are there.

    Raises:
        StoreError: where it cannot be written; what was there before is still in place.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_set(folder, {"a": b"one", "b/c": b"two", "all": b"done"}, last="all")
        >>> sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        ['a', 'all', 'b/c']
    """
    recover(folder)
    staged = folder / STAGED
    shutil.rmtree(staged, ignore_errors=True)  # of a process that was killed before it decided
    try:
        for name, content in contents.items():
            path = staged / (name if content is not None else f"{name}.gone")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                file.write(content.read_bytes() if isinstance(content, Path) else content or b"")
                file.flush()
                os.fsync(file.fileno())
        (staged / last).rename(staged / f"{last}.last")
        _sync(staged)
        os.rename(staged, folder / COMMITTED)
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise StoreError(
            f"Store: {folder} could not be written: {error.strerror or error}. What was there before is unharmed. Free "
            "some space or choose another folder with --out."
        ) from error
    _sync(folder)
    recover(folder)


def recover(folder: str | Path) -> None:
    """Complete a set of files that `write_set` decided to write before it was cut off.

    Every reader of such a folder calls it first; it does nothing where all is well.

    Args:
        folder: may be missing, or not writable.
    """
    committed = Path(folder, COMMITTED)
    if not committed.is_dir():
        return
    with contextlib.suppress(OSError):
        paths = [path for path in committed.rglob("*") if path.is_file()]
        for path in sorted(paths, key=lambda path: (path.suffix == ".last", path.suffix != ".gone", path)):
            name = path.relative_to(committed).as_posix()
            target = Path(folder, name.removesuffix(".gone").removesuffix(".last"))
            if path.suffix == ".gone":
                shutil.rmtree(target, ignore_errors=True)
                target.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another reader has moved it
                os.replace(path, target)
        shutil.rmtree(committed, ignore_errors=True)
        _sync(Path(folder))


def _sync(folder: Path) -> None:
    """Make the names in a folder last, where the system can."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
