"""Measured cost: milliseconds in a real runtime, all candidates interleaved in one run, with the machine's stamp."""

from __future__ import annotations

import contextlib
import hashlib
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
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from lilliput.cost.count import WEIGHTS, Cost, Estimated, Shape, shapes
from lilliput.onnx.session import Inputs, Session


@dataclass(frozen=True)
class Measured(Cost):
    """Hold a median latency with its quartiles, in milliseconds, and what it was measured with.

    `ratio` is the median over the run of (the first session's time / this one's), each pair taken side by side; `load`
    the machine's load average before and after.
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
) -> dict[str, Measured]:
    """Measure each session's latency on `example`, all interleaved in one run (A B C A B C ...) of about `seconds`.

    Whatever slows the machine slows all of them, so the ratios hold where single times drift. Every session runs at
    least `least` times, after a warm-up.

    Args:
        sessions: By name; ratios are to the first one.
        example: Inputs; the first `batch` examples are used, repeated where there are fewer.
        seconds: For all of them together.
        least: The fewest runs of a session.
        batch: Examples a run.
        clock: Wall time; on a machine that others use, `time.process_time` leaves out the time that they took.

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
    rounds = 0
    while rounds < least or time.perf_counter() < deadline:
        for name, session in sessions.items():
            first = clock()
            session.run(feeds[name])
            times[name].append(clock() - first)
        rounds += 1
    after = _load()
    load = None if before is None or after is None else (before, after)
    base = np.maximum(next(iter(times.values())), 1e-9)
    found = {}
    for name, session in sessions.items():
        spent = np.maximum(times[name], 1e-9)
        q1, median, q3 = (round(float(x) * 1e3, 6) for x in np.quantile(spent, [0.25, 0.5, 0.75]))
        ratio = round(float(np.median(base / spent)), 4)
        found[name] = Measured(median, q1, q3, rounds, batch, session.threads, session.runtime, ratio, load)
    return found


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
                found = self.weight(source, depth + 1)
                if found:
                    return found
        return None

    def constant(self, name: str, depth: int = 0) -> bool:
        """Whether a value depends on initialisers alone."""
        node = self.made.get(name)
        if node is None:
            return name in self.held
        return depth < 12 and all(self.constant(i, depth + 1) for i in node.input if i)


# ----------------------------------------------------------------------------------------------------------- estimate

WORK = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "GRU", "LSTM", "RNN", "MaxPool", "AveragePool", "Softmax",
                  "LayerNormalization", "GlobalAveragePool", "ReduceMean", "Gather"})  # fmt: skip


class LayerTimes:
    """How long each operator takes at each shape on this machine: measured once, kept in a JSON file.

    The latency of a network is estimated as `t0 + scale * sum over nodes of (t(node) - t0)`, with t(node) the median of
    a model of this one node, t0 that of an empty one, and `scale` from one measurement of a whole model (`calibrate`).
    What a runtime fuses into its neighbours (activations, additions, reshapes) is taken as free.

    Args:
        folder: where `layer_times.json` is kept.
        seconds: how long one node is measured.
    """

    def __init__(self, folder: str | Path, seconds: float = 0.02) -> None:
        self.path, self.seconds, self.scale = Path(folder) / "layer_times.json", seconds, 1.0
        here = machine()
        self.stamp = f"{here['cpu']} onnxruntime {here['onnxruntime']}"
        self.known: dict[str, float] = self._read()

    def _read(self) -> dict[str, float]:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            read = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(k): float(v) for k, v in read.items() if isinstance(v, int | float) and math.isfinite(v)}
        return {}

    def estimate(self, proto: ModelProto, example: Inputs, batch: int = 1) -> Estimated:
        """The latency that the table predicts; nodes it does not know are measured now."""
        found, before = shapes(proto, example), len(self.known)
        empty = self._time(None, [], batch)
        owners = _Owners(proto)
        total = sum(
            max(self._node(node, found, owners, batch) - empty, 0.0)
            for node in proto.graph.node
            if node.op_type in WORK and not owners.constant(node.output[0])
        )
        if len(self.known) > before:
            self.save()
        return Estimated(empty + self.scale * total, f"layer times x {self.scale:.3f}, batch {batch}, {self.stamp}")

    def calibrate(self, proto: ModelProto, example: Inputs, measured_ms: float, batch: int = 1) -> float:
        """Set `scale` so that the estimate of this model is what was measured; returns it."""
        self.scale = 1.0
        empty = self._time(None, [], batch)
        total = self.estimate(proto, example, batch).latency_ms - empty
        self.scale = max(measured_ms - empty, 1e-6) / total if total > 0 else 1.0
        return self.scale

    def save(self) -> None:
        """Write the table in one step; a folder that cannot be written only costs measuring again."""
        temporary = None
        with contextlib.suppress(OSError):
            self.known = {**self._read(), **self.known}  # another search may have measured more meanwhile
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".layer_times.")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self.known, file, indent=0, sort_keys=True)
            os.replace(temporary, self.path)
            temporary = None
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def _node(self, node: NodeProto, found: dict[str, Shape], owners: _Owners, batch: int) -> float:
        held = owners.held
        moving = [name for name in node.input if name and not owners.constant(name)]
        if not all(not name or name in found for name in node.input):
            return 0.0
        inner = onnx.NodeProto()
        inner.CopyFrom(node)
        inner.name = ""
        inner.input[:] = [f"i{i}" if name else "" for i, name in enumerate(node.input)]
        inner.output[:] = [f"o{i}" if name else "" for i, name in enumerate(node.output)]
        parts = []
        for i, name in enumerate(node.input):
            if not name:
                continue
            tensor = held.get(name)
            small = tensor is not None and tensor.data_type == onnx.TensorProto.INT64
            still = tensor is not None or owners.constant(name)
            kind = "tokens" if node.op_type == "Gather" and i == 1 and not small else "floats"
            value = numpy_helper.to_array(tensor) if small and tensor is not None else None
            parts.append((f"i{i}", found[name], still, kind, value))
        return self._time(inner, parts, batch) if moving else 0.0

    def _time(self, node: NodeProto | None, parts: list[tuple[str, Shape, bool, str, Any]], batch: int) -> float:
        shape_key = [
            (name, shape, still, kind, None if value is None else value.tolist())
            for name, shape, still, kind, value in parts
        ]
        written = b"" if node is None else node.SerializeToString(deterministic=True)
        digest = hashlib.sha256(repr((shape_key, written, batch, self.stamp)).encode()).hexdigest()[:24]
        key = f"{'empty' if node is None else node.op_type} {digest}"
        if key not in self.known:
            self.known[key] = self._measure(node, parts, batch)
        return self.known[key]

    def _measure(self, node: NodeProto | None, parts: list[tuple[str, Shape, bool, str, Any]], batch: int) -> float:
        draw = np.random.default_rng(0)
        if node is None:
            node = onnx.helper.make_node("Identity", ["i0"], ["o0"])
            parts = [("i0", (1, 4), False, "floats", None)]
        inputs, tensors, feed = [], [], {}
        for name, shape, still, kind, value in parts:
            if value is not None:
                tensors.append(numpy_helper.from_array(np.array(value), name))
            elif still:
                tensors.append(numpy_helper.from_array(draw.standard_normal(shape).astype(np.float32), name))
            else:
                wide = (shape[0] * batch, *shape[1:]) if shape else shape
                number = onnx.TensorProto.FLOAT if kind == "floats" else onnx.TensorProto.INT64
                inputs.append(onnx.helper.make_tensor_value_info(name, number, list(wide)))
                feed[name] = (
                    draw.standard_normal(wide).astype(np.float32) if kind == "floats" else np.zeros(wide, np.int64)
                )
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name][:1]
        graph = onnx.helper.make_graph([node], "g", inputs, outputs, tensors)
        proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
        try:
            session = Session(proto)
            for _ in range(3):
                session.run(feed)
            times: list[float] = []
            until = time.perf_counter() + self.seconds
            while len(times) < 5 or (time.perf_counter() < until and len(times) < 2000):
                first = time.perf_counter()
                session.run(feed)
                times.append(time.perf_counter() - first)
        except Exception:  # a node that does not stand alone is left out of the estimate
            return 0.0
        return float(np.median(times)) * 1e3
