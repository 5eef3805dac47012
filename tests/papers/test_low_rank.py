"""Facts about truncated singular value decomposition."""

import pytest
import torch
from torch import nn

from lilliput.code.base import attach
from lilliput.code.deploy import build
from lilliput.code.low_rank import LowRank
from lilliput.factor.svd import Factorize, rank_by_energy, ranks_by_budget


def test_eckart_young_the_error_is_the_tail_of_the_spectrum() -> None:
    """Eckart and Young, Psychometrika 1936: min over rank r of ||W - X||_F^2 = sum of s_i^2 beyond r."""
    torch.manual_seed(0)
    weight = torch.randn(12, 20)
    s = torch.linalg.svdvals(weight)
    for rank in (1, 4, 11, 12):
        code = LowRank(rank)
        error = (code.decode(*code.encode(weight)) - weight).square().sum()
        torch.testing.assert_close(error, s[rank:].square().sum(), atol=1e-3, rtol=1e-4)
    code = LowRank(4)
    nearest = (code.decode(*code.encode(weight)) - weight).norm()
    for _ in range(20):
        other = torch.randn(12, 4) @ torch.randn(4, 20)
        assert (other - weight).norm() > nearest


def test_the_singular_values_are_shared_by_both_factors() -> None:
    a, b = LowRank(3).encode(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(a.T @ a, b @ b.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(8, 6),
        nn.Conv1d(3, 6, 5, stride=2, padding=2),
        nn.Conv2d(3, 8, 3, padding=1, dilation=1, bias=False),
        nn.Conv2d(3, 8, (3, 1), padding="same", padding_mode="circular"),
        nn.Conv3d(2, 5, 2),
    ],
    ids=["linear", "conv1d", "conv2d", "same", "conv3d"],
)
def test_at_full_rank_two_layers_compute_what_one_did(layer: nn.Module) -> None:
    """arXiv:1405.3866, section 2.2: k x k into r channels, then 1 x 1."""
    net = nn.Sequential(layer)
    out, inner = layer.weight.shape[0], layer.weight[0].numel()
    code_rank = min(out, inner)
    x = torch.randn(2, layer.weight.shape[1], *(9,) * (layer.weight.dim() - 2))
    attach(net, "0.weight", LowRank(code_rank))
    built = build(net)
    torch.testing.assert_close(built(x), net(x), atol=1e-5, rtol=1e-4)
    assert built[0][1].weight.shape[2:] == (1,) * (layer.weight.dim() - 2)
    assert sum(p.numel() for p in built.parameters() if p.dim() > 1) == code_rank * (out + inner)


def test_rank_by_energy_is_the_least_that_holds_the_share() -> None:
    s = torch.tensor([4.0, 2.0, 1.0, 0.5])
    total = float(s.square().sum())
    for share in (0.5, 0.8, 0.95, 0.99, 0.999):
        rank = rank_by_energy(s, share)
        assert float(s[:rank].square().sum()) >= share * total - 1e-9
        assert rank == 1 or float(s[: rank - 1].square().sum()) < share * total


def test_a_budget_goes_to_the_layer_whose_spectrum_needs_it() -> None:
    flat, steep = torch.ones(16), 2.0 ** -torch.arange(16.0)
    ranks = ranks_by_budget({"flat": flat, "steep": steep}, {"flat": (16, 64), "steep": (16, 64)}, 0.5)
    assert ranks["flat"] > ranks["steep"] >= 1
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    for budget in (0.3, 0.5, 0.8):
        small = Factorize(budget=budget)(net, None, None)
        kept = sum(p.numel() for p in small.parameters() if p.dim() > 1)
        assert budget * 2048 - 64 <= kept <= budget * 2048
