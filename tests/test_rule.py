"""Rules and schedules on their own: the moments, what is refused, what a gradual pruning does step by step."""

import pytest
import torch
from torch import nn

from lilliput.code.base import attach, codes
from lilliput.code.low_rank import LowRank
from lilliput.prune.prune import Prune
from lilliput.rule import Rule
from lilliput.schedule import Cosine, Cubic, Linear, at


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def zeros(model: nn.Module) -> int:
    return sum(int((model.get_submodule(n).weight == 0).sum()) for n in "02")


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(8, 8)).square().sum().backward()
    optimizer.step()


def test_schedules_are_pure_functions_of_the_step() -> None:
    assert [at(0.3, step, 10) for step in (0, 10)] == [0.3, 0.3]
    assert Linear(0.0, 1.0)(200, 100) == 1.0
    warm = Cosine(1.0, warmup=0.1)
    assert warm(0, 100) < warm(5, 100) < warm(10, 100) == 1.0 and warm(100, 100) == pytest.approx(0, abs=1e-9)
    assert Cubic(0.9)(10, 0) == 0.9, "a training of no steps is at its end"


def test_sparsity_follows_the_schedule_and_ends_exact() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    seen = []
    with Prune(0.75, every=2).attached(model, sgd, steps=20) as driver:
        for step in range(20):
            take_step(model, sgd)
            seen.append(zeros(model))
            done = step + 1
            if done % 2 == 0:
                assert seen[-1] == round(Cubic(0.75)(done, 20) * 192)
    assert driver.step == 20 and seen == sorted(seen) and zeros(model) == 144


def test_pairs_are_reached_along_the_schedule() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    rule = Prune(allocation=(("0.weight", 0.5), ("2.weight", 0.25)), every=1)
    with rule.attached(model, sgd, steps=8):
        for _ in range(4):
            take_step(model, sgd)
        assert 0 < zeros(model) < 80
        for _ in range(4):
            take_step(model, sgd)
    assert int((model[0].weight == 0).sum()) == 64 and int((model[2].weight == 0).sum()) == 16


def test_what_was_dropped_stays_dropped_and_does_not_move() -> None:
    model = Prune(0.5)(net(), None, None)
    dropped = model[0].weight == 0
    adam = torch.optim.AdamW(model.parameters(), 0.1)
    with Prune(0.8, every=1).attached(model, adam, steps=5):
        for _ in range(5):
            take_step(model, adam)
            assert (model[0].weight[dropped] == 0).all()
    assert zeros(model) == round(0.8 * 192) and len(codes(model)["0.weight"]) == 1


def test_an_optimizer_that_misses_parameters_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    with (
        pytest.raises(ValueError, match=r"must hold every trainable parameter, but misses \['2.weight', '2.bias'\]"),
        Prune(0.5).attached(model, optimizer, steps=1),
    ):
        pass
    assert not codes(model)


def test_a_code_attached_after_the_optimizer_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attach(model, "0.weight", LowRank(2))
    with (
        pytest.raises(ValueError, match="Make the optimizer after codes are attached"),
        Rule().attached(model, optimizer, steps=1),
    ):
        pass


class Growing(Rule):
    """A rule that adds a parameter too late."""

    def begin(self, model, task, reference, steps):
        model.extra = nn.Parameter(torch.zeros(1))
        return {}


def test_a_rule_that_adds_parameters_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        pytest.raises(ValueError, match="Growing: parameters must exist before the optimizer"),
        Growing().attached(model, optimizer, steps=1),
    ):
        pass


def test_hooks_go_when_the_loop_ends_or_fails() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.01)
    with pytest.raises(KeyError), Prune(0.5).attached(model, sgd, steps=4):
        raise KeyError("the user's own mistake")
    assert not sgd._optimizer_step_pre_hooks and not sgd._optimizer_step_post_hooks


def test_taylor_reads_the_gradients_of_the_training_itself() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), 0.0)
    with torch.no_grad():
        model[2].weight[:2] = 0.0  # outputs 0 and 1 always lose nothing
        model[2].bias.zero_()
    with Prune(0.3, "taylor", every=1, allocation="uniform").attached(model, sgd, steps=2):
        for _ in range(2):
            take_step(model, sgd)
    assert (model[2].weight[:2] == 0).all() and int((model[0].weight == 0).sum()) == round(0.3 * 128)
