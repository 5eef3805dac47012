"""Facts of storing by rate and distortion: coordinate descent (QuantEase, arXiv:2309.01885) under the bits of an
entropy coder (Chou, Lookabaugh and Gray 1989), and Squeeze, which does it layer after layer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lilliput.code.base import codes, realize, storage
from lilliput.errors import NotSupported
from lilliput.quant.descent import Rate, choose, descend
from lilliput.quant.gptq import gptq
from lilliput.quant.grids import levels
from lilliput.quant.quantize import Quantize
from lilliput.quant.rounded import rounded
from lilliput.quant.squeeze import Squeeze, squeezed
from lilliput.recipe import Recipe
from lilliput.statistics.harm import Harm, Metric
from lilliput.task import Task, predict


def layer(rows: int = 12, d: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and the second moment of inputs that have something to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(d, d, generator=generator) @ torch.randn(d, 400, generator=generator)
    H = X @ X.T / 400
    return torch.randn(rows, d, generator=generator), H + 0.01 * H.diagonal().mean() * torch.eye(d)


def error(change: Tensor, H: Tensor) -> float:
    return float(((change @ H) * change).sum())


def solved(W: Tensor, H: Tensor, step: float, price: float, sweeps: int = 3) -> Tensor:
    ones = torch.ones(len(W), 1)
    return descend(W, H, step * ones, price * ones, 127 * ones, sweeps=sweeps)


def network() -> tuple[nn.Module, Task]:
    """A small convolutional network on data whose classes it has learnt."""
    torch.manual_seed(0)
    x = torch.randn(600, 2, 8, 8) + torch.randn(600, 2, 1, 1)
    net = nn.Sequential(
        nn.Conv2d(2, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 16, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(144, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        y = net(x).argmax(1)
    return net, Task("classes", (x[:400], y[:400]), (x[400:], y[400:]))


def allocation(net: nn.Module, step: float) -> tuple[tuple[str, str, float], ...]:
    weights = {name: p.detach() for name, p in net.named_parameters() if p.dim() > 1}
    return tuple((name, "tensor", step * float(p.std())) for name, p in weights.items())


def test_a_choice_is_the_best_integer() -> None:
    """(q - w)^2 + price R(q) over every q, by trying them."""
    generator = torch.Generator().manual_seed(0)
    wanted = 3 * torch.randn(500, generator=generator)
    rate = Rate(torch.tensor(0.4), torch.tensor(2.0), torch.tensor(0.8))
    price = torch.full_like(wanted, 0.7)
    q = torch.arange(-9.0, 10.0)
    bits = torch.where(q == 0, rate.zero, rate.first + rate.slope * q.abs())
    best = q[((q - wanted[:, None]).square() + 0.7 * bits).argmin(1)]
    assert torch.equal(choose(wanted, price, rate, torch.full_like(wanted, 9.0)), best)


def test_the_law_of_bits_is_that_of_an_entropy_coder() -> None:
    """Zeros and geometric magnitudes: their mean bits under the law are their entropy."""
    generator = torch.Generator().manual_seed(0)
    q = torch.empty(200_000).geometric_(0.6, generator=generator) * (torch.rand(200_000, generator=generator) < 0.3)
    q = q * (torch.randint(0, 2, q.shape, generator=generator) * 2 - 1)
    rate = Rate.of(q[:, None], 1)
    mean = torch.where(q == 0, rate.zero, rate.first + rate.slope * q.abs()).mean()
    shares = q.unique(return_counts=True)[1] / len(q)
    assert float(mean) == pytest.approx(float(-(shares * shares.log2()).sum()), rel=0.01)


def test_no_integer_alone_can_be_better_and_sweeps_never_lose() -> None:
    W, H = layer()
    q = solved(W, H, 0.7, 0.0, sweeps=30)
    least = error(0.7 * q - W, H)
    for i, j in ((0, 0), (3, 17), (11, 39)):
        for move in (-1, 1):
            other = q.clone()
            other[i, j] += move
            assert error(0.7 * other - W, H) >= least * (1 - 1e-5)
    assert error(0.7 * solved(W, H, 0.7, 0.0, 0) - W, H) >= least


def test_without_a_price_it_is_no_worse_than_gptq() -> None:
    W, H = layer()
    grid = levels("uniform", 8, True, "test")
    ours = error(0.7 * solved(W, H, 0.7, 0.0) - W, H)
    theirs = error(0.7 * gptq(W, torch.full((12, 1), 0.7), torch.zeros(12, 1), grid, hessian=H[None]) - W, H)
    assert ours <= 1.02 * theirs


def test_a_price_of_bits_makes_zeros_and_bytes_fall() -> None:
    W, H = layer(64, 64)
    form = Metric(torch.ones(64, 1), H[None], torch.ones(1, 64 * 64), (64, 64))
    found = rounded(W, form, "tensor", [0.1, 0.4, 1.6])
    sizes = [r.stored().storage().size_bytes for r in found]
    harms = [error(r.decode() - W, H) for r in found]
    zeros = [1 - float(r.mask.float().mean()) for r in found]
    assert sizes == sorted(sizes, reverse=True) and harms == sorted(harms) and zeros == sorted(zeros)
    assert zeros[-1] > 0.5


def test_what_counts_more_is_kept_better() -> None:
    W, H = layer(32, 32)
    weights = torch.ones(32, 1)
    weights[16:] = 100.0
    form = Metric(weights, H[None], torch.ones(1, 1024), (32, 32))
    for per in ("tensor", "channel"):
        change = rounded(W, form, per, [1.0])[0].decode() - W
        assert error(change[16:], H) < 0.6 * error(change[:16], H)


def test_the_form_predicts_what_changes_do() -> None:
    """Predicted and measured divergence of tensors stored alone, at several steps: they rank alike."""
    net, task = network()
    harm = Harm.of(net, task)
    pairs = []
    for name in ("0.weight", "2.weight", "5.weight"):
        weight = net.get_parameter(name).detach().clone()
        for step in (0.25, 0.7, 2.0):
            result = rounded(weight, harm.metrics[name], "tensor", [step * float(weight.std())])[0]
            with torch.no_grad():
                net.get_parameter(name).copy_(result.decode())
                moved = predict(net, harm.inputs)
                net.get_parameter(name).copy_(weight)
                measured = float(task.divergence(moved, predict(net, harm.inputs)).mean())
            pairs.append((harm.metrics[name].harm(result.decode() - weight), measured))
    table = torch.tensor(pairs).log()
    assert float(torch.corrcoef(table.T)[0, 1]) > 0.9
    assert bool(((table[:, 0] - table[:, 1]).abs() < 2).all())


def test_layers_make_up_for_those_before_them() -> None:
    """In sequence, with the biases: closer to the dense outputs than each layer rounded for itself."""
    net, task = network()
    harm = Harm.of(net, task)
    small = squeezed(net, harm, allocation(net, 2.5))
    alone = realize(net)
    for name, per, level in allocation(net, 2.5):
        result = rounded(net.get_parameter(name), harm.metrics[name], per, [level])[0]
        with torch.no_grad():
            alone.get_parameter(name).copy_(result.decode())
    x = task.probe("val").inputs
    dense = predict(net, x)
    ours, theirs = (float(task.divergence(predict(m, x), dense).mean()) for m in (small, alone))
    assert ours < 0.8 * theirs


def test_it_is_smaller_than_few_bits_at_the_same_harm() -> None:
    net, task = network()
    x = task.probe("val").inputs
    dense = predict(net, x)

    def judged(model: nn.Module) -> tuple[int, float]:
        size = sum(part.size_bytes for name, part in storage(model).items() if name.endswith("weight"))
        return size, float(task.divergence(predict(model, x), dense).mean())

    few, harm = judged(Quantize(2, rounding="gptq")(net, task, None))
    ours, ours_harm = judged(Squeeze(allocation(net, 1.2))(net, task, None))
    assert ours < few and ours_harm < harm


def test_its_codes_hold_the_integers_and_train_on() -> None:
    net, task = network()
    small = Squeeze((*allocation(net, 4.0), ("0.bias", "tensor", 8)))(net, task, None)
    kinds = {name: [type(code).__name__ for code in chain] for name, chain in codes(small).items()}
    assert kinds["2.weight"] == ["Masked", "Uniform"] and kinds["0.bias"] == ["Uniform"] and kinds["2.bias"] == ["Half"]
    before = realize(small).get_parameter("2.weight").detach().clone()
    task.loss(small(task.probe("train").inputs), task.probe("train")).backward()
    torch.optim.SGD([p for p in small.parameters() if p.grad is not None], 0.5).step()
    after = realize(small).get_parameter("2.weight").detach()
    assert not torch.equal(before, after) and bool((after[before == 0] == 0).all())


def test_its_recipe_gives_the_same_bytes_again() -> None:
    net, task = network()
    stage = Squeeze((("0.weight", "channel", 4), *allocation(net, 1.0)[1:]))
    read = Recipe.parse(Recipe((stage,)).data()).stages[0]
    assert read == stage and isinstance(read, Squeeze) and isinstance(read.allocation[0][2], int)
    first, again = stage(net, task, None), read(net, task, None)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_layers_called_twice_and_tensors_without_a_layer_are_stored_too() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.middle = nn.Embedding(30, 8), nn.Linear(8, 8)
            self.last, self.free = nn.Linear(8, 3), nn.Parameter(torch.randn(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.table(x).mean(1)
            y: Tensor = self.last(self.middle(self.middle(h).relu()) @ self.free)
            return y

    torch.manual_seed(0)
    net, x = Twice().eval(), torch.randint(0, 20, (64, 5))
    task = Task("words", train=(x, None), val=(x, None), loss="mse", metric="mse")
    names = ("table.weight", "middle.weight", "last.weight", "free")
    small = Squeeze(tuple((name, "tensor", 0.05) for name in names))(net, task, None)
    assert set(names) <= set(codes(small))
    assert float(task.divergence(predict(small, x), predict(net, x)).mean()) < 0.05


def test_what_no_example_shows_counts_all_the_same() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.EmbeddingBag(50, 4), nn.Linear(4, 3)).eval(), torch.randint(0, 10, (64, 5))
    form = Harm.of(net, Task("words", train=(x, None), val=(x, None), loss="mse", metric="mse")).metrics["0.weight"]
    assert bool((form.rows > 0).all()) and float(form.rows[10:].max()) <= float(form.rows[:10].median())


def test_bad_settings_are_refused_before_any_work() -> None:
    net, task = network()
    for wrong in (("0.weight", "row", 1.0), ("0.weight", "tensor", 9), ("0.weight", "tensor", 0.0)):
        with pytest.raises(ValueError, match="Squeeze: allocation must hold"):
            Squeeze((wrong,))
    with pytest.raises(ValueError, match="must name tensors of the model"):
        Squeeze((("0.wait", "tensor", 1.0),))(net, task, None)
    with pytest.raises(NotSupported, match="a code stores it already"):
        Squeeze((("0.weight", "tensor", 1.0),))(Quantize(8)(net, task, None), task, None)
    harm = Harm.of(net, task)
    harm.rows.given["0.weight"] = harm.rows.given["0.weight"] * torch.nan
    with pytest.raises((ValueError, RuntimeError)):
        squeezed(net, replace(harm), allocation(net, 1.0))
