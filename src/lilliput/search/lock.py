"""Lock: one search at a time in a folder. The system releases the lock when its process ends, however it ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from lilliput.errors import StoreError

NAME = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder while something is written to it.

    Args:
        folder: it is made where there is none.

    Raises:
        StoreError: where another process holds it, or it cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with held(folder):
        ...     (folder / NAME).read_text() == str(os.getpid())
        True
    """
    path = folder / NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _taken(path)
    except OSError as error:
        raise StoreError(
            f"Store: {folder} must be a folder that can be written, got: {error.strerror or error}. Choose another "
            "with --out."
        ) from error
    if file is None:
        with contextlib.suppress(OSError):
            owner = path.read_text(encoding="ascii", errors="replace").strip()
        raise StoreError(
            f"shrink: {folder} must not be in use, but process {owner or 'of another user'} works in it. Wait for its "
            "end, or choose another --out."
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is still held, so that nobody else's file is removed
        os.close(file)


def _taken(path: Path) -> int | None:
    """The open lock file with this process's number in it; None where another process holds it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
        if not _lock(file):
            os.close(file)
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                os.ftruncate(file, 0)
                os.write(file, str(os.getpid()).encode("ascii"))
                return file
        os.close(file)  # it was removed between opening and locking: another search has just ended


def _lock(file: int) -> bool:
    """Take the system's lock of an open file, where nobody has it."""
    try:
        try:
            import fcntl
        except ImportError:  # Windows
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            return True
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
