"""What holds for every code: factorised = reconstructed = dense, and the counted bits are those of what is packed."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from lilliput.code.base import Code, attach, codes, copy_model, pack, realize, storage
from lilliput.code.deploy import build
from lilliput.quant.uniform import Uniform
from lilliput.stored.base import section

SHAPE = (6, 18)


def layer(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]), nn.ReLU())


def originals(net: nn.Module) -> list[torch.Tensor]:
    return [value for name, value in net.named_parameters() if ".original" in name]


def coded(code, seed: int = 0) -> nn.Sequential:
    net = layer(seed)
    attach(net, "0.weight", code())
    return net


def theta_of(code: Code, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    theta = code.encode(weight)
    return theta if isinstance(theta, tuple) else (theta,)


def test_decodes_to_the_shape_it_encoded(code):
    weight = torch.randn(SHAPE)
    made = code()
    theta = theta_of(made, weight)
    assert all(part.is_floating_point() for part in theta)
    decoded = made.decode(*theta)
    assert decoded.shape == weight.shape and decoded.dtype == weight.dtype and decoded.isfinite().all()


def test_coding_again_moves_less_than_coding(code):
    weight = torch.randn(SHAPE)
    first, second = code(), code()
    once = first.decode(*theta_of(first, weight))
    twice = second.decode(*theta_of(second, once))
    assert (twice - once).norm() <= (once - weight).norm() + 1e-5


def test_gradients_reach_every_theta(code):
    net = coded(code)
    net(torch.randn(4, SHAPE[1])).square().sum().backward()
    for theta in originals(net):
        assert theta.grad is not None and theta.grad.isfinite().all() and theta.grad.abs().sum() > 0


def test_frozen_stays_frozen(code):
    net = layer()
    net.requires_grad_(False)
    attach(net, "0.weight", code())
    assert not any(p.requires_grad for p in net.parameters())
    assert not any(p.requires_grad for p in realize(net).parameters())


def test_realized_built_and_packed_are_the_coded_network(code):
    net, x = coded(code), torch.randn(4, SHAPE[1])
    expected = net(x)
    torch.testing.assert_close(realize(net)(x), expected)
    torch.testing.assert_close(build(net)(x), expected)
    stored = pack(net)["0.weight"]
    assert stored.shape == SHAPE
    np.testing.assert_allclose(stored.decode(), net[0].weight.detach().numpy(), rtol=0, atol=1e-6)


def test_counted_bits_are_those_of_what_is_packed(code):
    net = coded(code)
    counted, stored = storage(net)["0.weight"], pack(net)["0.weight"]
    assert counted == stored.storage() and counted.size_bytes == len(section(stored))
    assert counted.size_bytes == -(-counted.bits // 8) <= 4 * SHAPE[0] * SHAPE[1] + SHAPE[0] * SHAPE[1] // 8


def test_counting_does_not_need_the_weights_as_trained(code):
    """A sparser or coarser tensor may be smaller, but the same one always counts the same."""
    net = coded(code)
    assert storage(net) == storage(copy_model(net))


def test_state_dict_round_trip(code):
    net, other, x = coded(code), coded(code, seed=1), torch.randn(4, SHAPE[1])
    assert not torch.equal(net(x), other(x))
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


def test_a_copy_can_be_realized_and_the_original_lives_on(code):
    net, x = coded(code), torch.randn(4, SHAPE[1])
    before, keys = net(x), list(net.state_dict())
    plain = realize(net)
    assert not codes(plain) and type(plain[0]) is nn.Linear and set(plain.state_dict()) == {"0.weight", "0.bias"}
    assert torch.equal(net(x), before) and list(net.state_dict()) == keys
    build(net)
    realize(copy_model(net))
    assert torch.equal(net(x), before) and len(codes(net)) == 1


def test_settings_say_how_to_make_it_again(code):
    made = code()
    assert type(made).__name__ in repr(made) and isinstance(type(made).version, int)
    for name, value in made.settings().items():
        assert isinstance(value, int | float | str | tuple) and f"{name}={value!r}" in repr(made)


def test_inner_theta_can_be_stored_by_another_code(code):
    made = code()
    net, x = coded(code), torch.randn(4, SHAPE[1])
    if not made.inner:
        with pytest.raises(TypeError, match=r"[Rr]ealize"):
            attach(net, "0.weight", Uniform(8))
        return
    attach(net, "0.weight", Uniform(8, per="tensor"))
    assert [type(code).__name__ for code in codes(net)["0.weight"]] == [type(made).__name__] + ["Uniform"] * len(
        made.inner
    )
    expected = net(x)
    torch.testing.assert_close(realize(net)(x), expected)
    np.testing.assert_allclose(pack(net)["0.weight"].decode(), net[0].weight.detach().numpy(), rtol=0, atol=1e-6)
    expected.sum().backward()
    assert all(theta.grad is not None for theta in originals(net))


def test_cached_reads_are_the_same(code):
    net, x = coded(code), torch.randn(4, SHAPE[1])
    with torch.no_grad(), parametrize.cached():
        cached = net(x)
    assert torch.equal(cached, net(x))


def test_a_plain_deepcopy_computes_the_same(code):
    net, x = coded(code), torch.randn(4, SHAPE[1])
    assert torch.equal(copy.deepcopy(net)(x), net(x))
