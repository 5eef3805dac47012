"""Job: one search as data: what is asked, what is known so far, and where it is kept. The phases take it."""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.errors import ExportError, NotSupported, told
from lilliput.proposal import Known
from lilliput.runner import Runner
from lilliput.search import parts
from lilliput.search.choose import evidence
from lilliput.search.forge import Forge
from lilliput.search.margin import Floats
from lilliput.search.points import Clock, Point, Press
from lilliput.search.pool import Pool
from lilliput.search.progress import Silent
from lilliput.search.question import Question
from lilliput.store import Store
from lilliput.task import Score, Task, leaves
from lilliput.train import Diverged

FAILURES = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError),
    *(TypeError, ValueError, ExportError, NotSupported, TimeoutError),
)
"""What a stranger's model or a method may raise: the end of one point, never of the search."""


Pieces = Iterator[Point | float]
"""Points as they are made. A number is a pause: how many seconds the next piece of work may take, 0 where unknown."""


class Target(ABC):
    """A kind of network that can be shrunk: a torch network (network.py) or an ONNX file (onnx_file.py)."""

    @abstractmethod
    def begin(self, job: "Job", pool: Pool) -> None:
        """Give the workers what they can do while the dense network is measured."""

    @abstractmethod
    def dense(self, job: "Job") -> Point:
        """The network as given, exported, scored and weighed."""

    @abstractmethod
    def look(self, job: "Job") -> None:
        """Find what can be varied, and how much each technique hurts each tensor alone."""

    @abstractmethod
    def first(self, job: "Job") -> list[Point]:
        """Points that are made in seconds, before anything is looked at: the same network in 8 bits."""

    @abstractmethod
    def untrained(self, job: "Job", alone: bool) -> Pieces:
        """Points that need no training, one by one: each is added before the next is made.

        Args:
            job: the search.
            alone: whether they may take most of the time, since nothing trains beside.
        """

    @abstractmethod
    def trained(self, job: "Job", pool: Pool, beside: Iterator[float]) -> None:
        """Add the points that are trained, where training is possible and the budget allows it.

        Args:
            job: the search.
            pool: the workers.
            beside: what this process may do piece by piece while they train, each giving the seconds of the next.
        """

    @abstractmethod
    def tensors(self, job: "Job", point: Point) -> dict[str, Tensor]:
        """What model.safetensors holds for a point."""

    @abstractmethod
    def recipe(self, job: "Job", point: Point) -> str:
        """What recipe.toml says of a point."""

    @abstractmethod
    def plan(self, model: nn.Module, task: Task) -> dict[str, Any]:
        """What would be tried, for --dry-run: `values`, `tried` by method, and `left_alone`."""


@dataclass
class Job:
    """One search. Its phases (lilliput.search.phases) read and extend it; nothing else holds state.

    Args:
        target: what kind of network it is, and how points are made of it (a torch network, or an ONNX file).
        task: whose examples train and judge.
        runner: makes recipes' models, with the store behind it.
        press: turns models into points.
        workers: how many processes train, or ray://HOST; None for as many as cores and memory allow.
        points: the artifacts that were made, the dense one first.
        attempts: every structure and point that was tried, done or failed, as plain data.
        known: what proposals may ask.
        taught: under how many augmentations the dense network's outputs are computed.
        forge: compiles points beside the search, where time is asked for.
        history: what was handed over when, as plain data.
        handed: the point whose files lie in the folder.
        earlier: points of an earlier run that this one has not met yet, by their keys.
        took: the seconds that parts of the end took when they were last done: "choose", "write", "score", "report".
        spent_s: seconds that earlier runs of this search took.
        ended: why the search ended early, or an empty text.
        arrived: what happens with each new point: it is kept, and handed over where it is the best so far.
        quiet: holds what runs beside, for as long as something short is timed.
        report: writes the report of what the folder holds.
        callback: is told what happens, as plain data; None where nobody asked.
        writing: held by whoever writes the folder.
    """

    target: Target
    model: nn.Module
    task: Task
    question: Question
    clock: Clock
    trials: int | None
    seed: int
    folder: Path
    store: Store
    runner: Runner
    press: Press
    workers: int | str | None
    show: Silent
    command: str
    known: Known
    taught: int
    points: list[Point] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    handed: Point | None = None
    earlier: dict[str, Point] = field(default_factory=dict)
    took: dict[str, float] = field(default_factory=dict)
    spent_s: float = 0.0
    ended: str = ""
    stopped: bool = False
    arrived: Callable[["Job", Point], None] = lambda job, point: None
    quiet: Callable[[], AbstractContextManager[Any]] = nullcontext
    report: Callable[[], None] = lambda: None
    callback: Callable[[dict[str, Any]], None] | None = None
    lock: Any = field(default_factory=threading.Lock)
    forge: Forge | None = None
    writing: Any = field(default_factory=threading.RLock)

    @property
    def dense(self) -> Point:
        """The dense network as a point."""
        return self.points[0]

    @property
    def steps_per_s(self) -> float:
        """Optimizer steps a second of training, over all workers' training time."""
        return self.runner.steps / self.runner.trained_s if self.runner.trained_s else 0.0

    def lost(self, point: Point) -> float:
        """What a point loses on val against the dense network, in points of the metric."""
        return self.task.loss_of(self.dense.score.value, point.score.value)

    def bound(self, point: Point) -> float:
        """What a point loses at most with the probability that is asked for, judged alone.

        Where classes and groups count, it is more where one of them loses more than it may, in proportion.
        """
        seen = evidence(self.task, self.dense.score, [point.score], seed=self.seed)
        return float(max(seen.bound(self.question.sure)[0], self.worst([point.score])[0]))

    def worst(self, scores: Sequence[Score]) -> Floats:
        """What the worst class or group of each score may lose, against what it may, in points of the floor; 0 where
        nothing is asked of them."""
        dense, question = self.dense.score, self.question
        if question.worst is None:
            return np.zeros(len(scores))
        scale = question.points(dense.value) / max(question.worst_points(dense.value), 1e-9)
        return scale * parts.bounds(self.task, dense, scores, question.sure)

    def lack(self, point: Point) -> float:
        """How far a point is from what is asked; 0 where it meets it."""
        return self.question.lack(point.costs, self.lost(point), self.dense.score.value)

    def worth(self, point: Point) -> dict[str, Any]:
        """What a point loses and what it costs by the question, for its row."""
        return {"drop": round(self.lost(point), 6), "price": finite_or_none(point.price(self.question))}

    def add(self, point: Point, **about: Any) -> None:
        """Keep a point and its outcomes, and hand it over where it is the best so far; nothing where it is known.

        Args:
            point: the point.
            about: how it came about, for its row: `kind` ("untrained", "round", "tail"), `axes` (what it varies) and
                `seconds` (what it took).
        """
        with self.writing:
            if any(other.key == point.key for other in self.points):
                return
            point.about = {"kind": "point", "at_s": round(self.spent_s + self.clock.now, 2), **about}
            if known := self.earlier.pop(point.key, None):
                point.about, point.files = known.about, known.files
                self.handed = point if self.handed is known else self.handed
            with self.lock:
                self.points.append(point)
            if self.forge is not None and point is self._fewest():
                self.forge.start(point.proto)
                if point.macs < self.dense.macs:  # another will be better than the structure as it was given
                    self.forge.tune(point.proto)
            self.arrived(self, point)
            if point is self.dense:
                return
            self.attempt({"status": "done", **point.about, **point.row(), **self.worth(point)})
        self.show.advance(point.name)

    def attempt(self, row: dict[str, Any]) -> None:
        """Keep what was tried."""
        with self.lock:
            self.attempts.append(row)
        self.tell("tried", row)

    def tell(self, event: str, row: Mapping[str, Any]) -> None:
        """Tell whoever asked what happened; a callback that raises is not called again, and the search goes on."""
        if self.callback is None:
            return
        try:
            self.callback({"event": event, **row})
        except Exception as error:
            self.callback = None
            self.show.say(f"the callback raised {told(error)}. It is not called any more")

    def failed(self, name: str, error: BaseException) -> None:
        """Record a point that came to nothing, with the reason; the search goes on."""
        reason = told(error)
        status = "out of time" if isinstance(error, TimeoutError) else "failed"
        self.attempt({"kind": "point", "status": status, "name": name, "reason": reason})
        self.show.advance(f"failed: {name}")

    def remember(self, key: str, kind: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the store holds under a key; made and kept where it holds nothing, so that a resumed search agrees."""
        kept = self.store.record(key)
        if not kept:
            kept = {"kind": kind, **make()}
            self.store.put(key, kept)
        return kept

    def _fewest(self) -> Point:
        """Of the points within the floor the one that computes least."""
        floor = self.question.points(self.dense.score.value)
        return min((p for p in self.points if self.lost(p) <= floor), key=lambda p: p.macs)


def finite_or_none(value: float) -> float | None:
    """A number as JSON can hold it."""
    return value if math.isfinite(value) else None


def finite(outputs: Any) -> Any:
    """The outputs, where all of them are numbers.

    Raises:
        Diverged: where one is NaN or infinite.
    """
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves(outputs)):
        raise Diverged("Train: the outputs must stay finite, got NaN or infinity. Lower the learning rate.")
    return outputs
