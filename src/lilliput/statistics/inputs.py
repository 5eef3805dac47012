"""Second moments of the input features of each layer: the diagonal of the layer-wise Hessian."""

import torch
from torch import Tensor, nn

from lilliput.registry import register
from lilliput.statistics.sources import Layers, Parameters


@register("statistic")
def input_norm(layers: Layers, parameters: Parameters) -> Parameters:
    """Measure the L2 norm of each input feature over all examples and places, for linear and convolutional weights.

    Args:
        layers: Calibration inputs, and what each layer is given.
        parameters: The weights of the layers.

    Returns:
        The norms, broadcastable to each weight.

    Example:
        >>> from lilliput import Task
        >>> net, x = nn.Linear(2, 1), torch.tensor([[3.0, 0.0], [4.0, 1.0]])
        >>> input_norm(Layers.of(net, Task("two", train=x, val=x), 2), {"weight": net.weight})["weight"]
        tensor([[5., 1.]])

    Source:
        Sun, Liu, Bair and Kolter, A simple and effective pruning approach for large language models, ICLR 2024,
        arXiv:2306.11695, equation 1.
    """
    return {name: energy.sqrt() for name, (energy, _) in _energies(layers, parameters).items()}


@register("statistic")
def input_second_moment(layers: Layers, parameters: Parameters) -> Parameters:
    """Measure the mean square of each input feature over all examples and places, for linear and convolutional weights.

    Args:
        layers: Calibration inputs, and what each layer is given.
        parameters: The weights of the layers.

    Returns:
        The mean squares, broadcastable to each weight.

    Example:
        >>> from lilliput import Task
        >>> net, x = nn.Linear(2, 1), torch.tensor([[3.0, 0.0], [4.0, 1.0]])
        >>> input_second_moment(Layers.of(net, Task("two", train=x, val=x), 2), {"weight": net.weight})["weight"]
        tensor([[12.5000,  0.5000]])
    """
    return {name: energy / count for name, (energy, count) in _energies(layers, parameters).items()}


def _energies(layers: Layers, parameters: Parameters) -> dict[str, tuple[Tensor, int]]:
    """The summed squares of each weight's inputs, broadcastable to it, and how many were summed."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, module: nn.Module, x: Tensor) -> None:
        dims = parameters[name].dim()
        if dims > 2:
            channels = x if x.dim() == dims else x[None]
            rows = channels.transpose(0, 1).flatten(1).T
        else:
            rows = x.reshape(-1, x.shape[-1])
        energy, count = sums.get(name, (torch.zeros(()), 0))
        sums[name] = energy + _shaped(module, parameters[name], rows.square().sum(0)), count + len(rows)

    layers.watch(parameters, add)
    return sums


def _shaped(module: nn.Module, weight: Tensor, energy: Tensor) -> Tensor:
    """One number for each input channel, as it meets the weight."""
    if weight.dim() > 2:
        groups: int = module.groups  # type: ignore[assignment]
        outputs, inputs = weight.shape[:2]
        spread = energy.reshape(groups, 1, inputs).expand(groups, outputs // groups, inputs)
        return spread.reshape(outputs, inputs, *(1,) * (weight.dim() - 2))
    return energy[:, None] if type(module).__name__ == "Conv1D" else energy[None]
