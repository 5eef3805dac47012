"""A range, a rounding that needs data, and the statistic that it asks for."""

import torch
from torch import Tensor, nn

from lilliput.quant.grids import Levels
from lilliput.registry import register
from lilliput.statistics.sources import Layers, Parameters


@register("range")
def four_deviations(rows: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    """Four standard deviations on either side of zero."""
    width = 4 * rows.square().mean(1, keepdim=True).sqrt()
    return levels.steps(-width, width)


@register("statistic")
def input_mean(layers: Layers, parameters: Parameters) -> Parameters:
    """The mean of each input feature over all examples and places, of linear layers and convolutions of one group."""
    sums: dict[str, tuple[Tensor, int]] = {}

    def add(name: str, module: nn.Module, x: Tensor) -> None:
        if getattr(module, "groups", 1) == 1 and isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            dims = parameters[name].dim()
            features = x.movedim(1, -1) if dims > 2 else x
            rows = features.reshape(-1, features.shape[-1])
            total, count = sums.get(name, (torch.zeros(()), 0))
            shape = (1, -1, *(1,) * (dims - 2))
            sums[name] = total + rows.sum(0).reshape(shape), count + len(rows)

    layers.watch(parameters, add)
    return {name: total / count for name, (total, count) in sums.items()}


@register("rounding")
def mean_keeping(weight: Tensor, scale: Tensor, zero: Tensor, levels: Levels, *, input_mean: Tensor) -> Tensor:
    """Round such that the mean of each output stays: what one weight's error adds to it, the next ones take away."""
    steps, shifts = scale.expand_as(weight), zero.expand_as(weight)
    levels_of, carried = torch.empty_like(weight), torch.zeros_like(weight[:, 0])
    for j in range(weight.shape[1]):
        w, s, z, mean = weight[:, j], steps[:, j], shifts[:, j], input_mean[:, j]
        level = (w / s + z).round()
        up, down = ((level + move) for move in (1, -1))
        better = torch.stack([level, up, down]).clamp(levels.low, levels.high)
        # Of the levels within a step the one that leaves the least behind.
        near = ((better - z) * s - w).abs() <= s
        left = (carried + (w - (better - z) * s) * mean).abs().masked_fill(~near, torch.inf)
        levels_of[:, j] = torch.where(w == 0, z, better.gather(0, left.argmin(0)[None])[0])
        carried = carried + (w - (levels_of[:, j] - z) * s) * mean
    return levels_of
