"""Every allocation: a sparsity in [0, 1) for each tensor, which together are the sparsity asked for."""

import pytest
import torch

from lilliput.registry import Entry, entries

every = pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries("allocation")])


@every
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_the_whole_has_the_sparsity_asked_for(entry: Entry, sparsity: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (64, 32), "b": (16, 8, 3, 3), "c": (40, 40)}
    scores = {name: torch.rand(shape, generator=generator) + 0.01 for name, shape in shapes.items()}
    before = {name: score.clone() for name, score in scores.items()}
    shares = entry.load()(scores, sparsity)
    assert list(shares) == list(scores)
    assert all(0 <= value < 1 for value in shares.values())
    total = sum(score.numel() for score in scores.values())
    zeros = sum(shares[name] * score.numel() for name, score in scores.items())
    assert zeros == pytest.approx(sparsity * total, abs=0.5)
    assert shares == entry.load()(scores, sparsity)
    assert all(torch.equal(score, before[name]) for name, score in scores.items())


@every
def test_one_tensor_gets_all_of_it(entry: Entry) -> None:
    shares = entry.load()({"only": torch.arange(1.0, 101.0).view(10, 10)}, 0.4)
    assert shares == {"only": pytest.approx(0.4)}
