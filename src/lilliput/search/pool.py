"""Pool: processes that run a search's trainings, one thread each, started while the parent does something else.

Each worker is a loky executor of one process, so that a worker that is killed (for memory, by a person) takes only its
own call along: that call is tried once more with the hint `smaller=1`, the others never notice. Workers do not import
the program's main file, ignore Ctrl-C (the parent tells them what to do) and end with the parent, however it ends.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import psutil
from loky import ProcessPoolExecutor
from loky.process_executor import BrokenProcessPool

from lilliput.errors import StoreError
from lilliput.search import desk, share

THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
NEVER_RECYCLED = {"LOKY_MAX_MEMORY_LEAK_SIZE": "1e15"}  # what a worker keeps is no leak


class WorkerDied(RuntimeError):
    """Raised for a call whose worker was killed, and killed again when the call was tried smaller."""


@dataclass(frozen=True)
class Progress:
    """How far a call is.

    Args:
        steps: what it has reported.
        seconds: how long it had run then.
    """

    steps: float = 0.0
    seconds: float = 0.0


@dataclass(eq=False)
class _Call:
    future: "Future[Any]"
    payload: bytes
    name: str
    hint: bool
    deaths: int = 0


@dataclass(eq=False)
class _Slot:
    number: int
    executor: Any = None
    call: _Call | None = None


class Pool:
    """Run functions in processes: `function(desk, *args)`, where `desk.thing` is what is shared (lilliput.search.desk).

    Args:
        shared: what every call may read: models, tasks, arrays. Large arrays are mapped, not copied.
        workers: how many processes.
        later: how many of them start with `complete` alone, so that this process has their cores until then.

    Raises:
        TypeError: where what is shared cannot be pickled.
        StoreError: where the temporary folder has no room for it.

    Example:
        >>> with Pool(shared=20, workers=1) as pool:  # doctest: +SKIP
        ...     pool.submit(lambda desk, x: desk.thing + x, 3).result()
        23
    """

    local = True  # whether all workers are on this machine

    def __init__(self, shared: Any = None, workers: int = 1, later: int = 0) -> None:
        if workers < 1:
            raise ValueError(f"Pool: workers must be at least 1, got {workers}.")
        self.folder = Path(tempfile.mkdtemp(prefix="lilliput-"))
        self._shares, self._shared = 0, ""
        self._closed = False
        self._lock = threading.RLock()
        self._queue: deque[_Call] = deque()
        self._board = desk.board(self.folder, workers, "w+")
        self._slots = [_Slot(number) for number in range(workers)]
        try:
            for slot in self._slots[: max(1, workers - later)]:
                self._start(slot)
            self.share(shared)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    @property
    def workers(self) -> int:
        """How many processes there are."""
        return len(self._slots)

    @property
    def idle(self) -> int:
        """How many of them have nothing to do."""
        with self._lock:
            return max(0, sum(slot.call is None for slot in self._begun) - len(self._queue))

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        with self._lock:
            return [pid for slot in self._begun for pid in list(slot.executor._processes)]

    def complete(self) -> None:
        """Start the workers that were left for later."""
        with self._lock:
            for slot in self._slots if not self._closed else ():
                if slot.executor is None:
                    self._start(slot)
            self._fill()

    @property
    def _begun(self) -> list[_Slot]:
        return [slot for slot in self._slots if slot.executor is not None]

    def share(self, thing: Any) -> None:
        """Replace what calls that are submitted from now on find at their desk: `desk.thing`."""
        shared = f"shared-{self._shares + 1}"
        self.put(shared, thing)
        self._shares += 1
        self._shared = shared
        with self._lock:
            for slot in self._begun:  # read while nothing else is asked of them
                with contextlib.suppress(BrokenProcessPool):
                    slot.executor.submit(desk.ready, shared)

    def put(self, name: str, thing: Any) -> None:
        """Lay something where every worker finds it by `desk.get(name)`; it cannot be replaced.

        Args:
            name: a name for a folder.
            thing: as for `share`.
        """
        try:
            share.dump(thing, self.folder / name)
        except OSError as error:
            raise StoreError(
                f"Pool: {self.folder} must have room for the model and the data, got: {error.strerror}. Free some "
                "space, or name another folder by the environment variable TMPDIR."
            ) from error

    def submit(self, function: Callable[..., Any], *args: Any, **named: Any) -> "Future[Any]":
        """Run `function(desk, *args, **named)` in the next worker that is free.

        Args:
            function: any function, also a lambda or one of a notebook. Where it takes `smaller`, it is called with
                `smaller=1` when its first worker was killed.
            args: plain data, models, tensors.
            named: the same by name.

        Returns:
            A future. `cancel` takes back a call that has not begun; `end` asks one that runs to end.

        Raises:
            TypeError: where function or arguments cannot be pickled.
        """
        payload = share.dumps((self._shared, function, args, named))
        call = _Call(Future(), payload, getattr(function, "__name__", "call"), takes_hint(function))
        with self._lock:
            if self._closed:
                raise RuntimeError("Pool: it must be open to run something, but it is closed.")
            self._queue.append(call)
            self._fill()
        return call.future

    def map(self, function: Callable[..., Any], *iterables: Iterable[Any]) -> Iterator[Any]:
        """The results of `function(desk, *each)`, in order."""
        futures = [self.submit(function, *each) for each in zip(*iterables, strict=True)]
        return (future.result() for future in futures)

    def progress(self, future: "Future[Any]") -> Progress:
        """How far a call is, by what it reported last."""
        slot = self._slot(future)
        if slot is None:
            return Progress()
        return Progress(float(self._board[slot.number, desk.STEPS]), float(self._board[slot.number, desk.SECONDS]))

    def end(self, future: "Future[Any]") -> None:
        """Ask a call to end: one that waits is cancelled, one that runs sees `desk.stopped`."""
        with self._lock:
            if not future.cancel() and (slot := self._slot(future)) is not None:
                self._board[slot.number, desk.STOP] = 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Hold all workers while something is measured, or this process needs their cores."""
        held = [psutil.Process(pid) for pid in self.pids if psutil.pid_exists(pid)]
        try:
            for process in held:
                with contextlib.suppress(psutil.Error):
                    process.suspend()
            yield
        finally:
            for process in held:
                with contextlib.suppress(psutil.Error):
                    process.resume()

    def close(self) -> None:
        """End every worker, whatever it does, and remove the folder. Calls that are left raise CancelledError."""
        with self._lock:
            self._closed = True
            left = [*self._queue, *(slot.call for slot in self._slots if slot.call is not None)]
            self._queue.clear()
            executors = [slot.executor for slot in self._begun]
        for executor in executors:
            executor.shutdown(wait=True, kill_workers=True)
        for call in left:
            if not call.future.cancel() and not call.future.done():
                call.future.set_exception(CancelledError())
        shutil.rmtree(self.folder, ignore_errors=True)

    def _slot(self, future: "Future[Any]") -> _Slot | None:
        with self._lock:
            return next((s for s in self._slots if s.call is not None and s.call.future is future), None)

    def _start(self, slot: _Slot) -> None:
        """Give a slot a new process."""
        slot.executor = ProcessPoolExecutor(
            1,
            initializer=desk.begin,
            initargs=(str(self.folder), slot.number, len(self._slots), os.getpid()),
            env=THREADS | NEVER_RECYCLED,
        )
        with _deaf():  # the first submission starts the process
            slot.executor.submit(desk.ready, self._shared)

    def _fill(self) -> None:
        """Give waiting calls to idle slots."""
        for slot in self._begun:
            while slot.call is None and self._queue and not self._closed:
                call = self._queue.popleft()
                if call.deaths or call.future.set_running_or_notify_cancel():
                    self._run(slot, call)

    def _run(self, slot: _Slot, call: _Call) -> None:
        slot.call = call
        self._board[slot.number] = 0
        hint = {"smaller": 1} if call.deaths and call.hint else {}
        try:
            reply = slot.executor.submit(desk.called, call.payload, hint)
        except BrokenProcessPool:  # it was killed while it had nothing to do
            self._start(slot)
            reply = slot.executor.submit(desk.called, call.payload, hint)
        reply.add_done_callback(partial(self._done, slot, call))

    def _done(self, slot: _Slot, call: _Call, reply: "Future[bytes]") -> None:
        """Called in a thread of the executor."""
        error = reply.exception()
        with self._lock:
            if self._closed:
                return
            slot.call = None
            if error is not None:
                self._start(slot)
                call.deaths += 1
                if call.deaths == 1:
                    self._queue.appendleft(call)
            self._fill()
        if error is None:
            settle(call.future, reply.result())
        elif call.deaths > 1:
            call.future.set_exception(
                WorkerDied(
                    f"Pool: a worker must live to give its result, but the one that ran {call.name} was killed, and "
                    "killed again when it was tried smaller. Most often memory was short: take fewer workers."
                )
            )


def settle(future: "Future[Any]", data: bytes) -> None:
    """Give a future what a worker sent back."""
    try:
        result, error = share.loads(data)
    except Exception as failure:
        result, error = None, failure
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


def takes_hint(function: Callable[..., Any]) -> bool:
    """Whether a function can be asked to be smaller."""
    try:
        parameters = signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(p.name == "smaller" or p.kind is Parameter.VAR_KEYWORD for p in parameters)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes started inside never see Ctrl-C: a blocked signal stays blocked in a child."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
