"""Facts from the papers behind lottery tickets."""

import pytest
import torch
from torch import nn

from lilliput.code.names import theta
from lilliput.prune.lottery import Lottery
from lilliput.prune.masks import masks
from lilliput.prune.prune import Prune
from lilliput.stage import Reference
from lilliput.task import Task
from lilliput.train import Train, fit


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture
def task() -> Task:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return Task("corners", (x, y), (x, y), batch_size=16)


TRAINING = Train(12, lr=0.02)


def test_one_round_keeps_what_is_largest_after_training_at_its_first_value(net: nn.Module, task: Task) -> None:
    """arXiv:1803.03635, section 1: train, prune the smallest p%, reset the rest to theta_0."""
    reference = Reference(net, task)
    ticket = Lottery(0.75, rounds=1, training=TRAINING)(net, task, reference)
    trained = TRAINING(net, task, reference)
    expected = masks(Prune(0.75)(trained, None, None))
    for name, code in masks(ticket).items():
        assert torch.equal(code.mask, expected[name].mask)
        assert torch.equal(theta(ticket, name), net[int(name[0])].weight * code.mask)
    for key in ("0.bias", "1.weight", "1.running_mean", "1.num_batches_tracked", "3.bias"):
        assert torch.equal(ticket.state_dict()[key], net.state_dict()[key]), "everything else starts again too"
    assert not torch.equal(trained[0].bias, net[0].bias)


def test_rounds_drop_the_same_share_of_what_is_left_and_never_bring_it_back(net: nn.Module, task: Task) -> None:
    """arXiv:1803.03635, section 1: each of n rounds prunes p^(1/n) of the weights that survive the last."""
    reference, total = Reference(net, task), 6 * 16 + 16 * 4
    last = None
    for k in (1, 2, 3):
        ticket = Lottery(1 - 0.5**k, rounds=k, training=TRAINING)(net, task, reference)
        kept = {name: code.mask for name, code in masks(ticket).items()}
        assert sum(int(mask.sum()) for mask in kept.values()) == total - round((1 - 0.5**k) * total)
        assert last is None or all(bool((last[name] | ~mask).all()) for name, mask in kept.items())
        last = kept


def test_rewinding_goes_back_to_a_little_after_the_start(net: nn.Module, task: Task) -> None:
    """arXiv:1912.05671, algorithm 2: the ticket's weights are those of step k of the dense training."""
    reference = Reference(net, task)
    ticket = Lottery(0.5, rounds=2, training=TRAINING, rewind=0.25)(net, task, reference)
    early = fit(Train(12, lr=0.02, until=3), net, task, reference)
    assert not torch.equal(early[0].weight, net[0].weight)
    for name, code in masks(ticket).items():
        assert torch.equal(theta(ticket, name), early[int(name[0])].weight * code.mask)
    assert torch.equal(ticket[1].running_mean, early[1].running_mean)


def test_the_same_ticket_twice_and_by_pairs(net: nn.Module, task: Task) -> None:
    reference = Reference(net, task)
    stage = Lottery(0.75, rounds=2, training=TRAINING, allocation=(("0.weight", 0.75),))
    first, second = (stage(net, task, reference) for _ in range(2))
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    assert list(masks(first)) == ["0.weight"] and int(masks(first)["0.weight"].mask.sum()) == 24


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1 and rewind in"):
        Lottery(0.5, rewind=1.0)
    with pytest.raises(ValueError, match="sparsity must be in"):
        Lottery(90)
