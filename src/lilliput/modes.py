"""Modes: put a network into training mode, as far as what it computes stays what it is used for."""

import torch
from torch import nn

from lilliput.code.base import copy_model
from lilliput.task import Task, call, on, outline, take


def train_(model: nn.Module, task: Task) -> nn.Module:
    """Put a model into training mode, in place, and return it.

    Where it then returns something else than what it is used for (auxiliary heads), or cannot run since such a head has
    the shape of before, the modules whose code asks for the mode stay in eval mode; norms and dropout train.

    Args:
        model: the network.
        task: gives an input.
    """
    model.train()
    asking = [module for module in model.modules() if _asks(type(module))]
    if not asking:
        return model
    twin = copy_model(model)
    few = on(take(task.probe("train").inputs, slice(0, 2)), next(model.parameters()).device)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            alike = outline(call(twin, few)) == outline(call(twin.eval(), few))
        except RuntimeError:  # a layer of another shape, which only a training sees
            alike = False
    for module in asking if not alike else ():
        module.training = False
    return model


def _asks(kind: type) -> bool:
    """Whether the code of a class that is not torch's reads `training`; a worker may have no source of it."""
    classes = (each for each in kind.__mro__ if not each.__module__.startswith("torch."))
    parts = (part for each in classes for part in vars(each).values())
    return any("training" in part.__code__.co_names for part in parts if hasattr(part, "__code__"))
