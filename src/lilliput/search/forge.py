"""Forge: networks compiled by the engine beside a search, the dense one first, so that choosing waits for none."""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lilliput.engine.compile import write
from lilliput.engine.target import target
from lilliput.errors import ExportError, NotSupported
from lilliput.runtimes.engine import EngineSession

REFUSALS = (NotSupported, ExportError, OSError, ValueError, RuntimeError, CancelledError)
Submit = Callable[[Callable[[bytes, str], float], bytes, str], "Future[float]"]


def build(data: bytes, folder: str) -> float:
    """Compile a file for this machine into a folder; the seconds of processor and compiler that it took."""
    began = time.monotonic()
    write(data, folder, target("native"))
    return time.monotonic() - began


@dataclass
class _Job:
    future: "Future[float]"
    folder: Path
    nodes: int
    session: EngineSession | None = None
    reason: str = ""


class Forge:
    """Compile files, each once, elsewhere; what has been compiled says how long others will take.

    Args:
        submit: runs `function(data, folder)` beside the caller, such as the `submit` of an executor.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> import torch; from lilliput.onnx.trace import trace
        >>> proto = trace(torch.nn.Linear(4, 2), torch.zeros(1, 4)).proto
        >>> with ThreadPoolExecutor(1) as pool:
        ...     forge = Forge(pool.submit)
        ...     forge.start(proto)
        ...     session = forge.session(proto, seconds=60)
        >>> session.predict(torch.zeros(1, 4)).shape
        torch.Size([1, 2])
        >>> forge.close()
    """

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._folder = Path(tempfile.mkdtemp(prefix="lilliput-engine-"))
        self._jobs: dict[str, _Job] = {}

    def start(self, proto: Any) -> None:
        """Begin to compile a file, unless it has begun already."""
        data = proto.SerializeToString()
        if (key := _key(data)) not in self._jobs:
            folder = self._folder / str(len(self._jobs))
            self._jobs[key] = _Job(self._submit(build, data, str(folder)), folder, len(proto.graph.node))

    def session(self, proto: Any, seconds: float = 0.0) -> EngineSession | None:
        """The compiled file, or None where it is not there within as many seconds, or was refused."""
        job = self._jobs.get(_key(proto.SerializeToString()))
        if job is None or job.reason or job.session is not None:
            return None if job is None else job.session
        try:
            job.future.result(max(0.0, seconds))
            job.session = EngineSession.opened(job.folder)
        except NotYet:
            return None
        except REFUSALS as error:
            job.reason = f"{error}" or type(error).__name__
        return job.session

    def reason(self, proto: Any) -> str:
        """Why a file was refused, or an empty text."""
        job = self._jobs.get(_key(proto.SerializeToString()))
        return "" if job is None else job.reason

    def expected_s(self, proto: Any) -> float | None:
        """How long compiling a file will take by those that are done, node for node; None where none is."""
        done = [(job.future.result(), job.nodes) for job in self._jobs.values() if job.session is not None]
        if not done:
            return None
        return len(proto.graph.node) * sum(spent for spent, _ in done) / max(1, sum(nodes for _, nodes in done))

    def close(self) -> None:
        """Take back what has not begun, and remove the compiled files."""
        for job in self._jobs.values():
            job.future.cancel()
        shutil.rmtree(self._folder, ignore_errors=True)


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
