"""Recipes: plain data both ways, keys that change when the result would."""

import importlib
import linecache
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lilliput
from lilliput import Cosine, Distill, Prune, Quantize, Recipe, Student, Task, Train, registry, run
from lilliput.recipe import next_key, start_key
from lilliput.registry import lookup
from lilliput.runner import Runner
from lilliput.store import Store

RECIPE = Recipe(
    (
        Student(remove=("a.b",), width=0.5),
        Train(10, lr=Cosine(1e-2), rules=(Distill(0.5),), until=5),
        Prune(0.5),
        Quantize(4, allocation=(("0.weight", 3),)),
    )
)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return Task("toy", (x, y), (x, y), (x, y), batch_size=16)


def test_a_recipe_is_plain_data_both_ways(tmp_path: Path) -> None:
    assert Recipe.parse(RECIPE.data()) == RECIPE
    (tmp_path / "r.toml").write_text(RECIPE.toml())
    assert Recipe.read(tmp_path / "r.toml") == RECIPE


def test_unknown_stages_and_settings_are_named() -> None:
    with pytest.raises(KeyError, match=r"Did you mean 'Prune'.* needs that package installed"):
        Recipe.parse([{"stage": "Prun"}])
    with pytest.raises(ValueError, match="Prune takes"):
        Recipe.parse([{"stage": "Prune", "sparsty": 0.5}])
    with pytest.raises(ValueError, match="must name its stage"):
        Recipe.parse([{"sparsity": 0.5}])


MINE = """
from dataclasses import dataclass
from lilliput import Rule, Stage
from lilliput.schedule import Schedule

@dataclass(frozen=True)
class Halve(Schedule):
    first: float = 1.0
    def __call__(self, step, steps):
        return self.first / 2

@dataclass(frozen=True)
class Scale(Stage):
    factor: float | Schedule = 2.0
    def __call__(self, model, task, reference):
        return model

@dataclass(frozen=True)
class Prune(Stage):
    "A name that lilliput has too."
    def __call__(self, model, task, reference):
        return model

class Loose(Stage): ...
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "my_stages.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("my_stages")
    del sys.modules["my_stages"]


def test_a_stage_of_ones_own_is_written_with_its_module_and_imported(mine: Any, tmp_path: Path) -> None:
    recipe = Recipe((mine.Scale(mine.Halve(3.0)), mine.Prune(), Prune(0.5)))
    assert [stage["stage"] for stage in recipe.data()] == ["my_stages:Scale", "my_stages:Prune", "Prune"]
    assert recipe.data()[0]["factor"] == {"stage": "my_stages:Halve", "first": 3.0}
    (tmp_path / "mine.toml").write_text(recipe.toml())
    assert Recipe.read(tmp_path / "mine.toml") == recipe
    program = "from lilliput import Recipe; print(Recipe.read('mine.toml').describe())"
    command = [sys.executable, "-c", program]
    environment = {"PYTHONPATH": str(Path(lilliput.__file__).parents[1])}
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert "Prune(sparsity=0.5)" in made.stdout


def test_a_stage_that_cannot_be_imported_says_what_to_do(mine: Any) -> None:
    with pytest.raises(KeyError, match=r"'absent_module:Scale': No module .* Install .* folder of absent_module\.py"):
        Recipe.parse([{"stage": "absent_module:Scale"}])
    with pytest.raises(KeyError, match="'my_stages:Scales': module 'my_stages' has no attribute"):
        Recipe.parse([{"stage": "my_stages:Scales"}])
    with pytest.raises(TypeError, match=r"'my_stages:Loose'\. Decorate it with @dataclass"):
        Recipe.parse([{"stage": "my_stages:Loose"}])


def test_the_key_of_a_stage_of_ones_own_follows_its_source(mine: Any, tmp_path: Path) -> None:
    def key() -> str:
        linecache.clearcache()
        return next_key("start", importlib.reload(mine).Scale())

    first = key()
    (tmp_path / "my_stages.py").write_text(MINE.replace("factor: float", "# how much\n    factor: float"))
    assert key() == first, "a comment computes nothing"
    (tmp_path / "my_stages.py").write_text(MINE.replace("return model", "return model.double()"))
    assert key() != first


def test_keys_follow_the_source_of_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    first = next_key("start", Prune(0.5, score="ria"))
    monkeypatch.setitem(registry.live, ("score", "ria"), lookup("score", "wanda"))
    assert next_key("start", Prune(0.5, score="ria")) != first


def test_keys_change_with_weights_task_seed_stage_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    model, first = net(), start_key(net(), task(), 0)
    assert start_key(net(), task(), 0) == first
    assert start_key(net(), task(), 1) != first
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert start_key(model, task(), 0) != first
    other = task()
    other.split("val")[0][0, 0] += 1
    assert start_key(net(), other, 0) != first
    key = next_key(first, Prune(0.5))
    assert next_key(first, Prune(0.5)) == key != next_key(first, Prune(0.6))
    monkeypatch.setattr(Prune, "version", 2)
    assert next_key(first, Prune(0.5)) != key


def test_run_leaves_the_model_alone_and_is_repeatable(tmp_path: Path) -> None:
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Recipe((Prune(0.5), Train(20, lr=1e-2, rules=(Distill(),))))
    one, two = run(model, task(), recipe), run(model, task(), recipe, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_training_is_not_done_twice_and_comes_back_from_the_store(tmp_path: Path) -> None:
    recipe = Recipe((Train(20, lr=1e-2), Prune(0.5), Quantize(4), Train(5, lr=1e-3)))
    first = Runner(net(), task(), Store(tmp_path))
    a = first.make(recipe)
    again = Runner(net(), task(), Store(tmp_path))
    b = again.make(recipe)
    assert first.steps == 25 and again.steps == 0
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_a_rung_continues_the_same_schedule(tmp_path: Path) -> None:
    whole = Train(30, lr=Cosine(1e-2), rules=(Distill(),))
    rungs = Runner(net(), task(), Store(tmp_path / "a"))
    for until in (7, 19, None):
        stepped = rungs.make(Recipe((Train(30, lr=Cosine(1e-2), rules=(Distill(),), until=until),)))
    straight = Runner(net(), task(), Store(tmp_path / "b")).make(Recipe((whole,)))
    assert rungs.steps == 30
    assert all(
        torch.equal(x, y) for x, y in zip(stepped.state_dict().values(), straight.state_dict().values(), strict=True)
    )


def test_a_training_that_is_cut_short_is_not_kept_but_continues(tmp_path: Path) -> None:
    recipe = Recipe((Train(30, lr=Cosine(1e-2)),))
    store = Store(tmp_path)
    Runner(net(), task(), store).make(recipe, stop=lambda step: step >= 11)
    assert not [key for key, record in store.records() if record["kind"] == "train"]
    later = Runner(net(), task(), store)
    continued = later.make(recipe)
    straight = run(net(), task(), recipe)
    assert later.steps == 19
    assert all(
        torch.equal(x, y) for x, y in zip(continued.state_dict().values(), straight.state_dict().values(), strict=True)
    )
