"""Forge: networks compiled by the engine beside a search, the dense one too, so that choosing waits for none."""

import contextlib
import hashlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from onnx import ModelProto

from lilliput.cost.count import stored_values
from lilliput.engine.compile import write
from lilliput.engine.target import target
from lilliput.errors import ExportError, NotSupported
from lilliput.runtimes.engine import EngineSession
from lilliput.search.pool import Pool

REFUSALS = (NotSupported, ExportError, OSError, ValueError, RuntimeError, CancelledError)
VALUE_BYTES = 300  # of memory that compiling takes for each value of a large network
VALUE_S = 5e-6  # of time
PATIENCE = 0.1  # of a search's budget, that one compilation may take by its values
UNCOUNTED_S = 60.0  # the same where nothing counts seconds


def build(desk: Any, data: bytes, folder: str, tune: bool) -> float:
    """Compile a file for this machine into a folder; the seconds that it took. Runs in a worker of a pool."""
    began = time.monotonic()
    write(data, folder, target("native"), tune)
    return time.monotonic() - began


@dataclass
class _Build:
    future: "Future[float]"
    folder: Path
    session: EngineSession | None = None
    reason: str = ""

    def wait(self, seconds: float) -> EngineSession | None:
        """The compiled file as soon as it is there, or None."""
        if self.session is None and not self.reason:
            try:
                self.future.result(min(max(0.0, seconds), threading.TIMEOUT_MAX))
                self.session = EngineSession.opened(self.folder)
            except NotYet:
                return None
            except REFUSALS as error:
                self.reason = str(error) or type(error).__name__
        return self.session


class Forge:
    """Compile files, each once, elsewhere: at once with kernels by estimate, then perhaps with measured ones.

    Args:
        submit: runs `function(desk, *arguments)` in another process (`Pool.submit`).
        patience_s: a network that would take longer by its number of values is refused.

    Example:
        >>> from lilliput.search.pool import Pool
        >>> with Pool(workers=1) as pool:  # doctest: +SKIP
        ...     forge = Forge(pool.submit)
        ...     forge.start(proto)
        ...     sessions = forge.sessions(proto, seconds=60)
    """

    def __init__(self, submit: Callable[..., "Future[float]"], patience_s: float = UNCOUNTED_S) -> None:
        self._submit, self._patience_s = submit, patience_s
        self._folder = Path(tempfile.mkdtemp(prefix="lilliput-engine-"))
        self._quick: dict[str, _Build] = {}
        self._tuned: dict[str, _Build] = {}

    def start(self, proto: ModelProto) -> None:
        """Begin to compile a file by estimates, unless it has begun already, or there is no memory for it."""
        self._begin(self._quick, proto, tune=False)

    def tune(self, proto: ModelProto) -> None:
        """Begin to compile a file with measured kernels, instead of all those for which that has not begun yet."""
        for key, held in list(self._tuned.items()):
            if held.future.cancel():
                del self._tuned[key]
        self._begin(self._tuned, proto, tune=True)

    def sessions(self, proto: ModelProto, seconds: float = 0.0) -> list[EngineSession]:
        """The compiled file, once or twice; nothing where it is not there within as many seconds, or was refused."""
        key = _key(proto)
        quick = self._quick[key].wait(seconds) if key in self._quick else None
        tuned = self._tuned[key].wait(0.0) if key in self._tuned else None
        return [session for session in (quick, tuned) if session is not None]

    def reason(self, proto: ModelProto) -> str:
        """Why a file was refused, or an empty text."""
        held = self._quick.get(_key(proto))
        return "" if held is None else held.reason

    def expected_s(self) -> float:
        """How long the compilation by estimates of a network usually takes; 0 if unknown."""
        done = [held.future.result() for held in self._quick.values() if held.session is not None]
        return statistics.median(done) if done else 0.0

    def close(self) -> None:
        """Take back what has not begun, and remove the compiled files."""
        for held in (*self._quick.values(), *self._tuned.values()):
            held.future.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _begin(self, known: dict[str, _Build], proto: ModelProto, tune: bool) -> None:
        key = _key(proto)
        if key in known:
            return
        folder = self._folder / f"{len(self._quick)}-{len(self._tuned)}"
        if reason := self._too_large(stored_values(proto)):
            known[key] = _Build(Future(), folder, reason=reason)
        else:
            known[key] = _Build(self._submit(build, proto.SerializeToString(), str(folder), tune), folder)

    def _too_large(self, values: int) -> str:
        """Why a network of so many values is not compiled, or an empty text."""
        if values * VALUE_BYTES > 0.5 * psutil.virtual_memory().available:
            return f"compiling {values:,} values takes more memory than there is"
        if values * VALUE_S > self._patience_s:
            return f"compiling {values:,} values would take more than {self._patience_s:.0f} s"
        return ""


@contextlib.contextmanager
def forging(wanted: bool, budget_s: float | None = None) -> Iterator[Forge | None]:
    """A forge with a process of its own, where one is wanted.

    Args:
        wanted: whether it is.
        budget_s: of the whole search, None where no seconds are counted.
    """
    if not wanted:
        yield None
        return
    with Pool(workers=1) as pool:
        forge = Forge(pool.submit, UNCOUNTED_S if budget_s is None else PATIENCE * budget_s)
        try:
            yield forge
        finally:
            forge.close()


def _key(proto: ModelProto) -> str:
    return hashlib.sha256(proto.SerializeToString()).hexdigest()
