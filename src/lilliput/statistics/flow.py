"""Flow: the share of the linearised network's output that passes through each weight."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lilliput.registry import register
from lilliput.statistics.sources import Calibration, Parameters, gradients
from lilliput.task import call, leaves, mapped, on

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


@register("statistic")
def flow(calibration: Calibration, parameters: Parameters) -> Parameters:
    """Measure the gradient of log R in |w|, R the sum of the linearised network's outputs for an input of ones.

    The linearised network has every parameter by its magnitude, no biases, shifts and running means, and activations
    passed through. Each layer's sum of |w| times the gradient is 1 where the layer is a cut of the network, so nothing
    overflows. Of the task the shape of one input is enough. Inputs that are integers (tokens) are taken as they are;
    attention weights still come from a softmax.

    Args:
        calibration: A task's inputs, of which only the shape counts.
        parameters: The tensors to measure.

    Returns:
        The flow, of each tensor's shape.

    Raises:
        ValueError: When the output does not depend on any of these tensors.

    Example:
        >>> from lilliput import Task
        >>> net, x = nn.Linear(2, 1), torch.ones(4, 2)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, -3.0]]))
        >>> flow(Calibration.of(net, Task("two", train=x, val=x), 4), {"weight": net.weight})["weight"]
        tensor([[0.2500, 0.2500]])

    Source:
        Tanaka, Kunin, Yamins and Ganguli, Pruning neural networks without any data by iteratively conserving synaptic
        flow, NeurIPS 2020, arXiv:2006.05467, section 6 and algorithm 1.
    """
    model = _magnitudes(calibration.model)
    own: Parameters = {name: model.get_parameter(name).requires_grad_(True) for name in parameters}
    example = on(calibration.task.example, next(model.parameters()).device)
    with torch.enable_grad(), _Linear():
        total = torch.stack([leaf.sum() for leaf in leaves(call(model, _ones(example)))]).sum()
    flows = gradients(total, own) if total.requires_grad else ()
    if not any(bool(g.any()) for g in flows):
        raise ValueError(
            f"statistics: some flow must reach the output through {list(parameters)[:3]}, got none. Leave a softmax "
            "at the end out of the model, or use a score that is taken from data."
        )
    scale = 1 / total.detach()
    return {name: (g * scale).abs().float() for name, g in zip(own, flows, strict=True)}


@torch.no_grad()
def _magnitudes(model: nn.Module) -> nn.Module:
    """A copy in float64 with every parameter by its magnitude, without biases and running means."""
    model = copy.deepcopy(model).double().requires_grad_(False)
    for path, parameter in model.named_parameters():
        parameter.copy_(parameter.abs())
        if "bias" in path.rpartition(".")[2]:
            parameter.zero_()
    for path, buffer in model.named_buffers():
        if path.endswith("running_mean"):
            buffer.zero_()
    return model


def _ones(example: Any) -> Any:
    """The same input with every floating-point number one, in float64."""

    def ones(x: Tensor) -> Tensor:
        return torch.ones_like(x, dtype=torch.float64) if x.is_floating_point() else x

    return mapped(ones, example)
