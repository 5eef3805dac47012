"""What holds for every stage: plain data in, a new model out, the argument as it was."""

import dataclasses
import json
import tomllib

import pytest
import torch

from lilliput.code.base import realize
from lilliput.recipe import Recipe, plain, versions
from lilliput.stage import Reference
from lilliput.task import predict


def snapshot(model):
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in model.named_modules()]
    gradients = [(name, p.requires_grad, p.grad is None) for name, p in model.named_parameters()]
    return tensors, hooks, gradients, str(model)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_leaves_its_argument_alone(stage, model, task):
    tensors, *rest = snapshot(model)
    reference = Reference(realize(model), task)
    result = stage(model, task, reference)
    after, *rest_after = snapshot(model)
    assert result is not model and same(tensors, after) and rest == rest_after
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in result.parameters()}
    assert not shared


def test_gives_a_model_that_computes(stage, model, task):
    result = stage(model, task, Reference(realize(model), task))
    inputs, _ = task.split("val")
    outputs = predict(result, inputs)
    assert outputs.shape == predict(model, inputs).shape and outputs.isfinite().all()
    torch.testing.assert_close(predict(realize(result), inputs), outputs)


def test_gives_the_same_result_twice(stage, model, task):
    reference = Reference(realize(model), task)
    first, second = (stage(model, task, reference).state_dict() for _ in range(2))
    assert same(first, second)


def test_is_plain_data(stage):
    data = json.loads(json.dumps(plain(stage)))
    again = Recipe.parse([data]).stages[0]
    assert again == stage and hash(again) == hash(stage) and again is not stage
    assert Recipe.parse(tomllib.loads(Recipe((stage,)).toml())["stages"]).stages == (stage,)
    assert type(stage).__name__ in repr(stage) and Recipe((stage,)).describe().startswith(type(stage).__name__)
    assert versions(stage)


def test_is_frozen(stage):
    field = dataclasses.fields(stage)
    if not field:
        pytest.skip("a stage without settings")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(stage, field[0].name, None)


def test_has_a_docstring_with_its_source(stage):
    assert type(stage).__doc__ and len(type(stage).__doc__.split("\n")[0]) > 10
