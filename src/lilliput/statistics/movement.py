"""Movement: how far training moves each weight away from zero."""

from torch import Tensor

from lilliput.registry import register


@register("running")
def movement(held: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """-sum of w g over the steps of a training.

    Source: Sanh, Wolf and Rush, Movement pruning: adaptive sparsity by fine-tuning, NeurIPS 2020, arXiv:2005.07683,
        section 4.
    """
    return held - weight * gradient
