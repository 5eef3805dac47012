"""Levels: how a trained structure may be stored, with what is known beforehand of what that costs and gains."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lilliput.code.base import pack, realize
from lilliput.errors import StoreError
from lilliput.graph.fold import fold_batchnorm
from lilliput.prune.prune import Prune
from lilliput.recipe import Recipe
from lilliput.rule import Rule
from lilliput.search import engine
from lilliput.search.job import FAILURES, Job
from lilliput.search.outlook import Law
from lilliput.search.space import changes, identity, structure, topology

SPARSE: dict[str, Callable[[float], Rule]] = {
    "Taylor": lambda sparsity: Prune(sparsity, "taylor", allocation="normalized")
}
"""How zeros are made while a copy trains: what lies on the measured front of accuracy and time. Names are those of the
records, which a test holds them against."""


@dataclass(frozen=True)
class Level:
    """A way to store a trained structure.

    Args:
        bits: the mean width of weights; 32 leaves them as they are.
        sparsity: the fraction set to zero while it trains.
        factor: what it costs against the arm's price.
        trained: whether it is trained through the rounding.
    """

    bits: float
    sparsity: float = 0.0
    factor: float = 1.0
    trained: bool = True

    def name(self) -> str:
        """The level in a few words."""
        if self.bits >= 32:
            return "float32"
        text = f"{self.bits:g} bits" + (f", {self.sparsity:.0%} zeros" if self.sparsity else "")
        return text if self.trained else text + " without training"

    def law(self) -> Law:
        """What it adds to the log bound, before anything was seen: few bits and many zeros add more."""
        added = 0.02 + 0.1 * max(0.0, 4.5 - self.bits) ** 2 + 0.6 * self.sparsity**2
        return Law(added, 0.3 if self.trained else 0.15)


WHOLE = Level(32, factor=8.0, trained=False)  # of the smallest networks float32 makes the smallest file
UNTRAINED = Level(8, factor=2.0, trained=False)
COARSE = (4, 3, 2.5)  # bits to which rate and distortion take most trained structures without a further step
STORED = {
    "lil": (
        UNTRAINED,
        *(Level(bits, factor=bits / 4, trained=False) for bits in COARSE),
        *(Level(bits, factor=bits / 4) for bits in (3, 2.5, 2)),
    ),
    "onnx": (UNTRAINED, Level(4, trained=False), Level(4)),  # three bits take as many bytes there as four
}
"""Levels by file, with their bytes against those of four bits."""


def levels(job: Job) -> tuple[Level, ...]:
    """How trained structures are stored: in few bits for size, else in eight, which run no faster."""
    question = job.question
    if question.priced_by_runtime:
        return (replace(UNTRAINED, factor=1.0),)
    return STORED[question.file] if question.floor is not None else (WHOLE, *STORED[question.file])


def sparse(job: Job, plan: Recipe) -> tuple[Level, ...]:
    """Levels with the zeros that the engine rewards with time, where that may be asked for. It takes some seconds.

    Args:
        job: the search.
        plan: the structure that the engine is tried on.
    """
    question = job.question
    if not question.for_latency or question.runtime == "ort" or job.dense.values > engine.MOST_VALUES:
        return ()
    try:
        plain = fold_batchnorm(realize(job.runner.make(structure(plan))).cpu(), job.task.example)
        graph = job.press.structure(plain, topology(plan), identity(Recipe(changes(plan))))
        with job.clock.on("measure"):
            rewarded = engine.rewarded(graph, pack(plain), job.task.example)
    except StoreError:
        raise
    except FAILURES:
        return ()
    return tuple(Level(8, zeros, factor=engine.REWARD ** -(place + 1.0)) for place, zeros in enumerate(rewarded))
