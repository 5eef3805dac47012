"""Sensitivity: what each technique costs on each tensor alone, without training."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.code.names import find
from lilliput.quant.uniform import Uniform
from lilliput.task import Task, predict

Table = dict[str, dict[str, float]]


def _zeros(weight: Tensor, sparsity: float) -> Tensor:
    kept = weight.abs().flatten().kthvalue(max(1, int(sparsity * weight.numel()))).values
    return weight * (weight.abs() > kept)


def _rank(weight: Tensor, fraction: float) -> Tensor:
    matrix = weight.reshape(len(weight), -1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    r = max(1, int(fraction * len(s)))
    product: Tensor = (u[:, :r] * s[:r]) @ v[:r]
    return product.reshape(weight.shape)


def _bits(weight: Tensor, bits: int) -> Tensor:
    code = Uniform(bits, per="tensor" if len(weight) > 4096 else "channel")
    theta = code.encode(weight)
    decoded: Tensor = code.decode(*theta)
    return decoded


TECHNIQUES: dict[str, Callable[[Tensor], Tensor]] = {
    "8 bits": lambda w: _bits(w, 8),
    "4 bits": lambda w: _bits(w, 4),
    "3 bits": lambda w: _bits(w, 3),
    "2 bits": lambda w: _bits(w, 2),
    "50% zeros": lambda w: _zeros(w, 0.5),
    "80% zeros": lambda w: _zeros(w, 0.8),
    "half the rank": lambda w: _rank(w, 0.5),
}


def measure(
    model: nn.Module,
    task: Task,
    inputs: Any,
    *,
    techniques: Iterable[str] = tuple(TECHNIQUES),
    where: str = "*",
    seconds: float = float("inf"),
    dense: Tensor | None = None,
) -> Table:
    """The mean divergence from the model's own outputs when one tensor alone is stored by one technique.

    Each tensor with each technique, largest tensors first, until `seconds` have passed. Returns tensor -> technique ->
    divergence (in the task's unit: nats for classes).
    """
    work = copy_model(model).eval()
    parameters = dict(work.named_parameters())
    began, table = time.monotonic(), Table()
    before = predict(work, inputs) if dense is None else dense
    names = [name for name in find(work, where, who="sensitivity") if name in parameters]
    for name in sorted(names, key=lambda name: -parameters[name].numel()):
        parameter = parameters[name]
        original = parameter.detach().clone()
        for technique in techniques:
            if time.monotonic() - began > seconds:
                return table
            if technique == "half the rank" and min(len(original), original[0].numel()) < 4:
                continue
            with torch.no_grad():
                parameter.copy_(TECHNIQUES[technique](original))
                change = task.divergence(predict(work, inputs), before)
                parameter.copy_(original)
            table.setdefault(name, {})[technique] = float(change.mean().clamp_min(0))
    return table
