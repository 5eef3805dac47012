"""Points: a model turned into its artifact, scored in its runtime, and kept in the store."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.code.base import pack
from lilliput.cost.count import count, stored_values
from lilliput.cost.measure import latency
from lilliput.engine.memory import peak_bytes as planned_bytes
from lilliput.errors import ExportError
from lilliput.export import onnx as onnx_export
from lilliput.export import pack as pack_format
from lilliput.export.guard import compare, worst
from lilliput.export.save import prepared
from lilliput.search.check import measured
from lilliput.search.question import Question
from lilliput.stored.base import Stored
from lilliput.task import Model, Score, Task, leaves, length, predict, take
from lilliput.task.nested import output_names


class Clock:
    """Measure how long a search has run, of which budget, and what the time went on (the union over its workers).

    `reserved_s` are the seconds at the budget's end for what comes after the trainings.

    Args:
        budget_s: The budget in seconds; None for none.
        began: When it began, by time.monotonic(); now without one.
    """

    def __init__(self, budget_s: float | None, began: float | None = None) -> None:
        self.budget_s, self.began, self.reserved_s = budget_s, time.monotonic() if began is None else began, 0.0
        self._spans: list[tuple[float, float, str]] = []
        self._lock = threading.Lock()

    @property
    def now(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self.began

    def remaining(self, until: float = 1.0) -> float:
        """Seconds until a fraction of the budget that is not reserved; infinite without one."""
        return float("inf") if self.budget_s is None else (self.budget_s - self.reserved_s) * until - self.now

    def left(self) -> float:
        """Seconds until the end of the budget, what is reserved included; infinite without one."""
        return float("inf") if self.budget_s is None else self.budget_s - self.now

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Count the time inside as "train", "calibrate" or "measure"."""
        first = self.now
        try:
            yield
        finally:
            with self._lock:
                self._spans.append((first, self.now, what))

    def shares(self) -> dict[str, float]:
        """The fraction of the time so far that went on each; where two ran side by side, training counts first."""
        total, shares, taken = max(self.now, 1e-9), {}, np.zeros(0, bool)
        grid = np.linspace(0, total, 20001)
        taken = np.zeros(len(grid), bool)
        for what in ("train", "calibrate", "measure"):
            mine = np.zeros(len(grid), bool)
            for first, last, kind in list(self._spans):
                if kind == what:
                    mine |= (grid >= first) & (grid <= last)
            shares[what] = round(float((mine & ~taken).mean()), 4)
            taken |= mine
        shares["other"] = round(1 - sum(shares.values()), 4)
        return shares


@dataclass
class Point:
    """Hold one artifact: what made it, the file it is, and what it scored in its runtime.

    `score` is on val, of `model.onnx` in ONNX Runtime; `outputs` what it gave on the task's probe of val; `divergence`
    the mean divergence from the dense outputs; `agreement` the agreement with the torch model it came from; `latency`
    and `engine` are filled in by an interleaved measurement, `peak_bytes` by a run of its own in ONNX Runtime,
    `engine_peak_bytes` by the engine's plan; each where it is asked for. `layers` are facts of its stored tensors,
    `about` says how it came about (an attempt's row), `files` is the folder of its four files while they are kept; a
    point that was read from there has no structure, no stored tensors and no model.
    """

    name: str
    recipe: list[dict[str, Any]]
    key: str
    proto: Any
    structure: Any
    stored: dict[str, Stored]
    score: Score
    divergence: float
    onnx_bytes: int
    packed_bytes: int
    values: int
    macs: int
    agreement: dict[str, float]
    model: nn.Module | None = None
    latency: Any = None
    engine: Any = None
    peak_bytes: int | None = None
    engine_peak_bytes: int | None = None
    flags: list[str] = field(default_factory=list)
    outputs: Any = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)
    files: Path | None = None

    def row(self) -> dict[str, Any]:
        """The point as plain data for a record."""
        row: dict[str, Any] = {
            "name": self.name,
            "recipe": self.recipe,
            "key": self.key,
            "val": round(self.score.value, 6),
            "distance": round(self.divergence, 6),
            "values": self.values,
            **self.costs,
            "agreement": self.agreement,
            "flags": self.flags,
            "runtime": "onnxruntime",
            "threads": 1,
        }
        if self.latency is not None:
            row |= {"latency_iqr_ms": [self.latency.q1_ms, self.latency.q3_ms]}
        if self.engine is not None:
            row |= {"engine_iqr_ms": [self.engine.q1_ms, self.engine.q3_ms]}
        return row

    @property
    def costs(self) -> dict[str, Any]:
        """What the point costs, as far as it was counted and measured, by the names of summary.json."""
        costs: dict[str, Any] = {"onnx_bytes": self.onnx_bytes, "packed_bytes": self.packed_bytes, "macs": self.macs}
        if self.latency is not None:
            costs["latency_ms"] = self.latency.median_ms
        if self.engine is not None:
            costs["engine_ms"] = self.engine.median_ms
        for key in ("peak_bytes", "engine_peak_bytes"):
            if getattr(self, key) is not None:
                costs[key] = getattr(self, key)
        return costs

    def price(self, question: Question) -> float:
        """What the point costs by a question; infinite where that was not measured."""
        return question.price(self.costs)


class Press:
    """Turn models into points. A structure is exported once; its variants are rewritten by name.

    Args:
        task: Gives the examples.
        clock: Measures the time that pressing takes.
        compared: On how many examples of val an artifact is compared with the model that it came from (None: all).
        strip: Whether files have no names but those of inputs and outputs.
    """

    def __init__(self, task: Task, clock: Clock, compared: int | None = None, strip: bool = False) -> None:
        self.task, self.clock, self.compared, self.strip = task, clock, compared, strip
        self.dense: Point | None = None
        self.scored_s = 0.0  # how long the latest score on val took
        self.expected: Any = None  # what the first model gives on the probe, where that is known
        self._structures: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._refused: dict[tuple[str, tuple[str, ...]], str] = {}
        self._own: set[str] = set()
        self._lock = threading.Lock()

    def structure(self, model: nn.Module, topology: str, own: str = "") -> Any:
        """Export the graph of a plain folded model, or return it by the name of its topology (widths may differ).

        Args:
            model: The model.
            topology: The name of the topology.
            own: The name of the one structure, where `fitting` found that the topology's graph cannot hold its shapes.

        Returns:
            The structure.
        """
        with self._lock, self.clock.on("measure"):
            name = own if own in self._own else topology
            # A layer that was built from factors has other tensors. Sorted: a coded tensor, once realized, comes last.
            key = name, tuple(sorted(model.state_dict()))
            if key in self._refused:  # not tried again, perhaps while something trains
                raise ExportError(self._refused[key])
            if key not in self._structures:
                try:
                    self._structures[key] = onnx_export.trace(model, self.task.example)
                except ExportError as error:
                    self._refused[key] = str(error)
                    raise
            return self._structures[key]

    def point(
        self, model: nn.Module, topology: str, name: str, recipe: list[dict[str, Any]], key: str, own: str = ""
    ) -> Point:
        """The artifact of a model (with or without codes), scored on val in ONNX Runtime.

        Raises:
            ExportError: When the artifact does not compute what the model computes.
        """
        plain, stored = prepared(model, self.task.example)
        structure = self.structure(plain, topology, own)
        with self.clock.on("measure"):
            decoded: list[str] = []
            proto = structure.write(stored, decoded)
            point = self.finished(proto, structure, stored, plain, name, recipe, key, model)
            point.flags += [f"{name} is written in float32: its kind has no operators in ONNX." for name in decoded]
            return point

    def fitting(self, model: nn.Module, topology: str, own: str) -> None:
        """Export a plain folded model's graph, unless one that is known by its topology holds its shapes.

        Raises:
            ExportError: where torch cannot export it.
        """
        structure = self.structure(model, topology)
        try:
            structure.write(pack(model))
        except ExportError:  # the widths are part of this graph: it needs an export of its own
            with self._lock:
                self._own.add(own)
            self.structure(model, topology, own)

    def price(self, structure: Any, plain: nn.Module, objective: str) -> float:
        """MACs of a structure, its planned memory, or the median of a short measurement of its float32 artifact."""
        proto = structure.write(pack(plain))
        if objective == "memory":
            return float(planned_bytes(proto))
        if objective == "macs":
            return float(count(proto, self.task.example).macs)
        with self.clock.on("measure"):
            session = onnx_export.Session(proto)
            return latency({"it": session}, self.task.example, seconds=0.1, clock=time.thread_time)["it"].median_ms

    def finished(
        self,
        proto: Any,
        structure: Any,
        stored: dict[str, Stored],
        plain: nn.Module | None,
        name: str,
        recipe: list[dict[str, Any]],
        key: str,
        model: nn.Module | None,
    ) -> Point:
        """Score and weigh a written artifact; one that no torch model stands behind is compared with the dense one."""
        inputs = self.task.probe("val").inputs
        proto = onnx_export.stripped(proto) if self.strip else onnx_export.signed(proto)
        session = onnx_export.Session(proto)
        # Arithmetic that depends on the whole input is judged as it will be used.
        whole = any(node.op_type == "DynamicQuantizeLinear" for node in proto.graph.node)
        runner = one_by_one(session) if whole else session
        began = time.monotonic()
        score, outputs = measured(runner, self.task) if self.dense is None else judged(self.task, runner)
        self.scored_s = time.monotonic() - began
        if plain is None:
            assert self.dense is not None
            agreement = worst(
                [
                    onnx_export.agreement(a.numpy(), b.numpy(), self.task.class_axis(b))
                    for a, b in zip(leaves(outputs), leaves(self.dense.outputs), strict=True)
                ]
            )
        else:
            expected, self.expected = self.expected, None
            if expected is None:
                expected = predict(plain, inputs if self.compared is None else take(inputs, slice(0, self.compared)))
            first = take(outputs, slice(0, length(expected)))
            exact = all(s.plain for s in stored.values())
            agreement = compare(first, expected, exact=exact, who=name, axis=self.task.class_axis)
        if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves(outputs)):
            raise ExportError(f"{name}: outputs must be finite, got NaN or infinity. Train it more slowly.")
        dense = outputs if self.dense is None else self.dense.outputs
        packed = pack_format.size(structure.fill(stored), stored)
        kept = sum(s.values for s in stored.values()) or stored_values(proto)
        return Point(
            name,
            recipe,
            key,
            proto,
            structure,
            stored,
            score,
            float(self.task.divergence(outputs, dense).mean()),
            proto.ByteSize(),
            packed.size_bytes,
            kept,
            count(proto, self.task.example).macs,
            agreement,
            model,
            outputs=outputs,
            layers=facts(stored),
        )

    def judge(self, proto: Any) -> Score:
        """The score of a file on val."""
        return self.task.score(onnx_export.Session(proto), "val")


def facts(stored: dict[str, Stored]) -> list[dict[str, Any]]:
    """Each stored tensor of two and more dimensions: what it is, what it keeps, how wide."""
    return [
        {
            "name": name,
            **tensor.facts(),
            "shape": list(tensor.shape),
            "values": tensor.values,
            "bits": round(tensor.bits, 2),
        }
        for name, tensor in stored.items()
        if len(tensor.shape) > 1
    ]


def one_by_one(session: onnx_export.Session) -> Model:
    """A session as a model that is given one example at a time."""

    def run(*inputs: Any, **named: Any) -> Any:
        return session.predict(named or (inputs[0] if len(inputs) == 1 else inputs), 1)

    return run


def judged(task: Task, model: Model, split: str = "val") -> tuple[Score, Any]:
    """A model's score on a split, and its outputs on the task's probe of it."""
    score = task.score(model, split)
    return score, predict(model, task.probe(split).inputs) if score.outputs is None else score.outputs


def parameters(model: nn.Module) -> int:
    """How many parameters a model has."""
    return sum(p.numel() for p in model.parameters())


def kept(outputs: Any) -> dict[str, Tensor]:
    """Outputs as the store keeps them, by the names that a file gives them."""
    names = ["outputs"] if isinstance(outputs, Tensor) else output_names(outputs)
    return {name: leaf.contiguous() for name, leaf in zip(names, leaves(outputs), strict=True)}
