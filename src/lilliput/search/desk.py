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
import torch
from numpy.typing import NDArray

from lilliput.search import share

STOP, STEPS, SECONDS, FIELDS = 0, 1, 2, 8
WATCH_S = 0.5

_board: NDArray[np.float64]
_own: "Desk"


def board(folder: Path, slots: int, mode: Literal["r+", "w+"] = "r+") -> NDArray[np.float64]:
    """A row of numbers for each worker, in memory that parent and workers see: (slots, FIELDS)."""
    return np.memmap(folder / "board", np.float64, mode, shape=(slots, FIELDS)).view(np.ndarray)


@dataclass(eq=False)
class Desk:
    """What a call finds in its worker.

    Args:
        folder: a private folder of the search, which all workers on this machine and the parent see.
        slot: the number of the worker.
        kept: what a call leaves for those after it in the same process, such as structures that it has built; emptied
            when the parent shares something else.
    """

    folder: Path
    slot: int
    kept: dict[Any, Any] = field(default_factory=dict)
    shared: str = ""
    began: float = 0.0
    _read: dict[str, Any] = field(default_factory=dict)

    @property
    def thing(self) -> Any:
        """What the parent shares, read once a process."""
        return self.get(self.shared)

    def get(self, name: str) -> Any:
        """What the parent has put under a name, read once a process; None where there is nothing."""
        if name not in self._read:
            if not self._has(name):
                return None
            self._read[name] = self._open(name)
        return self._read[name]

    @property
    def stopped(self) -> bool:
        """Whether the parent wants this call to end at its next step."""
        return bool(_board[self.slot, STOP])

    def report(self, steps: float) -> None:
        """Tell the parent how far this call is; it costs a microsecond or two."""
        _board[self.slot, STEPS] = steps
        _board[self.slot, SECONDS] = time.monotonic() - self.began

    def run(self, payload: bytes, hint: dict[str, int]) -> bytes:
        """Run a call; its result, or what it raised, as bytes."""
        self.began = time.monotonic()
        try:
            shared, function, args, named = share.loads(payload)
            self.turn(shared)
            return share.dumps((function(self, *args, **named, **hint), None))
        except BaseException as error:
            return _failure(error)

    def turn(self, shared: str) -> None:
        """Forget what belongs to what was shared before."""
        if shared != self.shared:
            self._read.pop(self.shared, None)
            self.kept.clear()
            self.shared = shared

    def _has(self, name: str) -> bool:
        return share.whole(self.folder / name)

    def _open(self, name: str) -> Any:
        return share.load(self.folder / name)


def begin(folder: str, slot: int, slots: int, parent: int) -> None:
    """The first thing that a worker does: it takes its place, and imports what every call needs."""
    global _board, _own
    threading.Thread(target=_watch, args=(folder, parent), daemon=True).start()
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _own = Desk(Path(folder), slot)
    _board = board(_own.folder, slots)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # weights that fade away would make every product that they are in slow


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


def called(payload: bytes, hint: dict[str, int]) -> bytes:
    """Run a call at this process's desk."""
    return _own.run(payload, hint)


def ready(shared: str) -> None:
    """Read what is shared before the first call needs it."""
    _own.turn(shared)
    _own.get(shared)


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
