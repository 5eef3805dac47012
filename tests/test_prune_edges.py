"""Pruning of unusual models: a defined result, or an error that says what to do, for every stage and rule there is."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import registry
from lilliput.code.base import codes, copy_model, pack, realize
from lilliput.code.names import theta
from lilliput.errors import NotSupported
from lilliput.prune import patterns
from lilliput.prune.masks import masks
from lilliput.prune.prune import Prune
from lilliput.prune.rigl import RigL
from lilliput.prune.sparse import SET
from lilliput.recipe import Recipe
from lilliput.stage import Reference
from lilliput.task import Task
from lilliput.train import Diverged, Train, fit

_found = importlib.util.spec_from_file_location("contracts", Path(__file__).parent / "contracts" / "conftest.py")
assert _found is not None and _found.loader is not None
_contracts = importlib.util.module_from_spec(_found)
_found.loader.exec_module(_contracts)

STEPS = 3


def methods() -> list[Any]:
    """Every way of using every pruning method in its first settings: as a stage and as a rule."""
    cases = []
    for entry in registry.methods():
        for settings in _contracts.MADE.get(entry.name, [{}])[:1] if entry.room == "prune" else []:
            cases += [
                pytest.param(entry.name, settings, kind, id=f"{entry.name}-{kind}")
                for kind in ("Stage", "Rule")
                if kind in entry.kinds
            ]
    return cases


METHODS = methods()
every = pytest.mark.parametrize(("name", "settings", "kind"), METHODS)


def task(dtype: torch.dtype = torch.float32) -> Task:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 2, 5, 5, generator=generator).to(dtype), torch.arange(24) % 4
    return Task("tiny", train=(x, y), val=(x[:8], y[:8]), batch_size=8)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    made(torch.randn(16, 2, 5, 5))
    return made.eval()


class Odd(nn.Module):
    """A network with an empty tensor, a complex one, one module that is called twice, and two that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.twice, self.a, self.b = net(), *(nn.Linear(4, 4, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.phase = nn.Parameter(torch.ones(3, 3, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.twice(self.twice(self.body(x)))
        made: Tensor = self.b(self.a(h)) + self.empty.sum() + self.phase.real.mean() - 1
        return made


def used(name: str, settings: dict[str, Any], kind: str, model: nn.Module, data: Task) -> nn.Module:
    """The model after a method: as a stage, or as a rule of a short training."""
    method = Recipe.parse([{"stage": name, **settings}]).stages[0]
    reference = Reference(realize(model).eval(), data)
    if kind == "Stage":
        return method(model, data, reference)
    return fit(Train(STEPS, lr=0.01, rules=(method,), optimizer="sgd"), model, data, reference)  # type: ignore[arg-type]


def says_what_to_do(error: Exception) -> bool:
    text = str(error)
    return ": " in text and text.rstrip().endswith((".", "?")) and not isinstance(error, KeyError)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(name: str, settings: dict[str, Any], kind: str, dtype: torch.dtype) -> None:
    model = net().to(dtype)
    try:
        result = used(name, settings, kind, model, task(dtype))
    except (ValueError, NotSupported) as error:
        assert says_what_to_do(error) and str(dtype).removeprefix("torch.") in str(error)
        return
    for key, value in realize(result).named_parameters():
        assert value.dtype == dtype and value.isfinite().all(), key
    pack(result)
    for code in masks(result).values():
        assert code.mask.dtype == torch.bool


@every
def test_frozen_tensors_stay_frozen_and_as_they_were_where_kept(name: str, settings: dict[str, Any], kind: str) -> None:
    model = net()
    model[3].weight.requires_grad_(False)
    before = model[3].weight.clone()
    try:
        result = used(name, settings, kind, model, task())
    except ValueError as error:
        assert says_what_to_do(error) and "frozen" in str(error)
        return
    after = {key.removeprefix("body."): value for key, value in realize(result).named_parameters()}
    frozen = after["3.weight"]
    assert not frozen.requires_grad and after["7.weight"].requires_grad
    if kind == "Rule" and name not in ("L0", "STR"):  # their gates and thresholds scale what stays
        assert torch.equal(frozen[frozen != 0], before[frozen != 0]), "a mask may be put on, but nothing trains"


@every
def test_nan_is_refused_or_left_as_it_was(name: str, settings: dict[str, Any], kind: str) -> None:
    model = net()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = torch.nan
    try:
        result = used(name, settings, kind, model, task())
    except (ValueError, Diverged) as error:
        assert says_what_to_do(error)
        return
    assert kind == "Stage" and not codes(result), "nothing was chosen by it"


@every
def test_shared_tied_empty_and_complex_tensors(name: str, settings: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    model = Odd().eval()
    try:
        result = used(name, settings, kind, model, task())
    except (ValueError, NotSupported, Diverged) as error:
        assert says_what_to_do(error)
        return
    bodies = [module for module in result.modules() if isinstance(module, Odd)]
    for odd in bodies:
        assert odd.a.weight is odd.b.weight, "tied weights stay one"
        assert odd.empty.numel() == 0 and odd.phase.is_complex()
        assert type(odd.a.weight) is nn.Parameter
    packed = {name.rpartition(".")[2]: value for name, value in pack(result).items()}
    phase = torch.view_as_real(bodies[-1].phase.detach())
    torch.testing.assert_close(torch.from_numpy(packed["phase"].decode()), phase)


@every
def test_a_layer_with_one_channel(name: str, settings: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 1, 3, padding=1),
        nn.BatchNorm2d(1),
        nn.ReLU(),
        nn.Conv2d(1, 6, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()
    try:
        result = used(name, settings, kind, model, task())
    except ValueError as error:
        assert says_what_to_do(error)
        return
    for key, value in realize(result).named_parameters():
        assert value.dim() < 2 or value.numel(), key
        assert value.dim() < 2 or kind == "Stage" or bool((value != 0).any()), key


@pytest.mark.parametrize(
    ("name", "settings", "kind"),
    [p for p in METHODS if hasattr(registry.lookup(("stage", "rule"), p.values[0]), "sparsity")],
)
@pytest.mark.parametrize("sparsity", [1.0, -0.1, 90.0, float("nan")])
def test_sparsity_out_of_range(name: str, settings: dict[str, Any], kind: str, sparsity: float) -> None:
    given = {key: value for key, value in settings.items() if key != "allocation"}
    with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)") as error:
        Recipe.parse([{"stage": name, **given, "sparsity": sparsity}])
    assert str(error.value).startswith(f"{name}:") or ": " in str(error.value)
    if sparsity == 90:
        assert "write 0.9" in str(error.value)


@pytest.mark.parametrize(
    "pattern", ["elements", "even", "2:4", "2:4 out", "channel", "column", "head 2", "block 2x2", "engine"]
)
def test_sparsity_zero_keeps_everything_and_nearly_one_keeps_a_unit(pattern: str) -> None:
    model = nn.Linear(8, 8)
    assert torch.equal(Prune(0.0, pattern=pattern)(model, None, None).weight, model.weight)
    most = patterns.parse(pattern).most
    pruned = Prune(min(0.9999, most), pattern=pattern)(model, None, None)
    assert 0 < int((pruned.weight != 0).sum()) < 64
    with pytest.raises(ValueError, match=r"sparsity must be"):
        Prune(1.0, pattern=pattern)


def test_a_pattern_that_divides_no_shape_says_so_and_one_that_divides_some_leaves_the_rest() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 8), nn.Linear(8, 8))
    rule = Prune(0.5, pattern="block 4x4")
    assert set(rule.skipped(model)) == {"0.weight", "1.weight"} and all(
        "divide" in why for why in rule.skipped(model).values()
    )
    pruned = rule(model, None, None)
    assert set(codes(pruned)) == {"2.weight"}
    for pattern in ("2:4", "2:4 out", "head 3", "block 4x1", "kernel"):
        with pytest.raises(ValueError, match="some tensor must be left to prune"):
            Prune(0.5, pattern=pattern)(nn.Linear(5, 7), None, None)
    with pytest.raises(ValueError, match="some tensor must be left to prune"):
        SET(0.5, pattern="kernel").begin(nn.Linear(5, 7), None, None, 10)


def test_an_empty_and_a_tied_tensor_are_named_with_the_reason() -> None:
    skipped = Prune(0.5).skipped(Odd())
    assert skipped["empty"] == "it is empty" and "tied" in skipped["a.weight"] and "b.weight" not in skipped
    with pytest.raises(ValueError, match="floating-point tensor"):
        Prune(0.5, where="phase").skipped(Odd())


@pytest.mark.parametrize("make", [lambda: Prune(0.8, every=2), lambda: SET(0.8, every=2), lambda: RigL(0.8, every=2)])
def test_two_at_work_in_one_process_do_not_see_each_other(make: Any) -> None:
    """Interleaved steps give what each gives alone; nothing is global."""
    steps = 8

    def start(seed: int, rule: Any) -> Any:
        torch.manual_seed(seed)
        model, draw = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)), torch.Generator().manual_seed(seed)
        x, y = torch.randn(steps, 8, 12, generator=draw), torch.randint(0, 4, (steps, 8), generator=draw)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

        def walk() -> Any:
            with rule.attached(model, optimizer, steps=steps):
                for a, b in zip(x, y, strict=True):
                    optimizer.zero_grad()
                    F.cross_entropy(model(a), b).backward()
                    optimizer.step()
                    yield
            yield model

        return walk()

    def alone(seed: int, rule: Any) -> nn.Module:
        *_, model = start(seed, rule)
        return model

    shared = make()
    apart = [alone(0, make()).state_dict(), alone(1, Prune(0.5, every=1)).state_dict(), alone(2, make()).state_dict()]
    walks = [start(0, shared), start(1, Prune(0.5, every=1)), start(2, shared)]
    for _ in range(steps):
        for walk in walks:
            next(walk)
    together = [next(walk).state_dict() for walk in walks]
    for one, other in zip(apart, together, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_copy_and_its_original_are_pruned_apart() -> None:
    model = Prune(0.5)(net(), None, None)
    twin = copy_model(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    again = Prune(0.9)(twin, None, None)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert masks(again)["3.weight"].sparsity > masks(model)["3.weight"].sparsity
    assert theta(model, "3.weight") is not theta(again, "3.weight")
