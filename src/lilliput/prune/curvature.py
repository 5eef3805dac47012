"""Curvature: first and second derivatives of a task's loss in the weights, and the flow through a network without data.

Each function takes the named parameters of a plain model and gives a tensor of the shape of each.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lilliput.stage import calibration, on
from lilliput.task import Task, call, leaves, length, take

Parameters = dict[str, Tensor]
HELD_BYTES = 2**30


@dataclass(frozen=True)
class Examples:
    """The calibration examples of a task as a plain model sees them, in float32, with their labels or None."""

    model: nn.Module
    task: Task
    inputs: Any
    labels: Tensor | None
    seed: int = 0

    @classmethod
    def of(cls, model: nn.Module, task: Task, examples: int, seed: int) -> "Examples":
        inputs, (_, labels) = single(calibration(task, examples)), task.split("train")
        if labels is not None:
            labels = labels[torch.linspace(0, len(labels) - 1, length(inputs)).long()]
            labels = labels.float() if labels.is_floating_point() else labels
        return cls(model, task, inputs, labels, seed)

    def outputs(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The model's output and the labels, batch by batch."""
        device = next(self.model.parameters()).device
        for first in range(0, length(self.inputs), batch_size):
            part = slice(first, first + batch_size)
            labels = None if self.labels is None else self.labels[part].to(device)
            yield call(self.model, on(take(self.inputs, part), device)), labels

    def losses(self, batch_size: int) -> Iterator[tuple[Tensor, float]]:
        """The loss of each batch and the share of the examples in it; the same labels are drawn every time."""
        generator = torch.Generator().manual_seed(self.seed)
        for output, labels in self.outputs(batch_size):
            yield _loss(self.task, output, labels, generator), len(output) / length(self.inputs)

    def projections(self) -> Iterator[tuple[Tensor, float]]:
        """For each example u . output, with u drawn such that E[u u^T] is the Hessian of its loss in the output."""
        generator = torch.Generator().manual_seed(self.seed)
        for output, labels in self.outputs(1):
            yield _projection(self.task, output, labels, generator), 1 / length(self.inputs)


def single(inputs: Any) -> Any:
    """Inputs with every number in float32."""
    if isinstance(inputs, dict):
        return {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    parts = tuple(value.float() if value.is_floating_point() else value for value in leaves(inputs))
    return parts if isinstance(inputs, tuple) else parts[0]


def _loss(task: Task, output: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    """The task's loss; without labels, on ones drawn from the output itself."""
    loss: Tensor
    if labels is not None:
        loss = task.loss(output, labels)
    elif task.loss_name == "cross_entropy":
        chances = output.detach().softmax(-1).cpu()
        loss = task.loss(output, torch.multinomial(chances, 1, generator=generator)[:, 0].to(output.device))
    else:
        # A task that is no classification: random signs to project on.
        loss = (output * _signs(output, generator)).sum() / len(output)
    return loss


def _signs(output: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, tuple(output.shape), generator=generator) * 2 - 1).to(output)


def _projection(task: Task, output: Tensor, labels: Tensor | None, generator: torch.Generator) -> Tensor:
    if task.loss_name == "cross_entropy":
        rows = output.movedim(1, -1).reshape(-1, output.shape[1])
        chances = rows.detach().softmax(-1)
        drawn = torch.multinomial(chances.cpu(), 1, generator=generator)[:, 0].to(output.device)
        return (rows * (chances - F.one_hot(drawn, rows.shape[1]))).sum() / math.sqrt(len(rows))
    if task.loss_name == "bce":
        chance = output.detach().sigmoid()
        drawn = torch.rand(tuple(output.shape), generator=generator).to(output) < chance
        return (output * (chance - drawn.to(output))).sum() / math.sqrt(output.numel())
    if task.loss_name == "mse":
        return (output * _signs(output, generator)).sum() * math.sqrt(2 / output.numel())
    return _loss(task, output, labels, generator)


def gradients(scalar: Tensor, parameters: Parameters, again: bool = False) -> tuple[Tensor, ...]:
    """The gradient in each parameter, zero where the scalar does not depend on it; again: to be derived once more."""
    return torch.autograd.grad(scalar, list(parameters.values()), create_graph=again, materialize_grads=True)


def root_mean_square(examples: Examples, parameters: Parameters, batch_size: int) -> Parameters:
    """The root of the mean, over batches, of the squared gradient."""
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    batches = math.ceil(length(examples.inputs) / batch_size)
    for loss, _ in examples.losses(batch_size):
        for square, gradient in zip(squares.values(), gradients(loss, parameters), strict=True):
            square += gradient.square() / batches
    return {name: square.sqrt() for name, square in squares.items()}


def mean_gradient(examples: Examples, parameters: Parameters, batch_size: int) -> Parameters:
    """g: the gradient of the mean loss of all examples."""
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss, share in examples.losses(batch_size):
        for held, gradient in zip(mean.values(), gradients(loss, parameters), strict=True):
            held += gradient * share
    return mean


def hessian_gradient(examples: Examples, parameters: Parameters, batch_size: int) -> Parameters:
    """H g: half the gradient of ||g||^2, with g and H the first and second derivative of the mean loss in these
    parameters. Two passes: H is the sum over batches, so H g is, once g is known.
    """
    g = mean_gradient(examples, parameters, batch_size)
    product = {name: torch.zeros_like(p) for name, p in parameters.items()}
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        for loss, share in examples.losses(batch_size):
            first = gradients(loss, parameters, again=True)
            along = torch.stack([(a * b).sum() for a, b in zip(first, g.values(), strict=True)]).sum()
            if along.requires_grad:
                for held, second in zip(product.values(), gradients(along, parameters), strict=True):
                    held += second * share
    return product


def curvature(examples: Examples, parameters: Parameters) -> Parameters:
    """The diagonal of the generalised Gauss-Newton matrix: the mean over examples of (J^T u)^2, J the derivative of the
    output, one u an example. For cross entropy and binary cross entropy that is the Fisher information, its labels
    drawn from the model; for squared error it is exact where each parameter feeds one output. Any other loss: the
    squared gradient at the example's own label.
    """
    diagonal = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for projection, share in examples.projections():
        for held, gradient in zip(diagonal.values(), gradients(projection, parameters), strict=True):
            held += gradient.square() * share
    return diagonal


def fisher_blocks(examples: Examples, parameters: Parameters, size: int = 32) -> Parameters:
    """The empirical Fisher information F = 1/N sum of g_n g_n^T, g_n the gradient of example n's loss, in blocks along
    the diagonal: (blocks, size, size) in float64 for each tensor, flattened in C order and padded with zeros.

    Source: Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340, equation 2.
    """
    count, values = length(examples.inputs), sum(p.numel() for p in parameters.values())
    blocks = {
        name: torch.zeros(-(-p.numel() // size), size, size, dtype=torch.float64, device=p.device)
        for name, p in parameters.items()
    }
    waiting: list[tuple[Tensor, ...]] = []
    for i, (loss, _) in enumerate(examples.losses(1)):
        waiting.append(gradients(loss, parameters))
        if len(waiting) * values >= 2**25 or i == count - 1:
            for block, *of_each in zip(blocks.values(), *waiting, strict=True):
                g = torch.stack([part.flatten() for part in of_each]).double()
                g = F.pad(g, (0, block.shape[0] * size - g.shape[1])).view(len(g), -1, size)
                block.baddbmm_(g.permute(1, 2, 0), g.transpose(0, 1), alpha=1 / count)
            waiting = []
    return blocks


def inverse(blocks: Tensor, damp: float = 1e-5) -> Tensor:
    """(F + damp I)^-1 of every block. WoodFisher builds the same one example after another: with F_0 = damp I,
    F_n^-1 = F_(n-1)^-1 - F_(n-1)^-1 g_n g_n^T F_(n-1)^-1 / (N + g_n^T F_(n-1)^-1 g_n).

    Source: Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340, equation 3.

    >>> inverse(torch.tensor([[[3.0]]]), 1.0)
    tensor([[[0.2500]]])
    """
    damped = blocks + damp * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def inverse_fisher(examples: Examples, parameters: Parameters, size: int = 32, damp: float = 1e-5) -> Parameters:
    """The diagonal of the inverse of the damped empirical Fisher information, by blocks of `size` weights. As many
    tensors as fit into HELD_BYTES are done in one pass over the examples.
    """
    found, names = {}, list(parameters)
    while names:
        group = [names.pop(0)]
        while names and sum(parameters[n].numel() for n in [*group, names[0]]) * size * 8 <= HELD_BYTES:
            group.append(names.pop(0))
        for name, blocks in fisher_blocks(examples, {n: parameters[n] for n in group}, size).items():
            # Copies: a diagonal alone would hold on to the whole inverse.
            parts = [inverse(part, damp).diagonal(dim1=1, dim2=2).clone() for part in blocks.split(4096)]
            p = parameters[name]
            found[name] = torch.cat(parts).flatten()[: p.numel()].view_as(p).to(p)
    return found


ACTIVATIONS = frozenset(
    (
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "rrelu",
        "rrelu_",
        "elu",
        "elu_",
        "selu",
        "selu_",
        "celu",
        "celu_",
        "gelu",
        "silu",
        "mish",
        "tanh",
        "tanh_",
        "sigmoid",
        "sigmoid_",
        "softplus",
        "softsign",
        "logsigmoid",
        "hardtanh",
        "hardtanh_",
        "hardswish",
        "hardsigmoid",
        "hardshrink",
        "softshrink",
        "tanhshrink",
        "prelu",
        "log_softmax",
    )
)
NORMS = frozenset(("layer_norm", "group_norm", "rms_norm", "instance_norm"))


class _Linear(TorchFunctionMode):
    """Activations are passed through; normalisations keep their weight and nothing that depends on the data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ACTIVATIONS:
            return args[0] if args else kwargs["input"]
        if name in NORMS:
            x = args[0] if args else kwargs["input"]
            weight = kwargs.get("weight", args[2] if len(args) > 2 and name in ("layer_norm", "group_norm") else None)
            by_channel = weight is not None and name in ("group_norm", "instance_norm")
            return x if weight is None else x * (weight.view(-1, *(1,) * (x.dim() - 2)) if by_channel else weight)
        return func(*args, **kwargs)


def flow(model: nn.Module, example: Any, names: list[str]) -> Parameters:
    """The gradient of log R in |w|, with R the sum of the outputs for an input of ones of the linearised network: every
    parameter by its magnitude, no biases, shifts and running means, activations passed through.

    Each layer's sum of |w| times it is 1 where the layer is a cut of the network, so nothing overflows. Inputs that are
    integers (tokens) are taken as they are; attention weights still come from a softmax.

    Raises ValueError when the output does not depend on any of these tensors.

    Source: Tanaka, Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively conserving
    synaptic flow, NeurIPS 2020, arXiv:2006.05467, section 6 and algorithm 1.
    """
    model = copy.deepcopy(model).double().requires_grad_(False)
    for path, parameter in model.named_parameters():
        parameter.copy_(parameter.abs())
        if "bias" in path.rpartition(".")[2]:
            parameter.zero_()
    for path, buffer in model.named_buffers():
        if path.endswith("running_mean"):
            buffer.zero_()
    parameters = {name: model.get_parameter(name).requires_grad_(True) for name in names}
    device = next(model.parameters()).device

    def ones(x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x

    example = on(example, device)
    if isinstance(example, dict):
        example = {name: ones(value) for name, value in example.items()}
    else:
        parts = tuple(map(ones, leaves(example)))
        example = parts if isinstance(example, tuple) else parts[0]
    with torch.enable_grad(), _Linear():
        total = call(model, example).sum()
    found = gradients(total, parameters) if total.requires_grad else ()
    if not any(bool(g.any()) for g in found):
        raise ValueError(
            f"statistics: some flow must reach the output through {names[:3]}, got none. Leave a softmax "
            "at the end out of the model, or use a score that is taken from data."
        )
    scale = 1 / total.detach()
    return {name: (g * scale).abs().float() for name, g in zip(parameters, found, strict=True)}
