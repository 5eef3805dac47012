"""What every statistic promises: a shape that meets its tensor, finite values, determinism, a model left as it is."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lilliput.registry import Entry, entries
from lilliput.statistics.calibrate import of_layer_inputs, statistics, taken_from
from lilliput.task import Task

NAMES = ["0.weight", "1.weight", "3.weight", "7.weight"]
every = pytest.mark.parametrize("entry", entries("statistic"), ids=lambda entry: entry.name)


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]], need: str) -> bool:
    return all(
        need in b[name] and torch.equal(known[need], b[name][need]) for name, known in a.items() if need in known
    )


@every
def test_shapes_meet_the_tensor_and_values_are_finite(entry: Entry, model: nn.Module, task: Task) -> None:
    measured = statistics(model, task, NAMES, [entry.name], examples=12)
    assert set(measured) == set(NAMES)
    for name, known in measured.items():
        weight = model.get_parameter(name)
        if entry.name not in known:
            assert of_layer_inputs(entry.name) and name == "1.weight", "only what no layer shows may be missing"
            continue
        value = known[entry.name]
        assert value.isfinite().all() and not value.requires_grad
        matrix = value.dim() == 3 and value.shape[1:] == 2 * (weight[0].numel(),)
        assert matrix or torch.broadcast_shapes(value.shape, weight.shape) == weight.shape


@every
def test_deterministic_and_the_model_is_left_as_it_is(entry: Entry, model: nn.Module, task: Task) -> None:
    before: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    one, again = (statistics(model, task, NAMES, [entry.name], examples=12, seed=3) for _ in range(2))
    assert same(one, again, entry.name)
    assert model.training and [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@every
def test_what_it_is_taken_from_is_all_that_it_needs(entry: Entry, model: nn.Module, task: Task) -> None:
    inputs, _ = task.split("train")
    measured = statistics(model, task, NAMES, [entry.name], examples=12)
    if taken_from(entry.name) == "none":
        assert same(measured, statistics(model, None, NAMES, [entry.name]), entry.name)
        return
    with pytest.raises(ValueError, match=f"a task must be given for {entry.name}, got None"):
        statistics(model, None, NAMES, [entry.name])
    bare = statistics(model, Task("no labels", inputs, inputs), NAMES, [entry.name], examples=12)
    if taken_from(entry.name) == "inputs":
        assert same(measured, bare, entry.name)


@pytest.mark.parametrize("entry", entries("running"), ids=lambda entry: entry.name)
def test_what_a_training_gathers_keeps_its_shape(entry: Entry) -> None:
    weight, held = torch.randn(3, 4), torch.zeros(3, 4)
    for _ in range(5):
        held = entry.load()(held, weight, torch.randn(3, 4))
        assert held.shape == weight.shape and held.isfinite().all()
