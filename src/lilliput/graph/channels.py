"""Channel groups: find the channels that must be removed together, and remove some of them."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import near, told
from lilliput.graph import slicing
from lilliput.graph.follow import dependencies
from lilliput.graph.group import Group, Part
from lilliput.graph.narrow import narrow_
from lilliput.graph.probe import probed
from lilliput.graph.trace import Call, Skipped, calls, copied, frozen, run, shapes, tied, topology
from lilliput.graph.trial import awake, labelled, trial

REMEMBERED = 16
"""Topologies whose groups are kept: a search builds hundreds of students from few."""
_found: OrderedDict[str, tuple[Group, ...]] = OrderedDict()


def groups(model: nn.Module, example: Any) -> tuple[Group, ...]:
    """Find the model's channel groups, in the order of its layers; those that must stay say why.

    Torch-Pruning follows one run's autograd graph to find what is joined. Because it reads an unknown operation as one
    that keeps channels apart, every group is then tried: half of its channels are removed, and the narrower network
    must compute exactly what the wide one does with the readers of those channels set to zero. Layer and group norms,
    which see all channels at once, are taken out of both for that. What does not pass is left alone with the reason.

    Args:
        model: A model without codes.
        example: One example of inputs.

    Returns:
        The groups.

    Raises:
        NotSupported: When the model holds codes (realize it first).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [str(g) for g in groups(net, torch.rand(1, 4))]
        ['8 channels made by 0, read by 2.', '2 channels made by 2; they stay: they are the output.']

    Source:
        Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023, arXiv:2301.12900.
    """
    work = copied(model, "groups")
    key = topology(work, example)
    if key in _found:
        _found.move_to_end(key)
        return _found[key]
    listed = _searched(work, model, example)
    if key:
        _found[key] = listed
        while len(_found) > REMEMBERED:
            _found.popitem(last=False)
    return listed


def _searched(work: nn.Module, model: nn.Module, example: Any) -> tuple[Group, ...]:
    try:
        listed = dependencies(work, example)
    except Exception as error:  # whatever a stranger's forward raises: nothing of this model can be followed
        why = f"the model could not be followed ({told(error)})"
        held = [(n, m) for n, m in work.named_modules() if any(True for _ in m.parameters(recurse=False))]
        return tuple(probed(model, example, [_whole(name, module, why) for name, module in held]))
    seen = calls(work, example)
    listed = [replace(g, reason=g.reason or _reason(work, g, seen)) for g in listed]
    return tuple(probed(model, example, _tried(model, example, listed) + _unseen(work, listed)))


def _whole(name: str, module: nn.Module, why: str) -> Group:
    known = isinstance(module, slicing.KNOWN) and not slicing.reason(module)
    if not known:
        parameter = next(iter(dict(module.named_parameters(recurse=False))))
        return Group(f"{name}.{parameter}" if name else parameter, 0, (), (), why)
    everything = tuple(range(slicing.width(module, "out")))
    return Group(name, len(everything), (Part(name, "out", everything, everything),), (0,) * len(everything), why)


def _unseen(model: nn.Module, listed: list[Group]) -> list[Group]:
    """Layers with parameters that no group mentions."""
    made = {p.layer for g in listed for p in g.parts if p.side == "out"}
    heads = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention))
    return [
        _whole(name, module, slicing.reason(module) or "no run of the example joins it to the output")
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False)) and name not in made and not name.startswith(heads)
    ]


def _reason(model: nn.Module, group: Group, seen: Mapping[str, Call]) -> str:
    shared, still = tied(model), frozen(model)
    modules = dict(model.named_modules())
    for part in group.parts:
        layer = modules[part.layer]
        if part.layer in shared:
            return f"{part.layer} shares a parameter with another layer"
        if part.layer in seen and seen[part.layer].count > 1:
            return f"{part.layer} is called {seen[part.layer].count} times"
        if part.layer in still:
            return f"{part.layer} is frozen"
        if why := slicing.reason(layer):
            return f"{part.layer}: {why}"
    return ""


def _tried(model: nn.Module, example: Any, listed: list[Group]) -> list[Group]:
    listed = [labelled(model, g) if g.removable else g for g in listed]
    listed = [replace(g, reason="there is only one") if g.removable and g.size < 2 else g for g in listed]
    candidates = [g for g in listed if g.removable]
    work = awake(copied(model, "groups"))
    dense = run(work, example)
    if not candidates or not trial(work, example, candidates, dense):
        return listed
    return [replace(g, reason=trial(work, example, [g], dense)) if g.removable else g for g in listed]


def remove_channels(
    model: nn.Module, example: Any, keep: Mapping[str, Tensor], listed: tuple[Group, ...] | None = None
) -> nn.Module:
    """Copy a model with only the channels keep[name] of each named group; a plain module that trains and exports.

    Args:
        model: A model without codes.
        example: One example of inputs.
        keep: Group name -> sorted indices of the channels that stay (a group that is not named keeps all).
        listed: What `groups(model, example)` returned, to save the time of finding it again.

    Returns:
        The copy.

    Raises:
        KeyError: For a name that is no group.
        ValueError: For a group that must stay, for indices outside the group and for unequal runs.
        NotSupported: When the model holds codes.
        RuntimeError: When the result does not run.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> remove_channels(net, torch.rand(1, 4), {"0": torch.tensor([1, 5])})[2]
        Linear(in_features=2, out_features=2, bias=True)
    """
    listed = groups(model, example) if listed is None else listed
    known = {g.name: g for g in listed}
    chosen: dict[str, Tensor] = {}
    for name, kept in keep.items():
        if name not in known:
            raise KeyError(f"remove_channels: no group '{name}'. {near(name, known)}")
        chosen[name] = _checked(known[name], kept)
    smaller = copied(model, "remove_channels")
    with torch.no_grad():
        narrow_(smaller, [known[n] for n in chosen], chosen)
    before = shapes(run(copied(model, "remove_channels"), example))
    try:
        after = shapes(run(smaller, example))
    except Exception as error:
        raise RuntimeError(
            f"remove_channels: the narrower model does not run ({error}). Keep other channels."
        ) from error
    if after != before:
        raise RuntimeError(
            f"remove_channels: the output must keep the shape {before}, got {after}. Keep other channels."
        )
    return smaller


def _checked(group: Group, kept: Tensor) -> Tensor:
    if len(kept) == group.size and torch.equal(kept.long(), torch.arange(group.size)):
        return kept.long()
    if group.reason:
        raise ValueError(f"remove_channels: {Skipped(group.name, group.reason)}. Leave it out of keep.")
    kept = kept.long()
    if not len(kept) or bool((kept[1:] <= kept[:-1]).any()) or int(kept[0]) < 0 or int(kept[-1]) >= group.size:
        raise ValueError(
            f"remove_channels: {group.name} must keep sorted indices in [0, {group.size}), at least one, "
            f"got {kept.tolist()}."
        )
    counts = torch.bincount(torch.tensor(group.classes)[kept], minlength=group.multiple)
    if len(set(counts.tolist())) > 1:
        raise ValueError(
            f"remove_channels: {group.name} must keep equally many channels in each of its {group.multiple} runs, got "
            f"{counts.tolist()}. Use choose(group, scores, count)."
        )
    return kept
