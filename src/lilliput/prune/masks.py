"""Masks: find the tensors that can be pruned, put masks on them, and choose new masks from scores."""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lilliput.code.base import attach, codes, holders, reason
from lilliput.code.masked import Masked
from lilliput.code.names import find, parameter_names, theta
from lilliput.errors import NotSupported, near
from lilliput.prune.patterns import Pattern
from lilliput.registry import lookup

Allocation = str | tuple[tuple[str, float], ...]


def check_sparsity(sparsity: float, pattern: Pattern, who: str, name: str = "") -> None:
    """Raise ValueError unless 0 <= sparsity < 1 and the pattern allows that many zeros."""
    if not 0 <= sparsity < 1:
        hint = f"For {sparsity:g}% write {sparsity / 100:g}." if 1 < sparsity < 100 else "It is the fraction of zeros."
        raise ValueError(f"{who}: sparsity must be in [0, 1), got {sparsity:g}. {hint}")
    if sparsity > pattern.most + 1e-9:
        raise ValueError(f"{who}: sparsity must be at most {pattern.most:g} with pattern {name!r}, got {sparsity:g}.")


def check_allocation(allocation: Allocation, who: str) -> None:
    """Raise KeyError unless an allocation is pairs (name, sparsity) or a known name."""
    if isinstance(allocation, str):
        lookup("allocation", allocation, who)


def prunable(
    model: nn.Module, where: str, pattern: Pattern, who: str, allocation: Allocation = ""
) -> tuple[list[str], dict[str, str]]:
    """Split tensors into those that a mask of this pattern can be put on and those that are left alone, each with the
    reason.

    Args:
        model: The model.
        where: Chooses the tensors.
        pattern: The pattern of the masks.
        who: The method's name, for errors.
        allocation: Where it is pairs, their names are taken instead of `where`.

    Returns:
        The names of those that can be pruned, and the reasons of the others by name.

    Raises:
        ValueError: For a name that the model does not have.
        NotSupported: For a tensor in another code.
    """
    tensors, kept, skipped = parameter_names(model), [], {}
    names = find(model, where, who=who) if isinstance(allocation, str) else [name for name, _ in allocation]
    seen = codes(model)
    for name in names:
        if name not in tensors:
            raise ValueError(f"{who}: allocation must name tensors of the model, got {name!r}. {near(name, tensors)}")
        if why := reason(model, name):
            skipped[name] = why
            continue
        if not tensors[name].numel():
            skipped[name] = "it is empty"
            continue
        if bool(tensors[name].isnan().any()):
            raise ValueError(
                f"{who}: weights must be numbers, got NaN in {name}. Load a sound checkpoint, or leave it "
                "out with where=."
            )
        try:
            pattern.of(name).check(tuple(tensors[name].shape))
        except ValueError as error:
            skipped[name] = str(error)
            continue
        if name in seen and not isinstance(seen[name][0], Masked):
            raise NotSupported(
                f"{who}: {name} must be plain or masked, but is stored by "
                f"{type(seen[name][0]).__name__}. Prune first, then quantize or factorise."
            )
        kept.append(name)
    return kept, skipped


def attach_masks(model: nn.Module, names: Iterable[str], pattern: Pattern, straight: bool = False) -> dict[str, Masked]:
    """Put a mask that keeps everything on every tensor that has none yet, in place; return all their masks by name.

    Args:
        model: The model.
        names: The tensors.
        pattern: The pattern of the masks.
        straight: Whether gradients reach the entries that a mask drops.

    Returns:
        The masks by name.
    """
    coded = codes(model)
    for name in names:
        if name not in coded:
            module, attribute = holders(model, name)[0]
            weight = getattr(module, attribute)
            block = pattern.of(name).block(tuple(weight.shape))
            attach(model, name, Masked(torch.ones_like(weight, dtype=torch.bool), block))
    by_name = masks(model, names)
    for code in by_name.values():
        code.straight = straight
    return by_name


def masks(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Masked]:
    """Return the mask of each masked tensor, or of those among `names`."""
    wanted = None if names is None else set(names)
    return {
        name: chain[0]
        for name, chain in codes(model).items()
        if isinstance(chain[0], Masked) and (wanted is None or name in wanted)
    }


def chosen(model: nn.Module, where: str, allocation: Allocation = "") -> dict[str, Masked]:
    """Return the masks that a rule moves while it trains."""
    if not isinstance(allocation, str):
        return masks(model, [name for name, _ in allocation])
    globs = [glob.strip() for glob in where.split(",")]
    return {
        name: code
        for name, code in masks(model).items()
        if any(fnmatchcase(name, glob) or fnmatchcase(name.rpartition(".")[0], glob) for glob in globs)
    }


def amounts(
    rated: Mapping[str, Tensor], sparsity: float, allocation: Allocation, pattern: Pattern, last: float = 1.0
) -> dict[str, float]:
    """Compute how sparse each tensor becomes: with pairs, `sparsity` of `last` of the way to their amounts."""
    if isinstance(allocation, str):
        pooled = {name: pattern.of(name).pooled(score) for name, score in rated.items()}
        share: dict[str, float] = lookup("allocation", allocation)(pooled, sparsity)
        return share
    return {name: amount * sparsity / last for name, amount in allocation if name in rated}


def select(
    rated: Mapping[str, Tensor], sparsity: float, allocation: Allocation, pattern: Pattern, last: float = 1.0
) -> dict[str, Tensor]:
    """Choose new masks from scores by name: the lowest go, as many as the allocation says."""
    share = amounts(rated, sparsity, allocation, pattern, last)
    return {name: pattern.of(name)(score, share[name]) for name, score in rated.items()}


@torch.no_grad()
def put_(masked: Mapping[str, Masked], new: Mapping[str, Tensor], pattern: Pattern) -> None:
    """Give tensors new masks, in place. Under torch.distributed every process takes those of the first."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    for name, mask in new.items():
        old = masked[name]
        block = pattern.of(name).block(tuple(mask.shape))
        if old.block != block:
            # Entries that went one by one lie across the blocks; positions are then stored entry by entry.
            old.block = block if bool(old.mask.all()) else None
        if distributed:
            held = mask.to(torch.uint8)
            torch.distributed.broadcast(held, 0)
            mask = held.bool()
        old.mask.copy_(mask)


@torch.no_grad()
def regrow_(
    model: nn.Module, masked: Mapping[str, Masked], new: Mapping[str, Tensor], pattern: Pattern
) -> dict[str, Tensor]:
    """Give tensors new masks, in place, and let what comes back start at zero.

    Returns:
        State keys "fresh NAME": where a mask changed, the optimizer's momenta start anew.
    """
    before = {name: masked[name].mask.clone() for name in new}
    put_(masked, new, pattern)
    fresh = {}
    for name, old in before.items():
        now = masked[name].mask
        theta(model, name).mul_(now & old)
        fresh[f"fresh {name}"] = now ^ old
    return fresh
