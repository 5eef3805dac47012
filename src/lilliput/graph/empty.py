"""Empty channels and blocks: remove what zeros have emptied, which leaves the function as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import realize
from lilliput.graph import slicing
from lilliput.graph.blocks import removable, remove_blocks
from lilliput.graph.channels import groups, remove_channels
from lilliput.graph.group import Group
from lilliput.graph.trace import agree, run
from lilliput.stage import Reference, Stage
from lilliput.task import Task, leaves

MIXERS = (nn.RNNBase, nn.LayerNorm, nn.GroupNorm)  # what reads a channel beside its readers: states, statistics


@dataclass(frozen=True)
class RemoveEmpty(Stage):
    """Remove the channels and residual blocks that zeros have emptied: a smaller plain module, the same function.

    See `remove_empty`. Masks are realized first; `Masked` codes can be attached to the result anew.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.rand(1, 4)
        >>> with torch.no_grad():
        ...     net[2].weight[:, 2:] = 0
        >>> RemoveEmpty()(net, Task("some", train=x, val=x), None)[0]
        Linear(in_features=4, out_features=2, bias=True)
    """

    structural: ClassVar[bool] = True

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return remove_empty(model, task.example)


def remove_empty(model: nn.Module, example: Any) -> nn.Module:
    """Copy a model without the channels and blocks that compute nothing, repeatedly until nothing more goes.

    A channel c of a coupled group goes where no layer reads it, W[:, c] = 0 in every reader, or where every layer that
    makes it makes zero, W[c] = 0 and b[c] = 0 in every maker. A residual block that holds a tensor of nothing but zeros
    goes where the network computes the same without it. Each removal is checked on random inputs of the example's shape
    and undone where an output differs (an activation that makes something of zero). One channel of a group stays, even
    an empty one; groups that a recurrent layer or a layer or group norm sees stay whole.

    Args:
        model: The model; codes are realized.
        example: One example of inputs.

    Returns:
        A smaller plain module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with torch.no_grad():
        ...     net[2].weight[:, 2:] = 0
        >>> remove_empty(net, torch.rand(1, 4))[0]
        Linear(in_features=4, out_features=2, bias=True)
    """
    small = realize(model)
    flags = {name: p.requires_grad for name, p in small.named_parameters()}
    small.requires_grad_(True)
    inputs = _drawn(example)
    small = _without_blocks(small, example, inputs)
    while True:
        free = {g.name: g for g in groups(small, example) if g.removable}
        keep = {name: stays for name, g in free.items() if len(stays := occupied(small, g)) < g.size}
        keep = {name: stays for name, stays in keep.items() if not _mixed(small, free[name])}
        smaller = _removed(small, example, inputs, keep, tuple(free.values()))
        if smaller is small:
            break
        small = smaller
    for name, p in small.named_parameters():
        p.requires_grad_(flags.get(name, True))
    return small


def occupied(model: nn.Module, group: Group) -> Tensor:
    """Return the sorted indices of the group's channels that are both made and read, at least one of them."""
    sums = {side: torch.zeros(group.size) for side in ("out", "in")}
    for part in group.parts:
        layer = model.get_submodule(part.layer)
        if part.side == "out" and not isinstance(layer, slicing.MAPS):
            sums["out"] += torch.inf  # it may add to what the layer before it makes
            continue
        for name, tensor in layer.named_parameters(recurse=False):
            weights = slicing.per_channel(layer, part.side, name, tensor.detach().abs().float().cpu())
            if weights is not None:
                sums[part.side].index_add_(0, torch.tensor(part.channel), weights[torch.tensor(part.index)])
    used = (sums["out"] > 0) & (sums["in"] > 0)
    if group.multiple > 1:  # every run keeps equally many: the fullest one decides
        return _evenly(group, used)
    return used.nonzero().flatten() if bool(used.any()) else torch.zeros(1, dtype=torch.long)


def _evenly(group: Group, used: Tensor) -> Tensor:
    classes = torch.tensor(group.classes)
    members = [(classes == label).nonzero().flatten() for label in range(group.multiple)]
    most = max(1, *(int(used[own].sum()) for own in members))
    picked = [own[used[own].long().argsort(descending=True, stable=True)[:most]] for own in members]
    return torch.cat(picked).sort().values


def _mixed(model: nn.Module, group: Group) -> bool:
    layers = [model.get_submodule(part.layer) for part in group.parts]
    return any(isinstance(layer, MIXERS) for layer in layers) or not any(part.side == "in" for part in group.parts)


def _removed(
    model: nn.Module, example: Any, inputs: Any, keep: Mapping[str, Tensor], free: tuple[Group, ...]
) -> nn.Module:
    """Without these channels, all at once where that changes nothing, else one group at a time; itself where none."""
    before = run(model, inputs)
    if keep and agree(before, run(smaller := remove_channels(model, example, keep, free), inputs), 1e-4):
        return smaller
    for name in keep:
        if len(keep) > 1:
            smaller = remove_channels(model, example, {name: keep[name]}, free)
            if agree(before, run(smaller, inputs), 1e-4):
                return smaller
    return model


def _without_blocks(model: nn.Module, example: Any, inputs: Any) -> nn.Module:
    before = run(model, inputs)
    for name in removable(model, example):
        block = model.get_submodule(name)
        if any(p.dim() > 1 and not bool(p.any()) for p in block.parameters()):
            trial = remove_blocks(model, example, [name])
            if agree(before, run(trial, inputs), 1e-4):
                model = trial
    return model


def _drawn(example: Any) -> Any:
    """Inputs like the example: it and two noisy copies of it (whole numbers, such as tokens, stay)."""
    draw = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return torch.cat([x] * 3)
        noise = torch.randn((2, *x.shape), generator=draw).to(x) * x.float().std().clamp_min(0.1).nan_to_num(1.0)
        return torch.cat([x, x + noise[0], noise[1].to(x.dtype)])

    if isinstance(example, dict):
        return {name: noisy(value) for name, value in example.items()}
    made = tuple(noisy(value) for value in leaves(example))
    return made if isinstance(example, tuple) else made[0]
