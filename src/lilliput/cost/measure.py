"""Measured cost: milliseconds in a real runtime, all candidates interleaved in one run, with the machine's stamp."""

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lilliput.export.onnx import Session


@dataclass(frozen=True)
class Measured:
    """A median latency with its quartiles, in milliseconds, and what it was measured with.

    ratio: the median over the run of (the first session's time / this one's), each pair taken side by side.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int
    batch: int
    threads: int
    runtime: str
    ratio: float


def machine() -> dict[str, Any]:
    """What a measurement was made on: processor, cores, operating system, load average, Python."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": _cpu(), "cores": os.cpu_count(), "os": f"{platform.system()} {platform.release()}",
            "arch": platform.machine(), "python": platform.python_version(),
            "load": None if load is None else round(load, 2)}


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def latency(sessions: Mapping[str, Session], example: Any, *, seconds: float = 2.0, least: int = 15
            ) -> dict[str, Measured]:
    """Each session's latency on `example`, all interleaved in one run (A B C A B C ...) of about `seconds`.

    Whatever slows the machine slows all of them, so the ratios hold where single times drift. Every session runs at
    least `least` times, after a warm-up.
    """
    feeds = {name: session.feed(example) for name, session in sessions.items()}
    for _ in range(3):
        for name, session in sessions.items():
            session.run(feeds[name])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    deadline = time.perf_counter() + seconds
    while True:
        for name, session in sessions.items():
            first = time.perf_counter()
            session.run(feeds[name])
            times[name].append(time.perf_counter() - first)
        count = len(next(iter(times.values())))
        if count >= least and time.perf_counter() > deadline:
            break
    base = np.array(next(iter(times.values())))
    found = {}
    for name, session in sessions.items():
        spent = np.array(times[name])
        q1, median, q3 = (round(float(x) * 1e3, 6) for x in np.quantile(spent, [0.25, 0.5, 0.75]))
        batch = len(next(iter(feeds[name].values())))
        found[name] = Measured(median, q1, q3, len(spent), batch, session.threads, session.runtime,
                               round(float(np.median(base / spent)), 4))
    return found
