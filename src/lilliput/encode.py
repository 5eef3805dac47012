"""Encode: store tensors by any code, as a stage of a recipe."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lilliput.code.base import Code, attach, copy_model
from lilliput.code.names import find
from lilliput.code.spec import Spec
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class Encode(Stage):
    """Attach a code to every tensor that `where` chooses; on top of a code that is there, to its inner theta.

    Args:
        code: A code, or its plain data such as {"code": "LowRank", "rank": 8}, in which form a recipe holds it. Each
            tensor gets a new one of these settings.
        where: Glob patterns on module or tensor names; "*" takes every weight of two and more axes.

    Raises:
        KeyError: for a code that is not known.
        NotSupported: for a tensor that the code refuses, with the reason.
        TypeError: for settings that the code does not take.
        ValueError: when `where` matches nothing.

    Example:
        >>> from lilliput.code.base import codes
        >>> from lilliput.code.low_rank import LowRank
        >>> net = Encode(LowRank(2), where="0")(nn.Sequential(nn.Linear(8, 8)), None, None)
        >>> codes(net)
        {'0.weight': (LowRank(rank=2),)}
    """

    code: Spec | Code | Mapping[str, Any]
    where: str = "*"

    def __post_init__(self) -> None:
        object.__setattr__(self, "code", Spec.of(self.code))
        Spec.of(self.code).make()

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        model = copy_model(model)
        for name in find(model, self.where, who="Encode"):
            attach(model, name, Spec.of(self.code).make())
        return model
