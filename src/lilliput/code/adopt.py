"""Adopt: a network as people have it, made one that can be changed: unwrapped, in float32, its weights parameters."""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from lilliput.code.base import Code, copy_model


def adopted(model: nn.Module) -> nn.Module:
    """A copy of a model that can be compressed, in eval mode on the processor.

    Wrappers that compute the same (torch.compile, DataParallel, Accelerate's, PEFT's adapters) are taken off, weights
    that other tensors are computed to (weight_norm, spectral_norm, torch.nn.utils.prune, parametrizations of others)
    become plain parameters with the values that they have, and every float becomes float32: `torch.autocast` in a
    forward pass is left out. Codes of this package stay.
    become plain parameters with the values that they have, and every float becomes float32. Codes of this package stay.
    `nn.TransformerEncoder` computes on padded batches, as exported files do, in place of nested tensors.

    Args:
        model: the network; it stays as it is.

    Raises:
        ValueError: for a TorchScript module, and for one that cannot be copied.

    Example:
        >>> net = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).half()
        >>> plain = adopted(nn.DataParallel(net))
        >>> type(plain).__name__, plain.weight.dtype, sorted(name for name, _ in plain.named_parameters())
        ('Linear', torch.float32, ['bias', 'weight'])
    """
    inner = _unwrapped(model)
    if isinstance(inner, torch.jit.ScriptModule):
        raise ValueError(
            "shrink: the model must be an nn.Module whose layers can be changed, got a TorchScript module, which is a "
            "compiled program. Give the module that it was scripted or traced from."
        )
    try:
        result = copy_model(inner).cpu().eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"shrink: the model must be one that copy.deepcopy copies, but that raised {error}. Build it "
            "anew instead of taking it from a graph with gradients."
        ) from error
    if callable(merge := getattr(result, "merge_and_unload", None)):  # adapters of PEFT become part of the weights
        result = merge()
    if "_original_forward" in vars(result):  # Accelerate's, which casts inputs and outputs
        vars(result).pop("forward", None)
        del result._original_forward
    for module in result.modules():
        _permanent_(module)
        if _casts(type(module)):
            module.__class__ = _uncast(type(module))  # type: ignore[arg-type]  # mypy takes a class for unhashable
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    for tensor in (*result.parameters(), *result.buffers()):
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            tensor.data = tensor.data.float()
    return result


def _casts(kind: type) -> bool:
    """Whether the forward pass of a class, or what else it does, names torch.autocast."""
    functions = (
        part for each in kind.__mro__ if not each.__module__.startswith("torch.") for part in vars(each).values()
    )
    codes = (code for part in functions if (code := getattr(part, "__code__", None)) is not None)
    return any("autocast" in (*code.co_names, code.co_name.removeprefix("decorate_")) for code in codes)


@functools.cache
def _uncast(kind: type[nn.Module]) -> type[nn.Module]:
    """The same class, whose forward pass computes in the precision of its weights: a file holds one precision."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **named: Any) -> Any:
        enter, leave = torch.autocast.__enter__, torch.autocast.__exit__
        torch.autocast.__enter__ = lambda cast: cast  # type: ignore[method-assign]
        torch.autocast.__exit__ = lambda cast, *error: None  # type: ignore[method-assign]
        try:
            return kind.forward(self, *args, **named)
        finally:
            torch.autocast.__enter__, torch.autocast.__exit__ = enter, leave  # type: ignore[method-assign]

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside wrappers that compute the same."""
    while True:
        inner: Any = None
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            inner = model._orig_mod
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@torch.no_grad()
def _permanent_(module: nn.Module) -> None:
    """Make weights that are computed from other tensors parameters with the values that they have."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
    if parametrize.is_parametrized(module):
        listed: Any = module.parametrizations
        for name in list(listed):
            if not any(isinstance(part, Code) for part in listed[name]):
                with torch.enable_grad():  # without a gradient it would become a buffer
                    parametrize.remove_parametrizations(module, name, leave_parametrized=True)
