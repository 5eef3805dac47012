"""Stage: one thing done to a model. A frozen dataclass of plain values, called as (model, task, reference) -> model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from lilliput.reference import Reference as Reference
from lilliput.task import Task
from lilliput.task import on as on


class Stage(ABC):
    """Do one thing to a model: prune once, factorise, train, remove channels.

    A stage is a frozen dataclass of plain values (it hashes, prints, stores, compares) and never changes its argument.
    A `structural` one changes shapes and is given plain tensors. `version` rises when its result changes.

    Example:
        >>> from dataclasses import dataclass
        >>> from lilliput.code.base import copy_model
        >>> @dataclass(frozen=True)
        ... class Scale(Stage):
        ...     factor: float = 2.0
        ...     def __call__(self, model, task, reference):
        ...         model = copy_model(model)
        ...         for parameter in model.parameters():
        ...             parameter.data *= self.factor
        ...         return model
        >>> net = nn.Linear(1, 1, bias=False)
        >>> bool(Scale(3.0)(net, None, None).weight == 3 * net.weight)
        True
    """

    version: ClassVar[int] = 1
    structural: ClassVar[bool] = False
    # What a search needs to know of a stage that proposes itself (lilliput.proposal): when it is applied, behind which
    # methods, whether it gives another network altogether, whether it takes what all others leave, whether it may pay
    # without training, and whether operators stay as they are while shapes change.
    moment: ClassVar[str] = ""
    follows: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False
    last: ClassVar[bool] = False
    untrained: ClassVar[bool] = False
    same_graph: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, model: nn.Module, task: Task, reference: "Reference") -> nn.Module:
        """Return a new model."""

    def label(self) -> str:
        """Name the stage in a few words, as a search shows it."""
        return type(self).__name__


def calibration(task: Task, examples: int = 256) -> Any:
    """`task.calibration(examples)`: training inputs, evenly spread, without augmentation, to take statistics from."""
    return task.calibration(examples)
