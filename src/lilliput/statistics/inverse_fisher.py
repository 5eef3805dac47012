"""The empirical Fisher information by blocks, and the diagonal of its inverse."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.registry import register
from lilliput.statistics.sources import Labelled, Parameters, gradients
from lilliput.task import length

HELD_BYTES = 2**30  # of blocks at once; beyond, the examples are passed through the model again


def fisher_blocks(examples: Labelled, parameters: Parameters, size: int = 32) -> Parameters:
    """Measure the empirical Fisher information F = 1/N sum of g_n g_n^T in blocks along the diagonal.

    g_n is the gradient of example n's loss.

    Args:
        examples: Calibration inputs with the task's loss.
        parameters: The tensors to measure.
        size: Weights a block.

    Returns:
        (blocks, size, size) in float64 for each tensor, flattened in C order and padded with zeros.

    Source:
        Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340, equation 2.
    """
    count, values = length(examples.inputs), sum(p.numel() for p in parameters.values())
    blocks = {
        name: torch.zeros(-(-p.numel() // size), size, size, dtype=torch.float64, device=p.device)
        for name, p in parameters.items()
    }
    waiting: list[tuple[Tensor, ...]] = []
    for i, (loss, _) in enumerate(examples.losses(1)):
        waiting.append(gradients(loss, parameters))
        if len(waiting) * values >= 2**25 or i == count - 1:
            for block, *of_each in zip(blocks.values(), *waiting, strict=True):
                g = torch.stack([part.flatten() for part in of_each]).double()
                g = F.pad(g, (0, block.shape[0] * size - g.shape[1])).view(len(g), -1, size)
                block.baddbmm_(g.permute(1, 2, 0), g.transpose(0, 1), alpha=1 / count)
            waiting = []
    return blocks


def inverse(blocks: Tensor, damp: float = 1e-5) -> Tensor:
    """Invert every block: (F + damp I)^-1.

    WoodFisher builds the same one example after another: with F_0 = damp I,
    F_n^-1 = F_(n-1)^-1 - F_(n-1)^-1 g_n g_n^T F_(n-1)^-1 / (N + g_n^T F_(n-1)^-1 g_n).

    Args:
        blocks: (blocks, size, size).
        damp: Added to the diagonal.

    Returns:
        The inverses, of the same shape.

    Example:
        >>> inverse(torch.tensor([[[3.0]]]), 1.0)
        tensor([[[0.2500]]])

    Source:
        Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340, equation 3.
    """
    damped = blocks + damp * torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


@register("statistic")
def inverse_fisher(examples: Labelled, parameters: Parameters, size: int = 32, damp: float = 1e-5) -> Parameters:
    """Measure the diagonal of the inverse of the damped empirical Fisher information, by blocks of `size` weights.

    As many tensors as fit into HELD_BYTES are done in one pass over the examples.

    Args:
        examples: Calibration inputs with the task's loss.
        parameters: The tensors to measure.
        size: Weights a block.
        damp: Added to the diagonal of F.

    Returns:
        The diagonal, of each tensor's shape.

    Example:
        >>> from lilliput import Task
        >>> net, x = torch.nn.Linear(1, 1, bias=False), torch.ones(4, 1)
        >>> task = Task("one", train=(x, net(x).detach() + 1), val=(x, x), loss="mse", metric="mse")
        >>> inverse_fisher(Labelled.of(net, task, 4), {"weight": net.weight}, size=1, damp=0.0)["weight"]
        tensor([[0.2500]])

    Source:
        Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340, section 4.
    """
    diagonals, names = {}, list(parameters)
    while names:
        group = [names.pop(0)]
        while names and sum(parameters[n].numel() for n in [*group, names[0]]) * size * 8 <= HELD_BYTES:
            group.append(names.pop(0))
        for name, blocks in fisher_blocks(examples, {n: parameters[n] for n in group}, size).items():
            # Copies: a diagonal alone would hold on to the whole inverse.
            parts = [inverse(part, damp).diagonal(dim1=1, dim2=2).clone() for part in blocks.split(4096)]
            p = parameters[name]
            diagonals[name] = torch.cat(parts).flatten()[: p.numel()].view_as(p).to(p)
    return diagonals
