"""Explore: many short trainings, few long ones. The next version of the search replaces this file.

Structures are proposed by a sampler over the integers of the space, trained for a sixteenth of their schedule, and the
promising ones for a quarter; what lies on the front of (loss or divergence, price) goes on.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import torch

from lilliput.code.base import pack, realize
from lilliput.errors import StoreError
from lilliput.graph.fold import fold_batchnorm
from lilliput.recipe import Recipe
from lilliput.search.choose import front
from lilliput.search.job import FAILURES, Job, finite
from lilliput.search.pace import Pace
from lilliput.search.points import judged, parameters
from lilliput.search.space import Space, identity, name, structure, topology

RUNGS = (1 / 16, 1 / 4)
Row = dict[str, Any]


def explore(job: Job, space: Space, pace: Pace, pool: ThreadPoolExecutor, asked: int, finals: int) -> list[Recipe]:
    """Plans in the order in which they deserve a full training.

    Args:
        asked: how many structures are tried.
        finals: how many go on.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna calls multivariate sampling experimental, at each construction
        sampler = optuna.samplers.TPESampler(seed=job.seed, n_startup_trials=6, multivariate=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    for choice in space.starters():
        study.enqueue_trial(space.params(choice))
    seen: dict[Recipe, Row] = {}
    job.show.phase("short trainings of many structures", asked)
    for first in range(0, asked, 4):
        proposed = [study.ask() for _ in range(min(4, asked - first))]
        plans = [_built(job, space, space.ask(trial)) for trial in proposed]
        fresh = list(dict.fromkeys(plan for plan in plans if plan is not None and plan not in seen))
        if job.question.priced_by_runtime:
            export(job, fresh)
        rows = pool.map(lambda plan: _rung(job, pace, plan, RUNGS[0]), fresh)
        seen |= dict(zip(fresh, rows, strict=True))
        for trial, plan in zip(proposed, plans, strict=True):
            if plan is not None and "distance" in seen[plan]:
                study.tell(trial, [seen[plan]["distance"], seen[plan]["price"]])
            else:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            job.show.advance("" if plan is None else name(plan))
    alive = {plan: row for plan, row in seen.items() if "distance" in row}
    chosen = _promising(job, alive, max(finals, asked // 3))
    job.show.phase("longer trainings of the promising", len(chosen))
    again = dict(zip(chosen, pool.map(lambda plan: _rung(job, pace, plan, RUNGS[1]), chosen), strict=True))
    again = {plan: row for plan, row in again.items() if "distance" in row}
    for plan in again:
        job.show.advance(name(plan))
    survivors = _promising(job, again, finals)
    export(job, survivors)
    return survivors


def _built(job: Job, space: Space, choice: dict[str, int]) -> Recipe | None:
    """The plan of a choice; what cannot be built is the refusal of that point, never of the search."""
    try:
        plan = space.plan(choice)
        job.runner.make(structure(plan))
        return plan
    except StoreError:
        raise
    except FAILURES as error:
        shown = ", ".join(f"{axis} {number}" for axis, number in choice.items() if number)
        job.failed(shown or "same structure", error)
        return None


def export(job: Job, plans: list[Recipe]) -> None:
    """Trace the structures of plans. While nothing trains: torch's exporter shares state with its optimizers."""
    for plan in plans:
        try:
            plain = fold_batchnorm(realize(job.runner.make(structure(plan))).cpu(), job.task.example)
            job.press.fitting(plain, topology(plan), own=identity(structure(plan)))
        except FAILURES as error:
            job.failed(name(plan), error)


def _rung(job: Job, pace: Pace, plan: Recipe, until: float) -> Row:
    """Train a plan up to a rung of its schedule; rank, drop and price of what it is there."""
    key = ""
    try:
        recipe = pace.trained(plan, until)
        key = f"rung-{job.runner.key(recipe)}"
        kept = job.store.record(key)
        if kept:
            job.attempt(kept)
            return kept
        with job.clock.on("train"):
            model = job.runner.make(recipe, job.halt(0.7))
        score, outputs = judged(job.task, model)
        outputs = finite(outputs)
        row: Row = {
            "kind": "rung",
            "name": name(plan),
            "until": until,
            "status": "rung",
            "distance": _rank(job, outputs),
            "drop": job.task.loss_of(job.dense.score.value, score.value),
            "price": _price(job, model, plan),
            "values": parameters(model),
        }
    except StoreError:
        raise
    except FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
        row = {"kind": "rung", "name": name(plan), "until": until, "status": "failed", "reason": reason}
    job.attempt(row)
    if key:
        job.store.put(key, row)
    return row


def _rank(job: Job, outputs: Any) -> float:
    """What structures are ranked by while they train, far steadier than a metric: the task's own loss on val where
    there are labels (a student may come to know better than the dense network), else the divergence from it."""
    probe = job.task.probe("val")
    if job.task.labelled and probe.targets is not None:
        return float(job.task.loss(outputs, probe))
    return float(job.task.divergence(outputs, job.dense.outputs).mean())


def _price(job: Job, model: torch.nn.Module, plan: Recipe) -> float:
    """What a structure costs by the objective: packed bytes at four bits, or the layers' milliseconds or MACs."""
    if not job.question.priced_by_runtime:
        return sum(s.storage().bits / (8 if s.bits >= 32 else 1) for s in pack(realize(model)).values()) / 8
    plain = fold_batchnorm(realize(model), job.task.example)
    structure_ = job.press.structure(plain, topology(plan), identity(structure(plan)))
    return job.press.price(structure_, plain, job.question.objective)


def _promising(job: Job, rows: dict[Recipe, Row], count: int) -> list[Recipe]:
    """The plans to go on with: fronts of (rank, price) peeled one by one, evenly spread along each."""
    if not rows:
        return []
    limit = _slack(job, rows)
    enough = [row["price"] for row in rows.values() if row["drop"] <= 0 and job.question.floor is not None]
    cap = min(enough, default=float("inf"))  # what is as good as dense already needs no dearer rival
    viable = {plan: row for plan, row in rows.items() if row["drop"] <= limit and row["price"] <= cap}
    for plan in sorted(rows, key=lambda plan: float(rows[plan]["drop"])):
        if len(viable) < count:
            viable[plan] = rows[plan]
    rest, chosen = dict(viable), list[Recipe]()
    while rest and len(chosen) < count:
        plans = list(rest)
        best = [plans[i] for i in front([(rest[n]["distance"], rest[n]["price"]) for n in plans])]
        best.sort(key=lambda plan: float(rest[plan]["price"]))
        room = count - len(chosen)
        if len(best) > room:
            best = [best[round(i * (len(best) - 1) / max(1, room - 1))] for i in range(room)]
            best = list(dict.fromkeys(best))
        chosen += best
        rest = {plan: row for plan, row in rest.items() if plan not in chosen and len(chosen) < count}
    return chosen[:count]


def _slack(job: Job, rows: dict[Recipe, Row]) -> float:
    """How much a structure may still lose at a rung and be thought to meet the floor when it is trained."""
    floor = job.question.points(job.dense.score.value)
    return max(4 * floor, min(float(row["drop"]) for row in rows.values()) + 3 * floor) + 0.01
