"""A score: the energy that a weight passes on."""

from torch import Tensor

from lilliput.registry import register


@register("score")
def input_energy(weight: Tensor, *, input_second_moment: Tensor) -> Tensor:
    """w^2 E[x^2]: the energy that a weight passes on, x the input that it multiplies. Needs inputs."""
    return weight.square() * input_second_moment
