"""Muon: orthogonal steps for matrices and convolutions, AdamW for the rest."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.muon import MATCHED, Muon, orthogonal
from lilliput.train import Train, _optimizer


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 30), (2, 30, 4), (1, 1, 9)])
def test_singular_values_end_near_one_whatever_they_were(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(shape, generator=generator) * torch.logspace(-3, 3, shape[0])[:, None, None]
    values = torch.linalg.svdvals(orthogonal(matrices))
    assert 0.5 < values.median() < 1.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    angle = F.cosine_similarity(orthogonal(matrices).flatten(1), (u @ v).flatten(1))
    assert angle.min() > 0.9, "it lies near the polar factor"


def test_a_matrix_moves_by_as_much_as_adamw_would_move_it() -> None:
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.zeros(16, 48))
    w.grad = torch.randn(16, 48, generator=generator)
    Muon([w], lr=0.1, orthogonal=True).step()
    size = float(w.detach().square().mean().sqrt())
    assert size == pytest.approx(0.1 * MATCHED, rel=0.25)  # equation 4 of Liu et al.


def test_vectors_and_tables_are_stepped_as_torch_does() -> None:
    torch.manual_seed(0)
    mine = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3))
    theirs = copy.deepcopy(mine)
    x, y = torch.randint(5, (16, 2)), torch.randint(3, (16,))
    one = Muon([{"params": list(mine.parameters()), "weight_decay": 0.1}], lr=0.01)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(5):
        for net, optimizer in ((mine, one), (theirs, other)):
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


def test_train_gives_muon_the_matrices_and_convolutions_but_no_table() -> None:
    net = nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = _optimizer(Train(1, optimizer="muon"), net.parameters(), net)
    stepped = {id(p) for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    assert stepped == {id(net[1].weight), id(net[3].weight)}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())


def test_the_layout_of_a_convolution_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 6, 6)
    for net in (plain, last):
        net(x.to(memory_format=torch.channels_last) if net is last else x).square().sum().backward()
        Muon([{"params": [net.weight], "orthogonal": True}, {"params": [net.bias]}], lr=0.1).step()
    assert torch.allclose(plain.weight, last.weight, atol=1e-5) and last.weight.is_contiguous(
        memory_format=torch.channels_last
    )


def test_rare_directions_are_learned_in_fewer_steps_than_by_adamw() -> None:
    """What the method is for: inputs some of whose directions hardly vary."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    x = torch.randn(512, 24, generator=generator) * torch.logspace(0, -1.5, 24) @ turn
    truth = torch.randn(12, 24, generator=generator) / 5

    def lost(make: Callable[[nn.Parameter], torch.optim.Optimizer]) -> float:
        w = nn.Parameter(torch.zeros(12, 24))
        optimizer = make(w)
        for step in range(60):
            optimizer.param_groups[0]["lr"] = 0.2 * (1 - step / 60)
            optimizer.zero_grad()
            F.mse_loss(x @ w.T, x @ truth.T).backward()
            optimizer.step()
        return float(F.mse_loss(w.detach(), truth))

    muon = lost(lambda w: Muon([w], orthogonal=True))
    adamw = lost(lambda w: torch.optim.AdamW([w], weight_decay=0.0))
    assert muon < 0.6 * adamw
