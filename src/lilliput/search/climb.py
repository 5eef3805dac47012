"""Climb down: train structures and coded copies of them, always what is worth most a second, until the time is up.

Each structure is trained in rounds that end well, every round as long as all before it, and a copy of it is stored at a
level whenever that is worth more than training on. What a training brings changes what the next is expected to bring
(outlook.py): on a slow machine fewer and larger structures are tried, with more time smaller ones.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from lilliput.distill.logits import Distill
from lilliput.errors import StoreError, told
from lilliput.export.save import prepared
from lilliput.recipe import Recipe
from lilliput.schedule import Cosine
from lilliput.search import arithmetic
from lilliput.search import choose as choice
from lilliput.search.arms import Action, Arm, Prospect
from lilliput.search.candidates import Candidates, priced
from lilliput.search.job import FAILURES, Job
from lilliput.search.lessons import Lesson
from lilliput.search.levels import SPARSE, levels, sparse
from lilliput.search.outlook import LEAST, Worth, better, cheaper, choose
from lilliput.search.points import Point
from lilliput.search.pool import Pool, WorkerDied
from lilliput.search.space import Space, changes, identity, structure, topology, training
from lilliput.search.untrained import START
from lilliput.search.work import Asked, Made, batch_size_for, train
from lilliput.train import Train

WORK = 3.0  # trainings as long as a first one, for each structure that is asked for where steps are counted
GENERATION = 4  # trainings that are decided together where steps are counted, whatever the number of workers
COPY = 0.1  # of a first training, what a copy that is not trained counts for there
PRESSES = 2  # networks that are written after the last training
PRESSING = 3.0  # what that takes, in times of scoring val, before one was written
ZEROS = 3  # compilations that tell which zeros the engine rewards
ASKING = 0.1  # of the time that is left, which they may take
FIRST = 2  # structures a worker that are priced before any is trained
HOPE = 2.0  # times less than expected that options are taken to cost, where none seems worth anything else
FEWEST = 3  # coded copies that are exported, however much they may lose: they are what is nearest
WAIT = 0.3  # of its training, how long a worker may wait for the end of a piece of work beside
PATIENCE = 0.7  # how much shorter the next piece of work beside is taken to be, each time that it had to wait
NEAR = 2.0  # times what is allowed: what may lose, or costs, more is not exported
RATES = {True: 2e-2, False: 2e-3}  # of a first training, by whether the structure is another than the dense one
FEW = 2500  # steps: fewer are taken by Muon, which learns as much in half of them; more by AdamW, which is cheaper
MUON = 2.5  # its rate, against AdamW's
DECAY = 0.02  # of the weights of a structure; a coded copy is near its end
LOWER = 0.7  # the rate of a round, against that of the round before
FINE = 0.25  # the rate of a coded copy, against that of its structure


def climb(job: Job, space: Space, pool: Pool, waiting: list[Lesson], beside: Iterator[float]) -> None:
    """Add trained points to a job until its time is up, or nothing is worth more training.

    Args:
        job: the search.
        space: what its methods offer.
        pool: the workers.
        waiting: what they were asked for before (`lessons`).
        beside: what this process may do piece by piece while they train.
    """
    with job.clock.on("train"):
        here = _Climb.of(job, space, pool, beside)
        for each in waiting:
            while not each.ready and here.errand():
                pass
            each.keep(job, pool)
        job.show.phase("training what is worth most", 100)
        here.run()


@dataclass
class _Climb:
    job: Job
    pool: Pool
    beside: Iterator[float]
    candidates: Candidates
    prospect: Prospect
    total: float
    arms: list[Arm]
    used: float = 0.0
    coming: bool = True  # whether there is more to do beside
    errand_s: float = 0.0  # what the next piece of it may take
    pressed: int = 0
    running: "dict[Future[Made], Action]" = field(default_factory=dict)
    until: "dict[Future[Made], float]" = field(default_factory=dict)  # when they are expected

    @classmethod
    def of(cls, job: Job, space: Space, pool: Pool, beside: Iterator[float]) -> "_Climb":
        counted = job.clock.budget_s is None
        candidates = Candidates(job, space, None if counted else _remaining(job))
        roots = candidates.roots(pool)
        # Where a run has a price, finding it is done beside the first trainings.
        eager = counted or not job.question.priced_by_runtime
        arms = list(roots if eager else islice(roots, FIRST * pool.workers))
        first = max((arm.first for arm in arms), default=1.0)
        total = WORK * first * (job.trials or 1) if counted else _remaining(job)
        prospect = Prospect(levels(job), *((0.0, COPY * first) if counted else (0.5, 1.0)))
        here = cls(job, pool, beside, candidates, prospect, total, arms)
        here.beside = _in_turn(here._slowly(roots), beside)
        if counted:
            deque(here._slowly(roots), maxlen=0)
        return here

    def _slowly(self, roots: Iterator[Arm]) -> Iterator[float]:
        """Take in the structures that are not priced yet, and the levels that the engine has to be asked about."""
        for arm in roots:
            self.arms.append(arm)
            yield 0.0
        compiling = 0.0 if self.counted or self.job.forge is None else ZEROS * self.job.forge.expected_s()
        if self.arms and self.job.question.priced_by_runtime and compiling <= ASKING * self.left:
            yield compiling
            cheapest = min(self.arms, key=lambda arm: arm.price)
            self.prospect.levels += sparse(self.job, cheapest.plan)
            yield 0.0

    @property
    def counted(self) -> bool:
        """Whether steps are counted, so that no clock has a say."""
        return self.job.clock.budget_s is None

    @property
    def left(self) -> float:
        """Seconds of one worker, or steps, until the trainings end."""
        return self.total - self.used if self.counted else _remaining(self.job) - arithmetic.reserved_s(self.job)

    @property
    def floor(self) -> float:
        """The floor in points of the metric."""
        return max(self.job.question.points(self.job.dense.score.value), 1e-9)

    def run(self) -> None:
        """Train until nothing is worth more, or the time is up."""
        while self._launch() or self.running or (not self.counted and self.errand()):
            if self.counted:
                done, _ = wait(self.running)
            else:
                until = 0.0 if self.errand() else max(0.1, _remaining(self.job, 1 / 3))
                done, _ = wait(self.running, timeout=until, return_when=FIRST_COMPLETED)
                if self.running and not done and until:
                    break
            for future in [future for future in self.running if future in done]:
                del self.until[future]
                self._take(self.running.pop(future), future)
        for future, action in self.running.items():
            self.pool.end(future)
            self.job.failed(_title(action), TimeoutError("the budget ended while it trained"))
        if not any(arm.rounds for arm in self.arms):
            self.job.known.skip("training", "the budget left too little time, or nothing promised to be worth it")

    def errand(self) -> bool:
        """Do a piece of what this process does beside, once workers that end meanwhile have what is next; False for
        none."""
        if not self.coming:
            return False
        began = self.job.clock.now
        # What a worker is given ahead is chosen without what it tells itself: it rather waits for a while.
        late = [f for f, end in self.until.items() if end + WAIT * self.running[f].amount < began + self.errand_s]
        for _ in range(len(late) - max(0, len(self.running) - self.pool.workers)):
            if not self._begin(1):
                self.errand_s *= PATIENCE
                return False
        expected = next(self.beside, None)
        self.coming = expected is not None
        self.errand_s = expected or self.job.clock.now - began
        return True

    def _launch(self) -> bool:
        """Give free workers what is worth most; whether anything was begun."""
        if self.counted:
            return self._begin(0 if self.running else GENERATION) > 0
        return self._begin(self.pool.workers - len(self.running)) > 0

    def _begin(self, count: int) -> int:
        """Begin what is worth most, or have it wait for the first worker that will be free; how many there were."""
        for place in range(count):
            starts = 0.0
            if not self.counted and (waiting := len(self.running) - self.pool.workers) >= 0:
                starts = max(0.0, sorted(self.until.values())[waiting] - self.job.clock.now)
            options, left = self.prospect.options(self.arms), self.left - starts
            # Where nothing seems cheaper than what there is, prices were perhaps expected to be too high.
            option = choose(options, self._worth(), left) or choose(options, self._worth(HOPE), left)
            if option is None:
                return place
            option.what.arm.busy = True
            future = self._submit(option.what)
            self.running[future] = option.what
            took = option.what.amount or self.prospect.copying
            self.until[future] = self.job.clock.now + starts + self.prospect.overhead + took
        return count

    def _worth(self, hope: float = 1.0) -> Worth:
        """What makes one option better than another, by what is asked.

        Args:
            hope: how many times less than expected an option may cost.
        """
        question, job = self.job.question, self.job
        prices = [self._relative(point) for point in job.points]
        scores = [point.score for point in job.points]
        found = choice.choose(job.task, job.dense.score, scores, prices, floor=None, sure=question.sure)
        bounds = list(zip(job.points, np.maximum(found.bound, job.worst(scores)) / self.floor, strict=True))
        if question.floor is not None:
            promised = [(hope * self._relative(point), float(least)) for point, least in bounds if least <= 1]
            comes = self.coming and not self.counted and not question.priced_by_runtime
            sure = hope / START[question.file] if comes else hope  # what needs no training usually reaches START
            # The final choice takes back what a point owes to having been picked: what is safe beyond that counts.
            pairs = zip(bounds, found.luck / self.floor, strict=True)
            added = [more for (_, least), more in pairs if 0 < least <= NEAR]
            return cheaper(sure, promised, sum(added) / max(1, len(added)))
        fitting = [max(LEAST, float(least)) for point, least in bounds if question.fits(point.costs)]
        return better(min(fitting, default=100.0), self.most)

    @property
    def most(self) -> float:
        """The highest price, where one must hold."""
        limits = self.job.question.limits
        return limits[0][1] / self.candidates.unit if limits else math.inf

    def _relative(self, point: Point) -> float:
        """What a point costs, in prices of the dense network; at most 1 where it was not measured yet."""
        price = self.job.question.cost(priced(self.job.question), point.costs) / self.candidates.unit
        return price if math.isfinite(price) else 1.0

    def _submit(self, action: Action) -> "Future[Made]":
        """Ask a worker for a training, or take what an earlier run of the search has of it."""
        job, arm = self.job, action.arm
        self.used += action.amount or self.prospect.copying
        before = structure(arm.plan) if action.kind == "begin" else arm.recipe
        asked = Asked(
            before,
            _results(job, before),
            _training(job, action) if action.amount else None,
            replace(job.dense.score, outputs=None),
            action.level.bits if action.level else None,
            None if self.counted else action.amount,
            job.question.sure,
            None if job.question.worst is None else job.question.worst_points(job.dense.score.value) / self.floor,
        )
        known = job.store.record(_memo(job, action, before))
        if known is None:
            return self.pool.submit(train, asked)
        future: Future[Made] = Future()
        recipe = Recipe.parse(known["recipe"])
        future.set_result(Made(recipe, None, known["steps"], known["seconds"], known["drop"], known["bound"]))
        return future

    def _take(self, action: Action, future: "Future[Made]") -> None:
        """Take in what a worker made, or that it made nothing."""
        job, arm = self.job, action.arm
        arm.busy = False
        try:
            made = future.result()
        except StoreError:
            raise
        except (WorkerDied, InterruptedError, *FAILURES) as error:
            if action.level is None:
                arm.closed = told(error)
            else:
                arm.tried.add(action.level)
            job.failed(_title(action), error)
            return
        if made.result is not None:
            if job.store.record(key := job.runner.key(made.recipe)) is None:  # a kill may come between two records
                job.store.put(key, *made.result)
            job.runner.steps += made.steps
            job.runner.trained_s += made.seconds
        before = structure(arm.plan) if action.kind == "begin" else arm.recipe
        facts = {"steps": made.steps, "seconds": round(made.seconds, 3), "drop": made.drop, "bound": made.bound}
        memo = {"kind": "made", "recipe": made.recipe.data(), **facts}
        job.store.put(_memo(job, action, before), memo)
        self._learn(action, made)

    def _learn(self, action: Action, made: Made) -> None:
        """What a training tells: of its arm, of those that are like it, and of what may be tried next."""
        job, arm = self.job, action.arm
        after = max(made.bound / self.floor, LEAST)
        doublings = math.log2(1 + made.steps / arm.steps) if arm.steps else 1.0
        self.prospect.learn(action, arm.bound, after, doublings, made.steps)
        if action.level is not None:
            if not action.level.trained and not self.counted:
                self.prospect.copying = made.seconds
            arm.tried.add(action.level)
            weights = arm.weights * action.level.factor
            title = _title(action)
            arm = Arm(title, arm.plan, arm.axes, weights, arm.besides, 0.0, arm.pace, arm.share, action.level)
            arm.closed = "" if action.level.trained else "it is stored without training"
            self.arms.append(arm)
        arm.recipe, arm.bound, arm.steps, arm.rounds = made.recipe, after, arm.steps + made.steps, arm.rounds + 1
        arm.spent += action.amount if self.counted else made.seconds
        row: dict[str, Any] = {
            "kind": "round" if action.level is None else "tail",
            "name": arm.name,
            "at_s": round(job.clock.now, 2),
        }
        row |= {"axes": [axis for axis, number in arm.axes.items() if number], "seconds": round(made.seconds, 2)}
        row |= {"steps": made.steps, "drop": round(made.drop, 6), "bound": round(made.bound, 6), "price": arm.price}
        job.attempt({"status": "done", **row})
        job.show.advance(arm.name)
        if arm.level is not None:
            allowed = after <= NEAR if job.question.floor is not None else arm.price <= NEAR * self.most
            if allowed or self.pressed < FEWEST:
                expected, written = arm.price, self._press(arm)
                if written and action.level and not self.counted and not job.question.priced_by_runtime:
                    self.prospect.written(action.arm, written - expected)
            return
        arm.tried = set()
        if action.kind == "begin" and arm.inherited is None:
            waiting = sum(other.bound is None and not other.closed for other in self.arms)
            self.arms += self.candidates.sampled(arm, waiting)
        self.arms += self.candidates.children(arm)

    def _press(self, arm: Arm) -> float | None:
        """Make a coded arm an artifact, and add it as a point; its price, or None where it came to nothing."""
        self.pressed += 1
        began = self.job.clock.now
        job, recipe, own = self.job, arm.recipe, identity(Recipe(changes(arm.plan)))
        try:
            model, key = job.runner.make(recipe), job.runner.key(recipe)
            job.press.fitting(prepared(model, job.task.example)[0], topology(arm.plan), own)
            point = job.press.point(model, topology(arm.plan), arm.name, recipe.data(), key, own)
            job.add(point, axes=[axis for axis, number in arm.axes.items() if number])
            if (price := self._relative(point)) < 1:
                arm.weights = price - arm.besides
            job.took["press"] = job.clock.now - began
            return price
        except StoreError:
            raise
        except FAILURES as error:
            arm.closed = told(error)
            job.failed(arm.name, error)
        return None


def _in_turn(*kinds: Iterator[float]) -> Iterator[float]:
    """A piece of each kind of work in turn, each giving the seconds that the next may take."""
    waiting = deque((kind, 0.0) for kind in kinds)
    while waiting:
        kind, _ = waiting.popleft()
        if (expected := next(kind, None)) is not None:
            waiting.append((kind, expected))
        yield waiting[0][1] if waiting else 0.0


def _remaining(job: Job, part: float = 1.0) -> float:
    """Seconds until trainings end, or until a part of what comes after them is left."""
    return job.clock.remaining() - part * PRESSES * job.took.get("press", PRESSING * job.took["score"])


def _title(action: Action) -> str:
    """What an action makes, for people."""
    return action.arm.name if action.level is None else f"{action.arm.name}, {action.level.name()}"


def _training(job: Job, action: Action) -> Train:
    """The training of an action, on one cosine that starts lower with every round."""
    arm, plan = action.arm, training(action.arm.plan)
    changed = any(stage.structural for stage in structure(arm.plan).stages)
    rate = RATES[changed] * LOWER**arm.rounds
    rules, coded = plan.rules, action.level is not None or arm.level is not None
    orthogonal = changed and not coded and action.amount / arm.pace < FEW
    rate *= FINE if coded else MUON if orthogonal else 1.0
    if action.level is not None and action.level.sparsity:
        rules = (SPARSE["Taylor"](action.level.sparsity), *(rule for rule in rules if isinstance(rule, Distill)))
    return Train(
        steps=max(1, int(action.amount)),
        lr=Cosine(rate),
        rules=rules,
        supervised=plan.supervised,
        batch_size=batch_size_for(job.task),
        optimizer="muon" if orthogonal else "adamw",
        weight_decay=0.0 if coded else DECAY,
        seed=job.seed + arm.rounds,
    )


def _results(job: Job, recipe: Recipe) -> dict[int, Any]:
    """What the store holds of a recipe's trainings, but for those that another training goes on with."""
    known: dict[int, Any] = {}
    stages = recipe.stages
    for place, stage in enumerate(stages):
        if isinstance(stage, Train) and not any(isinstance(after, Train) for after in stages[place + 1 : place + 2]):
            key = job.runner.key(Recipe(stages[: place + 1]))
            known[place] = job.store.record(key), job.store.tensors(key)
    return known


def _memo(job: Job, action: Action, before: Recipe) -> str:
    """The key under which the store holds what an action made; a clock may have set how long it trained."""
    taught = identity(Recipe((replace(training(action.arm.plan), steps=1),)))
    text = f"{job.runner.key(before)} {action.kind} {action.level} {action.part} {taught} {job.clock.budget_s is None}"
    return f"made-{hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}"
