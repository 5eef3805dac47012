"""The trial of a group: without half of its channels the network computes what it computes when it ignores them."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.graph import slicing
from lilliput.graph.group import Group, choose
from lilliput.graph.narrow import mute_, narrow_, silence_
from lilliput.graph.trace import agree, first_line, replace_, run, shapes, sketch


def labelled(model: nn.Module, group: Group) -> Group:
    """The group with its classes: channels of one class may replace each other, and every class keeps equally many."""
    modules = dict(model.named_modules())
    labels = torch.zeros(group.size, dtype=torch.long)
    for part in group.parts:
        layer = modules[part.layer]
        runs = slicing.partitions(layer)
        if runs == 1:
            continue
        total = slicing.width(layer, part.side)
        if len(part.index) != total:
            return replace(group, reason=f"{part.layer} divides more channels than these into {runs} runs")
        mine = torch.zeros(group.size, dtype=torch.long)
        mine[torch.tensor(part.channel)] = torch.tensor(part.index) // (total // runs)
        labels = labels * runs + mine
    _, inverse, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(set(counts.tolist())) > 1:
        return replace(group, reason="the layers divide these channels into runs that do not match")
    if len(counts) > 1 and len(counts) == group.size:
        return replace(group, reason="every channel is a run of its own")
    return replace(group, classes=tuple(inverse.tolist()))


def awake(model: nn.Module) -> nn.Module:
    """Parameters that are all zero hide what is joined to what: the copy that is tried gets small numbers instead."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and not p.any():
                p.copy_(torch.randn(p.shape, generator=draw) / max(p[0].numel() if p.ndim else 1, 1) ** 0.5)
    return model


def _half(group: Group) -> Tensor:
    order = torch.randperm(group.size, generator=torch.Generator().manual_seed(group.size))
    return choose(group, order.float(), max(group.size // (2 * group.multiple), 1) * group.multiple)


def trial(model: nn.Module, example: Any, candidates: list[Group], dense: list[Tensor]) -> str:
    """Why removing half of the candidates' channels does not work; empty when it does."""
    keep = {g.name: _half(g) for g in candidates}
    narrow = sketch(model)
    try:
        narrow_(narrow, candidates, keep)
        outputs = run(narrow, example)
    except Exception as error:  # whatever a stranger's forward raises when its sizes change
        return f"the model fails without some of them ({first_line(error)})"
    if shapes(outputs) != shapes(dense):
        return "the output's shape depends on them"
    silent = sketch(model)
    silence_(silent, candidates, keep)
    mixed = [
        name for name in _layers(candidates) if isinstance(model.get_submodule(name), (nn.LayerNorm, nn.GroupNorm))
    ]
    for name in mixed:
        for net in (narrow, silent):
            replace_(net, net.get_submodule(name), nn.Identity())
    if mixed:
        outputs = run(narrow, example)
    expected = run(silent, example)
    if not all(bool(t.isfinite().all()) for t in expected) or agree(expected, outputs, 1e-3):
        return ""
    # What a dot product sums has no reader: there a channel that is gone is one that is zero wherever it is made.
    muted = sketch(model)
    mute_(muted, candidates, keep)
    for name in mixed:
        replace_(muted, muted.get_submodule(name), nn.Identity())
    if agree(run(muted, example), outputs, 1e-3):
        return ""
    return "an operation mixes them, so that removing one is not the same as ignoring it"


def _layers(listed: Iterable[Group]) -> list[str]:
    return list(dict.fromkeys(part.layer for group in listed for part in group.parts))
