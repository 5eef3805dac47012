"""shrink: a network and a floor in, the smallest or fastest network that meets it out, with the proof.

The search proposes structures (fewer blocks, an earlier stride, fewer channels), trains them against the dense
network's outputs for short, lets the promising ones train on, quantizes the best with training through the rounding,
scores every artifact in the runtime it is for, and chooses with the optimism of having chosen taken off.
"""

import os
import shutil
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

from lilliput.code.base import copy_model, pack, realize
from lilliput.errors import ExportError, NotSupported, StoreError, near
from lilliput.graph import blocks_left, groups, left, removable, remove_blocks
from lilliput.graph.fold import fold_batchnorm
from lilliput.graph.stride import earlier_stride, set_stride
from lilliput.quant.allocate import allocate_bits
from lilliput.recipe import Recipe
from lilliput.search import engine, post, post_onnx, sensitivity, units
from lilliput.search.check import check, place
from lilliput.search.choose import front
from lilliput.search.finish import Result, conclude
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.points import Clock, Point, Press
from lilliput.search.show import Silent
from lilliput.search.space import (
    SPARSE,
    Plan,
    Space,
    Tail,
    batch_size_for,
    count_values,
    is_stochastic,
    tables,
    tail,
    training,
)
from lilliput.stage import calibration
from lilliput.store import Store
from lilliput.task import Task, length, predict, take
from lilliput.train import Diverged, fit
from lilliput.workshop import Workshop

OBJECTIVES = ("size", "latency", "macs")
RUNGS = (1 / 16, 1 / 4)
PATIENT = 600  # seconds of budget from which on zeros are made in more than one way
LABELS = (0.3, 10.0)
FAILURES = (Diverged, TimeoutError, ExportError, NotSupported, ValueError, RuntimeError)


@dataclass(frozen=True)
class Question:
    """What is asked: the floor and what is to be small, or the most that fits and the best score under it."""

    objective: str = "size"
    floor: units.Floor | None = None
    max_bytes: int | None = None
    max_latency_ms: float | None = None


def shrink(
    model: nn.Module,
    task: Task,
    floor: float | str = "1%",
    objective: str = "size",
    budget: float | str | None = "5m",
    *,
    trials: int | None = None,
    max_bytes: int | str | None = None,
    max_latency_ms: float | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int | None = None,
    show: Silent | None = None,
    command: str | None = None,
    device: str = "cpu",
) -> Result:
    """The smallest (fastest, cheapest) network made from `model` that loses at most `floor` on data not tuned on.

    floor: points of the metric ("1%" or 0.01), or a fraction of the dense score ("0.5r"). objective: "size" (bytes of
    model.lil), "latency" (ONNX Runtime, one thread, batch 1) or "macs". budget: wall time of the whole search; with
    `trials` that many structures are tried instead, and the result depends on nothing but the seed. max_bytes (of
    model.onnx) or max_latency_ms turn the question round: the best score that fits. out: the folder for model.onnx,
    model.lil, model.safetensors, recipe.toml, report.html, summary.json and records/. The model is not changed.

    device: where to train, such as "cuda"; artifacts are always scored and measured on the processor.

    Returns a Result; `result.met` says whether the floor was met (the nearest points are in `result.front`).
    Raises ValueError for settings out of range, before anything is written.
    """
    if objective not in OBJECTIVES:
        raise ValueError(
            f"shrink: objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}. "
            f"{near(objective, OBJECTIVES)}"
        )
    if trials is not None and trials < 1:
        raise ValueError(f"shrink: trials must be at least 1, got {trials}.")
    if max_latency_ms is not None and not max_latency_ms > 0:
        raise ValueError(f"shrink: max-latency-ms must be above 0, got {max_latency_ms}.")
    turned = max_bytes is not None or max_latency_ms is not None
    question = Question(
        objective,
        None if turned else units.floor(floor),
        None if max_bytes is None else units.size_bytes(max_bytes),
        max_latency_ms,
    )
    budget_s = None if trials is not None or budget is None else units.seconds(budget)
    if budget_s is None and trials is None:
        raise ValueError("shrink: a budget or a number of trials must be given, got neither. Write budget='5m'.")
    where = place(device)
    try:
        model = copy_model(model).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"shrink: the model must be one that copy.deepcopy copies, but that raised {error}. Build it "
            "anew instead of taking it from a graph with gradients."
        ) from error
    check(model, task)
    folder = Path(out) if out is not None else Path(f"lilliput-{task.name}")
    if (folder / "records").exists() and any((folder / "records").iterdir()) and not resume:
        raise ValueError(
            f"shrink: {folder} must be empty or new, but holds an earlier search. Continue it with "
            "--resume, or choose another --out."
        )
    count = workers or (1 if is_stochastic(model) else max(1, min(4, os.cpu_count() or 1)))
    search = Search(model, task, question, budget_s, trials, seed, folder, count, show or Silent(), command, where)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    try:
        return search.run()
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(random)


def poolable(model: nn.Module, example: Any) -> tuple[str, ...]:
    """The first convolution, where it can read an input averaged two by two."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            try:
                set_stride(model, example, name, pool=True)
            except (ValueError, RuntimeError, NotSupported):
                return ()
            return (name,)
    return ()


class Search:
    """One search, from the dense model to the files: the five steps in order, each a method."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        question: Question,
        budget_s: float | None,
        trials: int | None,
        seed: int,
        folder: Path,
        workers: int,
        show: Silent,
        command: str | None,
        device: torch.device,
    ) -> None:
        self.question, self.trials, self.seed, self.show, self.command = question, trials, seed, show, command
        self.clock, self.folder, self.workers = Clock(budget_s), folder, workers
        self.fresh = not folder.exists()
        self.store = Store(folder / "records")
        self.original = task
        self.model = model
        self.task = self._cheaper(task)
        self.shop = Workshop(self.model, self.task, self.store, seed, device=device)
        self.press = Press(self.task, self.clock)
        self.points: list[Point] = []
        self.tried: list[dict[str, Any]] = []
        self.table: sensitivity.Table = {}
        self.space = Space()
        self.left: list[tuple[str, str]] = []
        self.batch = batch_size_for(task)
        self.labels = LABELS if task.split("train")[1] is not None else (0.0,)
        self._topologies: dict[Plan, str] = {}
        self._lock, self.stopped = threading.Lock(), False

    def _cheaper(self, task: Task) -> Task:
        """The task with as many augmentations as the dense network can be run on within a tenth of the budget."""
        if task.augment is None:
            return task
        if self.clock.budget_s is None:
            return task.with_draws(min(task.draws, 4))
        inputs, _ = task.split("train")
        few = take(inputs, slice(0, 64))
        predict(self.model, few)
        first = self.clock.now
        predict(self.model, few)
        each = (self.clock.now - first) / min(64, length(inputs))
        within = int(0.1 * self.clock.budget_s * self.workers / (each * task.examples + 1e-9))
        kept = self.store.record("draws")
        draws = kept["draws"] if kept else max(1, min(task.draws, within))
        self.store.put("draws", {"kind": "draws", "draws": draws})
        return task.with_draws(draws)

    def run(self) -> Result:
        """Measure, look, explore, refine, conclude."""
        torch.set_num_threads(1)
        with self.show, ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                self.measure_dense()
                self.look(pool)
                self.without_training()
                if self.trainable():
                    self.refine(pool, self.explore(pool))
                return conclude(self)
            except BaseException:
                self.stopped = True  # the other trainings end at their next step, their last checkpoints kept
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    # 1. the dense model ------------------------------------------------------------------------------------------

    def measure_dense(self) -> None:
        """The dense artifact: exported once with batch norm folded, scored and weighed."""
        self.show.phase("measuring the dense network", 1)
        try:
            dense = (
                post_onnx.dense(self, self.model)
                if isinstance(self.model, OnnxModel)
                else self.press.point(self.model, "dense", "dense", [], self.shop.start)
            )
        except (ExportError, NotSupported):
            if self.fresh:
                shutil.rmtree(self.folder, ignore_errors=True)  # nothing can be made of it: nothing is written
            raise
        self.press.dense = dense
        dense.distance = 0.0
        self.dense = dense
        self.points.append(dense)
        self.show.advance(f"{self.task.metric_name} {dense.score.value:.4f}, {units.shown(dense.onnx_bytes)}")

    # 2. what can be varied, and how much it hurts ----------------------------------------------------------------

    def look(self, pool: ThreadPoolExecutor) -> None:
        """What can be varied; each tensor's sensitivity; the blocks in the order in which they are missed."""
        if isinstance(self.model, OnnxModel):
            self.left = [("training", "an ONNX file has no parameters that could be trained or removed")]
            return
        example = self.task.example
        self.show.phase("what each technique costs on each layer", 2)
        with self.clock.on("calibrate"):
            found = groups(self.model, example)
            self.left = [(item.name, item.reason) for item in (*left(found), *blocks_left(self.model, example))]
            inputs = calibration(self.task, 64)
            dense = predict(self.model, inputs)
            limit = 20.0 if self.clock.budget_s is None else 0.04 * self.clock.budget_s
            kept = self.store.record(f"sensitivity-{self.shop.start}")
            if kept:
                self.table = kept["table"]
            else:
                self.table = sensitivity.measure(self.model, self.task, inputs, seconds=limit, dense=dense)
                self.store.put(f"sensitivity-{self.shop.start}", {"kind": "sensitivity", "table": self.table})
            self.show.advance(f"{len(self.table)} tensors")
            missed = {}
            for name in removable(self.model, example):
                without = predict(remove_blocks(self.model, example, [name]), inputs)
                missed[name] = float(self.task.divergence(without, dense).mean())
            strides = tuple(earlier_stride(self.model, example))[:1]
            pools = () if strides else poolable(self.model, example)
            self.space = Space(
                tuple(sorted(missed, key=missed.__getitem__)),
                strides or pools,
                bool(pools),
                any(group.removable for group in found),
                tables(self.model),
                self.labels,
                tuple(self.left),
            )
        self.show.advance(f"{len(self.space.blocks)} blocks can go")

    def trainable(self) -> bool:
        """Whether the budget holds enough steps to train a student at all."""
        if isinstance(self.model, OnnxModel):
            return False
        if self.task.examples < 2 or not any(p.requires_grad for p in self.model.parameters()):
            self.left.append(
                (
                    "training",
                    "no parameter may be trained" if self.task.examples > 1 else "one example is too few to train on",
                )
            )
            return False
        if self.trials is not None:
            return True
        small = self.space.recipe(self.space.first()[0])
        try:
            speed = self._speed(self.shop.make(small), f"speed-{self.shop.key(small)}")
        except StoreError:
            raise
        except FAILURES as error:
            self.left.append(("training", f"a step of it raised {type(error).__name__}: {error}"))
            return False
        steps = speed * self.clock.left(0.6) * self.workers
        if steps < 3000:
            self.left.append(("training", f"{steps:.0f} steps fit into the budget, too few to train a student"))
            return False
        return True

    # 3. structures: many short trainings, few long ones ----------------------------------------------------------

    def explore(self, pool: ThreadPoolExecutor) -> list[Plan]:
        """Plans in the order in which they deserve a full training."""
        budget = self.clock.budget_s
        asked = self.trials or (12 if budget is None or budget >= 60 else 4)
        self.finals = max(1, min(3 if asked >= 6 else 2, asked))
        self.tails: tuple[Tail, ...] = (Tail(4), Tail(3), *(() if self.space.tables else (Tail(4, 0.5),)))
        if self.for_latency:
            ways = tuple(SPARSE) if budget is None or budget >= PATIENT else tuple(SPARSE)[:1]
            self.tails = (Tail(4), *(Tail(8, sparsity, method=way) for sparsity in self._rewarded() for way in ways))
            self.clock.reserved_s = 0.0 if budget is None else engine.RESERVED * budget
        with self.clock.on("train"):
            self._teach(pool)
        share = (
            asked / 16
            + (asked // 3) * (RUNGS[1] - RUNGS[0])
            + self.finals * (1 - RUNGS[1])
            + self.finals * len(self.tails) * 0.2
        )
        self.slot = self._slot(0.88 * self.workers * self.clock.left(0.93) / share)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # optuna calls multivariate sampling experimental, at each construction
            sampler = optuna.samplers.TPESampler(seed=self.seed, n_startup_trials=6, multivariate=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
        for plan in self.space.first():
            study.enqueue_trial(self.space.params(plan))
        seen: dict[Plan, dict[str, Any]] = {}
        self.show.phase("short trainings of many structures", asked)
        for first in range(0, asked, 4):
            proposed = [study.ask() for _ in range(min(4, asked - first))]
            plans = [self.space.ask(trial) for trial in proposed]
            fresh = list(dict.fromkeys(plan for plan in plans if plan not in seen))
            if self._priced_by_runtime():
                self._export(fresh)
            for plan, row in zip(fresh, pool.map(lambda plan: self._rung(plan, RUNGS[0]), fresh), strict=True):
                seen[plan] = row
            for trial, plan in zip(proposed, plans, strict=True):
                row = seen[plan]
                if "distance" in row:
                    study.tell(trial, [row["distance"], row["price"]])
                else:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                self.show.advance(plan.name())
        alive = {plan: row for plan, row in seen.items() if "distance" in row}
        chosen = self._promising(alive, max(self.finals, asked // 3))
        self.show.phase("longer trainings of the promising", len(chosen))
        rows = dict(zip(chosen, pool.map(lambda plan: self._rung(plan, RUNGS[1]), chosen), strict=True))
        rows = {plan: row for plan, row in rows.items() if "distance" in row}
        for plan in rows:
            self.show.advance(plan.name())
        survivors = self._promising(rows, self.finals)
        self._export(survivors)
        return survivors

    def _export(self, plans: list[Plan]) -> None:
        """Trace the structures of plans. While nothing trains: torch's exporter shares state with its optimizers."""
        for plan in plans:
            plain = fold_batchnorm(realize(self.shop.make(self.space.recipe(plan))).cpu(), self.task.example)
            structure = self.press.structure(plain, self._topology(plan))
            try:
                structure.write(pack(plain))
            except ExportError:  # the widths are part of this graph: it needs an export of its own
                self._topologies[plan] = f"{self._topology(plan)} {plan}"
                self.press.structure(plain, self._topology(plan))

    def _rewarded(self) -> tuple[float, ...]:
        """The sparsities that the engine rewards on the structure that is tried first."""
        if self.dense.values > engine.MOST_VALUES:
            return ()
        plan = self.space.first()[0]
        try:
            plain = fold_batchnorm(realize(self.shop.make(self.space.recipe(plan))).cpu(), self.task.example)
            structure = self.press.structure(plain, self._topology(plan))
            with self.clock.on("measure"):
                return engine.rewarded(structure, pack(plain), self.task.example)
        except StoreError:
            raise
        except FAILURES:
            return ()

    @property
    def for_latency(self) -> bool:
        """Whether what is asked for is time, so that the engine has a say."""
        return self.question.objective == "latency" or self.question.max_latency_ms is not None

    def _priced_by_runtime(self) -> bool:
        """Whether time or multiply-adds are asked for, so that structures are exported as they come."""
        return self.question.objective != "size" or self.question.max_latency_ms is not None

    def _slot(self, seconds: float) -> float:
        """What a full training may take: measured once and kept, so that a search that goes on has the same recipes."""
        if self.clock.budget_s is None:
            return seconds
        key = f"slot-{self.clock.budget_s:g}-{self.workers}"
        kept = self.store.record(key)
        if not kept:
            self.store.put(key, {"kind": "slot", "seconds": round(seconds, 3)})
        return float(kept["seconds"]) if kept else round(seconds, 3)

    def _promising(self, rows: dict[Plan, dict[str, Any]], count: int) -> list[Plan]:
        """The plans to go on with: fronts of (distance, price) peeled one by one, evenly spread along each."""
        if not rows:
            return []
        limit = self._slack(rows)
        enough = [row["price"] for row in rows.values() if row["drop"] <= 0 and self.question.floor is not None]
        cap = min(enough, default=float("inf"))  # what is as good as dense already needs no dearer rival
        viable = {plan: row for plan, row in rows.items() if row["drop"] <= limit and row["price"] <= cap}
        for plan in sorted(rows, key=lambda plan: float(rows[plan]["drop"])):
            if len(viable) < count:
                viable[plan] = rows[plan]
        rest, chosen = dict(viable), list[Plan]()
        while rest and len(chosen) < count:
            names = list(rest)
            best = [names[i] for i in front([(rest[n]["distance"], rest[n]["price"]) for n in names])]
            best.sort(key=lambda plan: rest[plan]["price"])
            room = count - len(chosen)
            if len(best) > room:
                best = [best[round(i * (len(best) - 1) / max(1, room - 1))] for i in range(room)]
                best = list(dict.fromkeys(best))
            chosen += best
            rest = {plan: row for plan, row in rest.items() if plan not in chosen and len(chosen) < count}
        return chosen[:count]

    def _slack(self, rows: dict[Plan, dict[str, Any]]) -> float:
        """How much a structure may still lose at a rung and be thought to meet the floor when it is trained."""
        floor = 0.01 if self.question.floor is None else self.question.floor.points(self.dense.score.value)
        return max(4 * floor, min(float(row["drop"]) for row in rows.values()) + 3 * floor) + 0.01

    def _teach(self, pool: ThreadPoolExecutor) -> None:
        """The dense network's outputs on every (example, augmentation), side by side."""
        reference, count = self.shop.reference, self.task.examples
        chunks = [(index, draw) for draw in range(self.task.draws) for index in torch.arange(count).split(512)]
        self.show.phase("the dense network's outputs", len(chunks))
        for draw in range(self.task.draws):
            reference.prepare(draw)
        for _ in pool.map(lambda chunk: reference.outputs(*chunk), chunks):
            self.show.advance()

    def _speed(self, model: nn.Module, key: str) -> float:
        """Steps a second of training, on one thread; measured once and kept."""
        kept = self.store.record(key)
        if kept:
            return float(kept["steps_per_s"])
        stage = training(1000, self.batch, 1e-4, self.seed, self.labels[0])
        with self.clock.on("train"):
            seconds = []
            first = self.clock.now

            def stop(step: int) -> bool:
                seconds.append(self.clock.now)
                return step >= 12 or self.clock.now - first > 4

            fit(replace(stage, rules=()), model, self.task, self.shop.reference, stop=stop)
        speed = (
            (len(seconds) - 1) / max(1e-6, seconds[-1] - seconds[0])
            if len(seconds) > 3
            else 1 / max(1e-6, seconds[-1] - first)
        )
        self.store.put(key, {"kind": "speed", "steps_per_s": round(speed, 3)})
        return speed

    def _schedule(self, plan: Plan) -> tuple[int, int]:
        """(steps of the full training, steps of a tail) of a plan: what fits its slot, or a number of epochs."""
        epoch = max(1, self.task.examples // self.batch)
        if self.clock.budget_s is None:
            full = max(160, min(30 * epoch, 4000))
            return full, max(40, full // 5)
        structure = self.shop.make(self.space.recipe(plan))
        speed = self._speed(structure, f"speed-{self.shop.key(self.space.recipe(plan))}")
        full = max(64, int(speed * self.slot))
        return full, max(24, int(0.17 * speed * self.slot))

    def _lr(self, plan: Plan) -> float:
        return 1e-2 if plan.width < 1 or plan.stride or plan.blocks else 2e-3

    def _trained(self, plan: Plan, until: float | None = None) -> Recipe:
        full, _ = self._schedule(plan)
        stage = training(
            full,
            self.batch,
            self._lr(plan),
            self.seed,
            plan.labels,
            None if until is None else max(1, int(full * until)),
        )
        return self.space.recipe(plan) + stage

    def _rung(self, plan: Plan, until: float) -> dict[str, Any]:
        """Train a plan up to a rung of its schedule; distance, drop and price of what it is there."""
        key = ""
        try:
            recipe = self._trained(plan, until)
            key = f"rung-{self.shop.key(recipe)}"
            kept = self.store.record(key)
            if kept:
                with self._lock:
                    self.tried.append(kept)
                return kept
            with self.clock.on("train"):
                model = self.shop.make(recipe, self._halt(0.7))
            inputs, _ = self.task.split("val")
            outputs = predict(model, inputs)
            if not bool(torch.isfinite(outputs).all()):
                raise Diverged("Train: the outputs must stay finite, got NaN or infinity. Lower the learning rate.")
            row = {
                "kind": "rung",
                "name": plan.name(),
                "until": until,
                "status": "rung",
                "distance": self._rank(outputs),
                "drop": self.task.loss_of(self.dense.score.value, self.task.rate(outputs, "val").value),
                "price": self._price(model, plan),
                "values": count_values(model),
            }
        except StoreError:
            raise
        except FAILURES as error:
            row = {
                "kind": "rung",
                "name": plan.name(),
                "until": until,
                "status": "failed",
                "reason": f"{type(error).__name__}: {error}",
            }
        with self._lock:
            self.tried.append(row)
        if key:
            self.store.put(key, row)
        return row

    def _rank(self, outputs: torch.Tensor) -> float:
        """What structures are ranked by while they train, far steadier than a metric: the task's own loss on val where
        there are labels (a student may come to know better than the dense network), else the distance from it."""
        targets = self.task.split("val")[1]
        if targets is not None and self.task.split("train")[1] is not None:
            return float(self.task.loss(outputs, targets))
        return float(self.task.divergence(outputs, self.dense.score.outputs).mean())

    def _price(self, model: nn.Module, plan: Plan) -> float:
        """What a structure costs by the objective: packed bytes at four bits, or the layers' milliseconds or MACs."""
        if not self._priced_by_runtime():
            return sum(s.storage().bits / (8 if s.bits >= 32 else 1) for s in pack(realize(model)).values()) / 8
        plain = fold_batchnorm(realize(model), self.task.example)
        structure = self.press.structure(plain, self._topology(plan))
        return self.press.price(structure, plain, self.question.objective)

    def _topology(self, plan: Plan) -> str:
        return self._topologies.get(plan, f"blocks {plan.blocks} stride {plan.stride} rank {plan.rank:g}")

    def _halt(self, until: float) -> Callable[[int], bool]:
        def halt(step: int) -> bool:
            if self.stopped:
                raise CancelledError
            return step % 8 == 0 and self.clock.left(until) < 0

        return halt

    # 4. the survivors --------------------------------------------------------------------------------------------

    def refine(self, pool: ThreadPoolExecutor, plans: list[Plan]) -> None:
        """A full training for each survivor, then its tails: fewer bits, trained through the rounding."""
        self.show.phase("full training and quantizing of the survivors", len(plans) * (2 + len(self.tails)))
        list(pool.map(self._survivor, plans))

    def _survivor(self, plan: Plan) -> None:
        try:
            recipe = self._trained(plan)
            with self.clock.on("train"):
                model = self.shop.make(recipe, self._halt(0.9))
            folded = fold_batchnorm(realize(model), self.task.example)
            self._point(folded, plan, Tail(), recipe)
            table = self._student_table(folded)
            for which in (Tail(8, trained=False), *self.tails):
                self._tail(plan, recipe, folded, which, table)
        except StoreError:
            raise
        except FAILURES as error:
            self.failed(plan.name(), error)

    def _student_table(self, folded: nn.Module) -> sensitivity.Table:
        with self.clock.on("calibrate"):
            return sensitivity.measure(
                folded,
                self.task,
                calibration(self.task, 256),
                techniques=("8 bits", "4 bits", "3 bits", "2 bits"),
                seconds=max(2.0, 0.02 * min(self.clock.left(), 600)),
            )

    def _tail(self, plan: Plan, recipe: Recipe, folded: nn.Module, which: Tail, table: sensitivity.Table) -> None:
        """One variant of a trained structure; skipped when the time is up."""
        if which.trained and self.clock.left(0.94) < 0.12 * self.slot:
            self.failed(f"{plan.name()}, {which.name()}", TimeoutError("the budget leaves no time to train it"))
            return
        sizes = {name: p.numel() for name, p in folded.named_parameters() if name in table}
        allocation: tuple[tuple[str, int], ...] = ()
        if sizes:
            losses = sensitivity.by_bits(table)
            allocation = tuple(sorted(allocate_bits(losses, sizes, int(which.bits * sum(sizes.values()))).items()))
        _, steps = self._schedule(plan)
        stages = tail(
            which, steps, self.batch, self._lr(plan) / 4, self.seed, plan.labels, allocation, self.space.tables
        )
        whole = Recipe((*recipe.stages, *stages))
        try:
            with self.clock.on("train" if which.trained else "calibrate"):
                model = self.shop.make(whole, self._halt(0.95))
            if which.trained and self.clock.left(0.95) < 0:
                raise TimeoutError("the budget ended while it trained")
            self._point(model, plan, which, whole)
        except StoreError:
            raise
        except FAILURES as error:
            self.failed(f"{plan.name()}, {which.name()}", error)

    def _point(self, model: nn.Module, plan: Plan, which: Tail, recipe: Recipe) -> None:
        name = f"{plan.name()}, {which.name()}"
        key = self.shop.key(recipe)
        point = self.press.point(model, self._topology(plan), name, recipe.data(), key)
        self.add(point)

    def add(self, point: Point) -> None:
        """Keep a point and its outcomes."""
        with self._lock:
            self.points.append(point)
            self.tried.append({"kind": "point", "status": "done", **point.row(self.task)})
        self.store.put(
            f"point-{point.key}", {"kind": "point", **point.row(self.task)}, {"outputs": point.score.outputs}
        )
        self.show.advance(point.name)
        self.show.best(self._best())

    def failed(self, name: str, error: BaseException) -> None:
        """Record a point that came to nothing, with the reason; the search goes on."""
        with self._lock:
            self.tried.append(
                {"kind": "point", "status": "failed", "name": name, "reason": f"{type(error).__name__}: {error}"}
            )
        self.show.advance(f"failed: {name}")

    def _best(self) -> str:
        floor = 0.01 if self.question.floor is None else self.question.floor.points(self.dense.score.value)
        able = [p for p in self.points if self.task.loss_of(self.dense.score.value, p.score.value) <= floor]
        best = min(able, key=lambda p: p.packed_bytes)
        return (
            f"{best.name}: {self.task.metric_name} {best.score.value:.4f}, packed {units.shown(best.packed_bytes)} "
            f"({self.dense.onnx_bytes / best.packed_bytes:.0f} times less)"
        )

    # without training --------------------------------------------------------------------------------------------

    def without_training(self) -> None:
        """The dense network itself in fewer bits and narrower arithmetic: what post-training techniques reach."""
        file = self.model if isinstance(self.model, OnnxModel) else None
        for point in post.points(self) if file is None else post_onnx.points(self, file):
            self.add(point)

    @property
    def train_steps_per_s(self) -> float:
        """Optimizer steps a second of training, over all workers' training time."""
        return self.shop.steps / self.shop.trained_s if self.shop.trained_s else 0.0
