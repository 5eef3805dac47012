"""Post-training reconstruction: the best values for the weights that a mask keeps, on the layer's own inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model, realize
from lilliput.code.names import find, theta
from lilliput.prune.layers import finite, prepared, sequentially, sort
from lilliput.prune.masks import masks
from lilliput.stage import Reference, Stage
from lilliput.statistics.hessian import damped
from lilliput.task import Task

CHUNK_BYTES = 2**22  # of matrices at once: what fits into a processor's cache is solved twice as fast


def reconstruct(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """Find W' that is zero where the mask is and has the least ||W X - W' X||^2.

    For each row, with m what its mask keeps, w'_m = (H_mm)^-1 H_m: w. The same as w - H^-1_:p (H^-1_pp)^-1 w_p with p
    what the mask drops: optimal brain surgery on all of p at once.

    Args:
        weight: (out, ...).
        mask: Of the weight's shape.
        hessian: H = X X^T, (groups, d, d) with d the values of an output, positive definite: see
            `lilliput.statistics.hessian.damped`.

    Returns:
        A tensor like weight.

    Example:
        >>> H = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> reconstruct(torch.tensor([[2.0, 2.0]]), torch.tensor([[True, False]]), H)
        tensor([[3., 0.]])

    Source:
        Frantar, Singh and Alistarh, Optimal brain compression, NeurIPS 2022, arXiv:2208.11580, section 4.
    """
    groups, d = hessian.shape[:2]
    w = weight.to(hessian).reshape(groups, -1, d)
    target = (w @ hessian).reshape(-1, d)
    keep = mask.reshape(-1, d)
    result, counts = torch.zeros_like(target), keep.sum(1)
    order = counts.argsort(stable=True)  # so that rows of one chunk have about as many entries
    while len(order):
        most = int(counts[order[: max(1, CHUNK_BYTES // (8 * d * d))]].max())
        rows = order[: max(1, CHUNK_BYTES // (8 * max(1, int(counts[order].max())) ** 2))]
        most, order = int(counts[rows].max()), order[len(rows) :]
        at = keep[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real = keep[rows].gather(1, at)
        part = hessian[(rows // w.shape[1])[:, None, None], at[:, :, None], at[:, None, :]]
        part = part * (real[:, :, None] & real[:, None, :]) + torch.diag_embed((~real).to(part))
        right = target[rows].gather(1, at) * real
        solved = torch.cholesky_solve(right[:, :, None], torch.linalg.cholesky(part))[:, :, 0]
        result[rows] = torch.zeros_like(target[rows]).scatter_(1, at, solved * real)
    return result.view_as(weight).to(weight)


@dataclass(frozen=True)
class Reconstruct(Stage):
    """Recompute the kept weights of each masked layer for the least squared error of its outputs.

        W' = argmin ||W X - W' X||^2 + lambda ||W - W'||^2 with W' zero where the mask is

    X are the inputs that the layers before it give it by then. W: the reference's weights, or without a reference the
    values behind the mask. To be used after any pruning and before training. A model without masks is returned as it
    is, a copy.

    Args:
        where: Which masked tensors; those of layers whose inputs cannot be seen are left alone (see `skipped`).
        examples: How many inputs X is taken from.
        damp: lambda as a share of the mean of the squared inputs.

    Raises:
        ValueError: Without a task, when there are masks but none that can be reached, and for inputs that are not
            finite.

    Example:
        >>> net, x = nn.Linear(2, 1, bias=False), torch.ones(8, 2)
        >>> task = Task("twins", train=(x, None), val=(x, None), loss="mse", metric="mse")
        >>> from lilliput.prune.prune import Prune
        >>> net.weight.data = torch.tensor([[1.0, 2.0]])
        >>> Reconstruct(damp=0.0001)(Prune(0.5)(net, task, None), task, None).weight.detach().round(decimals=2)
        tensor([[0., 3.]])

    Source:
        Frantar, Singh and Alistarh, Optimal brain compression, NeurIPS 2022, arXiv:2208.11580, section 4.
    """

    where: str = "*"
    examples: int = 256
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.examples < 1 or self.damp <= 0:
            raise ValueError(
                f"Reconstruct: examples must be at least 1 and damp above 0, got {self.examples} and {self.damp:g}."
            )

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """List the masked tensors that `where` takes in but that are left alone, each with the reason."""
        return self._sort(model)[1]

    def _sort(self, model: nn.Module) -> tuple[list[str], dict[str, str]]:
        masked = masks(model, find(model, self.where, who="Reconstruct"))
        if not masked:
            return [], {}
        return sort(model, ",".join(masked), "elements", "Reconstruct")

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        names, skipped = self._sort(model)
        result = copy_model(model)
        if not masks(model):
            return result
        if not names and not skipped:
            raise ValueError(
                f"Reconstruct: where must match a masked tensor, got {self.where!r}. Masked are "
                f"{', '.join(list(masks(model))[:5])}."
            )
        plain, inputs, names = prepared(model, task, names, skipped, self.examples, "Reconstruct")
        dense = {} if reference is None else dict(realize(reference.model).named_parameters())
        masked = masks(result, names)

        def one(name: str, moment: Tensor) -> None:
            weight, behind = plain.get_parameter(name), theta(result, name).detach()
            w = dense[name].detach() if name in dense and dense[name].shape == weight.shape else behind
            H, _ = damped(finite(moment, name, "Reconstruct"), self.damp)
            # With H damped, single precision is enough where double would take long.
            weight.copy_(reconstruct(w, masked[name].mask, H.float() if len(H[0]) > 256 else H))

        sequentially(plain, inputs, names, one)
        with torch.no_grad():
            for name in names:
                theta(result, name).copy_(plain.get_parameter(name))
        return result
