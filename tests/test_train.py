"""The training loop: repeatable, resumable at any rung, and it says when a loss is not finite."""

import pickle
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lilliput.code.base import codes
from lilliput.distill.logits import Distill
from lilliput.layout import channels_last
from lilliput.prune.prune import Prune
from lilliput.quant.quantize import Quantize
from lilliput.rule import Rule, State
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


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
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
        ({"steps": 2, "optimizer": "adam"}, "'adamw', 'sgd' or 'muon', got 'adam'"),
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


class Places(Rule):
    """Notes (step, steps) wherever it is called."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []
        self.ended = 0

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        self.seen.append((step, steps))
        return state

    def end(self, state: State, model: nn.Module) -> State:
        self.ended += 1
        return state


def test_a_training_that_is_slowed_down_ends_on_time_and_at_the_end_of_its_schedule(
    model: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def wait(step: int) -> bool:
        clock[0] += 0.1 if step < 40 else 0.5  # something else takes the processor
        return False

    rates: list[float] = []

    def rate(step: int, steps: int) -> float:
        rates.append(Linear(1e-2, 0.0)(step, steps))
        return rates[-1]

    places = Places()
    trained = fit(Train(100, lr=rate, rules=(places, Prune(0.5, every=4))), model, task, Reference(model, task),
                  stop=wait, seconds=10.0)  # fmt: skip
    assert 10.0 <= clock[0] < 11.0 and 50 < len(rates) < 60
    assert rates == sorted(rates, reverse=True) and rates[39] == pytest.approx(6e-3, rel=0.05) and rates[-1] < 5e-4
    assert places.seen[-1][0] + 1 == places.seen[-1][1] == len(rates) and places.ended == 1
    assert int((trained[0].weight == 0).sum() + (trained[4].weight == 0).sum()) == (96 + 64) // 2


def test_a_limit_that_is_not_reached_changes_nothing(model: nn.Module, task: Task) -> None:
    reference = Reference(model, task)
    assert equal(fit(STAGE, model, task, reference), fit(STAGE, model, task, reference, seconds=1e6))


def test_a_limited_training_goes_on_where_it_was(model: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slow(last: int) -> Callable[[int], bool]:
        def stop(step: int) -> bool:
            clock[0] += 1.0
            return step == last

        return stop

    kept: list[dict] = []
    stage, reference = Train(100, rules=(places := Places(),)), Reference(model, task)
    fit(stage, model, task, reference, stop=slow(5), save=kept.append, seconds=20.0)
    assert places.ended == 0
    clock[0] += 100.0  # the search was not running
    fit(stage, model, task, reference, stop=slow(-1), load=lambda: kept[-1], seconds=20.0)
    assert 19 <= len(places.seen) <= 22 and places.ended == 1


def test_channels_may_lie_last_while_training(task: Task) -> None:
    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 2
    images = Task("images", (x, y), (x, y), batch_size=16)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)).eval()
    seen = []

    def last(model: nn.Module, task: Task, batch_size: int | None) -> bool:
        seen.append(channels_last(model, task, batch_size, timed=False))
        return seen[-1]

    stage, reference, kept = Train(12, lr=0.01, optimizer="sgd"), Reference(net, images), []
    plain, faster = fit(stage, net, images, reference), fit(stage, net, images, reference, layout=last)
    assert seen == [True] and all(p.is_contiguous() for p in faster.parameters())
    for name, value in faster.state_dict().items():
        assert torch.allclose(value.float(), plain.state_dict()[name].float(), atol=1e-4)
    fit(replace(stage, until=6), net, images, reference, save=kept.append, layout=last)
    assert equal(fit(stage, net, images, reference, load=lambda: kept[-1]), faster)


def test_a_network_that_needs_channels_first_keeps_them() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(288, 2)

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.fc(self.conv(x).view(len(x), -1))
            return h

    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 2
    images = Task("images", (x, y), (x, y), batch_size=16)
    net, before = Viewed(), torch.get_rng_state()
    assert not channels_last(net, images) and not channels_last(net, images, timed=False)
    assert torch.equal(before, torch.get_rng_state())
