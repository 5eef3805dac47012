"""Measured cost: milliseconds in a real runtime, all candidates interleaved in one run, with the machine's stamp."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto

from lilliput.cost.count import WEIGHTS, Cost
from lilliput.onnx.session import Inputs, Session


@dataclass(frozen=True)
class Measured(Cost):
    """Hold a median latency with its quartiles, in milliseconds, and what it was measured with.

    `ratio` is the median over the run of (the first session's time / this one's), each pair taken side by side;
    `interval` its central 95%; `load` the machine's load average before and after.
    """

    median_ms: float
    q1_ms: float
    q3_ms: float
    runs: int
    batch: int
    threads: int
    runtime: str
    ratio: float
    load: tuple[float, float] | None = None
    interval: tuple[float, float] | None = None


def machine() -> dict[str, Any]:
    """Describe what a measurement was made on: processor, cores, operating system, load average, versions.

    Returns:
        Plain data.

    Example:
        >>> sorted(machine())[:3]
        ['arch', 'cores', 'cpu']
    """
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "os": f"{platform.system()} {platform.release()}",
        "arch": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "onnx": version("onnx"),
        "onnxruntime": version("onnxruntime"),
        "load": _load(),
    }


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def latency(
    sessions: Mapping[str, Session],
    example: Inputs,
    *,
    seconds: float = 2.0,
    least: int = 15,
    batch: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    settled: float = 0.0,
) -> dict[str, Measured]:
    """Measure each session's latency on `example`, all interleaved in one run (A B C A B C ...) of about `seconds`.

    Whatever slows the machine slows all of them, so the ratios hold where single times drift. Every session runs at
    least `least` times, after a warm-up (three times where `least` of all take longer than ten times `seconds`).

    Args:
        sessions: By name; ratios are to the first one.
        example: Inputs; the first `batch` examples are used, repeated where there are fewer.
        seconds: For all of them together.
        least: The fewest runs of a session.
        batch: Examples a run.
        clock: Wall time; on a machine that others use, `time.thread_time` leaves out the time that they took (from
            sessions of one thread).
        settled: End before `seconds` once the interval of every ratio is narrower than this fraction of it.

    Returns:
        The latency of each session, by its name.

    Raises:
        ValueError: Without a session, or for a batch below 1.
    """
    if not sessions or batch < 1:
        raise ValueError(f"latency: needs a session and a batch of at least 1, got {len(sessions)} and {batch}.")
    feeds = {}
    for name, session in sessions.items():
        feed = session.feed(example)
        feeds[name] = {key: np.resize(x, (batch, *x.shape[1:])) for key, x in feed.items()}
    before = _load()
    for _ in range(3):
        for name, session in sessions.items():
            session.run(feeds[name])
    times: dict[str, list[float]] = {name: [] for name in sessions}
    deadline = time.perf_counter() + seconds
    rounds, latest = 0, deadline + 9 * seconds
    while time.perf_counter() < deadline or rounds < (least if time.perf_counter() < latest else 3):
        for name, session in sessions.items():
            first = clock()
            session.run(feeds[name])
            times[name].append(clock() - first)
        rounds += 1
        if settled and rounds % 8 == 0 and rounds >= least and _widest(times) < settled:
            break
    after = _load()
    load = None if before is None or after is None else (before, after)
    base = np.maximum(next(iter(times.values())), 1e-9)
    measured = {}
    for name, session in sessions.items():
        spent = np.maximum(times[name], 1e-9)
        q1, median, q3 = (round(float(x) * 1e3, 6) for x in np.quantile(spent, [0.25, 0.5, 0.75]))
        low, ratio, high = (round(x, 4) for x in _interval(base / spent))
        measured[name] = Measured(
            median, q1, q3, rounds, batch, session.threads, session.runtime, ratio, load, (low, high)
        )
    return measured


def _interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """The median between the ends of its central 95%, by order statistics: no distribution is assumed."""
    ordered, count = np.sort(values), len(values)
    reach = 0.98 * math.sqrt(count)
    low, high = max(0, math.floor(count / 2 - reach)), min(count - 1, math.ceil(count / 2 + reach))
    return float(ordered[low]), float(np.median(ordered)), float(ordered[high])


def _widest(times: Mapping[str, list[float]]) -> float:
    """The width of the widest interval of a ratio to the first session, as a fraction of that ratio."""
    base = np.maximum(next(iter(times.values())), 1e-9)
    ends = [_interval(base / np.maximum(spent, 1e-9)) for spent in times.values()]
    return max((high - low) / median for low, median, high in ends)


# ------------------------------------------------------------------------------------------------------------ profile


def profile(proto: ModelProto, example: Inputs, runs: int = 30) -> dict[str, float]:
    """Measure the share of the run time that each layer takes, from the runtime's own profile of `runs` runs.

    Keys are the names of the weights in `proto` (so give it the model with its state_dict names), for nodes without one
    "operator output". Shares are medians over runs and add up to 1.
    """
    named = ModelProto()
    named.CopyFrom(proto)
    for i, node in enumerate(named.graph.node):
        node.name = f"#{i}"
    with tempfile.TemporaryDirectory() as folder:
        session = Session(named, profile=str(Path(folder) / "p"))
        feed = {name: x[:1] for name, x in session.feed(example).items()}
        for _ in range(runs):
            session.run(feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["name"].removesuffix("_kernel_time"), event["args"].get("op_name", "")].append(event["dur"])
    owners = _Owners(named)
    total: dict[str, float] = defaultdict(float)
    for (name, op_type), durations in spent.items():
        total[owners.of(name, op_type)] += float(np.median(durations))
    whole = sum(total.values()) or 1.0
    return {name: share / whole for name, share in total.items()}


class _Owners:
    """From a node of the optimised graph to the weight of the node that it was made from."""

    def __init__(self, proto: ModelProto) -> None:
        graph = proto.graph
        self.by_name = {node.name: node for node in graph.node}
        self.made = {name: node for node in graph.node for name in node.output}
        self.held = {t.name: t for t in graph.initializer}
        self.weights = {name for name, t in self.held.items() if t.data_type in WEIGHTS}

    def of(self, name: str, op_type: str) -> str:
        plain = name.removeprefix("fused ").split(" ")[0].removesuffix("_nchwc")
        node = self.by_name.get(plain) or self.made.get(plain)
        if node is None:
            return f"{op_type} {plain}"
        # A fused node is named after its last part: go back to the one that does the work.
        wanted, here = op_type.removeprefix("Fused"), node
        for _ in range(3):
            if here.op_type == wanted:
                break
            before = [self.made[i] for i in here.input if i in self.made]
            here = next((n for n in before if n.op_type == wanted), before[0] if before else here)
        node = here if here.op_type == wanted else node
        return self.weight(node) or f"{node.op_type} {node.output[0]}"

    def weight(self, node: NodeProto, depth: int = 0) -> str | None:
        direct = [name for name in node.input if name in self.weights]
        if direct:
            sizes = {name: math.prod(self.held[name].dims) for name in direct}
            return str(max(sizes, key=lambda name: sizes[name]))
        for name in node.input:
            source = self.made.get(name)
            if source is not None and depth < 12 and self.constant(name):
                weight = self.weight(source, depth + 1)
                if weight:
                    return weight
        return None

    def constant(self, name: str, depth: int = 0) -> bool:
        """Whether a value depends on initialisers alone."""
        node = self.made.get(name)
        if node is None:
            return name in self.held
        return depth < 12 and all(self.constant(i, depth + 1) for i in node.input if i)
