"""Students: narrower and shallower copies of a network, with weights inherited from it or drawn anew."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import nn

from lilliput.errors import near
from lilliput.graph.blocks import remove_blocks
from lilliput.graph.channels import groups, remove_channels
from lilliput.graph.stride import set_stride
from lilliput.graph.trace import copied
from lilliput.graph.widths import Scores, kept, magnitude, rounded, uniform
from lilliput.graph.widths import widths as allocated


def student(
    model: nn.Module,
    example: Any,
    *,
    remove: Iterable[str] = (),
    stride: Iterable[str] = (),
    pool: Iterable[str] = (),
    width: float = 1.0,
    widths: Mapping[str, int] | None = None,
    target: float = 1.0,
    of: Literal["values", "macs"] = "values",
    multiple: int = 1,
    scores: Scores | None = None,
    init: str = "dense",
    seed: int = 0,
) -> nn.Module:
    """Make a smaller copy: first without whole blocks, then with earlier strides, then with fewer channels.

    Args:
        model: The dense network, without codes.
        example: One example of inputs.
        remove: Paths of blocks that go (see `removable`).
        stride: Convolutions that take twice their stride (see `set_stride`).
        pool: Convolutions that read an input of half the size (see `set_stride`).
        width: The share of every group's channels that stays, rounded to `multiple`.
        widths: Instead of `width`, counts by group name (a group that its blocks took with them is skipped).
        target: Instead of `width`, the share of what the copy has of values or MACs by then, allocated by
            `lilliput.graph.widths`.
        of: What `target` counts, "values" or "macs".
        multiple: Counts are multiples of this.
        scores: The channels with the highest scores stay; by default those of `magnitude`.
        init: "dense" inherits the weights, "random" calls each module's `reset_parameters`.
        seed: The seed of drawn weights.

    Returns:
        The copy.

    Raises:
        KeyError: For unknown names.
        ValueError: For what cannot go.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> student(net, torch.rand(1, 4), remove=["2"], width=0.5)[4]
        Linear(in_features=8, out_features=2, bias=True)
    """
    if init not in ("dense", "random"):
        raise ValueError(f'student: init must be "dense" or "random", got {init!r}.')
    gone = tuple(remove)
    small = remove_blocks(model, example, gone) if gone else copied(model, "student")
    for name in stride:
        small = set_stride(small, example, name, 2)
    for name in pool:
        small = set_stride(small, example, name, 2, pool=True)
    if sum((width != 1.0, widths is not None, target != 1.0)) > 1:
        raise ValueError("student: give one of width, widths and target, got more.")
    if widths is not None or width != 1.0 or target != 1.0:
        listed = groups(small, example)
        best = {**magnitude(small, listed), **(scores or {})}
        counts = uniform(listed, width, multiple)
        if target != 1.0:
            counts = allocated(small, example, listed, target, best, of=of, round_to=multiple)
        if widths is not None:
            known, before = {g.name: g for g in listed}, dict(model.named_modules())
            if unknown := [name for name in widths if name not in known and name not in before]:
                raise KeyError(f"student: no group '{unknown[0]}'. {near(unknown[0], known)}")
            counts |= {name: rounded(known[name], count) for name, count in widths.items() if name in known}
        small = remove_channels(small, example, kept(listed, best, counts), listed)
    return reset(small, seed) if init == "random" else small


def reset(model: nn.Module, seed: int) -> nn.Module:
    """Copy a model with new random weights: every module's own `reset_parameters`, drawn from `seed` alone."""
    fresh = copied(model, "reset")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if callable(draw := getattr(module, "reset_parameters", None)):
                draw()
    return fresh
