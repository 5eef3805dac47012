"""Movement: how far training moves each weight away from zero."""

from torch import Tensor

from lilliput.registry import register


@register("running")
def movement(held: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    """Update -sum of w g over the steps of a training.

    Args:
        held: The sum so far.
        weight: w.
        gradient: g of this step.

    Returns:
        The new sum.

    Example:
        >>> import torch
        >>> movement(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([-0.5]))
        tensor([2.])

    Source:
        Sanh, Wolf and Rush, Movement pruning: adaptive sparsity by fine-tuning, NeurIPS 2020, arXiv:2005.07683,
        section 4.
    """
    return held - weight * gradient
