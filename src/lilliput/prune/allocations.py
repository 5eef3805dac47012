"""Allocations: how sparse each tensor becomes. Functions (scores by name, sparsity) -> sparsity by name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lilliput.prune.patterns import drop
from lilliput.registry import register

Scores = Mapping[str, Tensor]


@register("allocation")
def uniform(scores: Scores, sparsity: float) -> dict[str, float]:
    """Give every tensor the same sparsity.

    Args:
        scores: The scores of each tensor, by its name.
        sparsity: The fraction that becomes zero, in [0, 1).

    Returns:
        The sparsity of each tensor, by its name.

    Example:
        >>> uniform({"a": torch.zeros(8, 2), "b": torch.zeros(8, 8)}, 0.25)
        {'a': 0.25, 'b': 0.25}

    Source:
        No paper: a baseline.
    """
    return {name: sparsity for name in scores}


@register("allocation")
def erk(scores: Scores, sparsity: float) -> dict[str, float]:
    """Give each tensor a density in proportion to the sum of its dimensions over their product (Erdos-Renyi-Kernel).

    The density of (out, in, kh, kw) is e (out + in + kh + kw) / (out in kh kw), at most 1, with e such that the whole
    has the sparsity asked for.

    Args:
        scores: The scores of each tensor, by its name.
        sparsity: The fraction of all weights that becomes zero, in [0, 1).

    Returns:
        The sparsity of each tensor, by its name.

    Example:
        >>> erk({"a": torch.zeros(8, 2), "b": torch.zeros(8, 8)}, 0.25)
        {'a': 0.0, 'b': 0.3125}

    Source:
        Evci, Gale, Menick, Castro and Elsen, Rigging the lottery, ICML 2020, arXiv:1911.11134, section 3, (1).
    """
    size = {name: score.numel() for name, score in scores.items()}
    raw = {name: sum(score.shape) / score.numel() for name, score in scores.items()}
    kept = (1 - sparsity) * sum(size.values())
    dense: set[str] = set()
    while True:
        thinned = [name for name in scores if name not in dense]
        e = (kept - sum(size[name] for name in dense)) / max(sum(raw[name] * size[name] for name in thinned), 1e-12)
        over = {name for name in thinned if e * raw[name] > 1}
        if not over:
            return {name: 0.0 if name in dense else 1 - e * raw[name] for name in scores}
        dense |= over


@register("allocation", name="global")
def global_(scores: Scores, sparsity: float) -> dict[str, float]:
    """Compare the scores of all tensors: the lowest anywhere go first, but never all of a tensor. The total is exact.

    Args:
        scores: The scores of each tensor, by its name.
        sparsity: The fraction of all weights that becomes zero, in [0, 1).

    Returns:
        The sparsity of each tensor, by its name.

    Example:
        >>> global_({"a": torch.tensor([1.0, 2.0, 3.0, 9.0]), "b": torch.tensor([4.0, 5.0, 6.0, 7.0])}, 0.25)
        {'a': 0.5, 'b': 0.0}

    Source:
        Frankle and Carbin, The lottery ticket hypothesis, ICLR 2019, arXiv:1803.03635, section 3 (global pruning).
    """
    flat = torch.cat([torch.where(score == score.max(), torch.inf, score).flatten() for score in scores.values()])
    kept = drop(flat, round(sparsity * len(flat)))
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: 1 - float(part.double().mean()) for name, part in zip(scores, parts, strict=True)}


@register("allocation")
def normalized(scores: Scores, sparsity: float) -> dict[str, float]:
    """Compare the scores of all tensors after each tensor's scores are divided by their L2 norm.

    Otherwise as `global_`. A small tensor, whose weights matter more each, is then not emptied because its weights are
    no larger.

    Args:
        scores: The scores of each tensor, by its name.
        sparsity: The fraction of all weights that becomes zero, in [0, 1).

    Returns:
        The sparsity of each tensor, by its name.

    Example:
        >>> normalized({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([10.0, 11.0, 12.0, 13.0])}, 0.5)
        {'a': 0.5, 'b': 0.5}

    Source:
        Lee, Park, Mitchell et al., JaxPruner, 2023, arXiv:2304.14082 (its global pruners).
    """
    norms = {name: torch.linalg.vector_norm(score[score.isfinite()].double()) for name, score in scores.items()}
    return global_({name: score.double() / norms[name].clamp_min(1e-30) for name, score in scores.items()}, sparsity)
