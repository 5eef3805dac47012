"""Ending: Ctrl-C, SIGTERM and the end of the budget end a search early; what was found is still chosen and written."""

import _thread
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name))


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
        if self._inside and not self.reason:
            self.reason = "the end of the budget"
            _thread.interrupt_main()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.reason == "the end of the budget" and not self._signals and self._inside:
            self._inside = False
            raise Stopped(self.reason)
        self._signals += 1
        if self._signals > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = self.reason or ("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)
        if self._inside:
            self._inside = False
            raise Stopped(self.reason)
