"""Block removal: take out whole residual blocks and layers whose output has the shape of their input."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.graph.trace import (
    Call,
    Skipped,
    calls,
    copied,
    first_line,
    frozen,
    holders,
    named,
    replace_,
    run,
    shapes,
    sketch,
    tied,
)

_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class PassThrough(nn.Module):
    """Pass the first tensor on in the place of a removed block, in a tuple of one if the block gave tuples."""

    def __init__(self, in_tuple: bool) -> None:
        super().__init__()
        self.in_tuple = in_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
        return (x,) if self.in_tuple else x

    def extra_repr(self) -> str:
        return f"in_tuple={self.in_tuple}"


def removable(model: nn.Module, example: Any) -> list[str]:
    """List the paths of the blocks that `remove_blocks` can take out one by one, in the order in which they run.

    A block is a module with parameters, called once, whose first tensor out has the shape of its first tensor in: the
    entries of a list of blocks where there is one (a transformer's layers, the blocks of a stage), else the outermost
    module that is no mere sequence; a lone Linear or Conv only as an entry of a sequence. Each was tried.

    Args:
        model: A model without codes.
        example: One example of inputs.

    Returns:
        Module paths.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.b(self.a(x).relu())
        >>> removable(nn.Sequential(nn.Linear(3, 4), Block(), Block(), nn.Linear(4, 2)), torch.rand(1, 3))
        ['1', '2']
    """
    work = copied(model, "removable")
    seen = calls(work, example)
    fits = {name for name, c in seen.items() if c.count == 1 and c.shape_in is not None and c.shape_in == c.shape_out}
    before = run(work, example)
    order = list(seen)
    names = [name for name, _ in _candidates(work, "", fits)]
    return [name for name in sorted(names, key=order.index) if not _why(work, name, example, seen, before)]


def skipped_blocks(model: nn.Module, example: Any) -> tuple[Skipped, ...]:
    """List the entries of lists of blocks that `removable` leaves out, each with the reason."""
    work = copied(model, "skipped_blocks")
    seen, free, before = calls(work, example), removable(model, example), run(work, example)
    skipped = []
    for name, module in work.named_modules():
        listed = bool(name) and isinstance(holders(work, name)[0], _LISTS) and any(True for _ in module.children())
        related = any(f"{name}.".startswith(f"{f}.") or f.startswith(f"{name}.") for f in free)
        if listed and not related and name in seen and any(True for _ in module.parameters()):
            why = _reason(seen[name]) or _why(work, name, example, seen, before) or "it is part of a block"
            skipped.append(Skipped(name, why))
    return tuple(skipped)


def _reason(seen: Call) -> str:
    if seen.count > 1:
        return f"it is called {seen.count} times"
    if seen.shape_in != seen.shape_out:
        return f"it turns the shape {_shape(seen.shape_in)} into {_shape(seen.shape_out)}"
    return ""


def _shape(shape: torch.Size | None) -> str:
    return str(tuple(shape)) if shape is not None else "none"


def _candidates(module: nn.Module, path: str, fits: set[str]) -> list[tuple[str, str]]:
    """What could go, below `module` and itself: (path, kind), the kind being "layer", "block" or "listed".

    A lone layer or mere sequence is a "layer"; "listed" are the entries of a list of blocks of one type.
    """
    children = {f"{path}.{name}" if path else name: child for name, child in module.named_children()}
    fit = path in fits and any(True for _ in module.parameters())
    if not children or isinstance(module, _LAYERS):  # a convolution that holds its padding is one all the same
        return [(path, "layer")] if fit and isinstance(module, _LAYERS) else []
    blocks = [c for full, child in children.items() for c in _candidates(child, full, fits)]
    if type(module) in _LISTS:
        kinds = {type(child) for child in children.values()}
        if len(kinds) == 1 and not kinds & {*_LISTS, *_LAYERS}:
            blocks = [(name, "listed" if name in children else kind) for name, kind in blocks]
        return blocks or ([(path, "layer")] if fit else [])
    if not path:  # the network itself: only what it calls by name is its own business
        return [c for c in blocks if not isinstance(children.get(c[0]), _LAYERS)]
    if fit:
        return [c for c in blocks if c[1] == "listed"] or [(path, "block")]
    return [c for c in blocks if c[1] != "layer"]


def _why(model: nn.Module, name: str, example: Any, seen: Mapping[str, Call], before: list[Tensor]) -> str:
    """Why the block cannot go; empty when it can."""
    block = model.get_submodule(name)
    shared, still = tied(model), frozen(model)
    for inner, _ in block.named_modules():
        full = f"{name}.{inner}" if inner else name
        if full in shared:
            return f"{full} shares a parameter with another layer"
        if full in still:
            return f"{full} is frozen"
    try:
        after = sketch(model)
        _without_(after, seen, [name])
        return "" if shapes(run(after, example)) == shapes(before) else "the output's shape depends on it"
    except Exception as error:  # whatever a stranger's forward raises
        return f"the model fails without it ({first_line(error)})"


def remove_blocks(model: nn.Module, example: Any, names: Iterable[str]) -> nn.Module:
    """Copy a model without the named blocks.

    An `nn.Identity` (a `PassThrough` for calls with more arguments) takes the place of each. Other names stay as they
    are, except in an `nn.TransformerEncoder` or `nn.TransformerDecoder`, whose forward looks into its first layer:
    there the entries are deleted and the later ones move up.

    Args:
        model: A model without codes.
        example: One example of inputs.
        names: Paths of the blocks.

    Returns:
        The copy.

    Raises:
        KeyError: For an unknown name.
        ValueError: For a block that must stay.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
        >>> remove_blocks(net, torch.rand(1, 3), ["1"])[1]
        Identity()
    """
    names = list(dict.fromkeys(names))
    work = copied(model, "remove_blocks")
    seen = calls(work, example)
    for name in names:
        named(model, name, "remove_blocks")
        if name not in seen:
            raise ValueError(f"remove_blocks: '{name}' must run on the example, it does not. Leave it out.")
    smaller = copied(model, "remove_blocks")
    _without_(smaller, seen, names)
    before = shapes(run(work, example))
    try:
        after = shapes(run(smaller, example))
    except Exception as error:
        raise ValueError(f"remove_blocks: the model does not run without {names} ({error}).") from error
    if after != before:
        raise ValueError(f"remove_blocks: the output must keep its shape {before}, got {after} without {names}.")
    return smaller


def _without_(model: nn.Module, seen: Mapping[str, Call], names: list[str]) -> None:
    lists = {id(m.layers): m for m in model.modules() if isinstance(m, (nn.TransformerEncoder, nn.TransformerDecoder))}
    gone: dict[int, list[nn.Module]] = {}
    for name in names:
        parent, last = holders(model, name)
        block = getattr(parent, last) if not isinstance(parent, nn.ModuleDict) else parent[last]
        if id(parent) in lists:
            gone.setdefault(id(parent), []).append(block)
        else:
            replace_(model, block, nn.Identity() if seen[name].plain else PassThrough(seen[name].in_tuple))
    for key, blocks in gone.items():
        stack = lists[key]
        stack.layers = nn.ModuleList(layer for layer in stack.layers if layer not in blocks)
        stack.num_layers = len(stack.layers)
