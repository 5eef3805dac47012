"""Layer-wise pruning: the second moment of each layer's inputs, and weights that change before the next layer sees
them.

Layer-wise pruning asks for W' with few entries and little squared error on the layer's own inputs X, (d, samples):
||W X - W' X||^2 = sum over rows w of (w - w') H (w - w')^T, H = X X^T. H is all that it needs to know of the data.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model, realize
from lilliput.code.names import theta
from lilliput.errors import near
from lilliput.prune.masks import Allocation, amounts, attach_masks, check_sparsity, prunable, put_
from lilliput.prune.patterns import NM, Pattern, parse
from lilliput.prune.patterns_of_blocks import Blocks, Channels, Units
from lilliput.stage import calibration, on
from lilliput.statistics.hessian import products
from lilliput.statistics.sources import sees_inputs, single
from lilliput.task import Task, call, leaves, length, take

HELD_BYTES = 2**30  # of activations at once; beyond, every layer costs a pass over the examples
Solve = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def check(who: str, sparsity: float | None, pattern: str, allocation: Allocation, examples: int, damp: float) -> None:
    """Raise ValueError for settings out of range."""
    kind = parse(pattern)
    if isinstance(kind, Channels):
        raise ValueError(
            f"{who}: pattern must leave some weights of an output to make up for the others, got "
            f"{pattern!r}. Use Prune, or lilliput.graph to remove channels."
        )
    if isinstance(allocation, str) and allocation not in ("uniform", "erk"):
        raise ValueError(
            f"{who}: allocation must be 'uniform', 'erk' or pairs (name, sparsity), got {allocation!r}: a "
            f"layer is done before the next one is seen. {near(allocation, ['uniform', 'erk'])}"
        )
    if sparsity is None and isinstance(allocation, str):
        raise ValueError(f"{who}: sparsity must be given, got None. Write {who}(0.5) for 50% zeros.")
    pairs = () if isinstance(allocation, str) else allocation
    for value in [*([] if sparsity is None else [sparsity]), *(value for _, value in pairs)]:
        check_sparsity(value, kind, who, pattern)
    if examples < 1:
        raise ValueError(f"{who}: examples must be at least 1, got {examples}.")
    if damp <= 0:
        raise ValueError(f"{who}: damp must be above 0, got {damp:g}, so that H has an inverse. 0.01 suits most.")


def sort(
    model: nn.Module, where: str, pattern: str, who: str, allocation: Allocation = ""
) -> tuple[list[str], dict[str, str]]:
    """Split the weights into those that can be pruned layer by layer and those that are left alone, each with the
    reason.
    """
    kind = parse(pattern)
    kept, skipped = prunable(model, where, kind, who, allocation)
    for name in list(kept):
        module = model.get_submodule(name.rpartition(".")[0])
        weight: Tensor = getattr(module, name.rpartition(".")[2])
        if not sees_inputs(model, name) or "Conv1D" in type(module).__name__:
            skipped[name] = "its inputs cannot be seen: no linear or convolutional module is called with them"
        elif isinstance(kind, NM) and kind.out:
            skipped[name] = "its rows are solved one by one, which groups along the outputs would tie: use '2:4'"
        elif isinstance(kind, Units):
            rows, columns, *others = kind.block(tuple(weight.shape))
            if max(others, default=1) > 1 or (columns > 1 and weight[0, 0].numel() > 1):
                skipped[name] = "its blocks must lie along the outputs, or along the inputs of a linear layer"
            elif len(weight) // getattr(module, "groups", 1) % rows:
                skipped[name] = "a block of outputs must lie in one group"
        if name in skipped:
            kept.remove(name)
    return kept, skipped


@torch.no_grad()
def sequentially(
    plain: nn.Module, inputs: Any, names: list[str], solve: Callable[[str, Tensor], None], batch_size: int = 64
) -> None:
    """Call solve(name, H) for each weight, in the order in which the model calls their layers.

    H is the second moment of what the layer is given by those before it as they are by then. solve changes the weight
    in place. All examples go together in one pass, a layer solved just before it computes, where they fit into
    HELD_BYTES and no layer is called twice. Otherwise each layer costs a pass, in batches. `names` must be called by
    the model.
    """
    modules = {name: plain.get_submodule(name.rpartition(".")[0]) for name in names}
    if len(set(map(id, modules.values()))) == len(modules) and _at_once(plain, inputs, modules):
        for name, module in modules.items():
            module.register_forward_pre_hook(
                lambda module, given, name=name: solve(name, products(module, leaves(given)[0]))
            )
        call(plain, inputs)
        return
    for name in called(plain, inputs, names):
        parts: list[Tensor] = []

        def listen(module: nn.Module, given: tuple[Any, ...], parts: list[Tensor] = parts) -> None:
            product = products(module, leaves(given)[0])
            parts[:] = [parts[0] + product if parts else product]

        hook = modules[name].register_forward_pre_hook(listen)
        for first in range(0, length(inputs), batch_size):
            call(plain, take(inputs, slice(first, first + batch_size)))
        hook.remove()
        solve(name, parts[0])


def _at_once(plain: nn.Module, inputs: Any, modules: dict[str, nn.Module]) -> bool:
    """Whether all examples may go through together: each layer is called once, and what is held is little."""
    calls, largest = dict.fromkeys(modules.values(), 0), [0]

    def measure(module: nn.Module, given: Any, output: Any) -> None:
        if module in calls:
            calls[module] += 1
        if isinstance(output, Tensor):
            largest[0] = max(largest[0], output.numel() * output.element_size())

    hooks = [module.register_forward_hook(measure) for module in plain.modules()]
    call(plain, take(inputs, slice(0, 1)))
    for hook in hooks:
        hook.remove()
    return max(calls.values(), default=1) == 1 and 8 * largest[0] * length(inputs) <= HELD_BYTES


@torch.no_grad()
def called(plain: nn.Module, inputs: Any, names: list[str]) -> list[str]:
    """List those weights whose layers the model calls, in the order of the first call."""
    order: dict[str, None] = {}
    hooks = [
        plain.get_submodule(name.rpartition(".")[0]).register_forward_pre_hook(
            lambda module, given, name=name: order.setdefault(name)
        )
        for name in names
    ]
    call(plain, take(inputs, slice(0, 1)))
    for hook in hooks:
        hook.remove()
    return list(order)


def prepared(
    model: nn.Module, task: Task | None, names: list[str], skipped: dict[str, str], examples: int, who: str
) -> tuple[nn.Module, Any, list[str]]:
    """Return a plain copy in float32, calibration inputs, and the weights whose layers are called, in order.

    Raises:
        ValueError: Without a task, and where there is none left to prune.
    """
    if task is None:
        raise ValueError(f"{who}: a task must be given, whose inputs the layers are matched on, got None. Pass task=.")
    plain = realize(model).eval().float().requires_grad_(False)
    inputs = on(single(calibration(task, examples)), next(plain.parameters()).device)
    if names:
        names = called(plain, inputs, names)
    if not names:
        why = next(iter(skipped.values()), "no layer is called").rstrip(".")
        raise ValueError(f"{who}: some weight must be left to prune, got none of {list(skipped)[:3]}: {why}.")
    return plain, inputs, names


def pruned(model: nn.Module, task: Task | None, who: str, settings: Any, solve: Solve) -> nn.Module:
    """Return a copy of the model in which solve(weight, H, sparsity) -> (new weight, mask) was done layer by layer.

    Args:
        model: The model.
        task: Gives the inputs.
        who: The method's name, for errors.
        settings: An object with sparsity, pattern, allocation, where and examples.
        solve: The method for one layer.

    Returns:
        The masked copy.
    """
    pattern = parse(settings.pattern)
    names, skipped = sort(model, settings.where, settings.pattern, who, settings.allocation)
    plain, inputs, names = prepared(model, task, names, skipped, settings.examples, who)
    share = amounts(
        {name: plain.get_parameter(name) for name in names},
        1.0 if settings.sparsity is None else settings.sparsity,
        settings.allocation,
        pattern,
    )
    masks: dict[str, Tensor] = {}

    def one(name: str, moment: Tensor) -> None:
        weight = plain.get_parameter(name)
        new, masks[name] = solve(weight, finite(moment, name, who), min(share[name], pattern.most))
        weight.copy_(new)

    sequentially(plain, inputs, names, one)
    result = copy_model(model)
    return store_(result, {name: (plain.get_parameter(name), mask) for name, mask in masks.items()}, pattern)


def finite(moment: Tensor, name: str, who: str) -> Tensor:
    """Return the second moment unchanged, or raise ValueError where it is not finite."""
    if not bool(moment.isfinite().all()):
        raise ValueError(
            f"{who}: the inputs of {name} must be finite, got NaN or infinity. Check the calibration "
            "inputs and the weights of the layers before it."
        )
    return moment


@torch.no_grad()
def store_(model: nn.Module, pruned: dict[str, tuple[Tensor, Tensor]], pattern: Pattern) -> nn.Module:
    """Put (weight, mask) by name into a model, in place."""
    masked = attach_masks(model, pruned, pattern)
    put_(masked, {name: mask for name, (_, mask) in pruned.items()}, pattern)
    for name, (weight, _) in pruned.items():
        theta(model, name).copy_(weight)
    return model


def bundle(pattern: Pattern) -> tuple[int, int]:
    """Return how many outputs and how many consecutive inputs share one entry of the mask."""
    return (*pattern.size, 1)[:2] if isinstance(pattern, Blocks) else (1, 1)  # type: ignore[return-value]


def group(pattern: Pattern) -> tuple[int, int]:
    """Return (dropped, m): how many of m consecutive inputs go at most; (1, 1) where there is no such limit."""
    return (pattern.m - pattern.n, pattern.m) if isinstance(pattern, NM) else (1, 1)
