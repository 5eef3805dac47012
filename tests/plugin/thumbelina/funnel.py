"""A family of students: one hidden layer, narrower and narrower, in the place of any network of one input."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.proposal import Known, Proposals, Refusal
from lilliput.registry import lookup, register
from lilliput.stage import Reference, Stage
from lilliput.task import Task, call, leaves


@register("net")
class Funnel(nn.Module):
    """One hidden layer on the flattened input: (n, ...) -> (n, outputs).

    Args:
        inputs: how many numbers an example has.
        hidden: the width of the hidden layer.
        outputs: how many numbers come out.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x.flatten(1))
        return y


@dataclass(frozen=True)
class BecomeFunnel(Stage):
    """Replace a network by an untrained one with one hidden layer.

    Args:
        hidden: the width of that layer.
        seed: of its first weights.
        net: the name of the network in the registry.
    """

    hidden: int = 16
    seed: int = 0
    net: str = "Funnel"

    structural: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        example = leaves(task.example)[0]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            outputs = call(model.eval(), task.example).shape[1]
            made: nn.Module = lookup("net", self.net, "BecomeFunnel")(example[0].numel(), self.hidden, outputs)
        return made.eval()

    def label(self) -> str:
        return f"funnel of {self.hidden}"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer students from 32 down to 4 hidden units, for a network of one input and one row of outputs."""
        inputs = leaves(task.example)
        if len(inputs) != 1 or not inputs[0].is_floating_point() or call(model.eval(), task.example).ndim != 2:
            return Refusal("it takes one input of real numbers and puts out one row of numbers")
        return Proposals(tuple(cls(hidden) for hidden in (32, 16, 8, 4)), 2)
