"""Journal: the sampler's study on disk, as Optuna keeps it, so that its dashboard shows a search while it runs.

optuna-dashboard lilliput-digits/records/optuna.log
"""

import contextlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.errors import StoreError

if TYPE_CHECKING:
    from optuna.storages import JournalStorage

NAME = "optuna.log"


def journal(folder: Path) -> "JournalStorage":
    """Optuna's storage in a folder that this process alone writes to.

    Args:
        folder: the store's, which is there.

    Returns:
        The storage. Create a study in it with a name of its own: what an earlier run left is still there.

    Raises:
        StoreError: where it cannot be written.

    Example:
        >>> import optuna, tempfile
        >>> study = optuna.create_study(study_name="0", storage=journal(Path(tempfile.mkdtemp())))
        >>> study.study_name
        '0'
    """
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    path = folder / NAME
    for left in folder.glob(f"{NAME}.lock*"):  # of a process that was killed while it wrote
        with contextlib.suppress(OSError):
            left.unlink()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna calls some of its storages experimental
            return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))
    except OSError as error:
        raise StoreError(
            f"Store: {path} could not be written: {error.strerror or error}. Choose another folder with --out."
        ) from error
