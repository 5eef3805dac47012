"""Scores that use the inputs of a weight: Wanda, RIA."""

import torch
from torch import Tensor

from lilliput.registry import register


@register("score")
def wanda(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """Score a weight by |w| ||x||_2, its magnitude times the norm of the input feature that it multiplies (Wanda).

    The paper compares within each output: pattern="even". Needs inputs.

    Args:
        weight: The weights, (out, in) or (out, in, kh, kw).
        input_norm: ||x||_2 of each input feature, broadcastable to the weights.

    Returns:
        Scores of the shape of the weights.

    Example:
        >>> wanda(torch.tensor([[1.0, -2.0]]), input_norm=torch.tensor([3.0, 1.0]))
        tensor([[3., 2.]])

    Source:
        Sun, Liu, Bair and Kolter, A simple and effective pruning approach for large language models, ICLR 2024,
        arXiv:2306.11695, equation 1.
    """
    return weight.abs() * input_norm


@register("score")
def ria(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """Score a weight by its relative importance within its row and column, times its activations (RIA). Needs inputs.

        (|w_ij| / sum_i |w_ij| + |w_ij| / sum_j |w_ij|) ||x_j||_2^(1/2)

    Each weight is compared with those of its input and those of its output, so that no row or column goes as a whole.

    Args:
        weight: The weights, (out, in) or (out, in, kh, kw).
        input_norm: ||x_j||_2 of each input feature, broadcastable to the weights.

    Returns:
        Scores of the shape of the weights.

    Example:
        >>> ria(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), input_norm=torch.ones(2))
        tensor([[0.7500, 1.5000],
                [1.0000, 0.7500]])

    Source:
        Zhang, Bai, Lin, Zhao, Hou and Cannistraci, Plug-and-play: an efficient post-training pruning method for large
        language models, ICLR 2024 (relative importance and activations, with its power a = 1/2).
    """
    size = weight.abs().reshape(len(weight), -1)
    tiny = torch.finfo(size.dtype).tiny
    relative = size / size.sum(0, keepdim=True).clamp_min(tiny) + size / size.sum(1, keepdim=True).clamp_min(tiny)
    return relative.view_as(weight) * input_norm.sqrt()
