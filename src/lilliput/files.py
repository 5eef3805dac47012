"""Write files atomically: whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable
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
