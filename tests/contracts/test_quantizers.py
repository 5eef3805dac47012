"""What every grid, range and rounding promises."""

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from lilliput.code.base import pack
from lilliput.export.onnx import Session, trace
from lilliput.quant.grids import levels, uniform
from lilliput.quant.quantize import Quantize
from lilliput.quant.ranges import fit
from lilliput.registry import Entry, entries
from lilliput.task import Task


def every(family: str) -> Any:
    return pytest.mark.parametrize("entry", entries(family), ids=lambda entry: entry.name)


@every("grid")
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_has_zero_and_no_more_levels_than_its_bits(entry: Entry, symmetric: bool) -> None:
    sizes = []
    for bits in range(2, 17):
        grid = levels(entry.name, bits, symmetric, "test")
        assert grid.low <= 0 < grid.high and grid.high - grid.low < 2**bits and grid.symmetric == symmetric
        sizes.append(grid.high - grid.low)
        low, high = -torch.rand(5, 1) * 3, torch.rand(5, 1) * 2
        scale, zero = grid.steps(low, high)
        assert (scale > 0).all() and torch.equal(zero, zero.round()) and torch.equal(scale, scale.half().float())
        assert (zero >= grid.low).all() and (zero <= grid.high).all()
        slack = scale + 1e-3 * (high - low)  # steps of eleven bits
        assert ((grid.high - zero) * scale + slack >= high).all()
        assert ((grid.low - zero) * scale - slack <= low).all()
    assert sizes == sorted(sizes)


@every("range")
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_range_is_finite_and_scales_with_its_rows(entry: Entry, symmetric: bool) -> None:
    rows = torch.randn(6, 33, generator=torch.Generator().manual_seed(0))
    rows[1] = 0
    rows[2] = rows[2].abs()
    for bits in (2, 4, 8):
        grid = uniform(bits, symmetric)
        scale, zero = fit(rows, grid, entry.name)
        assert scale.shape == zero.shape == (6, 1) and (scale > 0).all() and scale.isfinite().all()
        twice, same = fit(rows * 2, grid, entry.name)
        live = rows.any(1)
        torch.testing.assert_close(twice[live], 2 * scale[live])
        assert torch.equal(same[live], zero[live])
        alone = torch.cat([fit(row[None], grid, entry.name)[0] for row in rows])
        assert torch.equal(alone, scale), "each row has a step of its own"


@every("rounding")
def test_a_rounding_stays_on_the_grid_near_the_weight_and_keeps_zeros(
    entry: Entry, model: nn.Module, task: Task
) -> None:
    for bits, symmetric, per in itertools.product((2, 4, 8), (True, False), ("tensor", "channel", 3)):
        before = [p.clone() for p in model.parameters()]
        coded, again = (
            Quantize(bits, per=per, symmetric=symmetric, rounding=entry.name, biases="float32")(model, task, None)
            for _ in range(2)
        )
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        for index in (0, 3, 7):
            decoded, weight = coded[index].weight, model[index].weight
            assert torch.equal(decoded, again[index].weight) and decoded.isfinite().all()
            assert len(decoded.detach().unique()) <= 2**bits * len(weight) * weight[0].numel() // 3
            if bits == 8:
                torch.testing.assert_close(decoded, weight, atol=0.2, rtol=0.2)


@every("rounding")
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_rounding_keeps_zeros(entry: Entry, symmetric: bool, model: nn.Module, task: Task) -> None:
    with torch.no_grad():
        for index in (0, 3, 7):
            model[index].weight.flatten()[::3] = 0
    coded = Quantize(3, symmetric=symmetric, rounding=entry.name)(model, task, None)
    for index in (0, 3, 7):
        assert (coded[index].weight.flatten()[::3] == 0).all() and (coded[index].weight != 0).any()


@pytest.mark.parametrize("grid", [entry.name for entry in entries("grid")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_grid_goes_into_a_file(grid: str, symmetric: bool, model: nn.Module) -> None:
    x = torch.randn(2, 2, 5, 5)
    structure = trace(model, x)
    for bits in (2, 3, 8):
        coded = Quantize(bits, grid=grid, symmetric=symmetric)(model, None, None).eval()
        outputs = Session(structure.write(pack(coded))).outputs(x)
        torch.testing.assert_close(torch.from_numpy(outputs), coded(x).detach(), atol=1e-4, rtol=1e-4)
