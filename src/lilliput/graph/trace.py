"""Tracing: a plain copy of the model, and what one run of it shows, which every change of a graph starts from."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.errors import NotSupported, near
from lilliput.task import call

PLAIN = (bool, int, float, str, tuple, list, dict, type(None))
INDICES = 4096  # numbers that an integer buffer has at most to be told apart by


@dataclass(frozen=True)
class Skipped:
    """Name a part of a model that stays as it is, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} is left alone: {self.reason}"


def copied(model: nn.Module, who: str) -> nn.Module:
    """Copy a model to change it.

    Raises:
        NotSupported: Where a tensor is decoded: a graph is changed on plain tensors only.
    """
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise NotSupported(f"{who}: the model must hold plain tensors, got a coded '{name}'. Call realize(model).")
    return copy.deepcopy(model)


def tensors(output: Any) -> list[Tensor]:
    """List the floating-point and integer tensors in what a model returned, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in tensors(part)]
    return []


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode inside, and back into its own after it; random draws leave no trace."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run(model: nn.Module, example: Any) -> list[Tensor]:
    """Run the model on the example, in eval mode and without gradients; return its output tensors."""
    with evaluating(model), torch.no_grad():
        return tensors(call(model, example))


def shapes(outputs: list[Tensor]) -> list[torch.Size]:
    """List the shapes of outputs, in order."""
    return [t.shape for t in outputs]


def agree(a: list[Tensor], b: list[Tensor], tolerance: float) -> bool:
    """Tell whether two runs gave the same up to `tolerance` times the largest value (at least 1e-3)."""
    return shapes(a) == shapes(b) and all(
        bool((x.double() - y.double()).abs().max() <= tolerance * max(float(x.double().abs().max()), 1e-3))
        for x, y in zip(a, b, strict=True)
        if x.numel()
    )


def holders(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that holds `path`, and the attribute's name in it."""
    parent, _, last = path.rpartition(".")
    return model.get_submodule(parent), last


def replace_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` wherever the model holds `old`, so that a module with two names stays one."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, last = holders(model, name)
            setattr(parent, last, new)


def named(model: nn.Module, name: str, who: str) -> nn.Module:
    """Return the submodule at `name`, or raise KeyError with near misses."""
    known = dict(model.named_modules(remove_duplicate=False))
    if name not in known:
        raise KeyError(f"{who}: no module '{name}'. {near(name, [n for n in known if n])}")
    module: nn.Module = known[name]
    return module


def sketch(model: nn.Module) -> nn.Module:
    """Copy a model but share its tensors, for trials that replace tensors and never write into them."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in held})


@dataclass(frozen=True)
class Call:
    """Describe one module as a run saw it: how often it was called, and the shapes of its first tensors in and out."""

    name: str
    count: int
    inputs: int
    shape_in: torch.Size | None
    shape_out: torch.Size | None
    plain: bool  # one positional tensor in, one tensor out
    in_tuple: bool  # a tuple out


def calls(model: nn.Module, example: Any) -> dict[str, Call]:
    """Describe every submodule that the example reaches, in the order of first calls."""
    seen: dict[str, Call] = {}
    order: list[str] = []

    def before(name: str) -> Any:
        return lambda module, args: order.append(name)

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ins, outs = tensors([args, kwargs]), tensors(output)
            seen[name] = Call(
                name,
                seen[name].count + 1 if name in seen else 1,
                len(ins),
                ins[0].shape if ins else None,
                outs[0].shape if outs else None,
                len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(output, Tensor),
                isinstance(output, tuple),
            )

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(before(name)))
            handles.append(module.register_forward_hook(after(name), with_kwargs=True))
        run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return {name: seen[name] for name in dict.fromkeys(order) if name in seen}


def topology(model: nn.Module, example: Any) -> str:
    """Name all that decides how a model's layers are joined, whatever its weights: types, plain settings, shapes, ties.

    Args:
        model: A model.
        example: Inputs, of which the shapes count.

    Returns:
        A text that differs where any of that differs; empty where it cannot be known (a forward put into one instance).

    Example:
        >>> a, b, x = nn.Linear(4, 8), nn.Linear(4, 8), torch.rand(1, 4)
        >>> topology(a, x) == topology(b, x), topology(a, x) == topology(nn.Linear(4, 9), x)
        (True, False)
    """
    first: dict[tuple[int, int], int] = {}
    said = [f"{tuple(t.shape)} {t.dtype}" for t in tensors(example if isinstance(example, dict) else [example])]
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        if "forward" in own:
            return ""
        said.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {id(type(module))}")
        said += [f"{k}={v!r}" for k, v in own.items() if k[0] != "_" and k != "training" and isinstance(v, PLAIN)]
        held = (*module.named_parameters(recurse=False, remove_duplicate=False), *module.named_buffers(recurse=False))
        for key, t in held:
            place = first.setdefault((t.untyped_storage().data_ptr(), t.storage_offset()), len(first))
            said.append(f"{key} {tuple(t.shape)} {t.dtype} {t.requires_grad} {place if t.numel() else ''}")
            if not t.is_floating_point() and t.numel() <= INDICES:
                said.append(str(t.flatten().tolist()))  # an index tells where channels go
    return "\n".join(said)


def tied(model: nn.Module) -> set[str]:
    """Name the modules that share a parameter's storage with another module, or hold one under two names."""
    owners: dict[tuple[int, int], set[tuple[str, str]]] = {}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False, remove_duplicate=False):
            if p.numel():
                owners.setdefault((p.untyped_storage().data_ptr(), p.storage_offset()), set()).add((path, name))
    return {path for group in owners.values() if len(group) > 1 for path, _ in group}


def frozen(model: nn.Module) -> set[str]:
    """Name the modules with a parameter of their own that takes no gradient; none where the whole model takes none."""
    if not any(p.requires_grad for p in model.parameters()):
        return set()
    return {
        name
        for name, module in model.named_modules()
        if any(not p.requires_grad for p in module.parameters(recurse=False))
    }


def first_line(error: Exception) -> str:
    """Return the first line of what an exception says, for a reason."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
