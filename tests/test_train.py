"""The training loop: repeatable, resumable at any rung, and it says when a loss is not finite."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lilliput.code.base import codes
from lilliput.distill.logits import Distill
from lilliput.prune.prune import Prune
from lilliput.quant.quantize import Quantize
from lilliput.schedule import Cosine, Linear
from lilliput.stage import Reference
from lilliput.task import Task
from lilliput.train import Diverged, Train, fit


def shift(x: Tensor, seeds: Tensor) -> Tensor:
    return x + (seeds % 7).float()[:, None] / 100


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 6, generator=generator)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return Task("corners", (x[:96], y[:96]), (x[96:], y[96:]), augment=shift, draws=2, batch_size=16)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4)).eval()


def equal(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


STAGE = Train(24, lr=Cosine(0.01), rules=(Prune(0.5, every=4), Distill(0.5)), batch_size=16)


def test_it_learns_and_leaves_its_argument_alone(model: nn.Module, task: Task) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = Train(60, lr=Cosine(0.02))(model, task, Reference(model, task))
    assert task.score(trained).value > max(0.8, task.score(model).value + 0.2)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not trained.training


def test_the_same_seed_gives_the_same_weights(model: nn.Module, task: Task) -> None:
    reference = Reference(model, task)
    assert equal(STAGE(model, task, reference), STAGE(model, task, reference))
    assert not equal(STAGE(model, task, reference), replace(STAGE, seed=1)(model, task, reference))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_stopping_at_a_rung_and_going_on_changes_nothing(model: nn.Module, task: Task, optimizer: str) -> None:
    model[3].p = 0.0  # random numbers inside the network restart at a rung
    stage = replace(STAGE, optimizer=optimizer)
    reference = Reference(model, task)
    whole = fit(stage, model, task, reference)
    kept: list[dict] = []
    rung = fit(replace(stage, until=10), model, task, reference, save=kept.append)
    assert kept[-1]["step"] == 10 and len(codes(rung)) == 2
    rest = fit(stage, model, task, reference, load=lambda: kept[-1])
    assert equal(whole, rest)


def test_a_weight_of_zero_adds_exactly_nothing(model: nn.Module, task: Task) -> None:
    asked = []
    reference = Reference(model, task, load=lambda draw: asked.append(draw))
    alone = replace(STAGE, rules=())(model, task, reference)
    weighed = replace(STAGE, rules=(Distill(Linear(0, 0)), Distill(0.0)))(model, task, reference)
    assert equal(alone, weighed) and not asked


def test_coded_weights_train_through_the_rounding(model: nn.Module, task: Task) -> None:
    reference = Reference(model, task)
    dense = Train(60, lr=Cosine(0.02))(model, task, reference)
    coded = Quantize(2)(dense, task, reference)
    trained = Train(60, lr=Cosine(0.01))(coded, task, Reference(dense, task))
    assert trained[0].weight.unique(dim=1).numel() and all(row.unique().numel() <= 3 for row in trained[0].weight)
    assert task.score(trained).value >= task.score(coded).value


def test_a_frozen_layer_stays_as_it_is(model: nn.Module, task: Task) -> None:
    model[0].requires_grad_(False)
    pruned = Prune(0.5)(model, task, None)
    trained = Train(4, lr=0.1)(pruned, task, Reference(model, task))
    assert torch.equal(trained[0].weight, pruned[0].weight)
    assert not torch.equal(trained[4].weight, model[4].weight)


def test_diverging_is_said(model: nn.Module, task: Task) -> None:
    bad = Task("bad", task.split("train"), task.split("val"), loss=lambda out, y: out.sum() * float("nan"))
    with pytest.raises(Diverged, match="must stay finite"):
        Train(3)(model, bad, Reference(model, bad))


def test_wrong_settings_are_refused(model: nn.Module, task: Task) -> None:
    for settings, text in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 2, "until": 3}, "until between"),
        ({"steps": 2, "optimizer": "adam"}, "'adamw' or 'sgd', got 'adam'"),
    ):
        with pytest.raises(ValueError, match=text):
            Train(**settings)
    with pytest.raises(ValueError, match="must have a trainable parameter"):
        Train(1)(model.requires_grad_(False), task, Reference(model, task))


def test_the_dense_outputs_are_computed_once_for_each_augmentation(model: nn.Module, task: Task) -> None:
    calls = []
    model.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    saved: dict[int, dict[str, Tensor]] = {}
    reference = Reference(model, task, save=saved.__setitem__)
    Train(48, rules=(Distill(),), supervised=0.0)(nn.Sequential(nn.Linear(6, 4)), task, reference)
    assert sum(calls) <= 96 * 2 + 2 and set(saved) == {0, 1}
    again = Reference(model, task, load=saved.get)
    calls.clear()
    index = torch.arange(96)
    assert torch.equal(again.outputs(task.batch(index, 3)), reference.outputs(task.batch(index, 1)))
    assert sum(calls) <= 2
    torch.testing.assert_close(again.outputs(task.batch(index[:5], 0)), model(task.inputs(index[:5], 0)).detach())


def test_what_a_training_needs_goes_to_another_process(model: nn.Module, task: Task) -> None:
    """A process that is spawned has only what was pickled."""
    reference = Reference(model, task)
    reference.outputs(task.batch(torch.arange(8), 0))
    stage, sent, model = pickle.loads(pickle.dumps((STAGE, reference, model)))
    assert equal(stage(model, sent.task, sent), STAGE(model, task, reference))
