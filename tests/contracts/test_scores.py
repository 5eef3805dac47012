"""Every score: positive numbers of the weight's shape, from the weight and the statistics it names alone."""

import pytest
import torch
from torch import Tensor, nn

from lilliput.prune import scores
from lilliput.prune.masks import masks
from lilliput.prune.prune import Prune
from lilliput.registry import Entry, entries
from lilliput.task import Task

every = pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries("score")])
shapes = pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3), (6, 4, 3, 3), (6, 1, 3, 3)], ids=str)


def statistics(entry: Entry, shape: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {need: torch.rand(shape, generator=generator) + 0.1 for need in scores.needs(entry.load())}


@every
@shapes
def test_a_score_is_positive_finite_and_of_the_weights_shape(entry: Entry, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight.view(-1)[::5] = 0
    before, given = weight.clone(), statistics(entry, shape)
    score = entry.load()(weight, **given)
    assert score.shape == weight.shape and score.is_floating_point()
    assert bool(score.isfinite().all()) and bool((score >= 0).all())
    assert torch.equal(score, entry.load()(weight, **given)), "a score is a function of its arguments"
    assert torch.equal(weight, before)


@every
def test_a_score_names_statistics_that_exist(entry: Entry) -> None:
    assert scores.data_needed(entry.name) in ("none", "inputs", "labels")


@every
def test_a_score_prunes_or_says_what_it_needs(entry: Entry, model: nn.Module, task: Task) -> None:
    try:
        pruned = Prune(0.5, score=entry.name)(model, task, None)
    except ValueError as error:
        assert "gathered while training" in str(error)
        return
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert sum(int((~code.mask).sum()) for code in masks(pruned).values()) == total // 2


@every
def test_a_score_says_what_it_is(entry: Entry) -> None:
    assert entry.summary and len(entry.summary) < 500
