"""Teacher: the dense network's outputs, by whatever computes them fastest in this process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lilliput.code.base import copy_model
from lilliput.errors import ExportError
from lilliput.graph.fold import fold_batchnorm
from lilliput.layout import place
from lilliput.onnx.session import Session
from lilliput.search.desk import Desk
from lilliput.task import call, joined, leaves, length, on, take

FILE = "dense.onnx"
"""Under what the parent puts the bytes of the dense network's file."""
CLOSE = 1e-3
"""How far outputs may be apart, against the largest of them, to be taken for the same."""
CHUNK = 16  # examples at a time: their activations fit into the caches of one core
COMPARED = 4
CPU = torch.device("cpu")


def outputs(desk: Desk, model: nn.Module, inputs: Any) -> Any:
    """The dense network's outputs for some inputs.

    By ONNX Runtime where the parent has put the file there, else by torch with its batch norms folded and channels
    last; by the network itself where neither computes what it does, and on a device other than the processor. Each way
    always cuts the inputs at the same places, so that results do not depend on which worker computes them.

    Args:
        desk: where the file may be, and where the way is kept.
        model: the dense network in eval mode.
        inputs: (n, ...).
    """
    file = desk.get(FILE)
    key = ("teacher", file is not None)
    if key not in desk.kept:
        desk.kept[key] = _way(model, file, take(inputs, slice(0, COMPARED)))
    run: Callable[[Any], Any] = desk.kept[key]
    with torch.no_grad():
        return joined([run(take(inputs, slice(i, i + CHUNK))) for i in range(0, length(inputs), CHUNK)])


def _way(model: nn.Module, file: bytes | None, few: Any) -> Callable[[Any], Any]:
    device = next((p.device for p in model.parameters()), CPU)
    if device != CPU:
        return lambda inputs: on(call(model.eval(), on(inputs, device)), CPU)
    ways: list[Callable[[], Callable[[Any], Any]]] = [] if file is None else [lambda: Session(file).predict]
    ways += [lambda: _by_torch(place(fold_batchnorm(model, take(few, slice(0, 1))), True))]
    with torch.no_grad():
        expected = leaves(call(model, few))
        for make in ways:
            try:
                way = make()
                found = leaves(way(few))
            except (ExportError, RuntimeError, TypeError, ValueError, KeyError):
                continue
            if len(found) == len(expected) and all(map(_same, found, expected)):
                return way
    return _by_torch(copy_model(model))


def _by_torch(model: nn.Module) -> Callable[[Any], Any]:
    return lambda inputs: call(model.eval(), inputs)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a.double() - b.double()).abs().max() <= CLOSE * b.double().abs().max().clamp_min(1e-12))
