"""Question: what a search is asked, and the one place that says what a point costs.

Everything that compares points asks here: the scheduler, the choice, the front, the progress line, the report. Costs
are plain data under the names that summary.json has for them, so that a point and its row in a file cost the same.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lilliput.errors import near
from lilliput.search import ask

Costs = Mapping[str, Any]
OBJECTIVES = ("size", "latency", "macs", "memory")
FILES = {"lil": "packed_bytes", "onnx": "onnx_bytes"}
LATENCY = {"ort": "latency_ms", "engine": "engine_ms"}
PEAK = {"ort": "peak_bytes", "engine": "engine_peak_bytes"}


@dataclass(frozen=True)
class Question:
    """What is asked: the floor and what is to be small, or the limits that must hold and the best score within them.

    Args:
        objective: "size" (bytes of the file), "latency" (milliseconds of one example), "macs" or "memory" (peak bytes).
        floor: what may be lost; None where limits turn the question round.
        max_bytes: the most bytes of the file.
        max_latency_ms: the most milliseconds of one example.
        max_peak_bytes: the most bytes of memory.
        file: what is deployed, "lil" or "onnx".
        runtime: what it runs in, "ort" or "engine"; None for the better of both.
        sure: how probable it must be that no more is lost on new data.
        train: whether networks may be trained; otherwise tensors are coded without a training step.
        worst: what each class and each group may lose; None where only the average counts.
        strip: whether model.onnx has no names but those of inputs and outputs; None for what the file asks.

    Raises:
        ValueError: for a name that is none of these, or a limit that is not positive.

    Example:
        >>> question = Question("size", file="onnx")
        >>> question.price({"packed_bytes": 9_000, "onnx_bytes": 30_000})
        30000.0
    """

    objective: str = "size"
    floor: ask.Floor | None = None
    max_bytes: int | None = None
    max_latency_ms: float | None = None
    max_peak_bytes: int | None = None
    file: str = "lil"
    runtime: str | None = None
    sure: float = 0.9
    train: bool = True
    worst: ask.Floor | None = None
    strip: bool | None = None

    def __post_init__(self) -> None:
        for setting, given, allowed in (
            ("objective", self.objective, OBJECTIVES),
            ("file", self.file, tuple(FILES)),
            ("runtime", self.runtime or "ort", tuple(LATENCY)),
        ):
            if given not in allowed:
                raise ValueError(
                    f"shrink: {setting} must be one of {', '.join(allowed)}, got {given!r}. {near(given, allowed)}"
                )
        for setting, most in (
            ("max-bytes", self.max_bytes),
            ("max-latency-ms", self.max_latency_ms),
            ("max-peak", self.max_peak_bytes),
        ):
            if most is not None and not most > 0:
                raise ValueError(f"shrink: {setting} must be above 0, got {most}.")

    def data(self) -> dict[str, Any]:
        """The question as plain data."""
        return asdict(self)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> "Question":
        """The question that `data` gave."""
        floors = {name: data.get(name) for name in ("floor", "worst")}
        return cls(**{**data, **{name: None if kept is None else ask.Floor(**kept) for name, kept in floors.items()}})

    # what is measured ------------------------------------------------------------------------------------------------

    @property
    def nameless(self) -> bool:
        """Whether model.onnx is written without names: as asked, or where its bytes are what counts."""
        return (
            self.file == "onnx" and (self.objective == "size" or self.max_bytes is not None)
            if self.strip is None
            else self.strip
        )

    @property
    def file_key(self) -> str:
        """The name of the asked file's bytes in a point's row."""
        return FILES[self.file]

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the costs of which the smallest is the price."""
        return self._keys(self.objective)

    def _keys(self, what: str) -> tuple[str, ...]:
        by_runtime = {"latency": LATENCY, "memory": PEAK}.get(what)
        if by_runtime is None:
            return ("macs",) if what == "macs" else (self.file_key,)
        return tuple(by_runtime.values()) if self.runtime is None else (by_runtime[self.runtime],)

    @property
    def for_latency(self) -> bool:
        """Whether time is asked for, so that points are timed, also in the engine."""
        return self.objective == "latency" or self.max_latency_ms is not None

    @property
    def for_memory(self) -> bool:
        """Whether the memory of a run is asked for."""
        return self.objective == "memory" or self.max_peak_bytes is not None

    @property
    def priced_by_runtime(self) -> bool:
        """Whether structures are priced by their exported graph: by milliseconds, multiply-adds or memory."""
        return self.objective != "size" or self.max_latency_ms is not None or self.max_peak_bytes is not None

    # what a point costs ----------------------------------------------------------------------------------------------

    def price(self, costs: Costs) -> float:
        """What a point costs: bytes of the asked file, milliseconds, multiply-adds or bytes of memory.

        Args:
            costs: by the names of summary.json; the price is infinite where what is asked was not measured.
        """
        return self.cost(self.objective, costs)

    def cost(self, what: str, costs: Costs) -> float:
        """One cost of a point, "size", "latency", "macs" or "memory"; infinite where it was not measured."""
        return min((float(costs[key]) for key in self._keys(what) if costs.get(key) is not None), default=math.inf)

    def before(self, dense: Costs) -> float:
        """What the dense network costs: its ONNX file, its time in ONNX Runtime, its multiply-adds, its memory."""
        given = {"size": "onnx_bytes", "latency": "latency_ms"}.get(self.objective)
        return self.price(dense) if given is None or dense.get(given) is None else float(dense[given])

    def asked(self, costs: Costs) -> tuple[float, ...]:
        """What a point must be beaten on to leave the front: the asked file's bytes and each other cost that counts."""
        wanted = {"size", self.objective, *(what for what, _ in self.limits)}
        return tuple(self.cost(what, costs) for what in sorted(wanted))

    @property
    def limits(self) -> tuple[tuple[str, float], ...]:
        """The limits that hold, as (what, most): what is "size", "latency" or "memory"."""
        most = (("size", self.max_bytes), ("latency", self.max_latency_ms), ("memory", self.max_peak_bytes))
        return tuple((what, float(limit)) for what, limit in most if limit is not None)

    def excess(self, costs: Costs) -> float:
        """How many times the most exceeded limit is exceeded: at most 1 where all hold, 0 where there is none."""
        return max((self.cost(what, costs) / most for what, most in self.limits), default=0.0)

    def fits(self, costs: Costs) -> bool:
        """Whether every limit holds."""
        return self.excess(costs) <= 1

    def lack(self, costs: Costs, drop: float, dense: float) -> float:
        """How far a point is from what is asked: 0 where it meets it, 1 where it loses or needs twice what it may.

        Args:
            costs: as in `price`.
            drop: what it loses, in points of the metric.
            dense: the dense network's score.
        """
        beyond = self.excess(costs) - 1
        if self.floor is not None:
            floor = self.points(dense)
            beyond = max(beyond, drop / floor - 1 if floor > 0 else (math.inf if drop > 0 else 0.0))
        return max(0.0, beyond)

    def points(self, dense: float) -> float:
        """The floor in points of the metric; one point where there is none, to sort what is near from what is not."""
        return 0.01 if self.floor is None else self.floor.points(dense)

    def worst_points(self, dense: float) -> float:
        """What each class and each group may lose, in points of the metric; infinite where nothing is asked of them."""
        return math.inf if self.worst is None else self.worst.points(dense)

    # in words --------------------------------------------------------------------------------------------------------

    def written(self, price: float, what: str = "") -> str:
        """A price with its unit.

        Example:
            >>> Question().written(9120), Question("latency").written(0.3041), Question("macs").written(1.2e6)
            ('9.1 kB', '0.304 ms', '1,200,000 multiply-adds')
        """
        what = what or self.objective
        if not math.isfinite(price):
            return "not measured"
        if what == "latency":
            return f"{price:.3g} ms"
        return f"{price:,.0f} multiply-adds" if what == "macs" else ask.shown(price)

    @property
    def measure(self) -> str:
        """What is to be small, in words: "model.lil", "latency in the engine"."""
        where = {"ort": " in ONNX Runtime", "engine": " in the engine", None: ""}[self.runtime]
        names = {"latency": f"latency{where}", "memory": f"peak memory{where}", "macs": "multiply-adds"}
        return names.get(self.objective, f"model.{self.file}")


def question(
    objective: str = "size",
    floor: float | str = "1%",
    max_bytes: int | str | None = None,
    max_latency_ms: float | None = None,
    max_peak: int | str | None = None,
    file: str = "lil",
    runtime: str | None = None,
    sure: float | str = 0.9,
    train: bool = True,
    worst_class: float | str | None = None,
    strip: bool | None = None,
) -> Question:
    """A question as a person asks it; a limit turns it round, so that the floor no longer counts.

    Raises:
        ValueError: for what no search can answer.
    """
    turned = any(limit is not None for limit in (max_bytes, max_latency_ms, max_peak))
    allowed = ask.floor(floor)
    most = None if max_bytes is None else ask.size_bytes(max_bytes)
    peak = None if max_peak is None else ask.size_bytes(max_peak, "max-peak")
    kept, probable = None if turned else allowed, ask.sure(sure)
    worst = None if worst_class is None else ask.floor(worst_class, "worst-class")
    return Question(objective, kept, most, max_latency_ms, peak, file, runtime, probable, train, worst, strip)
