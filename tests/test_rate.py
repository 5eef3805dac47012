"""Rate and distortion: hulls, totals, exact bytes, and the search without training that is made of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput.code.base import Code, codes, pack
from lilliput.encode import Encode
from lilliput.quant.allocate import allocate, hull
from lilliput.quant.squeeze import Squeeze
from lilliput.quant.uniform import Uniform
from lilliput.recipe import Recipe
from lilliput.runner import run
from lilliput.search import codes as proposals
from lilliput.search import rate
from lilliput.search.rate import Offers, Option
from lilliput.search.untrained import Bracket
from lilliput.statistics.harm import Harm
from lilliput.task import Task, predict


def target() -> tuple[nn.Module, Task]:
    """A perceptron that knows its classes, with a margin, on inputs that hang together."""
    torch.manual_seed(0)
    x = torch.randn(1400, 6) @ torch.randn(6, 24)
    net = nn.Sequential(nn.Linear(24, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    with torch.no_grad():
        for layer in (net[0], net[2], net[4]):
            layer.weight.mul_(3)
        z = net(x)
    keep = (z.topk(2).values.diff().abs()[:, 0] > 0.5 * z.std()).nonzero()[:, 0][:1000]
    x, y = x[keep], z[keep].argmax(1)
    half = len(x) // 2
    return net, Task("toy", (x[:half], y[:half]), (x[half:], y[half:]))


@pytest.fixture(scope="module")
def known() -> tuple[Offers, Task]:
    net, task = target()
    return rate.offers(net, task), task


def test_a_hull_is_what_some_price_chooses() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = {i: (float(c), float(h)) for i, (c, h) in enumerate(torch.rand(15, 2, generator=generator))}
        prices = [10 ** (p / 20) for p in range(-80, 80)]
        chosen = {min(rows, key=lambda i: rows[i][1] + price * rows[i][0]) for price in prices}
        assert chosen <= set(hull(rows))
        costs, harms = zip(*(rows[i] for i in hull(rows)), strict=True)  # type: ignore[index]
        assert list(costs) == sorted(costs) and list(harms) == sorted(harms, reverse=True)


def test_allocation_lies_on_the_path_of_prices_and_spends_what_is_left() -> None:
    generator = torch.Generator().manual_seed(1)
    options = {
        name: {k: (float(k * (3 + i)), float(torch.rand((), generator=generator) + 1) * 2.0**-k) for k in range(1, 9)}
        for i, name in enumerate("abcdefgh")
    }
    for budget in (60.0, 110.0, 180.0, 300.0):
        picked = allocate(options, budget)
        spent = sum(options[n][k][0] for n, k in picked.items())
        harm = sum(options[n][k][1] for n, k in picked.items())
        assert spent <= budget
        for price in [2.0 ** (-p / 8) for p in range(100)]:  # nothing on the path within the budget is better
            other = {n: min(rows, key=lambda k, r=rows: r[k][1] + price * r[k][0]) for n, rows in options.items()}
            if sum(options[n][k][0] for n, k in other.items()) <= budget:
                assert harm <= sum(options[n][k][1] for n, k in other.items()) + 1e-12
        dearer = [(n, k) for n, rows in options.items() for k in rows if rows[k][1] < rows[picked[n]][1]]
        assert all(options[n][k][0] - options[n][picked[n]][0] > budget - spent for n, k in dearer)


def test_a_total_is_kept_and_costs_are_those_of_the_file(known: tuple[Offers, Task]) -> None:
    """The cost of what stands alone is exact to the byte; in sequence it is a few percent off."""
    offers, _ = known
    for total in (1500.0, 3000.0, 6000.0):
        picked = offers.chosen(total)
        assert sum(option.cost for option in picked.values()) <= total
        model, _ = rate.composed(offers, picked)
        sizes = {name: stored.storage().size_bytes for name, stored in pack(model).items()}
        made = sum(sizes[name] for name in picked)
        assert made == pytest.approx(sum(o.cost for o in picked.values()), rel=0.2)
        first = "0.weight"  # no layer comes before it, but its target is solved for
        assert sizes[first] == pytest.approx(picked[first].cost, rel=0.2)


@pytest.mark.parametrize("file", ["lil", "onnx"])
def test_an_options_cost_is_that_of_its_code(known: tuple[Offers, Task], file: str) -> None:
    offers, task = known
    priced = rate.offers(offers.model, task, file=file)
    weight = offers.model.get_parameter("2.weight")
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(weight.detach().clone()))
    lilliput.attach(holder, "weight", Uniform(8))
    exact = pack(holder)["weight"].cost(file)  # type: ignore[arg-type]
    assert priced.options["2.weight"]["channel", 8].cost == pytest.approx(exact, rel=0.02)
    least = min(option.cost for option in priced.options["2.weight"].values())
    assert least < 0.05 * exact if file == "lil" else least > 0.4 * exact  # ONNX has nothing below four bits


def test_less_costs_more(known: tuple[Offers, Task]) -> None:
    offers, task = known
    x = task.probe("val").inputs
    dense = predict(offers.model, x)
    harms, measured = [], []
    for total in (1200.0, 2000.0, 4000.0, 8000.0):
        picked = offers.chosen(total)
        harms.append(sum(option.harm for option in picked.values()))
        measured.append(float(task.divergence(predict(rate.composed(offers, picked)[0], x), dense).mean()))
    assert harms == sorted(harms, reverse=True) and measured == sorted(measured, reverse=True)


def test_stages_give_the_composed_network_again(known: tuple[Offers, Task]) -> None:
    offers, task = known
    model, stages = rate.composed(offers, offers.chosen(2500.0))
    again = lilliput.run(offers.model, task, Recipe.parse(Recipe(tuple(stages)).data()))
    for name, stored in pack(model).items():
        assert stored.storage() == pack(again)[name].storage()
        assert (stored.decode() == pack(again)[name].decode()).all()


class _Sign(Code):
    """A code from elsewhere: one bit a value, in a kind that is here already."""

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        theta: tuple[Tensor, Tensor] = Uniform(2, "tensor").encode(weight.sign() * weight.abs().mean())
        return theta

    def decode(self, *theta: Tensor) -> Tensor:
        return theta[0]

    @classmethod
    def proposals(cls, tensor: Tensor, statistics: Mapping[str, Tensor]) -> Sequence[Code]:
        return [cls()]


def test_a_code_that_is_registered_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    net, task = target()
    monkeypatch.setattr(proposals, "proposing", lambda: (Uniform, _Sign))
    offers = rate.offers(net, task, cost=lambda stored: 1.0 if stored.plain else 10.0)
    assert {option.family for option in offers.options["2.weight"].values()} == {rate.GRID, "_Sign"}
    picked = offers.chosen(3.0)
    assert any(option.code is not None for option in picked.values())
    model, stages = rate.composed(offers, picked)
    assert any(isinstance(stage, Encode) for stage in stages)
    assert any(isinstance(chain[0], _Sign) for chain in codes(model).values())


def test_predictions_are_fitted_family_by_family() -> None:
    offers = Offers(nn.Linear(1, 1), Harm({}, None, None))  # type: ignore[arg-type]
    rows = [(1.0, 4.0), (2.0, 1.0), (3.0, 3.0), (0.5, 2.0)]
    runs = [
        ({"a": Option(1, first, "one"), "b": Option(1, second, "two")}, 2.0 * first + 0.25 * second)
        for first, second in rows
    ]
    offers.fit(runs)
    assert offers.fitted["one"] == pytest.approx(2.0, rel=0.1) and offers.fitted["two"] == pytest.approx(0.25, rel=0.2)


def test_the_bracket_closes_on_the_floor() -> None:
    bracket, tried = Bracket(12.0), []
    while (ratio := bracket.next()) is not None:
        tried.append(ratio)
        bracket.saw(ratio, ratio < 23.4)
    assert bracket.low < 23.4 <= bracket.high < 1.16 * bracket.low and len(tried) < 8


def test_one_that_may_be_taken_back_is_followed_by_a_safer_one() -> None:
    bracket = Bracket(20.0)
    assert bracket.next() == 20.0
    bracket.saw(20.0, True, safe=False)
    assert bracket.next() == pytest.approx(15.4, abs=0.1)
    bracket.saw(15.4, True, safe=True)
    assert bracket.next() == pytest.approx(34.0)  # then on, from the largest that holds


def test_a_search_without_training_beats_8_bits_and_its_recipe_gives_its_file(tmp_path: Path) -> None:
    net, task = target()
    result = lilliput.shrink(net, task, floor="2%", trials=1, train=False, out=tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    done = {row["name"]: row for row in summary["points"] if row.get("status") == "done"}
    eight = next(row for name, row in done.items() if "8 bits" in name)
    assert "by rate and distortion, without training" in result.chosen["name"]
    assert result.chosen["packed_bytes"] < 0.7 * eight["packed_bytes"]
    assert not any("Train" in json.dumps(row["recipe"]) for row in done.values())
    assert (tmp_path / "out" / "model.lil").stat().st_size == result.chosen["packed_bytes"]
    recipe = Recipe.read(tmp_path / "out" / "recipe.toml")
    assert any(isinstance(stage, Squeeze) for stage in recipe.stages)
    made = lilliput.run(net, task, recipe)
    assert lilliput.save(made, task.example, tmp_path / "again")["model.lil"] == result.chosen["packed_bytes"]


def test_a_tensor_of_one_value_is_stored_too() -> None:
    net, x = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 3)), torch.randn(32, 1)
    task = Task("one", (x, x[:, :1].repeat(1, 3)), (x, x[:, :1].repeat(1, 3)), loss="mse", metric="mse")
    coded = run(net, task, rate.stages(rate.offers(net, task), 64.0))
    assert torch.allclose(coded(x), net(x), atol=0.1)
