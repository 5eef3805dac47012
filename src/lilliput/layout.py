"""Layout: how images lie in memory while a network trains, whichever way is faster on this processor."""

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.code.base import copy_model
from lilliput.modes import train_
from lilliput.task import Task, call, leaves, length, take

REPEATS = 3
SLOW_S = 0.5


def channels_last(model: nn.Module, task: Task, batch_size: int | None = None, timed: bool = True) -> bool:
    """Whether a network of two-dimensional convolutions trains faster with the channels of each place side by side.

    Args:
        model: the network.
        task: gives a batch.
        batch_size: examples in a batch; the task's own without one.
        timed: a few passes of each are timed; else the channels are last wherever the network runs that way.

    Returns:
        Whether channels should be last; False for networks that have no such convolution, or reshape in a way that
        needs them first.

    Example:
        >>> x, y = torch.zeros(8, 1, 6, 6), torch.zeros(8, dtype=torch.long)
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 2))
        >>> channels_last(net, Task("images", (x, y), (x, y)), timed=False)
        True
        >>> channels_last(nn.Linear(6, 2), Task("images", (x, y), (x, y)))
        False
    """
    if not _convolutions(model) or any(p.device.type != "cpu" for p in model.parameters()):
        return False
    inputs = task.probe("train").inputs
    inputs = take(inputs, slice(0, min(length(inputs), batch_size or task.batch_size)))
    random = torch.get_rng_state()
    try:
        first, last = train_(copy_model(model), task), place(train_(copy_model(model), task), True)
        after = _pass(last, inputs)
        if not timed:
            return True
        before = _pass(first, inputs)
        if before + after < SLOW_S:  # else what the first pass allocates is little beside it
            before = min(_pass(first, inputs) for _ in range(REPEATS))
            after = min(_pass(last, inputs) for _ in range(REPEATS))
        return after < before
    except RuntimeError:  # `view` of a tensor whose channels are last
        return False
    finally:
        torch.set_rng_state(random)


def place(model: nn.Module, last: bool) -> nn.Module:
    """Lay a model's filters with channels last, or first, in place; what it computes from images then lies as they do.

    Filters that are decoded in every pass stay as they are: to lay them anew each time gains nothing.
    """
    form = torch.channels_last if last else torch.contiguous_format
    for module in _convolutions(model):
        module.weight.data = module.weight.data.contiguous(memory_format=form)
    return model


def _convolutions(model: nn.Module) -> list[nn.Conv2d | nn.ConvTranspose2d]:
    found = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    return [module for module in found if not parametrize.is_parametrized(module, "weight")]


def _pass(model: nn.Module, inputs: Any) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    outputs: list[Tensor] = [leaf for leaf in leaves(call(model, inputs)) if leaf.requires_grad]
    torch.autograd.backward([leaf.sum() for leaf in outputs])
    return time.perf_counter() - began
