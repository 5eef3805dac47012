"""Layout: how images lie in memory while a network trains, whichever way is faster on this processor."""

import time
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.task import Task, call, leaves, length, take

REPEATS = 3


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
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return False
    if any(p.device.type != "cpu" for p in model.parameters()):
        return False
    inputs = task.probe("train").inputs
    inputs = take(inputs, slice(0, min(length(inputs), batch_size or task.batch_size)))
    random = torch.get_rng_state()
    try:
        first, last = copy_model(model).train(), place(copy_model(model).train(), True)
        _pass(last, inputs)
        if not timed:
            return True
        _pass(first, inputs)
        seconds = [(_pass(first, inputs), _pass(last, inputs)) for _ in range(REPEATS)]
        return min(b for _, b in seconds) < min(a for a, _ in seconds)
    except RuntimeError:  # `view` of a tensor whose channels are last
        return False
    finally:
        torch.set_rng_state(random)


def place(model: nn.Module, last: bool) -> nn.Module:
    """Lay a model's images and filters with channels last, or first, in place."""
    return model.to(memory_format=torch.channels_last if last else torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


def _pass(model: nn.Module, inputs: Any) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    outputs: list[Tensor] = [leaf for leaf in leaves(call(model, inputs)) if leaf.requires_grad]
    torch.autograd.backward([leaf.sum() for leaf in outputs])
    return time.perf_counter() - began
