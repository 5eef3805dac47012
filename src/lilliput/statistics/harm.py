"""Harm: how far a change of one tensor moves a network's outputs, predicted without running the changed network.

With D the divergence from the dense outputs, which is least where nothing changes, u drawn such that E[u u^T] is the
Hessian of D in the outputs, and J their derivative in a tensor's entries, a change dW has

    D = 1/2 E[(u^T J dW)^2],

where J^T u is a gradient. For a layer J dW is a sum over places of its outputs' derivatives times dW x, which gives
1/2 sum over outputs o of g_o dW_o M dW_o^T with M = E[x x^T], the second moment of what the layer is given, if the two
factors are independent: a form that a code can minimise, layer by layer. One pass with activations and one with
gradients serve every change of every tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import realize
from lilliput.statistics.rows import Rows, layer, sampled, together
from lilliput.statistics.sources import sees_inputs, single
from lilliput.task import Task, call, joined, leaves, length, mapped, on, take

STEP = 0.3  # of an output's spread: far enough to see where outputs that are sure of themselves would give way
SLOPES = 32  # sums of gradients that are kept
HELD_BYTES = 2**30  # of them


@dataclass(frozen=True)
class Metric:
    """What predicts the harm of a change of one tensor, and the quadratic form that a code may minimise instead.

    Args:
        rows: g, (out, 1).
        moment: M, (groups, d, d); or its diagonal, (1, d), where the inputs cannot be seen.
        slopes: sums of gradients along random directions of the outputs, (n, values), scaled so that the sum of
            squares of slopes @ dW is the expectation of (u^T J dW)^2.
        shape: of the tensor.

    Example:
        >>> form = Metric(torch.ones(1, 1), torch.eye(2)[None], torch.tensor([[1.0, 1.0]]), (1, 2))
        >>> form.harm(torch.tensor([[3.0, 4.0]]))
        24.5
    """

    rows: Tensor
    moment: Tensor
    slopes: Tensor
    shape: tuple[int, ...]

    @property
    def coupled(self) -> bool:
        """Whether the weights of an output can make up for one another."""
        return self.moment.dim() == 3

    def form(self, change: Tensor) -> float:
        """1/2 sum g dW M dW^T for a change dW of the tensor's shape."""
        flat = change.detach().float().reshape(len(self.rows), -1)
        if not self.coupled:
            return 0.5 * float(self.rows[:, 0] @ (flat.square() @ self.moment[0]))
        grouped = flat.view(len(self.moment), -1, flat.shape[1])
        return 0.5 * float(self.rows[:, 0] @ ((grouped @ self.moment) * grouped).sum(-1).reshape(-1))

    def harm(self, change: Tensor) -> float:
        """1/2 E (u^T J dW)^2 for a change dW of the tensor's shape."""
        return 0.5 * float((self.slopes @ change.detach().float().flatten()).square().sum())


@dataclass(frozen=True)
class Harm:
    """The metrics of a model's tensors, and the inputs of its layers that they were taken from.

    Args:
        metrics: by name of the tensor.
        rows: what each layer is given, by name of its weight.
        inputs: the calibration inputs.
    """

    metrics: dict[str, Metric]
    rows: Rows
    inputs: Any

    @classmethod
    def of(cls, model: nn.Module, task: Task, *, examples: int = 256, seed: int = 0) -> "Harm":
        """Measure a model's metrics on calibration inputs.

        Args:
            model: coded or plain; it stays as it is.
            task: gives the inputs, and the divergence.
            examples: how many inputs the second moments are taken from, and the gradients from every other of them.
            seed: of the directions and of the places that are looked at.
        """
        plain = realize(model).eval().float().requires_grad_(False)
        device = next(plain.parameters()).device
        inputs = together(plain, on(single(_inputs(task, examples)), device))
        names = [name for name, parameter in plain.named_parameters() if parameter.numel()]
        rows = sampled(plain, inputs, [name for name in names if _seen(plain, name)], seed)
        slopes = _slopes(plain, task, inputs, names, (examples + 1) // 2, seed)
        shapes = {name: tuple(plain.get_parameter(name).shape) for name in names}
        return cls({name: _metric(slopes[name], shapes[name], rows, name) for name in names}, rows, inputs)


def _inputs(task: Task, examples: int) -> Any:
    """Calibration inputs, half of them augmented where a task has augmentations.

    A network is surer of its training examples than of others, and shows there less of what a change does.
    """
    if not task.draws or min(examples, task.examples) < 2:
        return task.calibration(examples)
    half = min(examples, task.examples) // 2
    varied = task.batch(torch.linspace(0, task.examples - 1, half).long(), 0).inputs
    return joined([task.calibration(examples - half), varied])


def _seen(plain: nn.Module, name: str) -> bool:
    """Whether a layer's inputs can be seen, and its outputs are the rows of its weight (not so in a Conv1D)."""
    return sees_inputs(plain, name) and "Conv1D" not in type(layer(plain, name)).__name__


def _metric(slopes: Tensor, shape: tuple[int, ...], rows: Rows, name: str) -> Metric:
    """The metric of a tensor from its gradients."""
    flat = slopes.square().sum(0).reshape(shape[0] if shape else 1, -1)
    if name in rows.given:
        moment = rows.moment(name)
        trace = moment.diagonal(dim1=1, dim2=2).sum(1).repeat_interleave(len(flat) // len(moment))
        weights = flat.sum(1) / trace.clamp_min(1e-30)
    else:
        moment = flat.mean(0, keepdim=True)
        weights = flat.sum(1) / moment.sum().clamp_min(1e-30)
        # What the examples do not show (a word that none of them holds) is not harmless.
        shown = weights[weights > 0]
        if len(shown):
            weights = weights.clamp_min(float(shown.kthvalue(max(1, len(shown) // 10)).values))
    return Metric(weights[:, None], moment, slopes, shape)


def _slopes(
    plain: nn.Module, task: Task, inputs: Any, names: Iterable[str], graded: int, seed: int
) -> dict[str, Tensor]:
    """Sums of the gradients of some examples each, along random directions of the network's outputs, (n, values).

    Directions are drawn for each example, so that what the gradients of a sum have in common cancels on average.
    """
    parameters = {name: plain.get_parameter(name).requires_grad_(True) for name in names}
    total = sum(parameter.numel() for parameter in parameters.values())
    spread = torch.linspace(0, length(inputs) - 1, min(graded, length(inputs))).long()
    kept = max(4, min(SLOPES, len(spread), HELD_BYTES // (4 * max(1, total))))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    with torch.enable_grad():
        for index in spread.tensor_split(kept):
            if len(index):
                directed = _along(task, call(plain, take(inputs, index)), generator)
                found = torch.autograd.grad(directed, list(parameters.values()), materialize_grads=True)
                parts.append([part.flatten() for part in found])
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    scale = len(spread) ** -0.5
    return {name: torch.stack(each) * scale for name, each in zip(parameters, zip(*parts, strict=True), strict=True)}


def _along(task: Task, output: Any, generator: torch.Generator) -> Tensor:
    """sum over examples of u . output, with E[u u^T] like the Hessian of the divergence and of its trace.

    A small random step z of the outputs has the divergence D = 1/2 z^T H z and the gradient H z, whose length is set
    such that E |u|^2 = tr H.
    """
    dense = mapped(lambda leaf: leaf.detach(), output)

    def step(leaf: Tensor) -> Tensor:
        noise = torch.randn(tuple(leaf.shape), generator=generator).to(leaf)
        return leaf + STEP * leaf.std().clamp_min(1e-12) * noise if leaf.is_floating_point() else leaf

    with torch.enable_grad():
        moved = mapped(lambda leaf: step(leaf).requires_grad_(leaf.is_floating_point()), dense)
        apart = task.divergence(moved, dense)
        ends = [leaf for leaf in leaves(moved) if leaf.requires_grad]
        slopes = torch.autograd.grad(apart.sum(), ends, materialize_grads=True)
    sizes = torch.stack([slope.square().reshape(len(slope), -1).sum(1) for slope in slopes]).sum(0)
    steps = [STEP * leaf.std().clamp_min(1e-12) for leaf in leaves(dense) if leaf.is_floating_point()]
    length_ = (2 * apart.detach().clamp_min(0) / torch.stack(steps).mean().square() / sizes.clamp_min(1e-30)).sqrt()
    floats = [leaf for leaf in leaves(output) if leaf.is_floating_point()]
    return torch.stack(
        [
            ((slope * leaf).reshape(len(leaf), -1).sum(1) * length_).sum()
            for slope, leaf in zip(slopes, floats, strict=True)
        ]
    ).sum()
