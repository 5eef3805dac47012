"""Gradients of the task's loss: their root mean square over batches, and their mean."""

import math

import torch
from torch import Tensor

from lilliput.registry import register
from lilliput.statistics.sources import Labelled, Parameters, gradients
from lilliput.task import length


@register("statistic")
def gradient(examples: Labelled, parameters: Parameters) -> Parameters:
    """Measure the root of the mean, over batches, of the squared gradient of the task's loss.

    A task without labels is given ones drawn from the model's own outputs (the gradient of the Fisher information): the
    divergence from the outputs themselves has none.

    Args:
        examples: Calibration inputs with the task's loss.
        parameters: The tensors to measure.

    Returns:
        The root mean square, of each tensor's shape.

    Example:
        >>> from lilliput import Task
        >>> net, x = torch.nn.Linear(1, 1), torch.ones(4, 1)
        >>> task = Task("one", train=(x, net(x).detach() + 1), val=(x, x), loss="mse", metric="mse")
        >>> gradient(Labelled.of(net, task, 4), {"weight": net.weight})["weight"].round(decimals=3)
        tensor([[2.]])
    """
    squares = {name: torch.zeros_like(p) for name, p in parameters.items()}
    batches = math.ceil(length(examples.inputs) / examples.batch_size)
    for loss, _ in examples.losses():
        for square, g in zip(squares.values(), gradients(loss, parameters), strict=True):
            square += g.square() / batches
    return {name: square.sqrt() for name, square in squares.items()}


@register("running", name="gradient")
def running_gradient(held: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Update the root of a moving average, over ten steps or so, of the squared gradient.

    Args:
        held: The value so far.
        weight: The weight, of the same shape.
        gradient: The gradient of this step.

    Returns:
        The new value.

    Example:
        >>> running_gradient(torch.tensor([0.0]), torch.ones(1), torch.tensor([2.0]))
        tensor([0.6325])
    """
    return (0.9 * held * held).addcmul_(gradient, gradient, value=0.1).sqrt_()


@register("statistic")
def mean_gradient(examples: Labelled, parameters: Parameters) -> Parameters:
    """Measure the gradient g of the mean loss of all examples, with its sign.

    Of drawn labels it is mere noise around zero.

    Args:
        examples: Calibration inputs with the task's loss.
        parameters: The tensors to measure.

    Returns:
        The gradient, of each tensor's shape.

    Example:
        >>> from lilliput import Task
        >>> net, x = torch.nn.Linear(1, 1), torch.ones(4, 1)
        >>> task = Task("one", train=(x, net(x).detach() + 1), val=(x, x), loss="mse", metric="mse")
        >>> mean_gradient(Labelled.of(net, task, 4), {"weight": net.weight})["weight"].round(decimals=3)
        tensor([[-2.]])
    """
    mean = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for loss, share in examples.losses():
        for held, g in zip(mean.values(), gradients(loss, parameters), strict=True):
            held += g * share
    return mean


@register("running", name="mean_gradient")
def running_mean_gradient(held: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Update a moving average of the gradient, over ten steps or so.

    Args:
        held: The value so far.
        weight: The weight, of the same shape.
        gradient: The gradient of this step.

    Returns:
        The new value.

    Example:
        >>> running_mean_gradient(torch.tensor([0.0]), torch.ones(1), torch.tensor([2.0]))
        tensor([0.2000])
    """
    return held.lerp(gradient, 0.1)
