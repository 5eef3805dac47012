"""The tensors of a model by the names that they had before codes were attached."""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.errors import near


def find(model: nn.Module, where: str = "*", *, least_dim: int = 2, who: str = "find") -> list[str]:
    """List the names of the tensors that `where` chooses, such as "layers.0.conv1.weight".

    A name chosen outright is taken whatever its dimensions. Tied tensors are named once.

    Args:
        model: The model.
        where: Glob patterns on module or tensor names, separated by commas; "*" takes every weight of at least
            `least_dim` dimensions.
        least_dim: The fewest dimensions of a tensor that a pattern takes.
        who: The method's name, for errors.

    Returns:
        The names, in the order of the model.

    Raises:
        ValueError: When nothing matches, with near misses.
    """
    owners = parameter_names(model)
    patterns = [pattern.strip() for pattern in where.split(",") if pattern.strip()]
    chosen = []
    for name, tensor in owners.items():
        module = name.rpartition(".")[0]
        by_glob = any(fnmatchcase(name, p) or fnmatchcase(module, p) for p in patterns)
        if by_glob and (tensor.dim() >= least_dim or name in patterns) and tensor.is_floating_point():
            chosen.append(name)
    if not chosen:
        modules = {name.rpartition(".")[0] or name for name in owners}
        raise ValueError(
            f"{who}: where must match a floating-point tensor of at least {least_dim} dimensions, got "
            f"{where!r}. {near(where, modules)}"
        )
    return chosen


def parameter_names(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter by the name it had before codes were attached, decoded; tied ones under their first name."""
    by_name: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in plain_modules(model):
        for name in (*module._parameters, *lists(module)):
            if parametrize.is_parametrized(module, name):
                identity = id(next(originals(module, name)))
                with torch.no_grad():
                    tensor = getattr(module, name)
            else:
                tensor = module._parameters[name]
                identity = id(tensor)
            if tensor is not None and identity not in seen:
                seen.add(identity)
                by_name[f"{path}.{name}" if path else name] = tensor
    return by_name


def lists(module: nn.Module) -> Any:
    """The parametrization list of each parametrised tensor of a module, by attribute."""
    return module._modules.get("parametrizations") or {}  # getattr would raise, slowly, at every step of a rule


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, in the order and with the paths of `named_modules`, without what parametrizations hold."""
    seen, waiting = set(), [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module not in seen:
            seen.add(module)
            yield path, module
            waiting += [
                (f"{path}.{name}" if path else name, child)
                for name, child in reversed(module._modules.items())
                if child is not None and name != "parametrizations"
            ]


def originals(module: nn.Module, name: str) -> Iterator[Tensor]:
    """The innermost tensors behind a parametrised one."""
    holder = lists(module)[name]
    for original in original_names(holder):
        if original in lists(holder):
            yield from originals(holder, original)
        else:
            yield getattr(holder, original)


def original_names(holder: Any) -> list[str]:
    """The attributes of a parametrization list that hold theta."""
    if getattr(holder, "is_tensor", True):
        return ["original"]
    return [f"original{i}" for i in range(holder.ntensors)]


def theta(model: nn.Module, name: str) -> Tensor:
    """The tensor that is trained for `name`: the first innermost one behind its codes, or the plain parameter itself.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> theta(net, "weight") is net.weight
        True
    """
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    return next(originals(module, attribute)) if attribute in lists(module) else module.get_parameter(attribute)
