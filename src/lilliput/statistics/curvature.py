"""Curvature: the diagonal of the generalised Gauss-Newton matrix."""

import torch

from lilliput.registry import register
from lilliput.statistics.sources import Calibration, Parameters, gradients


@register("statistic")
def curvature(examples: Calibration, parameters: Parameters) -> Parameters:
    """The diagonal of the generalised Gauss-Newton matrix: the mean over examples of (J^T u)^2, J the derivative of the
    output, one u an example.

    For cross entropy and binary cross entropy that is the Fisher information, its labels drawn from the model; for
    squared error it is exact where each parameter feeds one output. Any other loss: the squared gradient at the
    example's own label.

    Source: LeCun, Denker and Solla, Optimal brain damage, NIPS 1989, section 2.2.
    """
    diagonal = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for projection, share in examples.projections():
        for held, gradient in zip(diagonal.values(), gradients(projection, parameters), strict=True):
            held += gradient.square() * share
    return diagonal
