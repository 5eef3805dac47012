"""Codes for tensors: collect what every registered code proposes for each of them."""

import copy
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, cast

from torch import Tensor, nn

from lilliput import registry
from lilliput.code.base import Code
from lilliput.code.names import find
from lilliput.proposal import Refusal
from lilliput.statistics.calibrate import statistics
from lilliput.task import Task


@cache
def proposing() -> tuple[type[Code], ...]:
    """Every registered code that proposes itself for tensors."""
    codes = [entry.load() for entry in registry.methods() if "Code" in entry.kinds]
    return tuple(code for code in codes if code.proposals.__func__ is not cast(Any, Code.proposals).__func__)


class Measured(Mapping[str, Tensor]):
    """The statistics of one tensor, each measured for all of a model's tensors when a code first asks for it.

    Args:
        model: what is measured.
        task: gives the calibration inputs.
        names: the tensors.
    """

    def __init__(self, model: nn.Module, task: Task, names: list[str]) -> None:
        self.model, self.task, self.names, self.name = model, task, names, ""
        self._known: dict[str, dict[str, dict[str, Tensor]]] = {}

    def of(self, name: str) -> "Measured":
        """The same statistics, read for the tensor `name`."""
        other = copy.copy(self)
        other.name = name
        return other

    def __getitem__(self, need: str) -> Tensor:
        if need not in {entry.name for entry in registry.entries("statistic")}:
            raise KeyError(need)
        if need not in self._known:
            self._known[need] = statistics(self.model, self.task, self.names, [need])
        return self._known[need][self.name][need]

    def __iter__(self) -> Iterator[str]:
        return iter(entry.name for entry in registry.entries("statistic"))

    def __len__(self) -> int:
        return len(registry.entries("statistic"))


def proposed(tensor: Tensor, statistics: Mapping[str, Tensor]) -> list[Code]:
    """What every code proposes for a tensor; a refusal, or an error about this tensor, proposes nothing."""
    codes: list[Code] = []
    for code in proposing():
        try:
            offered = code.proposals(tensor, statistics)
        except (ValueError, TypeError, RuntimeError, KeyError):
            continue
        codes += [] if isinstance(offered, Refusal) else list(offered)
    return codes


def offered(model: nn.Module, task: Task) -> dict[str, str]:
    """What codes are proposed for a model's tensors, for --dry-run: the widths, and how many tensors each may store."""
    counts: dict[str, int] = {}
    parameters = dict(model.named_parameters())
    names = [name for name in find(model, who="codes") if name in parameters]
    measured = Measured(model, task, names)
    for name in names:
        for code in proposed(parameters[name].detach(), measured.of(name)):
            counts[code.label()] = counts.get(code.label(), 0) + 1
    listed = ", ".join(f"{label} ({count} tensors)" for label, count in counts.items())
    return {"codes": listed or "no tensor can be coded"}
