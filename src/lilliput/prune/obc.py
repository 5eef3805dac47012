"""OBC: exact optimal brain surgery on every output of a layer, one weight after another."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.prune.layers import bundle, check, group, pruned, sort
from lilliput.prune.masks import Allocation
from lilliput.prune.patterns import NM, Pattern, parse
from lilliput.prune.reconstruct import reconstruct
from lilliput.stage import Reference, Stage
from lilliput.statistics.hessian import CHUNK_BYTES, damped
from lilliput.task import Task


def traces(weight: Tensor, hessian: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the inputs of every output in the order in which greedy removal drops them, and what each removal costs.

    For each row w, with H^-1 that of what is left: drop p with the least w_p^2 / [H^-1]_pp, then
    w -= w_p / [H^-1]_pp H^-1_:p and H^-1 -= H^-1_:p H^-1_p: / [H^-1]_pp. A block P goes as one, at the cost of
    w_P^T ([H^-1]_PP)^-1 w_P. Rows of a block share their H^-1, and their loss is the sum. O(d^3 / 3) a row.

    Args:
        weight: (groups, rows, d).
        hessian: (groups, d, d), positive definite.
        pattern: What goes together; N:M drops at most m - n of m.

    Returns:
        order and loss, both (bundles of rows, steps): order counts blocks of inputs, loss is by how much the removal
        raises the squared error on the layer's inputs.
    """
    _, total, d = weight.shape
    down, c = bundle(pattern)
    limit, m = group(pattern)
    H = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).to(weight).unflatten(1, (-1, c)).unflatten(3, (-1, c))
    bundles, u = weight.reshape(-1, down, d // c, c), d // c
    steps = u // m * limit if isinstance(pattern, NM) else u
    orders, losses = [], []
    size = max(1, CHUNK_BYTES // (d * d * H.element_size()))
    for first in range(0, len(bundles), size):
        w = bundles[first : first + size].clone()
        n = len(w)
        inverse = H[torch.arange(first, first + n, device=w.device) // (total // down)]  # (n, u, c, u, c)
        row, ids = torch.arange(n, device=w.device), torch.arange(u, device=w.device).repeat(n, 1)
        gone, alive = torch.zeros(n, -(-u // m), dtype=torch.long, device=w.device), torch.ones_like(ids).bool()
        order, loss = [], []
        for step in range(steps):
            if alive.shape[1] > 16 and step and 8 * (u - step) <= 7 * alive.shape[1]:
                # What is gone leaves the matrices: the same number in every row.
                at = alive.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : u - step].sort(1).values
                inverse = inverse[row[:, None, None], at[:, :, None], :, at[:, None, :]].permute(0, 1, 3, 2, 4)
                w = w.permute(0, 2, 1, 3)[row[:, None], at].permute(0, 2, 1, 3)
                ids, alive = ids.gather(1, at), torch.ones_like(at).bool()
            blocks = inverse.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (n, u, c, c)
            safe = torch.where(alive[:, :, None, None], blocks, torch.eye(c).to(blocks))
            solved = 1 / safe if c == 1 else torch.linalg.inv(safe)
            cost = (
                torch.einsum("naui,nuij,nauj->nu", w, solved, w)
                if c > 1
                else (w[..., 0].square().sum(1) * solved[:, :, 0, 0])
            )
            open_ = alive & (gone.gather(1, ids // m) < limit) if isinstance(pattern, NM) else alive
            p = cost.masked_fill(~open_, torch.inf).argmin(1)
            column, inner = inverse[row, :, :, p].reshape(n, -1, c), solved[row, p]  # (n, u c, c), (n, c, c)
            scaled = column @ inner
            w -= (w[row, :, p] @ scaled.transpose(1, 2)).view_as(w)
            inverse.view(n, len(ids[0]) * c, -1).baddbmm_(scaled, column.transpose(1, 2), alpha=-1)
            order.append(ids[row, p])
            loss.append(cost[row, p])
            alive[row, p] = False
            w[row, :, p] = 0
            gone.scatter_add_(1, (ids[row, p] // m)[:, None], torch.ones_like(gone[:, :1]))
        orders.append(torch.stack(order, 1))
        losses.append(torch.stack(loss, 1))
    return torch.cat(orders), torch.cat(losses)


def obc(
    weight: Tensor, hessian: Tensor, sparsity: float, pattern: Pattern, damp: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Prune one layer: of all rows the cheapest next removal first, by their traces; then the best weights under that
    mask.

    Args:
        weight: (out, ...).
        hessian: H = X X^T, (groups, d, d), d the values of an output.
        sparsity: The fraction that becomes zero, in [0, 1).
        pattern: What goes together.
        damp: lambda as a share of the mean of H's diagonal.

    Returns:
        New weights and their mask.

    Example:
        >>> W, H = torch.tensor([[1.0, 3.0], [2.0, 2.0]]), torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> obc(W, H, 0.5, parse("elements"), damp=0.0)
        (tensor([[0.0000, 3.5000],
                [0.0000, 3.0000]]), tensor([[False,  True],
                [False,  True]]))

    Source:
        Frantar, Singh and Alistarh, Optimal brain compression, NeurIPS 2022, arXiv:2208.11580, section 4 (algorithm 1
        for a row, and the global step behind it).
    """
    groups, d = hessian.shape[:2]
    H, dead = damped(hessian, damp)
    w = weight.to(H).reshape(groups, -1, d)
    alive = w.masked_fill(dead[:, None], 0)
    order, loss = traces(alive.float() if d > 64 else alive, H, pattern)
    # A row's next removal waits for those before it, so its place is that of the dearest one so far.
    reached = loss.double()
    if not isinstance(pattern, NM):
        reached = reached.cummax(1).values.flatten().argsort(stable=True).argsort().view_as(reached).double()
    down, across = bundle(pattern)
    score = torch.full(
        (len(order), d // across), float(2 * w.numel()) + 2 * float(reached.max()), dtype=torch.float64, device=w.device
    ).scatter_(1, order, reached)
    score = score.repeat_interleave(across, 1).repeat_interleave(down, 0)
    mask = pattern(score, sparsity)
    return reconstruct(weight, mask, H), mask.view_as(weight)


@dataclass(frozen=True)
class OBC(Stage):
    """Prune layer after layer, each output's weights one by one; after each removal the others make up for it.

    Each layer is matched on the inputs that the layers before it, pruned by then, give it: few ||W X - W' X||^2.
    Greedy and exact: the time grows with outputs times inputs^3, so for layers of some hundred inputs. See `traces`.

    Args:
        sparsity: The fraction that becomes zero, in [0, 1).
        pattern: "elements", "even", "2:4" (any N:M) or "block 4x1" (along the outputs, or also along the inputs of a
            linear layer).
        allocation: "uniform", "erk" or pairs (tensor, sparsity).
        where: Which tensors, as in `Prune`; those of layers whose inputs cannot be seen are left alone (see `skipped`).
        damp: The damping of H, as a share of the mean of its diagonal.
        examples: How many inputs H is taken from; no labels are needed.

    Raises:
        ValueError: For settings out of range, without a task, and when there is no tensor left to prune.

    Example:
        >>> net, x = nn.Linear(8, 4), torch.randn(64, 8)
        >>> task = Task("some", train=(x, None), val=(x, None), loss="mse", metric="mse")
        >>> int((OBC(0.5)(net, task, None).weight == 0).sum())
        16

    Source:
        Frantar, Singh and Alistarh, Optimal brain compression: a framework for accurate post-training quantization and
        pruning, NeurIPS 2022, arXiv:2208.11580, section 4.
    """

    sparsity: float | None = None
    pattern: str = "elements"
    allocation: Allocation = "uniform"
    where: str = "*"
    damp: float = 0.01
    examples: int = 256

    def __post_init__(self) -> None:
        check("OBC", self.sparsity, self.pattern, self.allocation, self.examples, self.damp)

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """List the tensors that `where` takes in but that are left alone, each with the reason."""
        return sort(model, self.where, self.pattern, "OBC", self.allocation)[1]

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        pattern = parse(self.pattern)
        return pruned(model, task, "OBC", self, lambda w, H, s: obc(w, H, s, pattern, self.damp))
