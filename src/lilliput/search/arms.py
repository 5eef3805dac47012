"""Arms: the networks of a search, each a structure with the trainings that it has had, and what may be done next."""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from lilliput.recipe import Recipe
from lilliput.search.levels import Level
from lilliput.search.outlook import STEPS, Law, Option, Outlook

DOUBLINGS = (0, 1, 2, 3, 4)
"""How many further trainings, each as long as all before it, are looked ahead."""
PARTS = (1.0, 0.5)
"""Of the training that an arm is due: where little time is left, half of it may still bring something."""
TAIL = 0.3
"""The training of a coded copy, as a part of that of its structure."""


@dataclass(eq=False)
class Arm:
    """A structure and what was made of it so far.

    Args:
        name: what a person calls it.
        plan: the structure's stages, among them trainings that it inherits from, and a training that is to begin.
        axes: the choice that it stands for, by method.
        weights: the price of its weights at four bits, or of a run of it, in prices of the dense network.
        besides: the price of what its file holds besides.
        first: seconds, or steps, of its first training.
        pace: seconds, or steps, that one step is expected to take.
        share: its parameters, as a part of the dense network's: what it may lose follows them, whatever it costs.
        level: how its weights are stored; None while they are plain.
        recipe: all stages that were done.
        spent: seconds, or steps, that its training took in all.
        steps: of its training in all.
        rounds: how often it was trained.
        bound: what it may lose, in floors; None before its first training.
        inherited: the bound of the arm whose weights it goes on with; None where it begins with the dense network's.
        sibling: whether it is that arm's structure, trained in another way.
        busy: whether it is being trained.
        extra: by how much the price of a written copy exceeded what was expected; None where none was written.
        tried: the levels that its weights were stored at, after the latest round.
        closed: why nothing more is done with it, or an empty text.
    """

    name: str
    plan: Recipe
    axes: dict[str, int]
    weights: float
    besides: float
    first: float
    pace: float = 1.0
    share: float = 1.0
    level: Level | None = None
    recipe: Recipe = field(default_factory=Recipe)
    spent: float = 0.0
    steps: int = 0
    rounds: int = 0
    bound: float | None = None
    inherited: float | None = None
    sibling: bool = False
    busy: bool = False
    extra: float | None = None
    tried: set[Level] = field(default_factory=set)
    closed: str = ""

    @property
    def price(self) -> float:
        """What it costs, as it is stored or at four bits."""
        return self.weights + self.besides

    @property
    def way(self) -> tuple[bool, int]:
        """How it is trained: through a rounding or not, mostly by the dense network or mostly by the labels."""
        return self.level is not None, self.axes.get("labels", 0)


@dataclass(frozen=True)
class Action:
    """What to do with an arm: `begin` it, train it `longer`, or `code` a copy of it at a level.

    Args:
        arm: which.
        kind: one of these words.
        level: of a coded copy.
        part: of the training that it is due.
    """

    arm: Arm
    kind: str
    level: Level | None = None
    part: float = 1.0

    @property
    def amount(self) -> float:
        """Seconds, or steps, of its training."""
        if self.level is not None:
            return max(TAIL * self.arm.spent, TAIL * self.arm.first) if self.level.trained else 0.0
        return self.part * (self.arm.first if self.kind == "begin" else self.arm.spent)


@dataclass
class Prospect:
    """Everything that may be done next, and what it may bring.

    Args:
        levels: how trained structures are stored.
        overhead: seconds that each training takes besides.
        copying: seconds that a coded copy takes which is not trained.
        outlook: how bounds move with price and training.
        child: what a structural step adds to the log bound of the arm that it inherits from.
        sibling: what training on in another way adds to it.
        laws: what each level adds to the log bound.
        offsets: by how much the log bounds of structures with a choice differ from the rest, by (axis, number).
        extras: by how much the prices of written copies exceeded what was expected.
    """

    levels: tuple[Level, ...]
    overhead: float = 0.5
    copying: float = 1.0
    outlook: Outlook = field(default_factory=Outlook)
    child: Law = field(default_factory=lambda: Law(0.6, 0.5))
    sibling: Law = field(default_factory=lambda: Law(0.0, 0.3))
    laws: dict[Level, Law] = field(default_factory=dict)
    offsets: dict[tuple[str, int], Law] = field(default_factory=dict)
    extras: list[float] = field(default_factory=list)

    def written(self, arm: Arm, extra: float) -> None:
        """Take in by how much the price of a written copy of an arm exceeded what was expected."""
        arm.extra = extra
        self.extras.append(extra)

    def options(self, arms: list[Arm]) -> list[Option]:
        """Every action on every arm that is free, each with what it may lead to."""
        return [option for arm in arms if not arm.busy and not arm.closed for option in self._of(arm)]

    def law(self, level: Level) -> Law:
        """What storing weights at a level adds to the log bound."""
        return self.laws.setdefault(level, level.law())

    def _of(self, arm: Arm) -> Iterator[Option]:
        if arm.bound is None:
            for part in PARTS:
                begin, (bound, spread) = Action(arm, "begin", part=part), self._begun(arm, part)
                for later, *rest in self._ahead(arm, bound, begin.amount, spread):
                    yield Option(begin, begin.amount + later, *rest)
            return
        longer = [Action(arm, "longer", part=part) for part in PARTS]
        if arm.level is not None:
            for k in DOUBLINGS[1:3]:
                yield Option(longer[0], arm.spent * (2**k - 1), arm.price, *self.outlook.trained(arm.bound, k, arm.way))
            return
        for level in self.levels:
            if level not in arm.tried:
                yield Option(Action(arm, "code", level), *self._coded(arm, level, arm.bound, arm.spent, 0.1))
        for action in longer:
            bound, spread = self.outlook.trained(arm.bound, math.log2(1 + action.part), arm.way)
            for later, *rest in self._ahead(arm, bound, arm.spent + action.amount, spread):
                yield Option(action, action.amount + later, *rest)

    def _ahead(
        self, arm: Arm, bound: float, spent: float, spread: float
    ) -> Iterator[tuple[float, float, float, float]]:
        """(seconds, price, bound, spread) of what an arm's weights may be stored as after further trainings."""
        for k in DOUBLINGS:
            later, wide = self.outlook.trained(bound, k, arm.way)
            for level in self.levels:
                tail, *rest = self._coded(arm, level, later, spent * 2**k, math.hypot(wide, spread))
                yield (spent * (2**k - 1) + tail, *rest)

    def _coded(
        self, arm: Arm, level: Level, bound: float, spent: float, spread: float
    ) -> tuple[float, float, float, float]:
        law, took = self.law(level), self.overhead + (TAIL * max(spent, arm.first) if level.trained else self.copying)
        return (
            took,
            max(1e-9, arm.weights * level.factor + arm.besides + self._extra(arm)),
            bound * math.exp(law.mean),
            math.hypot(spread, law.spread),
        )

    def _extra(self, arm: Arm) -> float:
        """What a file takes beyond tensors and graph of the dense network: as for the last copy, else as for most."""
        return arm.extra if arm.extra is not None else statistics.median(self.extras or [0.0])

    def _begun(self, arm: Arm, part: float) -> tuple[float, float]:
        """The expected bound of an arm after a part of its first training, and the spread of its logarithm."""
        if arm.inherited is not None:
            law = self._heirs(arm)
            return arm.inherited * math.exp(law.mean) * part**-STEPS, law.spread
        bound, spread = self.outlook.fresh(arm.share, part * arm.first / arm.pace)
        return bound * math.exp(self._offset(arm)), spread

    def _heirs(self, arm: Arm) -> Law:
        return self.sibling if arm.sibling else self.child

    def _offset(self, arm: Arm) -> float:
        return sum(self.offsets[item].mean for item in arm.axes.items() if item in self.offsets)

    def learn(
        self, action: Action, before: float | None, bound: float, doublings: float = 1.0, steps: float | None = None
    ) -> None:
        """Take in what an action made of the bound.

        Args:
            action: what was done.
            before: the bound before it; None where there was none.
            bound: the bound after it.
            doublings: how often a training that went on has doubled all before it.
            steps: that it had; None for as many as were expected.
        """
        arm = action.arm
        if before is None:
            if arm.inherited is not None:
                self._heirs(arm).learn(math.log(bound / arm.inherited))
                return
            steps = arm.first / arm.pace if steps is None else steps
            surprise = math.log(bound / self.outlook.fresh(arm.share, steps)[0]) - self._offset(arm)
            for item in arm.axes.items():
                self.offsets.setdefault(item, Law(0.0, 0.4, weight=3.0)).learn(surprise / len(arm.axes))
            self.outlook.begin(arm.share, bound, steps)
        elif action.level is not None:
            self.law(action.level).learn(math.log(bound / before))
        elif doublings > 0.2:
            self.outlook.doubled(arm.way).learn(math.log(before / bound) / doublings)
