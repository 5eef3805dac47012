"""WoodFisher: optimal brain surgery on the task's loss, with the empirical Fisher information for its Hessian."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.code.base import copy_model, realize
from lilliput.prune.layers import check, store_
from lilliput.prune.masks import Allocation, amounts, prunable
from lilliput.prune.patterns import Pattern, parse
from lilliput.prune.reconstruct import reconstruct
from lilliput.prune.scores import woodfisher
from lilliput.stage import Reference, Stage
from lilliput.statistics import inverse_fisher as fisher
from lilliput.statistics.sources import Labelled
from lilliput.task import Task


def surgery(
    weight: Tensor, blocks: Tensor, sparsity: float, pattern: Pattern, damp: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Drop the weights of the least w_q^2 / (2 [F^-1]_qq) and let the other weights of each block make up for them.

    For one weight q of a block, dw = -w_q F^-1 e_q / [F^-1]_qq. For all of Q at once,
    dw = -F^-1 E_Q ([F^-1]_QQ)^-1 w_Q; no sum of single steps, which would count twice what two have in common.

    Args:
        weight: Of any shape.
        blocks: (blocks, size, size), the Fisher information along the flattened weight, padded with zeros, as
            `lilliput.statistics.inverse_fisher.fisher_blocks` gives it.
        sparsity: The fraction that becomes zero, in [0, 1).
        pattern: What goes together.
        damp: Added to F's diagonal.

    Returns:
        New weights and their mask.

    Example:
        >>> F = torch.tensor([[[1.0, 0.5], [0.5, 1.0]]])
        >>> surgery(torch.tensor([[1.0, 2.0]]), F, 0.5, parse("elements"), damp=0.0)
        (tensor([[0.0000, 2.5000]]), tensor([[False,  True]]))

    Source:
        Singh and Alistarh, WoodFisher, NeurIPS 2020, arXiv:2004.14340 (one weight at a time); Kurtic et al., The
        optimal BERT surgeon, EMNLP 2022, arXiv:2203.07259 (several at once).
    """
    size, count = blocks.shape[-1], weight.numel()
    damped = blocks + damp * torch.eye(size).to(blocks)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped)).diagonal(dim1=1, dim2=2)
    score = woodfisher(weight, inverse_fisher=inverse.flatten()[:count].view_as(weight).to(weight))
    mask = pattern(score, sparsity)
    rows, kept = (F.pad(part.flatten(), (0, len(blocks) * size - count)).view(-1, size) for part in (weight, mask))
    return reconstruct(rows, kept, damped).flatten()[:count].view_as(weight) * mask, mask


@dataclass(frozen=True)
class WoodFisher(Stage):
    """Prune the weights that the loss needs least, by its curvature; the other weights of a block make up for them.

    F = 1/N sum of g_n g_n^T, g_n the gradient of example n's loss, in blocks of `size` weights along each tensor's
    diagonal. In every round the same share of what is left goes, and F is taken anew. See `surgery` for the equations.
    Without labels the loss is that on some drawn from the model's own outputs.

    Args:
        sparsity: The fraction that becomes zero, in [0, 1).
        rounds: In how many rounds.
        pattern: "elements", "even", "2:4" (any N:M) or "block 4x1".
        allocation: "uniform", "erk" or pairs (tensor, sparsity).
        where: Which tensors, of any kind of layer.
        size: Weights a block.
        damp: Added to F's diagonal.
        examples: N; each costs a backward pass in each round.
        seed: The seed of the choice of examples and of drawn labels.

    Raises:
        ValueError: For settings out of range, without a task, and when there is no tensor left to prune.

    Example:
        >>> net, x = nn.Linear(8, 4), torch.randn(64, 8)
        >>> task = Task("some", train=(x, torch.arange(64) % 4), val=(x, torch.arange(64) % 4))
        >>> int((WoodFisher(0.5)(net, task, None).weight == 0).sum())
        16

    Source:
        Singh and Alistarh, WoodFisher: efficient second-order approximation for neural network compression, NeurIPS
        2020, arXiv:2004.14340.
    """

    sparsity: float | None = None
    rounds: int = 4
    pattern: str = "elements"
    allocation: Allocation = "uniform"
    where: str = "*"
    size: int = 32
    damp: float = 1e-5
    examples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check("WoodFisher", self.sparsity, self.pattern, self.allocation, self.examples, self.damp)
        if self.size < 1 or self.rounds < 1:
            raise ValueError(f"WoodFisher: size and rounds must be at least 1, got {self.size} and {self.rounds}.")

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """List the tensors that `where` takes in but that are left alone, each with the reason."""
        return prunable(model, self.where, parse(self.pattern), "WoodFisher", self.allocation)[1]

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        pattern = parse(self.pattern)
        names, skipped = prunable(model, self.where, pattern, "WoodFisher", self.allocation)
        if task is None:
            raise ValueError("WoodFisher: a task must be given, whose loss is kept low, got None. Pass task=.")
        if not names:
            why = next(iter(skipped.values()), "the allocation is empty").rstrip(".")
            raise ValueError(f"WoodFisher: some tensor must be left to prune, got none of {list(skipped)[:3]}: {why}.")
        plain = realize(model).eval().float().requires_grad_(False)
        examples = Labelled.of(plain, task, self.examples, self.seed)
        parameters: dict[str, Tensor] = {name: plain.get_parameter(name) for name in names}
        share = amounts(parameters, 1.0 if self.sparsity is None else self.sparsity, self.allocation, pattern)
        kept: dict[str, Tensor] = {}
        for k in range(1, self.rounds + 1):
            results: dict[str, tuple[Tensor, Tensor]] = {}
            for some in self._groups(parameters):
                results |= self._round(examples, some, share, pattern, k, kept)
            for name, (new, kept[name]) in results.items():
                parameters[name].data.copy_(new)
        return store_(copy_model(model), {name: (parameters[name].detach(), kept[name]) for name in names}, pattern)

    def _groups(self, parameters: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Tensors whose blocks are held at once."""
        groups: list[dict[str, Tensor]] = [{}]
        for name, parameter in parameters.items():
            held = sum(p.numel() for p in groups[-1].values()) + parameter.numel()
            if groups[-1] and held * self.size * 8 > fisher.HELD_BYTES:
                groups.append({})
            groups[-1][name] = parameter
        return groups

    def _round(
        self,
        examples: Labelled,
        parameters: dict[str, Tensor],
        share: dict[str, float],
        pattern: Pattern,
        k: int,
        kept: dict[str, Tensor],
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """The new weights and masks of some tensors; what an earlier round dropped stays zero."""
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            blocks = fisher.fisher_blocks(examples, parameters, self.size)
        results = {}
        for name, parameter in parameters.items():
            w, gone = parameter.requires_grad_(False), ~kept.get(name, torch.ones_like(parameter, dtype=torch.bool))
            ahead = 1 - (1 - min(share[name], pattern.most)) ** (k / self.rounds)
            flat = F.pad(gone.flatten(), (0, blocks[name].shape[0] * self.size - gone.numel())).view(-1, self.size)
            # No weight is made up for by one that has gone: it has no curvature with the others.
            here = blocks[name] * (~flat[:, :, None] & ~flat[:, None, :])
            results[name] = surgery(w, here, ahead, pattern, self.damp)
        return results
