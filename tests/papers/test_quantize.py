"""Facts from the papers behind the uniform grid, its ranges, its training, and the allocation of bits."""

import itertools
import math

import pytest
import torch
from torch import nn

from lilliput.quant.activations import Activation
from lilliput.quant.allocate import allocate_bits
from lilliput.quant.grids import uniform
from lilliput.quant.quantize import Quantize
from lilliput.quant.ranges import fit
from lilliput.quant.uniform import Uniform
from lilliput.registry import entries

RANGES = [entry.name for entry in entries("range")]


def rounded(weight: torch.Tensor, bits: int = 4, rule: str = "mse", symmetric: bool = True) -> torch.Tensor:
    code = Uniform(bits, symmetric=symmetric, range=rule)
    return code.decode(*code.encode(weight))


def test_lsq_equations_2_and_3_gradient_of_the_step_size() -> None:
    """arXiv:1902.08153: dw_hat / ds = -w/s + round(w/s) inside, -Q_N or Q_P outside; times ds / dlog2 s = s ln 2."""
    s = 0.25
    weight = torch.tensor([[0.3, -0.36, 0.62, 5.0, -5.0]], requires_grad=True)
    log_scale = torch.full((1, 1), math.log2(s), requires_grad=True)
    code = Uniform(4, per="tensor")
    for i, expected in enumerate([-1.2 + 1, 1.44 - 1, -2.48 + 2, 7.0, -7.0]):
        gradient, through = torch.autograd.grad(code.decode(weight, log_scale)[0, i], (log_scale, weight))
        assert float(gradient) == pytest.approx(expected * s * math.log(2), rel=1e-5)
        assert through[0, i] == (1.0 if i < 3 else 0.0), "equation 5: straight through inside, nothing outside"


def test_affine_grids_learn_their_step_by_the_same_rule() -> None:
    code = Uniform(4, per="tensor", symmetric=False, range="minmax")
    weight, log_scale = code.encode(torch.linspace(-1, 2, 16)[None])
    weight, log_scale = (weight * 1.2).requires_grad_(), log_scale.requires_grad_()
    out = code.decode(weight, log_scale)
    (gradient,) = torch.autograd.grad(out.sum(), log_scale)
    with torch.no_grad():
        s, z = 2**log_scale, code.zero_point
        x = weight / s + z
        inside = (x > 0) & (x < 15)
        expected = (x.round().clamp(0, 15) - z - inside * (x - z)).sum() * s * math.log(2)
    assert float(gradient) == pytest.approx(float(expected), rel=1e-3)


def test_the_grid_is_jacob_equation_1_with_an_exact_zero() -> None:
    """arXiv:1712.05877: r = S (q - Z), and real zero is exactly representable."""
    torch.manual_seed(0)
    weight = torch.randn(4, 32) + 0.5
    weight[:, 0] = 0.0
    for symmetric in (True, False):
        code = Uniform(4, symmetric=symmetric)
        theta = code.encode(weight)
        decoded = code.decode(*theta)
        scale = (2 ** theta[1]).half().float()
        q = decoded / scale + code.zero_point
        torch.testing.assert_close(q, q.round(), atol=1e-4, rtol=0)
        low, high = (-7, 7) if symmetric else (0, 15)
        assert q.min() >= low - 1e-4 and q.max() <= high + 1e-4 and (decoded[:, 0] == 0).all()
        assert (scale == scale.half().float()).all()


def test_the_error_inside_the_range_is_at_most_half_a_step() -> None:
    weight = torch.randn(4, 64)
    code = Uniform(5, range="minmax")
    theta = code.encode(weight)
    assert ((code.decode(*theta) - weight).abs() <= 2 ** theta[1] / 2 * 1.01).all()


def test_every_bit_takes_about_six_decibels_off_the_error() -> None:
    """Uniform rounding noise is s^2 / 12: a bit more, a quarter of the power."""
    weight = torch.rand(1, 20000) * 2 - 1
    errors = [float((rounded(weight, bits, "minmax") - weight).square().mean()) for bits in (5, 6, 7, 8)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.7 < coarse / fine < 4.5


def test_the_mse_range_is_never_worse_than_the_others() -> None:
    """arXiv:2106.08295, equation 8: the range with the least squared error."""
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) ** 3
    for bits, symmetric in itertools.product((2, 3, 4, 8), (True, False)):
        errors = {rule: float((rounded(weight, bits, rule, symmetric) - weight).square().sum()) for rule in RANGES}
        assert errors["mse"] <= min(errors.values()) * 1.001, errors


def test_percentile_does_not_count_pruned_zeros() -> None:
    dense = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0))
    sparse = torch.cat([dense, torch.zeros(1, 9000)], 1)
    grid = uniform(4, symmetric=True)
    torch.testing.assert_close(fit(sparse, grid, "percentile")[0], fit(dense, grid, "percentile")[0])


def test_activations_follow_equation_12() -> None:
    """arXiv:1712.05877: s = (b - a) / (n - 1), q = round((clamp(r; a, b) - a) / s) s + a, with zero on the grid."""
    code = Activation(3)
    code.calibrate(torch.tensor([-1.0, 2.5]), "minmax")
    assert float(code.scale) == 0.5 and int(code.zero_point) == 2
    x = torch.tensor([-9.0, -0.6, 0.0, 0.3, 2.4, 9.0], requires_grad=True)
    y = code(x)
    assert y.tolist() == [-1.0, -0.5, 0.0, 0.5, 2.5, 2.5]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_allocation_is_optimal_on_small_cases() -> None:
    """Shoham and Gersho 1988: on convex losses the greedy steps are the Lagrangian solution."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        size = {name: int(torch.randint(50, 400, (), generator=generator)) for name in "abcd"}
        power = {name: float(torch.rand((), generator=generator)) for name in "abcd"}
        loss = {name: {bits: power[name] * 4.0**-bits * size[name] for bits in (2, 3, 4, 6, 8)} for name in "abcd"}
        budget = int(4.3 * sum(size.values()))
        found = allocate_bits(loss, size, budget)
        total = sum(loss[name][found[name]] for name in found)
        assert sum(found[name] * size[name] for name in found) <= budget
        best = min(
            sum(loss[n][b] for n, b in zip("abcd", bits, strict=True))
            for bits in itertools.product((2, 3, 4, 6, 8), repeat=4)
            if sum(size[n] * b for n, b in zip("abcd", bits, strict=True)) <= budget
        )
        assert total <= 1.6 * best
    with pytest.raises(ValueError, match="must be at least 20 "):
        allocate_bits({"a": {2: 0.0}}, {"a": 10}, 19)


def test_more_bits_never_move_the_weights_further() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 8))
    with torch.no_grad():
        errors = [float((Quantize(bits)(net, None, None)[0].weight - net[0].weight).norm()) for bits in (2, 3, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]
