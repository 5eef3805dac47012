"""Proposals: the settings that a method offers for a model, from mild to strong, or the reason why it offers none.

A Stage or Rule that a search may use names its `moment` and has a class method

    proposals(model, task, known) -> Sequence[Stage | Rule] | Proposals | Refusal

A search never lists methods by name: it asks every method of the registry that has a moment, on the model as the
stages before it left it. `moment` orders a recipe: "structure" (what the network computes), "training" (how it is
trained), "code" (how each tensor is stored), "activation" (which arithmetic runs). Within "structure" a method may name
the methods that it must follow; one with `replaces` gives another network altogether and goes first, one with `last`
takes whatever the others leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lilliput.errors import told

MOMENTS = ("structure", "training", "code", "activation")


@dataclass(frozen=True)
class Refusal:
    """Why a method offers nothing for a model.

    Args:
        reason: a sentence without a subject, such as "no block keeps its shape".

    Example:
        >>> Refusal("no convolution may take an earlier stride").reason
        'no convolution may take an earlier stride'
    """

    reason: str


@dataclass(frozen=True)
class Proposals:
    """A method's options, from mild to strong, and where to begin.

    Args:
        options: stages or rules, each milder than the next.
        first: the number, from 1, of the option that a search tries first; 0 where it begins without the method.

    Raises:
        ValueError: where there is no option, or `first` names none.

    Example:
        >>> Proposals(("a", "b", "c"), first=2).options[1]
        'b'
    """

    options: tuple[Any, ...]
    first: int = 0

    def __post_init__(self) -> None:
        if not self.options or not 0 <= self.first <= len(self.options):
            raise ValueError(
                f"Proposals: first must be from 0 to the number of options, which is at least 1, got {self.first} of "
                f"{len(self.options)}. Return a Refusal where a method has nothing to offer."
            )

    def __len__(self) -> int:
        return len(self.options)


@dataclass
class Known:
    """What a search knows when it asks for proposals.

    Args:
        objective: "size", "latency" or "macs".
        budget_s: the wall time of the whole search in seconds, None where it is counted in trials.
        harm: tensor -> technique -> mean divergence from the dense outputs when that tensor alone is stored that way.
        skipped: (name, reason) of what is left alone; a method adds what it cannot change.
        bare: method -> number of the option, from 1, which together lose little without training; 0 for none.

    Example:
        >>> known = Known()
        >>> known.skip("layers.0", "its channels are read by name")
        >>> known.skipped
        [('layers.0', 'its channels are read by name')]
    """

    objective: str = "size"
    budget_s: float | None = None
    harm: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    bare: dict[str, int] = field(default_factory=dict)

    def skip(self, name: str, reason: str) -> None:
        """Record once that `name` is left alone, and why."""
        if (name, reason) not in self.skipped:
            self.skipped.append((name, reason))


def proposals(method: Any, model: Any, task: Any, known: Known) -> Proposals | Refusal:
    """Ask a method what it offers for a model.

    Args:
        method: a class with a class method `proposals`.
        model: the model as the stages before it left it.
        task: what must be preserved.
        known: what the search knows so far.

    Returns:
        The options and where to begin (a plain sequence begins in its middle), or the refusal. What a method raises
        about a stranger's model is its refusal too: it never ends a search.
    """
    try:
        offered = method.proposals(model, task, known)
    except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, ArithmeticError) as error:
        return Refusal(told(error))
    if isinstance(offered, Refusal | Proposals):
        return offered
    options = tuple(offered)
    return Proposals(options, -(-len(options) // 2)) if options else Refusal("nothing to offer")


def in_order(methods: Sequence[type]) -> list[type]:
    """Methods of one moment in the order in which they are applied.

    Args:
        methods: classes with `replaces`, `last` and `follows` (names of methods).

    Returns:
        Those that replace the network first; then each behind what it must follow, otherwise by name; then the last.

    Raises:
        ValueError: where methods must follow each other in a circle.
    """
    waiting = sorted(methods, key=_place)
    placed: list[type] = []
    while waiting:
        names = {method.__name__ for method in waiting}
        early = [method for method in waiting if not getattr(method, "last", False)]
        ready = [method for method in early or waiting if not names & set(getattr(method, "follows", ()))]
        if not ready:
            raise ValueError(f"proposals: methods must not follow each other in a circle, got {sorted(names)}.")
        placed.append(ready[0])
        waiting.remove(ready[0])
    return placed


def _place(method: type) -> tuple[bool, str]:
    return not getattr(method, "replaces", False), method.__name__
