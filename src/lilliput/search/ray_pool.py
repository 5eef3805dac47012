"""RayPool: the same calls as tasks of a Ray cluster. The driver chooses and writes; a dead node takes no result along.

A task holds one core. What the driver shares lies in Ray's object store and is fetched once a process; how far calls
are, and that they should end, goes through one small actor beside the driver.
"""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lilliput.extras import extra
from lilliput.search import share
from lilliput.search.desk import Desk
from lilliput.search.pool import Pool, Progress, WorkerDied, settle, takes_hint

RETRIES = 3
"""How often Ray runs a task again whose worker or node died; from the second time on it is asked to be smaller."""
BEAT_S, AGAIN_S = 0.5, 3.0
TRIES = 2  # to connect
LOCAL, AUTO = "ray://local", "ray://auto"


@dataclass
class _Row:
    """One call, as the board knows it."""

    begun: int = 0
    steps: float = 0.0
    seconds: float = 0.0
    stop: bool = False


class Board:
    """What driver and tasks tell each other: an actor. (It restarts empty where its node dies.)"""

    def __init__(self) -> None:
        self.rows: dict[int, _Row] = {}

    def begin(self, call: int) -> tuple[int, bool]:
        """A task begins; how often it did before, and whether it should end at once."""
        row = self.rows.setdefault(call, _Row())
        row.begun += 1
        return row.begun - 1, row.stop

    def report(self, call: int, steps: float, seconds: float) -> bool:
        """How far a task is; whether it should end."""
        row = self.rows.setdefault(call, _Row())
        row.steps, row.seconds = steps, seconds
        return row.stop

    def stop(self, call: int) -> None:
        """A task should end."""
        self.rows.setdefault(call, _Row()).stop = True

    def progress(self, call: int) -> tuple[float, float]:
        """How far a task is."""
        row = self.rows.get(call, _Row())
        return row.steps, row.seconds

    def forget(self, call: int) -> None:
        """A task is over."""
        self.rows.pop(call, None)


@dataclass(eq=False)
class RayDesk(Desk):
    """A desk whose things come from Ray's object store."""

    things: dict[str, Any] = field(default_factory=dict)
    board: Any = None
    call: int = 0
    _stop: bool = False
    _beat: float = 0.0
    _answer: Any = None
    _steps: float = 0.0

    @property
    def stopped(self) -> bool:
        self._tell()
        return self._stop

    def report(self, steps: float) -> None:
        self._steps = steps
        self._tell()

    def _tell(self) -> None:
        """Send how far this call is and read the answer to what was sent before, without waiting for it."""
        now = time.monotonic()
        if now - self._beat < BEAT_S:
            return
        import ray

        self._beat = now
        with contextlib.suppress(ray.exceptions.RayError):
            if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
                self._stop = ray.get(self._answer) or self._stop
                self._answer = None
            if self._answer is None:
                self._answer = self.board.report.remote(self.call, self._steps, now - self.began)

    def _has(self, name: str) -> bool:
        return name in self.things

    def _open(self, name: str) -> Any:
        import ray

        return share.loads(ray.get(self.things[name]))


_own: dict[str, tuple[RayDesk, tempfile.TemporaryDirectory[str]]] = {}
"""This process's desk, by the pool that it works for."""


def called(pool: str, things: dict[str, Any], board: Any, call: int, hint: bool, payload: bytes) -> bytes:
    """Run a call in a task of Ray."""
    import ray

    if pool not in _own:
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        folder = tempfile.TemporaryDirectory(prefix="lilliput-")
        _own.clear()
        _own[pool] = RayDesk(Path(folder.name), 0), folder
    desk = _own[pool][0]
    before, desk._stop = 0, False
    with contextlib.suppress(ray.exceptions.RayError):
        before, desk._stop = ray.get(board.begin.remote(call))
    desk.things, desk.board, desk.call = things, board, call
    desk._beat, desk._answer, desk._steps = 0.0, None, 0.0
    return desk.run(payload, {"smaller": 1} if hint and before > 1 else {})


class RayPool(Pool):
    """Run functions as tasks of a Ray cluster, with the interface of `Pool`.

    Args:
        address: "ray://HOST" or "ray://HOST:PORT" of a cluster's head, "ray://auto" on a machine of the cluster, or
            "ray://local" for a cluster of this machine's cores that ends with the pool.

    Raises:
        ModuleNotFoundError: where Ray is not installed.
        ValueError: where no cluster answers.
    """

    local = False

    def __init__(self, address: str) -> None:
        with extra("ray", f"shrink: workers={address!r}"):
            import ray
        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            _connect(ray, address)
        # On the head: where that dies, the cluster does.
        heads = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
        beside = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(heads[0], soft=True) if heads else None
        self._board_actor = ray.remote(Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=beside).remote()
        self._task = ray.remote(called).options(num_cpus=1, max_retries=RETRIES)
        self.folder = Path(tempfile.mkdtemp(prefix="lilliput-"))
        self._things: dict[str, Any] = {}
        self._calls: dict[Future[Any], tuple[int, Any]] = {}
        self._over: deque[int] = deque()
        self._ends: list[Future[Any]] = []
        self._repeats: threading.Thread | None = None
        self._shares, self._shared, self._count, self._closed = 0, "", 0, False

    @property
    def workers(self) -> int:
        return max(1, int(self._ray.cluster_resources().get("CPU", 1)))

    @property
    def idle(self) -> int:
        return max(0, self.workers - len(self._calls))

    @property
    def pids(self) -> list[int]:
        return []  # Ray's to hold and to end

    def complete(self) -> None:
        return None  # Ray starts them

    def share(self, thing: Any) -> None:
        self._shares += 1
        self._shared = f"shared-{self._shares}"
        self._things.pop(f"shared-{self._shares - 1}", None)
        self.put(self._shared, thing)

    def put(self, name: str, thing: Any) -> None:
        self._things[name] = self._ray.put(share.dumps(thing))

    def submit(self, function: Callable[..., Any], *args: Any, **named: Any) -> "Future[Any]":
        payload = share.dumps((self._shared, function, args, named))
        if self._closed:
            raise RuntimeError("Pool: it must be open to run something, but it is closed.")
        while self._over:
            self._board_actor.forget.remote(self._over.popleft())
        self._count += 1
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        reference = self._task.remote(
            self.folder.name, dict(self._things), self._board_actor, self._count, takes_hint(function), payload
        )
        self._calls[future] = self._count, reference
        name = getattr(function, "__name__", "call")
        reference.future().add_done_callback(partial(self._finished, future, name))
        return future

    def progress(self, future: "Future[Any]") -> Progress:
        if future not in self._calls:
            return Progress()
        return Progress(*self._ray.get(self._board_actor.progress.remote(self._calls[future][0])))

    def end(self, future: "Future[Any]") -> None:
        if future in self._calls:
            self._ends.append(future)
            self._board_actor.stop.remote(self._calls[future][0])
            if self._repeats is None:
                self._repeats = threading.Thread(target=self._repeat, daemon=True)
                self._repeats.start()

    def _repeat(self) -> None:
        """Say it again while calls are left that should end: a board that was restarted has forgotten it."""
        while not self._closed:
            time.sleep(AGAIN_S)
            self._ends = [future for future in self._ends if future in self._calls]
            for number, _ in [self._calls.get(future, (0, None)) for future in self._ends]:
                with contextlib.suppress(Exception):  # between its end and its next beginning it cannot be asked
                    self._board_actor.stop.remote(number)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for future, (_, reference) in list(self._calls.items()):
            self._ray.cancel(reference, force=True)
            if not future.done():
                future.set_exception(CancelledError())
        self._ray.kill(self._board_actor)
        self._things.clear()
        if self._ours:
            self._ray.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _finished(self, future: "Future[Any]", name: str, reply: "Future[bytes]") -> None:
        """Called in the thread that brings Ray's answers: to ask Ray something here would wait for ever."""
        number, _ = self._calls.pop(future, (0, None))
        if self._closed or future.done():
            return
        self._over.append(number)
        error = reply.exception()
        if error is None:
            settle(future, reply.result())
        else:
            future.set_exception(
                WorkerDied(
                    f"Pool: a worker must live to give its result, but those that ran {name} died {RETRIES + 1} times: "
                    f"{str(error).strip().splitlines()[-1]}"
                )
            )


def _connect(ray: Any, address: str) -> None:
    quiet = {"configure_logging": False, "log_to_driver": False}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
    if address == LOCAL:
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    for left in reversed(range(TRIES)):
        try:
            ray.init("auto" if address == AUTO else address, **quiet)
            return
        except (ConnectionError, RuntimeError, ValueError) as error:  # the server of a busy head may start too slowly
            if left == 0:
                raise ValueError(
                    "shrink: workers must be a number or the address of a Ray cluster that answers, got "
                    f"{address!r}: {str(error).strip().splitlines()[-1]}"
                ) from error
