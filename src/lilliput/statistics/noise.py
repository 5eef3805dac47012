"""Uniform noise, for the random score and for stochastic rounding."""

import zlib

import torch

from lilliput.registry import register
from lilliput.statistics.sources import Parameters, Weights


@register("statistic")
def noise(source: Weights, parameters: Parameters) -> Parameters:
    """Draw uniform numbers in [0, 1) that are a function of the seed and the tensor's name alone.

    Args:
        source: Holds the seed.
        parameters: The tensors.

    Returns:
        The numbers, of each tensor's shape.

    Example:
        >>> parameters = {"weight": torch.zeros(2, 2)}
        >>> noise(Weights(torch.nn.Linear(2, 2)), parameters)["weight"].shape
        torch.Size([2, 2])
    """
    drawn = {}
    for name, parameter in parameters.items():
        generator = torch.Generator().manual_seed(source.seed * 1000003 + zlib.crc32(name.encode()))
        drawn[name] = torch.rand(parameter.shape, generator=generator)
    return drawn
