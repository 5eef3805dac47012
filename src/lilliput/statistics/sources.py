"""Sources: what a statistic is taken from. The first parameter of a statistic names one of these classes.

`Weights` holds no data, `Calibration` inputs, `Layers` also what each layer is given, `Labelled` also the task's loss.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.task import Batch, Task, call, leaves, length, mapped, on, take

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Weights:
    """A plain model in eval mode and float32: the source of a statistic that needs no data.

    Attributes:
        model: without codes; a statistic leaves it as it is.
        seed: of whatever a statistic draws.
        batch_size: how many examples go through the model at once.
    """

    model: nn.Module
    seed: int = field(default=0, kw_only=True)
    batch_size: int = field(default=64, kw_only=True)


@dataclass(frozen=True)
class Calibration(Weights):
    """The calibration inputs of a task as a plain model sees them, in float32.

    Attributes:
        task: where they come from.
        inputs: the examples along the first axis.
        labels: their labels or None.
    """

    task: Task
    inputs: Any
    labels: Any

    @classmethod
    def of(cls, model: nn.Module, task: Task, examples: int, seed: int = 0, batch_size: int = 64) -> Self:
        """Evenly spread training examples of a task, at most `examples` of them."""
        inputs, labels = single(task.calibration(examples)), task.probe("train").targets
        if labels is not None:
            labels = single(take(labels, torch.linspace(0, length(labels) - 1, length(inputs)).long()))
        return cls(model, task, inputs, labels, seed=seed, batch_size=batch_size)

    def outputs(self, batch_size: int | None = None) -> Iterator[tuple[Any, Any]]:
        """The model's output and the labels, batch by batch."""
        device, size = next(self.model.parameters()).device, batch_size or self.batch_size
        for first in range(0, length(self.inputs), size):
            part = slice(first, first + size)
            labels = on(take(self.labels, part), device)
            yield call(self.model, on(take(self.inputs, part), device)), labels

    def projections(self) -> Iterator[tuple[Tensor, float]]:
        """For each example u . output and its share of all, with u drawn such that E[u u^T] is the Hessian of the
        example's loss in the output. The labels count only where the loss is no likelihood.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for output, labels in self.outputs(1):
            yield _projection(self.task, output, labels, generator), 1 / length(self.inputs)


@dataclass(frozen=True)
class Layers(Calibration):
    """Calibration inputs, and what every layer is given while they pass through the model."""

    @torch.no_grad()
    def watch(self, parameters: Parameters, see: Callable[[str, nn.Module, Tensor], None]) -> None:
        """Run every batch, and call see(name, layer, input) whenever the layer of a weight is called.

        Only weights whose inputs can be seen are watched: see `sees_inputs`.
        """
        hooks = []
        for name in (name for name in parameters if sees_inputs(self.model, name)):

            def listen(module: nn.Module, given: tuple[Any, ...], output: Any, name: str = name) -> None:
                see(name, module, leaves(given)[0].detach().float())

            hooks.append(self.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(listen))
        for _ in self.outputs():
            pass
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Labelled(Calibration):
    """Calibration inputs with the task's loss on them."""

    def losses(self, batch_size: int | None = None) -> Iterator[tuple[Tensor, float]]:
        """The loss of each batch and the share of the examples in it; without labels, on ones drawn from the model's
        outputs, the same every time.
        """
        generator = torch.Generator().manual_seed(self.seed)
        for output, labels in self.outputs(batch_size):
            yield _loss(self.task, output, labels, generator), length(output) / length(self.inputs)


def sees_inputs(model: nn.Module, name: str) -> bool:
    """Whether the inputs that meet a tensor can be seen: those of a linear or convolutional module that is called."""
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    called = not (path and isinstance(model.get_submodule(path.rpartition(".")[0]), nn.MultiheadAttention))
    return (
        attribute == "weight"
        and called
        and (
            isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
            or type(module).__name__ in ("Conv1D", "ParametrizedConv1D")
        )
    )


def single(inputs: Any) -> Any:
    """Inputs with every number in float32."""
    return mapped(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, inputs)


def gradients(scalar: Tensor, parameters: Parameters, again: bool = False) -> tuple[Tensor, ...]:
    """The gradient in each parameter, zero where the scalar does not depend on it; again: to be derived once more."""
    return torch.autograd.grad(scalar, list(parameters.values()), create_graph=again, materialize_grads=True)


def _loss(task: Task, output: Any, labels: Any, generator: torch.Generator) -> Tensor:
    """The task's loss; without labels, on ones drawn from the output itself."""
    loss: Tensor
    axis = task.class_axis(output)
    if labels is not None:
        loss = task.loss(output, Batch((), labels))
    elif axis is not None and task.meaning.kind == "logits":
        chances = output.detach().movedim(axis, -1).softmax(-1).cpu()
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator).reshape(chances.shape[:-1])
        loss = task.loss(output, Batch((), drawn.to(output.device)))
    else:
        # A task that is no classification: random signs to project on.
        signed = [(leaf * _signs(leaf, generator)).sum() for leaf in leaves(output)]
        loss = torch.stack(signed).sum() / length(output)
    return loss


def _signs(output: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, tuple(output.shape), generator=generator) * 2 - 1).to(output)


def _projection(task: Task, output: Any, labels: Any, generator: torch.Generator) -> Tensor:
    loss: Tensor
    axis = task.class_axis(output)
    if axis is not None and task.meaning.kind == "logits":
        rows = output.movedim(axis, -1).reshape(-1, output.shape[axis])
        chances = rows.detach().softmax(-1)
        drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(output.device)
        loss = (rows * (chances - F.one_hot(drawn, rows.shape[1]))).sum() / math.sqrt(len(rows))
    elif task.meaning.kind == "bits":
        chance = output.detach().sigmoid()
        drawn = torch.rand(tuple(output.shape), generator=generator).to(output) < chance
        loss = (output * (chance - drawn.to(output))).sum() / math.sqrt(output.numel())
    elif task.loss_name == "mse":
        loss = (output * _signs(output, generator)).sum() * math.sqrt(2 / output.numel())
    else:
        loss = _loss(task, output, labels, generator)
    return loss
