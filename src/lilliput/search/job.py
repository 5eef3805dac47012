"""Job: one search as data: what is asked, what is known so far, and where it is kept. The phases take it."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import ExportError, NotSupported
from lilliput.proposal import Known
from lilliput.runner import Runner
from lilliput.search.choose import evidence
from lilliput.search.forge import Forge
from lilliput.search.points import Clock, Point, Press, kept
from lilliput.search.pool import Pool
from lilliput.search.progress import Silent
from lilliput.search.question import Question
from lilliput.store import Store
from lilliput.task import Task, leaves
from lilliput.train import Diverged

FAILURES = (Diverged, TimeoutError, ExportError, NotSupported, ValueError, TypeError, KeyError, RuntimeError)
"""What a stranger's model or a method may raise: the end of one point, never of the search."""


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
    def untrained(self, job: "Job") -> Iterator[Point]:
        """Points that need no training, each as soon as it is made."""

    @abstractmethod
    def trained(self, job: "Job", pool: Pool) -> None:
        """Add the points that are trained, where training is possible and the budget allows it."""

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
        task: as the search uses it, perhaps with fewer augmentations than the user's.
        runner: makes recipes' models, with the store behind it.
        press: turns models into points.
        workers: how many processes train, or ray://HOST; None for as many as cores and memory allow.
        points: the artifacts that were made, the dense one first.
        attempts: every structure and point that was tried, done or failed, as plain data.
        known: what proposals may ask.
        forge: compiles points beside the search, where time is asked for.
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
    points: list[Point] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False
    lock: Any = field(default_factory=threading.Lock)
    forge: Forge | None = None

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
        """What a point loses at most with the probability that is asked for, judged alone."""
        seen = evidence(self.task, self.dense.score, [point.score], seed=self.seed)
        return float(seen.bound(self.question.sure)[0])

    def add(self, point: Point) -> None:
        """Keep a point and its outcomes."""
        row = {"kind": "point", "status": "done", **point.row()}
        with self.lock:
            self.points.append(point)
            self.attempts.append(row)
        if self.forge is not None and point is self._fewest():
            self.forge.start(point.proto)
            self.forge.tune(point.proto)
        self.store.put(f"point-{point.key}", {"kind": "point", **point.row()}, kept(point.outputs))
        self.show.advance(point.name)
        self.show.best(self._best())

    def attempt(self, row: dict[str, Any]) -> None:
        """Keep what was tried and is no point."""
        with self.lock:
            self.attempts.append(row)

    def failed(self, name: str, error: BaseException) -> None:
        """Record a point that came to nothing, with the reason; the search goes on."""
        reason = f"{type(error).__name__}: {error}"
        self.attempt({"kind": "point", "status": "failed", "name": name, "reason": reason})
        self.show.advance(f"failed: {name}")

    def halt(self, until: float) -> Callable[[int], bool]:
        """A function of the step that ends a training when a fraction of the budget is over, or the search is."""

        def halt(step: int) -> bool:
            if self.stopped:
                raise CancelledError
            return step % 8 == 0 and self.clock.remaining(until) < 0

        return halt

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

    def _best(self) -> str:
        """The best point so far by what is asked: its name, score and price."""
        question, dense = self.question, self.dense
        score = dense.score.value

        def rank(point: Point) -> tuple[float, float]:
            lack = question.lack(point.costs, self.lost(point), score)
            return lack, self.lost(point) if question.floor is None else point.price(question)

        best = min(self.points, key=rank)
        price, before = best.price(question), question.before(dense.costs)
        times = f" ({before / price:.1f} times less)" if 0 < price < before else ""
        metric = f"{self.task.metric_name} {best.score.value:.4f}"
        return f"{best.name}: {metric}, {question.measure} {question.written(price)}{times}"


def finite(outputs: Any) -> Any:
    """The outputs, where all of them are numbers.

    Raises:
        Diverged: where one is NaN or infinite.
    """
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves(outputs)):
        raise Diverged("Train: the outputs must stay finite, got NaN or infinity. Lower the learning rate.")
    return outputs
