"""Stage: one thing done to a model. A frozen dataclass of plain values, called as (model, task, reference) -> model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.task import Task, call, predict
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
    # methods, whether it gives another network altogether, and whether operators stay as they are while shapes change.
    moment: ClassVar[str] = ""
    follows: ClassVar[tuple[str, ...]] = ()
    replaces: ClassVar[bool] = False
    same_graph: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, model: nn.Module, task: Task, reference: "Reference") -> nn.Module:
        """Return a new model."""

    def label(self) -> str:
        """Name the stage in a few words, as a search shows it."""
        return type(self).__name__


@dataclass
class Reference:
    """The dense model and its outputs, computed once per (example, augmentation) and kept in `load` and `save`.

    load(draw) gives the stored outputs of an augmentation or None; save(draw, outputs) keeps them. device: where the
    model runs and training happens; the outputs are kept in main memory.
    """

    model: nn.Module
    task: Task
    load: Callable[[int], Tensor | None] = lambda draw: None
    save: Callable[[int, Tensor], None] = lambda draw, outputs: None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        self._outputs: dict[int, Tensor] = {}
        self._known: dict[int, Tensor] = {}
        self._whole: set[int] = set()
        self.model.to(self.device).eval()

    def outputs(self, index: Tensor, draw: int) -> Tensor:
        """The dense model's outputs for training examples `index` under augmentation `draw`."""
        draw = draw % self.task.draws
        if draw not in self._outputs:
            self.prepare(draw)
        table = self._outputs[draw]
        if draw not in self._whole:
            known = self._known[draw]
            missing = index[~known[index]]
            if len(missing):
                inputs = on(self.task.inputs(missing, draw), self.device)
                table[missing] = predict(self.model, inputs).to(table)
                known[missing] = True
            if bool(known.all()):
                self._whole.add(draw)
                self.save(draw, table)
        return table[index].to(self.device)

    def prepare(self, draw: int) -> None:
        """Make room for an augmentation's outputs, from the store where they are."""
        if draw in self._outputs:
            return
        self.task.prepare(draw)
        stored, count = self.load(draw), self.task.examples
        if stored is None:
            with torch.no_grad():
                shape = call(self.model, on(self.task.example, self.device)).shape[1:]
            stored, known = torch.zeros(count, *shape), torch.zeros(count, dtype=torch.bool)
        else:
            known = torch.ones(count, dtype=torch.bool)
            self._whole.add(draw)
        self._known[draw] = known
        self._outputs[draw] = stored


def calibration(task: Task, examples: int = 256) -> Any:
    """`task.calibration(examples)`: training inputs, evenly spread, without augmentation, to take statistics from."""
    return task.calibration(examples)
