"""Curvature: the diagonal of the generalised Gauss-Newton matrix."""

import torch

from lilliput.registry import register
from lilliput.statistics.sources import Calibration, Parameters, gradients


@register("statistic")
def curvature(examples: Calibration, parameters: Parameters) -> Parameters:
    """Measure the diagonal of the generalised Gauss-Newton matrix: the mean over examples of (J^T u)^2.

    J is the derivative of the output, u one vector an example. For cross entropy and binary cross entropy that is the
    Fisher information, its labels drawn from the model; for squared error it is exact where each parameter feeds one
    output. Any other loss: the squared gradient at the example's own label.

    Args:
        examples: Calibration inputs.
        parameters: The tensors to measure.

    Returns:
        The diagonal, of each tensor's shape.

    Example:
        >>> from lilliput import Task
        >>> net, x = torch.nn.Linear(1, 1), torch.ones(4, 1)
        >>> task = Task("one", train=(x, x), val=(x, x), loss="mse", metric="mse")
        >>> curvature(Calibration.of(net, task, 4), {"weight": net.weight})["weight"].round(decimals=3)
        tensor([[2.]])

    Source:
        LeCun, Denker and Solla, Optimal brain damage, NIPS 1989, section 2.2.
    """
    diagonal = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for projection, share in examples.projections():
        for held, gradient in zip(diagonal.values(), gradients(projection, parameters), strict=True):
            held += gradient.square() * share
    return diagonal
