"""GPTQ: round a layer column by column, with later columns compensating for the error of earlier ones."""

import torch
from torch import Tensor

from lilliput.quant.grids import Levels
from lilliput.quant.roundings import nearest
from lilliput.registry import register
from lilliput.statistics.hessian import damped

DAMP = 0.01  # of the mean of H's diagonal: the paper's
WIDTH = 128  # columns after which the rest of the matrix is updated at once


@register("rounding")
def gptq(weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels, *, hessian: Tensor) -> Tensor:
    """Choose levels for little squared error of the layer's outputs, ||W X - W' X||^2. Needs inputs.

    With U the upper Cholesky factor of (H + lambda I)^-1, H = X X^T, column j is rounded to the nearest levels, and its
    error e = (w_j - w'_j) / U_jj moves the columns that follow: w_k -= e U_jk. Weights that are zero stay zero, so
    that a mask holds; what they have been given meanwhile is passed on as an error as well.

    Args:
        weight: (out, d), d the values of one output.
        scale: The steps, broadcastable to weight.
        zero: The zero points, likewise.
        levels: Those of the grid.
        hessian: H, (groups, d, d); the outputs of a group follow each other.

    Returns:
        A level for each weight, in its type.

    Example:
        >>> W, H = torch.tensor([[0.4, 0.4]]), torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> gptq(W, torch.ones(1, 1), torch.zeros(1, 1), Levels(-7, 7, True), hessian=H)
        tensor([[0., 1.]])

    Source:
        Frantar, Ashkboos, Hoefler and Alistarh, GPTQ: accurate post-training quantization for generative pre-trained
        transformers, ICLR 2023, arXiv:2210.17323, section 3, algorithm 1.
    """
    groups, d = hessian.shape[:2]
    H, _ = damped(hessian.double(), DAMP)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    W, s, z = (part.expand_as(weight).to(H).reshape(groups, -1, d) for part in (weight, scale, zero))
    kept, rounded = W != 0, torch.empty_like(W)
    W = W.clone()
    for start in range(0, d, WIDTH):
        end = min(start + WIDTH, d)
        errors = torch.zeros_like(W[:, :, start:end])
        for j in range(start, end):
            level = torch.where(kept[:, :, j], nearest(W[:, :, j], s[:, :, j], z[:, :, j], levels), z[:, :, j])
            error = (W[:, :, j] - (level - z[:, :, j]) * s[:, :, j]) / U[:, None, j, j]
            W[:, :, j:end] -= error[:, :, None] * U[:, None, j, j:end]
            errors[:, :, j - start], rounded[:, :, j] = error, level
        W[:, :, end:] -= errors @ U[:, start:end, end:]
    return rounded.reshape(weight.shape).to(weight.dtype)
