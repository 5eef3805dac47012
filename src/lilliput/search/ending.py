"""Ending: Ctrl-C, SIGTERM and the end of the budget end a search early; what was found is still chosen and written."""

import _thread
import contextlib
import signal
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lilliput import files

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))

DELICATE = ("weakref.py", "_weakrefset.py", "pathlib.py", "tempfile.py")
"""Files of Python's own in which nothing may be raised from outside."""
AGAIN_S = 0.2  # until the main thread is interrupted again


class Stopped(BaseException):
    """Raised in the main thread when a search is to end with what it has. No `except Exception` catches it.

    Args:
        reason: such as "Ctrl-C".
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Ending:
    """End what runs inside `search`, once: at a signal or after some seconds.

    The first signal, or the deadline, raises `Stopped` where the main thread is inside `search`; elsewhere it is
    remembered, and the next `search` does not begin. A second Ctrl-C raises KeyboardInterrupt at once, wherever it is.
    In another thread than the main one there are no signals: there only what asks `reason` ends.

    Example:
        >>> with Ending() as ending:
        ...     try:
        ...         with ending.search(seconds=0.01):
        ...             while True:
        ...                 pass
        ...     except Stopped as stopped:
        ...         print(stopped.reason)
        the end of the budget
    """

    def __init__(self) -> None:
        self.reason = ""
        self._inside = False
        self._signals = 0
        self._own = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Ending":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *details: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def search(self, seconds: float) -> Iterator[None]:
        """What may be ended.

        Args:
            seconds: how long it may take; infinite for no deadline.

        Raises:
            Stopped: when it is ended, or was to end before it began.
        """
        timer = threading.Timer(max(0.0, seconds), self._deadline) if seconds < threading.TIMEOUT_MAX else None
        try:
            self._inside = True
            if self.reason:
                raise Stopped(self.reason)
            if timer is not None and self._before:
                timer.daemon = True
                timer.start()
            yield
        finally:
            self._inside = False
            if timer is not None:
                timer.cancel()

    def _deadline(self) -> None:
        self.reason = self.reason or "the end of the budget"
        self._interrupt()

    def _interrupt(self) -> None:
        """Interrupt the main thread where it is inside, and again until it is not."""
        if self._inside:
            self._own = True
            _thread.interrupt_main()
            self._soon()

    def _soon(self) -> None:
        timer = threading.Timer(AGAIN_S, self._interrupt)
        timer.daemon = True
        timer.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        own, self._own = self._own, False
        if not own:
            self._signals += 1
            if self._signals > 1 and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.reason = self.reason or ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        if self._inside and _delicate(frame):
            self._soon()
        elif self._inside:
            raise Stopped(self.reason)


def _delicate(frame: FrameType | None) -> bool:
    """Whether a frame is where an exception does harm: in a callback of the garbage collector it is lost, in an import
    it leaves half a module, and where a file was opened but is not yet held, nothing closes it."""
    while frame is not None and not frame.f_code.co_filename.endswith("phases.py"):  # the search itself
        file = frame.f_code.co_filename
        if frame.f_code.co_name == "__del__" or file.startswith("<frozen importlib"):
            return True
        if file == files.__file__ or Path(file).name in DELICATE:
            return True
        given = [frame.f_locals.get(name) for name in frame.f_code.co_varnames[: frame.f_code.co_argcount]]
        if any(isinstance(value, weakref.ref) and value() is None for value in given):
            return True  # a callback of the garbage collector is given the reference that died
        frame = frame.f_back
    return False
