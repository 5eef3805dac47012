"""Static 8-bit integers by groups of operators: what each gains and harms is measured, what hurts is left out."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

from onnx import ModelProto

from lilliput.cost.measure import latency
from lilliput.onnx.session import Session
from lilliput.quant.static import Observed, written
from lilliput.task import Inputs, Task

RULES = ("mse", "minmax")
MOST = 12  # groups that are told apart
Names = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Neighbouring operators, what it harms that they alone are in integers, and what that gains.

    Args:
        names: of the operators.
        harm: the mean divergence from the dense outputs.
        gain: the time of a run that they save, as a fraction of the dense network's.
    """

    names: Names
    harm: float
    gain: float = 0.0


@dataclass(frozen=True)
class Choice:
    """A choice of operators.

    Args:
        names: those in integers.
        harm: what their groups harm, added up.
        time: of a run, as a fraction of the dense network's, by what their groups gain.
    """

    names: Names
    harm: float
    time: float


@dataclass
class Integers:
    """The choices of operators of one network, and how they are written.

    Args:
        seen: the network and what calibration saw of it.
        rule: how ranges are fitted.
        whole: all operators.
        choices: those of the operators that gain in ONNX Runtime, from the fastest to the least harmful.
    """

    seen: Observed
    rule: str
    whole: Choice
    choices: list[Choice]

    def write(self, choice: Choice) -> ModelProto:
        """The network of a choice."""
        return written(self.seen, choice.names, self.rule)


def integers(
    seen: Observed, task: Task, inputs: Inputs, seconds: float, begin: Callable[[ModelProto], None] | None = None
) -> Generator[float, None, Integers]:
    """Measure what groups of operators in integers gain and harm, and list the choices that are worth a trial.

    The group that harms most is halved, and halved again, until the time is over or what hurts stands alone. A group
    whose gain is within the noise of its measurement is left out of all choices.

    Args:
        seen: the network and what calibration saw of it.
        task: gives the divergence.
        inputs: at most 128 examples.
        seconds: for all of it; fewer groups are told apart in less.
        begin: given the network with all operators in integers, the likely choice, before anything is told apart.

    Yields:
        Between the pieces of the work, how many seconds the next may take.
    """
    deadline = time.monotonic() + seconds
    dense = Session(seen.proto)
    before = dense.predict(inputs)

    def harm(names: Names, rule: str) -> float:
        outputs = Session(written(seen, names, rule)).predict(inputs)
        return float(task.divergence(outputs, before).mean().clamp_min(0))

    everything = tuple(site.name for site in seen.sites)
    began = time.monotonic()
    by_rule = {rule: harm(everything, rule) for rule in RULES}
    each = (time.monotonic() - began) / len(RULES)
    rule = min(by_rule, key=lambda rule: by_rule[rule])
    if begin is not None:
        begin(written(seen, everything, rule))
    whole, until = Group(everything, by_rule[rule]), deadline - 0.4 * seconds
    told = yield from _split(whole, lambda names: harm(names, rule), until, each)
    left = max(0.5, min(0.4 * seconds, deadline - time.monotonic()))
    yield left
    spent, groups = _gains(seen, rule, told, task.example, left)
    return Integers(seen, rule, Choice(everything, by_rule[rule], spent), _choices(groups))


def _split(
    whole: Group, harm: Callable[[Names], float], until: float, each: float
) -> Generator[float, None, list[Group]]:
    """Groups in the order of the graph, those that harm most in the smallest parts."""
    groups = [whole]
    while len(groups) < MOST and time.monotonic() + 2 * each < until:
        wide = [group for group in groups if len(group.names) > 1]
        worst = max(wide, key=lambda group: group.harm, default=None)
        if worst is None or worst.harm <= whole.harm / MOST:
            break
        yield 2 * each
        middle, place = len(worst.names) // 2, groups.index(worst)
        halves = [Group(part, harm(part)) for part in (worst.names[:middle], worst.names[middle:])]
        groups[place : place + 1] = halves
    return groups


def _gains(
    seen: Observed, rule: str, groups: Sequence[Group], example: Any, seconds: float
) -> tuple[float, list[Group]]:
    """The time of all in integers, and the groups with what each gains where all others are in integers too.

    Those that gain nothing are left out.
    """
    everything = [name for group in groups for name in group.names]
    sessions = {"dense": Session(seen.proto), "all": Session(written(seen, everything, rule))}
    if len(groups) > 1:
        for i, group in enumerate(groups):
            rest = [name for name in everything if name not in group.names]
            sessions[str(i)] = Session(written(seen, rest, rule))
    times = latency(sessions, example, seconds=seconds, clock=time.thread_time, settled=0.01)
    spent = {name: 1 / measured.ratio for name, measured in times.items()}
    if len(groups) == 1:
        return spent["all"], [Group(g.names, g.harm, 1 - spent["all"]) for g in groups if spent["all"] < 1]
    found = []
    for i, group in enumerate(groups):
        low, high = times[str(i)].interval or (0.0, 0.0)
        gain = spent[str(i)] - spent["all"]
        if gain > (1 / low - 1 / high) / 2:
            found.append(Group(group.names, group.harm, gain))
    return spent["all"], found


def _choices(groups: Sequence[Group]) -> list[Choice]:
    """All groups, then without those that harm most for what they gain; each choice harms half of the one before."""
    order = sorted(groups, key=lambda group: group.harm / group.gain)
    found: list[Choice] = []
    for count in range(len(order), 0, -1):
        taken = order[:count]
        harm = sum(group.harm for group in taken)
        if not found or harm <= found[-1].harm / 2:
            names = tuple(name for group in taken for name in group.names)
            found.append(Choice(names, harm, 1 - sum(group.gain for group in taken)))
    return found
