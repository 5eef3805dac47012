"""Space: the plans of a job. A plan is a recipe: the structure's stages, then one training whose length is set later.

Every registered method with a moment is an axis, one integer: 0 leaves it out, k takes its k-th proposal on the dense
network. Where that cannot be applied to what earlier stages made of it (a layer that they removed), the method is asked
anew, and k is read in proportion.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from optuna.distributions import IntDistribution
from torch import nn

from lilliput import registry
from lilliput.distill.logits import Distill
from lilliput.errors import StoreError
from lilliput.proposal import Known, Proposals, Refusal, in_order, proposals
from lilliput.recipe import Recipe
from lilliput.rule import Rule
from lilliput.runner import Runner
from lilliput.search.job import FAILURES
from lilliput.stage import Stage
from lilliput.task import Task
from lilliput.train import Train

LABELS = (0.3, 10.0)
"""Weights of the task's own loss, against one for the divergence from the dense network's outputs."""

Choice = dict[str, int]


@dataclass(frozen=True)
class Axis:
    """A method that proposes, with what it offers on the dense network."""

    name: str
    method: type
    offered: Proposals


def methods(moment: str) -> list[type]:
    """Every registered Stage and Rule that proposes at a moment, in the order in which they are applied."""
    classes = [entry.load() for entry in registry.methods() if {"Stage", "Rule"} & set(entry.kinds)]
    return in_order([method for method in classes if getattr(method, "moment", "") == moment])


@dataclass
class Space:
    """The axes of a job, and the plans that integers on them stand for.

    Args:
        axes: methods of the moment "structure", in order.
        rules: methods of the moment "training", in order: rules that join the training.
        labels: the weights of the task's own loss that are tried.
        taught: under how many augmentations there are outputs of the dense network; None where under all.
    """

    runner: Runner
    known: Known
    axes: tuple[Axis, ...] = ()
    rules: tuple[Axis, ...] = ()
    labels: tuple[float, ...] = (0.0,)
    taught: int | None = None
    _asked: dict[tuple[str, str], Proposals | Refusal] = field(default_factory=dict)

    @classmethod
    def of(cls, runner: Runner, known: Known, taught: int | None = None) -> "Space":
        """Ask every method about the dense network; refusals are kept in `known.skipped`."""
        task = runner.task
        taught = taught if taught is not None and taught < task.draws else None
        space = cls(runner, known, labels=LABELS if task.labelled else (0.0,), taught=taught)
        space.axes = tuple(space._axes("structure"))
        space.rules = tuple(space._axes("training"))
        return space

    def _axes(self, moment: str) -> Iterable[Axis]:
        for method in methods(moment):
            offered = self._ask(method, Recipe())
            if isinstance(offered, Refusal):
                self.known.skip(method.__name__, offered.reason)
            else:
                yield Axis(method.__name__, method, offered)

    def _ask(self, method: type, before: Recipe) -> Proposals | Refusal:
        key = (method.__name__, self.runner.key(before))
        if key not in self._asked:
            self._asked[key] = proposals(method, self.runner.make(before), self.runner.task, self.known)
        return self._asked[key]

    def plan(self, choice: Choice) -> Recipe:
        """The recipe of a choice: its structure, and a training of one step whose length the pace sets."""
        structure = Recipe()
        for axis in self.axes:
            if picked := self._picked(axis, choice.get(axis.name, 0), structure):
                structure += cast(Stage, picked)
        rules = [self._picked(axis, choice.get(axis.name, 0), structure) for axis in self.rules]
        weight = self.labels[min(choice.get("labels", 0), len(self.labels) - 1)]
        kept = tuple(cast(Rule, rule) for rule in rules if rule is not None)
        return structure + Train(steps=1, rules=(*kept, Distill(draws=self.taught)), supervised=weight)

    def _picked(self, axis: Axis, number: int, before: Recipe) -> Stage | Rule | None:
        if not number:
            return None
        option: Stage | Rule = axis.offered.options[number - 1]
        if not before.stages or self._applies(option, before):
            return option
        here = self._ask(axis.method, before)
        if isinstance(here, Refusal):
            return None
        share = number / len(axis.offered)
        picked: Stage | Rule = here.options[max(1, round(share * len(here))) - 1]
        return picked

    def _applies(self, option: Stage | Rule, before: Recipe) -> bool:
        """Whether what a method offers on the dense network can be done to what earlier stages made of it."""
        if not isinstance(option, Stage):
            return False
        try:
            self.runner.make(before + option)
        except StoreError:
            raise
        except FAILURES:
            return False
        return True

    def starters(self) -> list[Choice]:
        """Choices that are worth trying on any network: where the search starts.

        All methods where they like to begin; then the same with one of them milder, stronger, or alone, taught mostly
        by the dense network or mostly by the labels; then with each method that is not used at first. Short budgets
        take the first few, which lie far apart.
        """
        joint = [axis for axis in self.axes if not getattr(axis.method, "replaces", False)]
        whole = [axis for axis in self.axes if getattr(axis.method, "replaces", False)]
        base = self._base(joint)
        used = [axis for axis in joint if axis.offered.first]
        last = len(self.labels) - 1
        choices = [base | {"labels": 0}]
        choices += [{axis.name: axis.offered.first or 1, "labels": last} for axis in whole]
        if used:
            early, final = used[-2:] if len(used) > 1 else (used[0], used[0])
            first, most = final.offered.first, len(final.offered)
            choices += [
                base | {early.name: early.offered.first // 2, "labels": last},
                {final.name: 1, "labels": last},
                base | {final.name: first + -(-(most - first) // 3), "labels": 0},
                base | {"labels": last},
                base | {final.name: first + 2 * (most - first) // 3, "labels": last},
                base | {final.name: first + 5 * (most - first) // 6, "labels": last},
                {final.name: -(-2 * first // 3), "labels": last},
                *([base | {used[0].name: used[0].offered.first // 2, "labels": 0}] if used[0] is not early else []),
                base | {final.name: min(first + 1, most), "labels": 0},
            ]
        choices += [base | {axis.name: 1, "labels": last} for axis in joint if not axis.offered.first]
        choices += [{axis.name: 1, "labels": last} for axis in whole]
        choices += [base | {axis.name: axis.offered.first or 1, "labels": 0} for axis in self.rules]
        return list({tuple(sorted(choice.items())): choice for choice in choices}.values())

    def _base(self, joint: Sequence[Axis]) -> Choice:
        """What loses little without training, and every other method where it likes to begin."""
        return {axis.name: self.known.bare.get(axis.name, axis.offered.first) for axis in joint}

    def spread(self, count: int = 8) -> list[Choice]:
        """Choices from mild to strong: every starter, and the last axis from end to end with all others as they begin.

        Args:
            count: how many numbers of the last axis are taken.
        """
        joint = [axis for axis in self.axes if not getattr(axis.method, "replaces", False)]
        used = [axis for axis in joint if axis.offered.first]
        choices = self.starters()
        if used:
            base, final, last = self._base(joint), used[-1], len(self.labels) - 1
            most = len(final.offered)
            for k in range(count):
                number = max(1, round((k + 1) * most / count))
                choices.append(base | {final.name: number, "labels": last if k % 2 else 0})
                choices.append({final.name: number, "labels": last if k % 2 else 0})
        return list({tuple(sorted(choice.items())): choice for choice in choices}.values())

    def distributions(self) -> dict[str, Any]:
        """What a sampler draws from: one integer a method."""
        axes = {axis.name: IntDistribution(0, len(axis.offered)) for axis in (*self.axes, *self.rules)}
        return axes | ({"labels": IntDistribution(0, len(self.labels) - 1)} if len(self.labels) > 1 else {})

    def params(self, choice: Choice) -> dict[str, Any]:
        """The sampler's parameters of a choice: the inverse of `ask`."""
        numbers: dict[str, Any] = {axis.name: choice.get(axis.name, 0) for axis in (*self.axes, *self.rules)}
        return numbers | ({"labels": choice.get("labels", 0)} if len(self.labels) > 1 else {})

    def ask(self, trial: Any) -> Choice:
        """The choice that a trial of the sampler stands for, asked for with `distributions`."""
        return {axis: int(number) for axis, number in trial.params.items()}


def structure(plan: Recipe) -> Recipe:
    """A plan without its training."""
    return Recipe(plan.stages[:-1])


def training(plan: Recipe) -> Train:
    """A plan's training."""
    return cast(Train, plan.stages[-1])


def topology(plan: Recipe) -> str:
    """A name for the plan's graph: plans that differ only in shapes, or in how they are trained, share one export."""
    return identity(Recipe(tuple(stage for stage in changes(plan) if not stage.same_graph)))


def changes(plan: Recipe) -> tuple[Stage, ...]:
    """A plan's structural stages in order, those of the arms that it inherits from too, without their trainings."""
    return tuple(stage for stage in structure(plan).stages if not isinstance(stage, Train))


def identity(recipe: Recipe) -> str:
    """A name that no other recipe has: all of its settings."""
    return json.dumps(recipe.data(), sort_keys=True)


def name(plan: Recipe) -> str:
    """A plan in a few words, for people: what was done to the structure, in order, trainings between left out."""
    labels = [stage.label() for stage in changes(plan)]
    parts = [label if count == 1 else f"{count} times {label}" for label, count in Counter(labels).items()]
    parts += [type(rule).__name__ for rule in training(plan).rules if not isinstance(rule, Distill)]
    parts += ["mostly from labels"] if training(plan).supervised > 1 else []
    return ", ".join(parts) or "same structure"


def offers(model: nn.Module, task: Task, known: Known) -> dict[str, str]:
    """What every registered method offers on a model, or why it does not, in a few words each."""
    texts: dict[str, str] = {}
    for method in (*methods("structure"), *methods("training")):
        about = " ".join((method.__doc__ or "").partition("\n\n")[0].split()).rstrip(".")
        offered = proposals(method, model, task, known)
        if isinstance(offered, Refusal):
            texts[method.__name__] = f"{about}: not tried, {offered.reason}"
        else:
            texts[method.__name__] = f"{about}: {_listed([_label(option) for option in offered.options])}"
    return texts


def _label(option: Any) -> str:
    return str(option.label() if hasattr(option, "label") else type(option).__name__)


def _listed(labels: Sequence[str]) -> str:
    distinct = list(dict.fromkeys(labels))
    if len(distinct) <= 4:
        return ", ".join(distinct)
    return f"{distinct[0]}, {distinct[1]}, ... {distinct[-1]} ({len(distinct)} in all)"
