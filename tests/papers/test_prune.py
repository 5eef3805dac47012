"""Facts from the papers behind scores, allocations, patterns and the gradual schedule."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.prune import allocations, patterns, scores, scores_of_inputs
from lilliput.prune.prune import Prune
from lilliput.schedule import Cubic
from lilliput.statistics.calibrate import statistics
from lilliput.task import Task


def test_erk_equation_1_density_is_proportional_to_the_sum_over_the_product_of_the_sides() -> None:
    """arXiv:1911.11134, section 3: 1 - (n_in + n_out + w + h) / (n_in n_out w h), scaled to the whole's sparsity."""
    shapes = {"first": (16, 3, 3, 3), "wide": (64, 32, 3, 3), "point": (64, 64, 1, 1), "fc": (10, 64)}
    rated = {name: torch.zeros(shape) for name, shape in shapes.items()}
    shares = allocations.erk(rated, 0.9)
    zeros = sum(shares[name] * value.numel() for name, value in rated.items())
    assert zeros == pytest.approx(0.9 * sum(value.numel() for value in rated.values()))
    raw = {name: sum(shape) / torch.Size(shape).numel() for name, shape in shapes.items()}
    ratios = {name: (1 - shares[name]) / raw[name] for name in shapes if shares[name] > 0}
    assert len(ratios) >= 2 and max(ratios.values()) == pytest.approx(min(ratios.values()))
    assert all(raw[name] * max(ratios.values()) >= 1 for name in shapes if shares[name] == 0), "no denser than dense"


def test_cubic_schedule_equation_1() -> None:
    """arXiv:1710.01878: s_t = s_f + (s_i - s_f)(1 - (t - t_0) / (n dt))^3."""
    schedule = Cubic(last=0.8, first=0.2, begin=0.1, end=0.6)
    for step in range(0, 101, 5):
        u = min(1.0, max(0.0, (step - 10) / 50))
        assert schedule(step, 100) == pytest.approx(0.8 + (0.2 - 0.8) * (1 - u) ** 3)
    steps = [schedule(step, 100) for step in range(10, 61)]
    gains = [b - a for a, b in itertools.pairwise(steps)]
    assert gains == sorted(gains, reverse=True), "prunes fast at first, slowly as fewer weights remain"


def test_wanda_equation_1_is_weight_times_the_norm_of_its_input() -> None:
    """arXiv:2306.11695: S_ij = |W_ij| ||X_j||_2, over all examples and places; figure 1's worked comparison by rows."""
    weight = torch.tensor([[4.0, 0.0, 1.0, -1.0], [3.0, -2.0, -1.0, -3.0], [-3.0, 1.0, 0.0, 2.0]])
    norm = torch.tensor([[1.0, 2.0, 8.0, 3.0]])
    score = scores_of_inputs.wanda(weight, input_norm=norm)
    assert score.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    kept = patterns.parse("even")(score, 0.5)
    assert (weight * kept).tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]


def test_input_norms_are_those_of_the_inputs_that_meet_each_weight() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(2), nn.Linear(9, 2))
    x = torch.randn(80, 4, 3, 3)
    task = Task("norms", (x, torch.zeros(80, 6, 2)), (x, torch.zeros(80, 6, 2)), None, "mse", "mse")
    measured = statistics(net, task, ["0.weight", "3.weight"], ["input_norm", "input_second_moment"], examples=80)
    norm = x.transpose(0, 1).flatten(1).norm(dim=1)
    expected = torch.stack([norm[:2]] * 3 + [norm[2:]] * 3)[:, :, None, None]
    torch.testing.assert_close(measured["0.weight"]["input_norm"], expected)
    hidden = net[:3](x).detach().reshape(-1, 9)
    torch.testing.assert_close(measured["3.weight"]["input_second_moment"], hidden.square().mean(0, keepdim=True))


def test_taylor_equation_8_is_the_first_order_change_of_the_loss() -> None:
    """arXiv:1906.10771: I_m = (g_m w_m)^2, the squared change of the loss when w_m becomes zero, to first order."""
    torch.manual_seed(0)
    net, x, y = nn.Sequential(nn.Linear(5, 3)), torch.randn(32, 5), torch.arange(32) % 3
    with torch.no_grad():
        net[0].weight.mul_(1e-2)
    task = Task("taylor", (x, y), (x, y))
    known = statistics(net, task, ["0.weight"], ["gradient"], batch_size=32)["0.weight"]
    score = scores.taylor(net[0].weight.detach(), **known)
    before = F.cross_entropy(net(x), y).double().detach()
    for i, j in ((0, 0), (1, 3), (2, 4)):
        saved = net[0].weight.detach().clone()
        with torch.no_grad():
            net[0].weight[i, j] = 0.0
            change = abs(float(F.cross_entropy(net(x), y).double() - before))
            net[0].weight.copy_(saved)
        assert change == pytest.approx(float(score[i, j]), rel=0.05, abs=2e-6)


def test_global_magnitude_is_the_nearest_network_of_that_many_weights() -> None:
    """Magnitude pruning minimises || W - m * W ||_F: no other mask of the size is nearer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    pruned = Prune(0.75)(net, None, None)
    lost = sum(float((a.weight - b.weight).detach().square().sum()) for a, b in zip(net, pruned, strict=True))
    assert lost == pytest.approx(float(flat.square().sort().values[:54].sum()))


def test_two_of_four_keeps_the_largest_half_of_every_group() -> None:
    """arXiv:2104.08378, section 3."""
    score = torch.rand(8, 16)
    mask = patterns.parse("2:4")(score, 0.5)
    groups, kept = score.reshape(-1, 4), mask.reshape(-1, 4)
    assert (kept.sum(1) == 2).all()
    assert ((groups * kept).sum(1) == groups.sort(1).values[:, 2:].sum(1)).all()
    half_way = patterns.parse("2:4")(score, 0.25).reshape(-1, 4)
    assert sorted(half_way.sum(1).unique().tolist()) == [2, 4] and int((~half_way).sum()) == 32
    assert (half_way >= kept).all()


@pytest.mark.parametrize("text", ["elements", "even", "channel", "block 2x1", "block 4x2"])
def test_counts_are_exact_and_ties_broken_by_position(text: str) -> None:
    pattern = patterns.parse(text)
    for score in (torch.rand(8, 8), torch.ones(8, 8)):
        mask = pattern(score, 0.5)
        assert int(mask.sum()) == 32 and torch.equal(mask, pattern(score.clone(), 0.5))
        assert pattern(score, 0.99).any(), "never the last unit"
        assert pattern(score, 0.0).all()
    block = pattern.block((8, 8))
    if block:
        tiles = mask.unfold(0, block[0], block[0]).unfold(1, block[1], block[1]).flatten(2).float()
        assert ((tiles.mean(2) == 0) | (tiles.mean(2) == 1)).all()
