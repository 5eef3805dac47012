"""Every pattern: exact counts, whole units, the lowest scores first, and a clear refusal of what it does not divide."""

import pytest
import torch

from lilliput.prune.patterns import Pattern, parse
from lilliput.registry import entries

# Patterns with settings, as text; any other is its own name.
TEXTS = {"N:M": ["2:4", "2:4 out"], "block": ["block 4x1", "block 2x2"], "head": ["head 2"]}
SHAPES = [(8, 16), (8, 4, 3, 3), (8, 8, 4)]

every = pytest.mark.parametrize("text", [text for entry in entries("pattern") for text in TEXTS.get(entry.name, [entry.name])])  # fmt: skip  # noqa: E501


def rated(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.01


def fitting(pattern: Pattern) -> list[tuple[int, ...]]:
    """The shapes that a pattern divides; what it does not divide, it refuses with what to do."""
    shapes = []
    for shape in SHAPES:
        try:
            pattern.check(shape)
        except ValueError as error:
            assert "where=" in str(error)
        else:
            shapes.append(shape)
    assert shapes
    return shapes


@every
def test_a_mask_has_the_sparsity_asked_for_in_whole_units(text: str) -> None:
    pattern = parse(text)
    for shape in fitting(pattern):
        score, block = rated(shape), pattern.block(shape)
        before = score.clone()
        assert bool(pattern(score, 0.0).all())
        last = 0
        for sparsity in (0.25, 0.5, 0.75):
            mask = pattern(score, min(sparsity, pattern.most))
            assert mask.dtype == torch.bool and mask.shape == score.shape
            dropped = int((~mask).sum())
            unit = torch.Size(block or (1,)).numel()
            assert dropped % unit == 0 and abs(dropped - min(sparsity, pattern.most) * score.numel()) <= unit / 2 + 1e-6
            assert dropped >= last and bool(mask.any())
            last = dropped
        assert torch.equal(score, before)
        assert torch.equal(pattern(score, 0.5), pattern(score.clone(), 0.5))


@every
def test_pooled_scores_are_what_is_compared(text: str) -> None:
    """What stays scores at least as high as what goes, in every unit's own comparison, and the shape is kept."""
    pattern = parse(text)
    for shape in fitting(pattern):
        score = rated(shape)
        pooled, mask = pattern.pooled(score), pattern(score, min(0.5, pattern.most))
        assert pooled.shape == score.shape and pooled.dtype == score.dtype
        if pattern.block(shape):
            assert pooled[mask].min() >= pooled[~mask].max()


@every
def test_one_score_in_all_places_drops_the_first_units(text: str) -> None:
    pattern = parse(text)
    for shape in fitting(pattern):
        mask = pattern(torch.ones(shape), min(0.5, pattern.most))
        assert not bool(mask.flatten()[0]) and bool(mask.flatten()[-1])


@every
def test_settings_that_a_pattern_does_not_take_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse(f"{text} twice")
