"""Layers without some channels, and layers that ignore them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lilliput.graph import recurrent, slicing
from lilliput.graph.group import Group


def _indices(model: nn.Module, groups: Iterable[Group], keep: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """For each side of each layer that changes, the positions that stay."""
    modules = dict(model.named_modules())
    masks: dict[tuple[str, str], Tensor] = {}
    for group in groups:
        stays = torch.zeros(group.size, dtype=torch.bool)
        stays[keep[group.name]] = True
        for part in group.parts:
            size = slicing.width(modules[part.layer], part.side)
            if isinstance(modules[part.layer], nn.PReLU) and size == 1:
                continue
            mask = masks.setdefault((part.layer, part.side), torch.ones(size, dtype=torch.bool))
            mask[torch.tensor(part.index)] &= stays[torch.tensor(part.channel)]
    return {key: mask.nonzero().flatten() for key, mask in masks.items()}


def narrow_(model: nn.Module, groups: Iterable[Group], keep: Mapping[str, Tensor]) -> None:
    """Keep only the channels keep[name] of each group, in place."""
    indices = _indices(model, groups, keep)
    modules = dict(model.named_modules())
    for name in dict.fromkeys(layer for layer, _ in indices):
        slicing.narrow_(modules[name], indices.get((name, "out")), indices.get((name, "in")))


def silence_(model: nn.Module, groups: Iterable[Group], keep: Mapping[str, Tensor]) -> None:
    """Let the readers of all other channels see zeros, in place: what narrowing must compute exactly."""
    modules = dict(model.named_modules())
    for (name, side), stays in _indices(model, groups, keep).items():
        layer = modules[name]
        gone = torch.ones(slicing.width(layer, side), dtype=torch.bool)
        gone[stays] = False
        if side == "in":
            slicing.silence_(layer, gone.nonzero().flatten())
        elif isinstance(layer, nn.RNNBase):
            recurrent.silence_(layer, gone.nonzero().flatten())


def mute_(model: nn.Module, groups: Iterable[Group], keep: Mapping[str, Tensor]) -> None:
    """Let all other channels be zero wherever they are made, in place."""
    modules = dict(model.named_modules())
    for (name, side), stays in _indices(model, groups, keep).items():
        if side == "out":
            gone = torch.ones(slicing.width(modules[name], side), dtype=torch.bool)
            gone[stays] = False
            slicing.mute_(modules[name], gone.nonzero().flatten())
