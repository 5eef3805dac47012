"""Candidates: structures that may be trained: what methods offer on the dense network, and smaller children of arms."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import optuna

from lilliput.code.base import realize
from lilliput.errors import StoreError
from lilliput.graph.fold import fold_batchnorm
from lilliput.proposal import Refusal, proposals
from lilliput.recipe import Recipe
from lilliput.search.arms import Arm
from lilliput.search.job import FAILURES, Job
from lilliput.search.points import parameters
from lilliput.search.pool import Pool
from lilliput.search.question import Question
from lilliput.search.space import Axis, Choice, Space, changes, identity, name, structure, topology, training
from lilliput.search.untrained import File
from lilliput.search.work import BACKWARD, Size, batch_size_for, size, size_of
from lilliput.task import Task

FIRST_EPOCHS = 4  # of a structure's first training, where steps are counted
FEWEST, MOST = 80, 400  # steps of it
LONG = 1500  # steps of it where a clock has a say: a long training that ends well is better than several short ones
PART = 1 / 2  # of a worker's time, the most that it may take
SHORT = 1 / 50  # of it, the least: between trainings much is done beside
STEP = 0.6  # the parameters of a child, as a part of those of the arm that it inherits from
WORTH_CHILDREN = 3.0  # floors: an arm that may lose more is trained first
WAITING = 6  # structures that wait to begin; with fewer, the sampler is asked for two at a time


@dataclass
class Candidates:
    """Makes the arms of a job.

    Args:
        job: the search.
        space: what its methods offer.
        seconds: of one worker, in all; None where steps are counted.
    """

    job: Job
    space: Space
    seconds: float | None
    _known: set[Any] = field(default_factory=set)

    def __post_init__(self) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=self.job.seed, n_startup_trials=6)
        self._study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)

    def roots(self, pool: Pool) -> Iterator[Arm]:
        """What is worth trying on any network, from mild to strong, each built in a worker to see how large it is.

        To find what one costs may take a second, where that is what a run takes.
        """
        plans = [(choice, plan) for choice in self.space.spread() if (plan := self._plan(choice)) is not None]
        sizes = [pool.submit(size, structure(plan)) for _, plan in plans]
        for (choice, plan), future in zip(plans, sizes, strict=True):
            try:
                arm = self._arm(choice, plan, future.result())
            except StoreError:
                raise
            except FAILURES as error:
                self.job.failed(name(plan), error)
            else:
                if arm is not None:
                    yield arm

    def sampled(self, arm: Arm, waiting: int) -> list[Arm]:
        """Tell the sampler how an arm began, and ask it for one or two more.

        Args:
            arm: one that was begun.
            waiting: how many wait to begin.
        """
        drawn = self.space.distributions()
        told = optuna.trial.create_trial(
            params=self.space.params(arm.axes), distributions=drawn, values=[arm.bound, arm.price]
        )
        self._study.add_trial(told)
        arms = []
        for _ in range(2 if waiting < WAITING else 1):
            choice = self.space.ask(self._study.ask(drawn))
            plan = self._plan(choice)
            try:
                arms.append(
                    None if plan is None else self._arm(choice, plan, size_of(self.job.runner, structure(plan)))
                )
            except StoreError:
                raise
            except FAILURES as error:
                self.job.failed("a structure of the sampler", error)
        return [arm for arm in arms if arm is not None]

    def children(self, arm: Arm) -> list[Arm]:
        """Smaller structures that inherit what an arm has learned, one a method, where it may well be promised.

        Args:
            arm: a plain arm that was trained.
        """
        if arm.bound is None or arm.bound > WORTH_CHILDREN or (key := self.job.runner.key(arm.recipe)) in self._known:
            return []
        self._known.add(key)
        children: list[Arm | None] = [*self._sibling(arm)]
        for axis in self.space.axes:
            if not getattr(axis.method, "replaces", False):
                try:
                    children.append(self._child(arm, axis))
                except StoreError:
                    raise
                except FAILURES as error:
                    self.job.failed(f"{arm.name}, then {axis.name}", error)
        return [child for child in children if child is not None]

    def _sibling(self, arm: Arm) -> Iterator[Arm]:
        """The same network trained on in the other way: what learns fast is often not what ends best."""
        before, way = training(arm.plan), arm.axes.get("labels", 0)
        key = structure(arm.plan), "sibling"
        if arm.sibling or arm.rounds < 2 or len(self.space.labels) < 2 or key in self._known:
            return
        self._known.add(key)
        other = (way + 1) % len(self.space.labels)
        plan = Recipe((*arm.recipe.stages, replace(before, supervised=self.space.labels[other])))
        axes = {**arm.axes, "labels": other}
        sibling = Arm(name(plan), plan, axes, arm.weights, arm.besides, arm.spent, arm.pace, arm.share)
        sibling.inherited, sibling.sibling, sibling.rounds, sibling.extra = arm.bound, True, arm.rounds, arm.extra
        yield sibling

    def _child(self, arm: Arm, axis: Axis) -> Arm | None:
        """The arm's network after the option of a method that leaves the wanted part of it."""
        job = self.job
        model = job.runner.make(arm.recipe)
        offered = proposals(axis.method, model, job.task, job.known)
        if isinstance(offered, Refusal):
            return None
        before, (low, high) = size_of(job.runner, arm.recipe), (0, len(offered) - 1)
        while low <= high:  # options go from mild to strong
            middle = (low + high) // 2
            plan = Recipe((*arm.recipe.stages, offered.options[middle], training(arm.plan)))
            after = size_of(job.runner, structure(plan))
            share = after.values / before.values
            if STEP**1.5 <= share <= STEP**0.5:
                child = Arm(name(plan), plan, arm.axes, *self._price(plan, after), *self._first(after))
                child.inherited, child.extra = arm.bound, arm.extra
                return child
            low, high = (middle + 1, high) if share > STEP else (low, middle - 1)
        return None

    def _plan(self, choice: Choice) -> Recipe | None:
        """The plan of a choice; what cannot be built is the refusal of that choice, never of the search."""
        try:
            return self.space.plan(choice)
        except StoreError:
            raise
        except FAILURES as error:
            shown = ", ".join(f"{axis} {number}" for axis, number in choice.items() if number)
            self.job.failed(shown or "same structure", error)
            return None

    def _arm(self, choice: Choice, plan: Recipe, found: Size) -> Arm | None:
        """An arm that may begin, or None where another has as many values in the same graph, trained alike."""
        alike = (found.values, topology(plan), training(plan))
        if alike in self._known:
            return None
        self._known.add(alike)
        return Arm(name(plan), plan, dict(choice), *self._price(plan, found), *self._first(found))

    @cached_property
    def unit(self) -> float:
        """What the dense network costs: bytes of the asked file, or what a run takes."""
        job, what = self.job, priced(self.job.question)
        if what == "size":
            return job.question.cost(what, job.dense.costs)
        whole = fold_batchnorm(job.model, job.task.example)
        return max(1e-9, job.press.price(job.dense.structure, whole, what))

    def _price(self, plan: Recipe, found: Size) -> tuple[float, float]:
        """What a structure costs, in prices of the dense network: its weights at four bits, or a run of it; and what
        its file holds besides weights."""
        job, what = self.job, priced(self.job.question)
        if what == "size":
            return found.values / 2 / self.unit, self._besides / self.unit
        plain = fold_batchnorm(realize(job.runner.make(structure(plan))), job.task.example)
        own = identity(Recipe(changes(plan)))
        job.press.fitting(plain, topology(plan), own)
        graph = job.press.structure(plain, topology(plan), own)
        return max(1e-6, job.press.price(graph, plain, what) / self.unit), 0.0

    @cached_property
    def _besides(self) -> float:
        """Bytes of a file besides its stored tensors, as of the first coded files, or of the dense one."""
        question = self.job.question
        target: File = "onnx" if question.file == "onnx" else "lil"
        points = [point for point in self.job.points if point.stored]
        seen = [
            float(point.costs[question.file_key]) - sum(tensor.cost(target) for tensor in point.stored.values())
            for point in points[1:] or points
        ]
        return max(0.0, min(seen, default=0.0))

    def _first(self, found: Size) -> tuple[float, float, float]:
        """Seconds, or steps, of a structure's first training, as far as the time allows, and of one step of it; and its
        part of the dense network's parameters."""
        share = found.values / parameters(self.job.model)
        if self.seconds is None:
            return first_steps(self.job.task), 1.0, share
        step_s = BACKWARD * found.forward_s * batch_size_for(self.job.task)
        least = max(1.0, FEWEST * step_s, SHORT * self.seconds)
        return max(least, min(LONG * step_s, PART * self.seconds)), step_s, share


def priced(question: Question) -> str:
    """What structures are compared by: the limit that must hold, or the objective."""
    return question.limits[0][0] if question.limits else question.objective


def first_steps(task: Task) -> float:
    """Steps of a structure's first training: some epochs."""
    return float(max(FEWEST, min(FIRST_EPOCHS * max(1, task.examples // batch_size_for(task)), MOST)))
