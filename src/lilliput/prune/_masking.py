"""Shared base of rules that train a dense tensor behind a mask that they update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.code.base import Code, attach, codes
from lilliput.code.masked import Masked
from lilliput.code.names import theta
from lilliput.errors import NotSupported
from lilliput.prune import patterns
from lilliput.prune.masks import (
    Allocation,
    attach_masks,
    check_allocation,
    check_sparsity,
    chosen,
    prunable,
    put_,
    select,
)
from lilliput.rule import Rule, State
from lilliput.schedule import Cubic, Schedule, at
from lilliput.stage import Reference
from lilliput.task import Task


@dataclass(frozen=True)
class Masking(Rule):
    """Hold a mask on each chosen tensor, which keeps everything until the rule moves it.

    Args:
        sparsity: The fraction that is zero, in [0, 1), or a schedule of the step.
        pattern: As in `Prune`.
        allocation: As in `Prune`.
        where: As in `Prune`.
    """

    sparsity: float | Schedule = 0.9
    pattern: str = "elements"
    allocation: Allocation = "global"
    where: str = "*"

    straight: ClassVar[bool] = False

    def __post_init__(self) -> None:
        who, pattern = type(self).__name__, patterns.parse(self.pattern)
        check_allocation(self.allocation, who)
        pairs = () if isinstance(self.allocation, str) else self.allocation
        for value in (at(self.sparsity, 0, 1), at(self.sparsity, 1, 1), *(value for _, value in pairs)):
            check_sparsity(value, pattern, who, self.pattern)

    @property
    def schedule(self) -> Schedule:
        """How sparse the network is while it trains, for rules that begin dense: a number s means Cubic(s)."""
        return Cubic(self.sparsity, begin=0.1) if isinstance(self.sparsity, int | float) else self.sparsity

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """The tensors that `where` takes in but that are left alone, each with the reason."""
        return prunable(model, self.where, patterns.parse(self.pattern), type(self).__name__, self.allocation)[1]

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        who, pattern = type(self).__name__, patterns.parse(self.pattern)
        names, skipped = prunable(model, self.where, pattern, who, self.allocation)
        if not names:
            raise ValueError(
                f"{who}: some tensor must be left to prune, got none of {list(skipped)[:3]}: "
                f"{next(iter(skipped.values()), 'the allocation is empty')}."
            )
        attach_masks(model, names, pattern, self.straight)
        return {}

    def masked(self, model: nn.Module) -> dict[str, Masked]:
        """The masks that this rule moves."""
        return chosen(model, self.where, self.allocation)

    def rated(self, state: State, model: nn.Module) -> dict[str, Tensor]:
        """The score of every entry by tensor, dropped ones included: magnitudes, where a rule has no other."""
        return {name: theta(model, name).detach().float().abs() for name in self.masked(model)}

    def keep_(self, rated: dict[str, Tensor], model: nn.Module, sparsity: float) -> None:
        """Keep the entries of the highest scores, in place."""
        pattern = patterns.parse(self.pattern)
        put_(self.masked(model), select(rated, sparsity, self.allocation, pattern, at(self.sparsity, 1, 1)), pattern)

    @torch.no_grad()
    def end(self, state: State, model: nn.Module) -> State:
        for name, code in self.masked(model).items():
            code.straight = False
            theta(model, name).mul_(code.mask)
        return state


def check_number(sparsity: object, who: str) -> None:
    """Raise ValueError where a sparsity that stays the same for the whole training is given as a schedule."""
    if not isinstance(sparsity, int | float):
        raise ValueError(
            f"{who}: sparsity must be a number, for it does not change, got {sparsity}. Prune and STE take a schedule."
        )


def attach_gates(
    model: nn.Module, where: str, allocation: Allocation, who: str, make: Callable[[str], Code]
) -> list[str]:
    """Store tensors by codes that learn which of their entries are zero, in place, unless that is done already.

    Raises:
        ValueError: Where no tensor is left.
        NotSupported: For tensors that have a code already.
    """
    kind, seen = type(make("")), codes(model)
    if done := [name for name, chain in seen.items() if isinstance(chain[0], kind)]:
        return done
    names, skipped = prunable(model, where, patterns.parse("elements"), who, allocation)
    if not names:
        raise ValueError(
            f"{who}: some tensor must be left to prune, got none of {list(skipped)[:3]}: "
            f"{next(iter(skipped.values()), 'the allocation is empty')}."
        )
    for name in names:
        if name in seen:
            raise NotSupported(f"{who}: {name} must be plain, but has a mask. Realize it first.")
        attach(model, name, make(name))
    return names


def harden_(model: nn.Module, name: str, mask: Tensor) -> None:
    """Store a tensor as it is decoded now by a mask instead, in place."""
    path, _, attribute = name.rpartition(".")
    module, trains = model.get_submodule(path), theta(model, name).requires_grad
    with torch.enable_grad():  # a tensor that needs no gradient would become a buffer
        theta(model, name).requires_grad_(True)
        parametrize.remove_parametrizations(module, attribute)
    module.get_parameter(attribute).requires_grad_(trains)
    attach(model, name, Masked(mask))


def second(model: nn.Module, name: str) -> Tensor:
    """What is trained beside the weights themselves: thresholds, gates."""
    path, _, attribute = name.rpartition(".")
    return model.get_parameter(f"{path}.parametrizations.{attribute}.original1".lstrip("."))
