"""Facts from the papers behind roundings: GPTQ, stochastic rounding, and nearest as what both are measured against."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lilliput.code.base import codes
from lilliput.prune.prune import Prune
from lilliput.quant.gptq import gptq
from lilliput.quant.grids import Levels, uniform
from lilliput.quant.quantize import Quantize
from lilliput.quant.ranges import fit
from lilliput.quant.roundings import nearest, stochastic
from lilliput.statistics.calibrate import statistics
from lilliput.task import Task


def layer(d: int = 200, out: int = 24) -> tuple[Tensor, Tensor]:
    """Weights, and inputs (d, samples) that hang together as those of real layers do."""
    generator = torch.Generator().manual_seed(0)
    few, mix = torch.randn(20, 1000, generator=generator), torch.randn(d, 20, generator=generator)
    return torch.randn(out, d, generator=generator), mix @ few + 0.3 * torch.randn(d, 1000, generator=generator)


def error(weight: Tensor, rounded: Tensor, X: Tensor) -> float:
    return float(((weight - rounded).double() @ X.double()).square().sum())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_loses_less_of_the_outputs_than_nearest_where_inputs_are_correlated(bits: int, symmetric: bool) -> None:
    """arXiv:2210.17323, section 3: the error of each column is made up for by those that follow."""
    W, X = layer()
    levels = uniform(bits, symmetric)
    scale, zero = fit(W, levels, "mse")
    H = (X @ X.T).double()[None]
    ours = gptq(W, scale, zero, levels, hessian=H)
    plain = nearest(W, scale, zero, levels)
    assert ours.min() >= levels.low and ours.max() <= levels.high and torch.equal(ours, ours.round())
    lost, before = (error(W, (found - zero) * scale, X) for found in (ours, plain))
    assert lost < 0.4 * before
    assert error(W, (ours - zero) * scale, torch.eye(200)) > error(W, (plain - zero) * scale, torch.eye(200))


def test_gptq_with_uncorrelated_inputs_is_nearest() -> None:
    """A diagonal Hessian: no column can make up for another."""
    W, _ = layer()
    scale, zero = fit(W, uniform(3, True), "minmax")
    for H in (torch.eye(200), torch.diag(torch.rand(200) + 0.1)):
        rounded = gptq(W, scale, zero, uniform(3, True), hessian=H[None].double())
        assert torch.equal(rounded, nearest(W, scale, zero, uniform(3, True)))


def test_gptq_equation_3_one_column_after_another() -> None:
    """Section 3: with the last weight left, w_k -= e H^-1_jk / H^-1_jj over the inverse of what remains; by hand."""
    W, X = layer(d=6, out=3)
    levels, H = uniform(3, True), X @ X.T
    scale, zero = fit(W, levels, "minmax")
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(6)
    expected, w = torch.empty(3, 6).double(), W.double().clone()
    for j in range(6):
        inverse = torch.linalg.inv(damped[j:, j:])
        expected[:, j] = nearest(w[:, j], scale[:, 0], zero[:, 0], levels)
        lost = w[:, j] - expected[:, j] * scale[:, 0]
        w[:, j:] -= lost[:, None] * inverse[0] / inverse[0, 0]
    assert torch.equal(gptq(W, scale, zero, levels, hessian=H[None].double()).double(), expected)


def test_gptq_takes_more_columns_than_one_block_as_it_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    W, X = layer()
    scale, zero = fit(W, uniform(3, True), "mse")
    H = (X @ X.T).double()[None]
    whole = gptq(W, scale, zero, uniform(3, True), hessian=H)
    monkeypatch.setattr("lilliput.quant.gptq.WIDTH", 7)
    assert torch.equal(gptq(W, scale, zero, uniform(3, True), hessian=H), whole)


def test_stochastic_rounding_meets_the_weight_on_average() -> None:
    """arXiv:1502.02551, section 3: E[round(x)] = x, and a value on the grid stays."""
    x = torch.tensor([[0.25, -1.7, 3.0]]).repeat(20000, 1)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    rounded = stochastic(x, torch.ones(1, 1), torch.zeros(1, 1), Levels(-7, 7, True), noise=noise)
    torch.testing.assert_close(rounded.mean(0), x[0], atol=0.01, rtol=0)
    assert (rounded[:, 2] == 3).all() and set(rounded[:, 0].tolist()) == {0.0, 1.0}


class Net(nn.Module):
    """Linear, grouped convolution and an embedding, whose inputs no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 16)
        self.conv, self.fc = nn.Conv1d(16, 32, 3, padding=1, groups=2), nn.Linear(32, 12)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(torch.relu(self.conv(self.table(tokens).transpose(1, 2))).mean(2))


@pytest.mark.parametrize("per", ["tensor", "channel", 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantize_puts_weights_on_the_levels_of_its_rounding(per: str | int, symmetric: bool) -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randint(0, 9, (64, 7))
    task = Task("tokens", x, x)
    coded = Quantize(3, per=per, symmetric=symmetric, rounding="gptq")(net, task, None)
    same = Quantize(3, per=per, symmetric=symmetric)(net, None, None)
    assert torch.equal(coded.table.weight, same.table.weight), "without inputs: nearest"
    for name in ("conv", "fc"):
        ours, plain = (getattr(found, name) for found in (coded, same))
        assert torch.equal(ours.parametrizations.weight.original0, ours.weight), "on its levels already"
        assert torch.equal(ours.parametrizations.weight.original1, plain.parametrizations.weight.original1)
        assert not torch.equal(ours.weight, plain.weight)
    known = statistics(net, task, ["conv.weight", "fc.weight"], ["hessian"])
    for name in ("conv", "fc"):
        H = known[f"{name}.weight"]["hessian"]
        lost = [
            (getattr(found, name).weight - getattr(net, name).weight).detach().double().reshape(len(H), -1, len(H[0]))
            for found in (coded, same)
        ]
        ours, plain = (float((part @ H * part).sum()) for part in lost)
        assert ours < plain, name


def test_a_mask_holds_under_gptq_and_what_is_kept_makes_up_for_it() -> None:
    torch.manual_seed(0)
    W, X = layer()
    net = nn.Sequential(nn.Linear(200, 24))
    net[0].weight.data = W / 10
    task = Task("layer", X.T, X.T)
    pruned = Prune(0.5)(net, None, None)
    ours, plain = (Quantize(3, rounding=rounding)(pruned, task, None) for rounding in ("gptq", "nearest"))
    dropped = ~codes(pruned)["0.weight"][0].mask
    assert (ours[0].weight[dropped] == 0).all() and [type(code).__name__ for code in codes(ours)["0.weight"]] == [
        "Masked",
        "Uniform",
    ]
    target = pruned[0].weight.detach()
    assert error(target, ours[0].weight.detach(), X) < 0.6 * error(target, plain[0].weight.detach(), X)


def test_what_a_rounding_cannot_have_is_said() -> None:
    net = nn.Sequential(nn.Linear(40, 20))
    with pytest.raises(ValueError, match="Quantize: a task must be given for rounding 'gptq', got None"):
        Quantize(4, rounding="gptq")(net, None, None)
    table, x = nn.Sequential(nn.Embedding(4, 2)), torch.zeros(3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="must have hessian of some tensor, got none"):
        Quantize(4, rounding="gptq")(table, Task("table", x, x), None)
    one, two = (Quantize(4, rounding="stochastic", seed=seed)(copy.deepcopy(net), None, None) for seed in (0, 1))
    assert not torch.equal(one[0].weight, two[0].weight)
