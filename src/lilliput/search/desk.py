"""Desk: what a call finds in its worker, and what a worker process does beside its calls."""

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray

from lilliput.search import share

STOP, STEPS, SECONDS, FIELDS = 0, 1, 2, 8
WATCH_S = 0.5

_board: NDArray[np.float64]
_folder: Path
_desks: dict[int, "Desk"] = {}


def board(folder: Path, slots: int, mode: Literal["r+", "w+"] = "r+") -> NDArray[np.float64]:
    """A row of numbers for each worker, in memory that parent and workers see: (slots, FIELDS)."""
    return np.memmap(folder / "board", np.float64, mode, shape=(slots, FIELDS)).view(np.ndarray)


@dataclass(eq=False)
class Desk:
    """What a call finds in its worker.

    Args:
        thing: what the parent shared, loaded once a process.
        folder: a private folder of the search, which all workers on this machine and the parent see.
        slot: the number of the worker.
        kept: what a call leaves for those after it in the same process, such as structures that it has built.
    """

    thing: Any
    folder: Path
    slot: int
    kept: dict[Any, Any] = field(default_factory=dict)
    began: float = 0.0

    @property
    def stopped(self) -> bool:
        """Whether the parent wants this call to end at its next step."""
        return bool(_board[self.slot, STOP])

    def report(self, steps: float) -> None:
        """Tell the parent how far this call is; it costs less than a microsecond or two."""
        _board[self.slot, STEPS] = steps
        _board[self.slot, SECONDS] = time.monotonic() - self.began


def begin(folder: str, slot: int, slots: int, parent: int) -> None:
    """The first thing that a worker does: it takes its place, and imports what every call needs."""
    global _board, _folder
    threading.Thread(target=_watch, args=(folder, parent), daemon=True).start()
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _folder = Path(folder)
    _board = board(_folder, slots)
    import torch

    torch.set_num_threads(1)


def _watch(folder: str, parent: int) -> None:
    """End this process when the parent is gone, and with it the folder that the parent can no longer remove."""
    if sys.platform == "linux":
        import ctypes

        with contextlib.suppress(OSError, AttributeError):  # PR_SET_PDEATHSIG: wakes a worker that is held (`paused`)
            ctypes.CDLL(None).prctl(1, signal.SIGCONT)
    while psutil.pid_exists(parent) and (os.name == "nt" or os.getppid() == parent):
        time.sleep(WATCH_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def called(slot: int, payload: bytes, hint: dict[str, int]) -> bytes:
    """Run a call; its result, or what it raised, as bytes."""
    try:
        number, function, args, named = share.loads(payload)
        desk = _desk(number, slot)
        return share.dumps((function(desk, *args, **named, **hint), None))
    except BaseException as error:
        return _failure(error)


def ready(number: int, slot: int) -> None:
    """Read what is shared before the first call needs it."""
    if number:
        _desk(number, slot)


def _desk(number: int, slot: int) -> Desk:
    if number not in _desks:
        _desks.clear()
        _desks[number] = Desk(share.load(_folder / f"shared-{number}"), _folder, slot)
    _desks[number].began = time.monotonic()
    return _desks[number]


def _failure(error: BaseException) -> bytes:
    """What a call raised, as the parent can raise it again, with the worker's traceback as a note."""
    plain = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
    plain.add_note("In a worker:\n" + "".join(traceback.format_exception(error)))
    try:
        data = share.dumps((None, plain))
        share.loads(data)
        return data
    except Exception:  # an exception whose constructor takes something else cannot be made again
        return share.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
