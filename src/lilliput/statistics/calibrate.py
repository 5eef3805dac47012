"""Calibration: measure the statistics that scores, roundings and allocators ask for by name.

A statistic is one function `(source, parameters) -> {name: Tensor}` under `@register("statistic")`. The class of its
first parameter says what it is taken from (see `lilliput.statistics.sources`). What a training gathers as it goes is
one function `(held, weight, gradient) -> held` under `@register("running")`, called after every backward pass.
"""

import inspect
from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from lilliput.code.base import realize
from lilliput.errors import near
from lilliput.registry import entries, lookup
from lilliput.statistics.sources import Calibration, Labelled, Layers, Parameters, Weights
from lilliput.task import Task

Statistics = dict[str, dict[str, Tensor]]
Statistic = Callable[[Any, Parameters], Parameters]
Running = Callable[[Tensor, Tensor, Tensor], Tensor]


def statistics(
    model: nn.Module,
    task: Task | None,
    names: Iterable[str],
    needs: Collection[str],
    *,
    examples: int = 256,
    batch_size: int = 64,
    seed: int = 0,
) -> Statistics:
    """Measure the statistics `needs` of the tensors `names` on calibration inputs of a task.

    The model is left as it is: everything is measured on a plain copy in eval mode, in float32. A tensor whose inputs
    cannot be seen (attention projections, recurrent weights) lacks the statistics of layer inputs.

    Args:
        model: coded or plain.
        task: where the calibration examples come from; None where no statistic needs data.
        names: tensors, as `lilliput.code.base.find` names them.
        needs: names of registered statistics.
        examples: how many training examples are used at most.
        batch_size: how many go through the model at once.
        seed: of whatever is drawn: noise, labels of a task that has none.

    Returns:
        name of tensor -> name of statistic -> its value, broadcastable to the tensor (the layer-wise `hessian` is a
        matrix for each group).

    Raises:
        ValueError: for an unknown statistic, one that needs a task where there is none, one that only a training can
            gather (movement), weights that are NaN, and a statistic that is not finite.

    Example:
        >>> net = nn.Linear(2, 1); x = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
        >>> task = Task("tiny", train=(x, torch.zeros(2, 1)), val=(x, torch.zeros(2, 1)), loss="mse", metric="mse")
        >>> statistics(net, task, ["weight"], ["input_norm"])["weight"]["input_norm"]
        tensor([[5., 1.]])
    """
    names, needs = list(names), list(dict.fromkeys(needs))
    for need in needs:
        _check(need, task)
    plain = realize(model).eval()
    for name in names:
        if bool(plain.get_parameter(name).isnan().any()):
            raise ValueError(
                f"statistics: weights must be numbers, got NaN in {name}. Load a sound checkpoint, or "
                "leave it out with where=."
            )
    plain = plain.float().requires_grad_(False)
    parameters: Parameters = {name: plain.get_parameter(name).requires_grad_(True) for name in names}
    measured: Statistics = {name: {} for name in names}
    for need in needs:
        source = _source(need)
        if issubclass(source, Calibration) and task is not None:
            given: Weights = source.of(plain, task, examples, seed, batch_size)
        else:
            given = source(plain, seed=seed, batch_size=batch_size)
        with torch.enable_grad():
            values: Parameters = lookup("statistic", need)(given, parameters)
        for name, value in values.items():
            if not bool(value.isfinite().all()):
                raise ValueError(
                    f"statistics: {need} must be finite, got NaN or infinity for {name}. Check the model's "
                    "other weights, its inputs and its loss for NaN."
                )
            measured[name][need] = value.detach()
    return measured


def taken_from(need: str) -> str:
    """What a statistic is taken from: "none", "inputs", or "labels" (which imply inputs).

    Raises:
        ValueError: for an unknown statistic.

    Example:
        >>> taken_from("noise"), taken_from("input_norm"), taken_from("gradient"), taken_from("movement")
        ('none', 'inputs', 'labels', 'labels')
    """
    if need in running():
        return "labels"
    source = _source(need)
    return "labels" if issubclass(source, Labelled) else "inputs" if issubclass(source, Calibration) else "none"


def of_layer_inputs(need: str) -> bool:
    """Whether a statistic is of what a layer is given, so that only layers whose inputs can be seen have it."""
    return need not in running() and issubclass(_source(need), Layers)


def running() -> dict[str, Running]:
    """What a training can gather as it goes: (held, weight, gradient) -> what is held after a step, by name."""
    return {entry.name: entry.load() for entry in entries("running")}


def needs(function: Callable[..., Any]) -> tuple[str, ...]:
    """The statistics that a score or a rounding asks for: the names of its keyword-only arguments.

    Example:
        >>> def wanda(weight, *, input_norm): return weight.abs() * input_norm
        >>> needs(wanda)
        ('input_norm',)
    """
    parameters = inspect.signature(function).parameters.items()
    return tuple(name for name, parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _check(need: str, task: Task | None) -> None:
    known = [entry.name for entry in entries("statistic")]
    if need not in known and need in running():
        raise ValueError(
            f"statistics: {need} must be gathered while training, but was asked for without one. Use a score in a "
            "rule (for movement, lilliput.prune.movement.Movement), or score='saliency'."
        )
    if need not in known:
        raise ValueError(f"statistics: needs must be known statistics, got {need!r}. {near(need, known)}")
    if task is None and issubclass(_source(need), Calibration):
        raise ValueError(f"statistics: a task must be given for {need}, got None. Pass task=.")


@cache
def _source(need: str) -> type[Weights]:
    known = [entry.name for entry in entries("statistic")]
    if need not in known:
        raise ValueError(f"statistics: needs must be known statistics, got {need!r}. {near(need, known)}")
    source = next(iter(get_type_hints(lookup("statistic", need)).values()), None)
    if not (isinstance(source, type) and issubclass(source, Weights)):
        raise TypeError(
            f"statistics: the first parameter of {need} must be annotated as Weights, Calibration, Layers or Labelled "
            f"of lilliput.statistics.sources, got {source}."
        )
    return source
