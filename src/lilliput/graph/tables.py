"""Lookup tables: what most of a text or recommendation network's values are."""

from torch import nn

from lilliput.code.base import holders


def tables(model: nn.Module) -> tuple[str, ...]:
    """Name the lookup tables that are most of a model and nobody else's: their rows can go.

    Args:
        model: a network.

    Returns:
        Names of `Embedding` and `EmbeddingBag` weights with more than half of all values that are not tied.

    Example:
        >>> tables(nn.Sequential(nn.EmbeddingBag(100, 8), nn.Linear(8, 2)))
        ('0.weight',)
    """
    total = sum(p.numel() for p in model.parameters())
    return tuple(
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.weight.numel() > 0.5 * total
        and len(holders(model, f"{name}.weight" if name else "weight")) == 1
    )
