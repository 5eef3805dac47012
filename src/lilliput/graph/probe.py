"""Joint groups that the dependency graph gets wrong, found by sending NaNs through the network.

A NaN in one channel survives whatever keeps channels apart and spreads over whatever mixes them. So where exactly one
channel's NaN arrives at a position, that position reads this channel: through a concatenation with inputs, into both
sides of a dot product, from a module that is called many times. That takes two runs for each bit of a channel's number.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lilliput.graph import slicing
from lilliput.graph.group import Group, Part
from lilliput.graph.trace import copied, first_line, frozen, replace_, run, sketch, tensors, tied
from lilliput.graph.trial import awake, labelled, trial

MIXED, NOBODY = -2, -1
"""A position that several channels reach; one that none reaches."""
OUTPUT = "they are the output"
MANY = 16
"""Where more layers than these lie in no removable group, only tables are tried: each trial takes dozens of runs."""
SPREAD = (nn.LayerNorm, nn.GroupNorm)  # these would spread a NaN over all channels, which they leave apart


def probed(model: nn.Module, example: Any, listed: Sequence[Group]) -> list[Group]:
    """The groups, those that stay replaced where following NaNs finds groups that may lose channels.

    Each table, Linear, recurrent layer or shared convolution that lies in no removable group is tried alone, then with
    others of its width.

    Args:
        model: A model without codes.
        example: One example of inputs.
        listed: Its groups so far.

    Returns:
        The groups in the old order, new ones in the place of the group that had their first maker.
    """
    work = awake(copied(model, "groups"))
    try:
        waiting = _waiting(work, example, listed)
    except Exception:  # whatever a stranger's forward raises: the groups already say so
        return list(listed)
    if not waiting:
        return list(listed)
    dense, found = run(work, example), list[Group]()
    for alone in (True, False):
        for sets in [[name] for name in waiting] if alone else _of_one_width(work, waiting):
            if not set(sets) <= set(waiting):
                continue
            group = _group(work, example, sets)
            if group.removable and not trial(work, example, [group], dense):
                found.append(group)
                waiting = [name for name in waiting if name not in sets]
    return _merged(listed, found)


def _waiting(model: nn.Module, example: Any, listed: Sequence[Group]) -> list[str]:
    """Layers that no removable group has, and that could be narrower; none where they are nothing but outputs."""
    free = {p.layer for g in listed if g.removable for p in g.parts if p.side == "out"}
    ends = {p.layer for g in listed if g.reason == OUTPUT for p in g.parts if p.side == "out"}
    never = free | tied(model) | frozen(model)
    names = [
        name
        for name, count in _counts(model, example).items()
        if name not in never and not slicing.reason(layer := model.get_submodule(name))
        if count > 1 or not isinstance(layer, slicing.CONVS)  # what the graph refuses else about convolutions is so
        if slicing.width(layer, "out") > 1
    ]
    tables = [name for name in names if isinstance(model.get_submodule(name), slicing.TABLES)]
    if len(names) > MANY:
        return tables
    return names if tables or set(names) - ends else []


def _counts(model: nn.Module, example: Any) -> dict[str, int]:
    """How often each table, Linear, recurrent layer and convolution is called."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Any:
        return lambda module, args, output: counts.update({name: counts.get(name, 0) + 1})

    with _hooked() as handles:
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.RNNBase, *slicing.CONVS, *slicing.TABLES)):
                handles.append(module.register_forward_hook(hook(name)))
        run(model, example)
    return counts


def _of_one_width(model: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Those of one width together: all tables, then all layers, then all tables and one other layer."""
    sizes = {name: slicing.width(model.get_submodule(name), "out") for name in names}
    for size in dict.fromkeys(sizes.values()):
        same = [name for name in names if sizes[name] == size]
        tables = [name for name in same if isinstance(model.get_submodule(name), slicing.TABLES)]
        others = [name for name in same if name not in tables]
        choices = [tables, same, *([*tables, other] for other in others)]
        yield from (list(names) for names in dict.fromkeys(tuple(c) for c in choices) if len(names) > 1)


def _group(model: nn.Module, example: Any, makers: Sequence[str]) -> Group:
    """The group of the channels that these layers make, with everything that reads them one by one."""
    size = slicing.width(model.get_submodule(makers[0]), "out")
    everything = tuple(range(size))
    parts = [Part(name, "out", everything, everything) for name in makers]
    try:
        labels = _labels(model, example, makers, size)
    except Exception as error:  # whatever a stranger's forward raises when it meets a NaN
        return Group(makers[0], size, tuple(parts), (0,) * size, f"the model fails on NaN ({first_line(error)})")
    fixed = tied(model) | frozen(model)
    for name, channel in labels.items():
        index = (channel >= 0).nonzero().flatten()
        if not len(index):
            continue
        layer = model.get_submodule(name)
        side = "in" if isinstance(layer, slicing.MAPS) and not slicing.depthwise(layer) else "out"
        parts.append(Part(name, side, tuple(index.tolist()), tuple(channel[index].tolist())))
        why = f"{name} shares a parameter with another layer or is frozen" if name in fixed else slicing.reason(layer)
        if why:
            return Group(makers[0], size, tuple(parts), (0,) * size, why)
    return labelled(model, Group(makers[0], size, tuple(parts), (0,) * size))


def _labels(model: nn.Module, example: Any, makers: Sequence[str], size: int) -> dict[str, Tensor]:
    """For each layer that a NaN reaches, the channel that reaches each position of its input."""
    work = sketch(model)
    readers = {name: m for name, m in work.named_modules() if isinstance(m, slicing.KNOWN)}
    widths = {name: _side(m) for name, m in readers.items() if name not in makers or isinstance(m, slicing.MAPS)}
    for module in [m for m in work.modules() if isinstance(m, SPREAD)]:
        replace_(work, module, nn.Identity())
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for bit in range(max((size - 1).bit_length(), 1)):
        ones = torch.arange(size) >> bit & 1 == 1
        pair = [_arrivals(work, example, makers, mask, widths) for mask in (ones, ~ones)]
        for name in widths:
            quiet = torch.zeros(widths[name][0], dtype=torch.bool)
            seen.setdefault(name, []).append((pair[0].get(name, quiet), pair[1].get(name, quiet)))
    return {name: label for name, bits in seen.items() if bool(((label := _decoded(bits)) != NOBODY).any())}


def _decoded(bits: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    number = torch.zeros(len(bits[0][0]), dtype=torch.long)
    once, never = torch.ones(len(number), dtype=torch.bool), torch.ones(len(number), dtype=torch.bool)
    for bit, (one, zero) in enumerate(bits):
        number += one.long() << bit
        once &= one ^ zero
        never &= ~(one | zero)
    number[~once] = MIXED
    number[never] = NOBODY
    return number


def _side(layer: nn.Module) -> tuple[int, int]:
    """The width of the layer's input, and which dimension of the tensor it is."""
    last = isinstance(layer, (nn.Linear, nn.RNNBase, nn.LayerNorm, *slicing.TABLES))
    side = "in" if isinstance(layer, slicing.MAPS) and not slicing.depthwise(layer) else "out"
    return slicing.width(layer, side), -1 if last else 1


def _arrivals(
    model: nn.Module, example: Any, makers: Sequence[str], mask: Tensor, widths: dict[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Run with NaN in the masked channels of the makers; which positions of each layer's input are NaN."""
    arrived: dict[str, Tensor] = {}

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, PackedSequence):
            return output._replace(data=spoil(module, args, output.data))
        if isinstance(output, tuple):  # a recurrent layer: the outputs of both directions side by side, and its states
            return tuple(spoil(module, args, part) for part in output)
        gone = mask.to(output.device)
        if isinstance(module, slicing.CONVS):
            gone = gone.view(-1, *[1] * (module.weight.ndim - 2))
        elif isinstance(module, nn.RNNBase):
            gone = gone.repeat(output.shape[-1] // len(gone))
        return output.nan_to_num().masked_fill(gone, torch.nan)  # what is made here anew is whole but for these

    def look(name: str) -> Any:
        size, dim = widths[name]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [part.data if isinstance(part, PackedSequence) else part for part in args]
            into = [t for t in tensors([*given, kwargs]) if t.is_floating_point()]
            if not into or into[0].ndim < abs(dim) + (dim > 0) or into[0].shape[dim] != size:
                return
            nan = into[0].isnan().movedim(dim, 0).flatten(1).any(1).cpu()
            arrived[name] = arrived[name] | nan if name in arrived else nan

        return hook

    with _hooked() as handles:
        for name in makers:
            handles.append(model.get_submodule(name).register_forward_hook(spoil))
        for name in widths:
            handles.append(model.get_submodule(name).register_forward_pre_hook(look(name), with_kwargs=True))
        run(model, example)
    return arrived


@contextmanager
def _hooked() -> Iterator[list[Any]]:
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _merged(listed: Sequence[Group], found: Sequence[Group]) -> list[Group]:
    """The old groups without the makers that were found, and each found group where its first maker was."""
    taken = {p.layer for g in found for p in g.parts if p.side == "out"}
    result: list[Group] = []
    for group in listed:
        result += [g for g in found if group.reason and g.name in {p.layer for p in group.parts if p.side == "out"}]
        made = [p for p in group.parts if p.side == "out" and p.layer not in taken]
        if group.removable or not group.parts or len(made) == sum(p.side == "out" for p in group.parts):
            result.append(group)
        elif made:
            parts = tuple(p for p in group.parts if p.side == "in" or p in made)
            result.append(replace(group, name=made[0].layer, parts=parts))
    return [*result, *(g for g in found if g not in result)]
