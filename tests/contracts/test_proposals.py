"""What holds for every method and code that proposes itself to a search."""

import pytest
import torch
from torch import Tensor, nn

from lilliput import registry
from lilliput.code.base import Code, attach, pack
from lilliput.proposal import MOMENTS, Known, Proposals, Refusal, in_order, proposals
from lilliput.recipe import Recipe, plain
from lilliput.rule import Rule
from lilliput.search import codes
from lilliput.search.space import methods
from lilliput.stage import Reference, Stage
from lilliput.task import Task, call

PROPOSING = [entry.load() for entry in registry.methods() if {"Stage", "Rule"} & set(entry.kinds)]
PROPOSING = [method for method in PROPOSING if getattr(method, "moment", "")]


class Residual(nn.Module):
    """y = x + f(x), a block that can go."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.second(self.first(x).relu())
        return y


def images() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.ReLU(), Residual(16), Residual(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip
    x, y = torch.randn(24, 2, 8, 8), torch.arange(24) % 4
    return net.eval(), Task("images", train=(x, y), val=(x[:8], y[:8]), batch_size=8)


def words() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.EmbeddingBag(400, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x, y = torch.randint(0, 400, (24, 5)), torch.arange(24) % 3
    return net, Task("words", train=(x, y), val=(x[:8], y[:8]), batch_size=8)


def rows() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    x, y = torch.randn(24, 6), torch.arange(24) % 3
    return net, Task("rows", train=(x, y), val=(x[:8], y[:8]), batch_size=8)


NETWORKS = [images, words, rows]


@pytest.mark.parametrize("method", PROPOSING, ids=lambda method: method.__name__)
def test_says_its_moment_and_what_it_follows(method: type) -> None:
    assert method.moment in MOMENTS
    known = {entry.name for entry in registry.methods()}
    assert set(getattr(method, "follows", ())) <= known
    assert method in methods(method.moment)


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("method", PROPOSING, ids=lambda method: method.__name__)
def test_what_it_proposes_is_plain_data_that_builds_a_network_of_the_same_outputs(method: type, make) -> None:
    model, task = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    offered = proposals(method, model, task, Known())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    if isinstance(offered, Refusal):
        assert offered.reason and not offered.reason.endswith(".")
        return
    assert len(set(offered.options)) == len(offered.options)
    wanted = call(model, task.example).shape
    reference = Reference(model, task)
    for option in {offered.options[0], offered.options[len(offered) // 2], offered.options[-1]}:
        assert isinstance(option, Stage | Rule)
        assert Recipe.parse([plain(option)]).stages == (option,)
        if isinstance(option, Stage):
            assert option.label() and call(option(model, task, reference), task.example).shape == wanted


@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("method", PROPOSING, ids=lambda method: method.__name__)
def test_strong_options_keep_fewer_values_than_mild_ones(method: type, make) -> None:
    model, task = make()
    offered = proposals(method, model, task, Known())
    if isinstance(offered, Refusal) or not isinstance(offered.options[0], Stage):
        return
    reference = Reference(model, task)

    def kept(option: Stage) -> int:
        made = option(model, task, reference)
        return sum(int(tensor.count_nonzero()) for tensor in made.state_dict().values())

    assert kept(offered.options[-1]) <= kept(offered.options[0])


def test_every_kind_of_network_is_offered_something() -> None:
    for make in NETWORKS:
        model, task = make()
        offers = [proposals(method, model, task, Known()) for method in PROPOSING]
        assert any(isinstance(offer, Proposals) for offer in offers), make


@pytest.mark.parametrize("kind", codes.proposing(), ids=lambda kind: kind.__name__)
def test_proposed_codes_store_the_tensor_from_mild_to_strong(kind: type[Code]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 24)
    offered = kind.proposals(weight, {})
    assert not isinstance(offered, Refusal) and offered
    sizes, errors = [], []
    for made in offered:
        theta = made.encode(weight)
        decoded = made.decode(*(theta if isinstance(theta, tuple) else (theta,)))
        assert decoded.shape == weight.shape and made.label()
        errors.append(float((decoded - weight).norm()))
        sizes.append(bits_of(type(made)(**made.settings()), weight))
    assert len({made.label() for made in offered}) == len(offered)
    assert sizes == sorted(sizes, reverse=True) and errors == sorted(errors)
    assert sizes[0] < 32 * weight.numel()


def bits_of(code: Code, tensor: Tensor) -> int:
    """The exact bits of a tensor under a code."""
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(tensor.clone()))
    attach(holder, "weight", code)
    return pack(holder)["weight"].storage().bits


def test_a_method_that_raises_has_refused() -> None:
    class Broken:
        @classmethod
        def proposals(cls, model, task, known):
            raise RuntimeError("no such attribute")

    refused = proposals(Broken, None, None, Known())
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith("RuntimeError: no such attribute (test_proposals.py, line ")


def test_methods_that_follow_each_other_are_refused() -> None:
    first, second = type("First", (), {"follows": ("Second",)}), type("Second", (), {"follows": ("First",)})
    with pytest.raises(ValueError, match="in a circle"):
        in_order([first, second])
    third = type("Third", (), {"follows": ("Zero",)})
    zero = type("Zero", (), {"replaces": True})
    assert in_order([third, zero]) == [zero, third]
