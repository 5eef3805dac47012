"""SparseGPT: one pass over the columns of a layer, in which later columns make up for what is dropped."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lilliput.prune.layers import bundle, check, group, pruned, sort
from lilliput.prune.masks import Allocation
from lilliput.prune.patterns import NM, Even, Pattern, parse
from lilliput.stage import Reference, Stage
from lilliput.statistics.hessian import damped
from lilliput.task import Task


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float, pattern: Pattern, width: int = 128, damp: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Prune one layer column by column, with little error on the layer's inputs.

    With U the upper Cholesky factor of (H + lambda I)^-1 = U^T U, the inverse of what remains after the first j columns
    is U_j:^T U_j:, so dropping w_j costs w_j^2 / U_jj^2 and is best made up for by w_k -= w_j / U_jj U_jk, k > j. The
    mask is chosen for `width` columns at a time, by that cost as the weights are by then (N:M: for m columns).
    Weights of inputs that are always zero cost nothing, and go first.

    Args:
        weight: (out, ...).
        hessian: H = X X^T, (groups, d, d), d the values of an output.
        sparsity: The fraction that becomes zero, in [0, 1).
        pattern: What goes together.
        width: How many columns get their mask at once.
        damp: lambda as a share of the mean of H's diagonal.

    Returns:
        New weights and their mask.

    Example:
        >>> W, H = torch.tensor([[1.0, 1.0]]), torch.tensor([[[1.0, 0.9], [0.9, 1.0]]])
        >>> sparsegpt(W, H, 0.5, parse("elements"), damp=0.0)
        (tensor([[0.0000, 1.9000]]), tensor([[False,  True]]))

    Source:
        Frantar and Alistarh, SparseGPT, ICML 2023, arXiv:2301.00774, section 3, algorithm 1.
    """
    groups, d = hessian.shape[:2]
    H, dead = damped(hessian, damp)
    W = weight.to(H).reshape(groups, -1, d).masked_fill(dead[:, None], 0)
    rows = groups * W.shape[1]
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    cost = U.diagonal(dim1=1, dim2=2).square()[:, None]
    mask, (down, across), (_, m) = torch.ones_like(W, dtype=torch.bool), bundle(pattern), group(pattern)
    unit = rows if isinstance(pattern, Even) else m * down * across  # entries that are counted as one
    units, share = rows * d // unit, sparsity / (pattern.most if isinstance(pattern, NM) else 1)
    limit, gone = units - (not isinstance(pattern, NM)), 0

    def choose(i: int, j: int) -> None:
        """The mask of columns i to j: as many units go as keep the sparsity of all columns so far."""
        nonlocal gone
        there = rows * (j - i) // unit
        count = min(round(share * rows * j / unit), limit) - gone
        score = (W[:, :, i:j].square() / cost[:, :, i:j]).reshape(rows, j - i)
        if count >= there and not isinstance(pattern, NM):
            mask[:, :, i:j] = False
        elif count > 0:
            mask[:, :, i:j] = pattern(score, count / there * min(1.0, pattern.most)).view(groups, -1, j - i)
        gone += max(0, min(count, there))

    step = m * across
    blocks = -(-d // max(width, step))
    edges = [round(d // step * b / blocks) * step for b in range(blocks + 1)]
    for start, end in pairwise(edges):
        if not isinstance(pattern, NM):
            choose(start, end)
        errors = torch.zeros_like(W[:, :, start:end])
        for j in range(start, end):
            if isinstance(pattern, NM) and j % m == 0:
                choose(j, j + m)
            error = W[:, :, j] * ~mask[:, :, j] / U[:, None, j, j]
            W[:, :, j:end] -= error[:, :, None] * U[:, None, j, j:end]
            errors[:, :, j - start] = error
        W[:, :, end:] -= errors @ U[:, start:end, end:]
    W = torch.where(dead[:, None], weight.to(W).view_as(W), W) * mask
    return W.view_as(weight).to(weight), mask.view_as(weight)


@dataclass(frozen=True)
class SparseGPT(Stage):
    """Prune layer after layer, column after column; the columns that follow make up for what is dropped.

    Each layer is matched on the inputs that the layers before it, pruned by then, give it: few ||W X - W' X||^2. The
    time is that of one factorisation a layer, however many outputs it has. See `sparsegpt` for the equations.

    Args:
        sparsity: The fraction that becomes zero, in [0, 1).
        pattern: "elements", "even", "2:4" (any N:M) or "block 4x1" (along the outputs, or also along the inputs of a
            linear layer).
        allocation: "uniform", "erk" or pairs (tensor, sparsity).
        where: Which tensors, as in `Prune`; those of layers whose inputs cannot be seen are left alone (see `skipped`).
        width: How many columns get their mask at once.
        damp: The damping of H, as a share of the mean of its diagonal.
        examples: How many inputs H is taken from; no labels are needed.

    Raises:
        ValueError: For settings out of range, without a task, and when there is no tensor left to prune.

    Example:
        >>> net, x = nn.Linear(8, 4), torch.randn(64, 8)
        >>> task = Task("some", train=(x, None), val=(x, None), loss="mse", metric="mse")
        >>> int((SparseGPT(0.5, pattern="2:4")(net, task, None).weight == 0).sum())
        16

    Source:
        Frantar and Alistarh, SparseGPT: massive language models can be accurately pruned in one-shot, ICML 2023,
        arXiv:2301.00774, section 3.
    """

    sparsity: float | None = None
    pattern: str = "elements"
    allocation: Allocation = "uniform"
    where: str = "*"
    width: int = 128
    damp: float = 0.01
    examples: int = 256

    def __post_init__(self) -> None:
        check("SparseGPT", self.sparsity, self.pattern, self.allocation, self.examples, self.damp)
        if self.width < 1:
            raise ValueError(f"SparseGPT: width must be at least 1 column, got {self.width}.")

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """List the tensors that `where` takes in but that are left alone, each with the reason."""
        return sort(model, self.where, self.pattern, "SparseGPT", self.allocation)[1]

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        pattern = parse(self.pattern)
        return pruned(
            model, task, "SparseGPT", self, lambda w, H, s: sparsegpt(w, H, s, pattern, self.width, self.damp)
        )
