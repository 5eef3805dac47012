"""Facts from the papers behind learnt thresholds (STR) and drawn gates (L0)."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.code.base import attach, codes, realize
from lilliput.code.masked import Masked
from lilliput.code.names import theta
from lilliput.errors import NotSupported
from lilliput.prune.hard_concrete import BETA, GAMMA, ZETA, HardConcrete
from lilliput.prune.l0 import L0
from lilliput.prune.masks import masks
from lilliput.prune.prune import Prune
from lilliput.prune.soft_threshold import STR
from lilliput.prune.threshold import SoftThreshold
from lilliput.schedule import Once
from lilliput.stage import Reference
from lilliput.task import Task
from lilliput.train import Train


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.fixture
def task() -> Task:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    return Task("corners", (x, y), (x, y), batch_size=16)


def test_str_equation_4_is_the_soft_threshold() -> None:
    """arXiv:2002.03231: S(W, s) = sign(W) relu(|W| - g(s)); g = exp."""
    code, w = SoftThreshold(), torch.tensor([[1.5, -0.2, 0.5], [-3.0, 0.0, 0.499]])
    s = torch.tensor(0.5).log()
    assert torch.allclose(code.decode(w, s), torch.tensor([[1.0, 0.0, 0.0], [-2.5, 0.0, 0.0]]))
    code.shift.fill_(torch.tensor(2.0).log())
    assert torch.allclose(code.decode(w, s), torch.tensor([[0.5, 0.0, 0.0], [-2.0, 0.0, 0.0]]))


def test_str_equations_5_and_6_gradients_of_weights_and_threshold() -> None:
    """arXiv:2002.03231, section 3: dL/dW passes where S != 0; dL/ds = -g'(s) sum of dL/dS sign(W) there."""
    torch.manual_seed(0)
    code, w = SoftThreshold(), torch.randn(6, 5, requires_grad=True)
    s, g = torch.tensor(-0.7, requires_grad=True), torch.randn(6, 5)
    decoded = code.decode(w, s)
    (decoded * g).sum().backward()
    alive = decoded.detach() != 0
    assert 0 < int(alive.sum()) < 30
    torch.testing.assert_close(w.grad, g * alive)
    assert s.grad is not None
    torch.testing.assert_close(s.grad, -(g * w.detach().sign() * alive).sum() * torch.tensor(-0.7).exp())


def test_str_begins_where_the_dense_network_is(net: nn.Module) -> None:
    x = torch.randn(5, 8)
    coded = STR(0.5)(net, None, None)
    torch.testing.assert_close(coded(x), net(x))
    assert len(list(coded.parameters())) == len(list(net.parameters())) + 2


def test_str_without_a_target_gets_sparser_the_more_it_decays(net: nn.Module, task: Task) -> None:
    """arXiv:2002.03231, section 4: the sparsity comes from the weight decay on s and from its first value."""
    zeros = []
    for decay in (0.0, 0.02, 0.1):
        stage = Train(60, lr=0.05, optimizer="sgd", rules=(STR(decay=decay, start=-4.0),))
        trained = stage(net, task, Reference(net, task))
        zeros.append(sum(int((~code.mask).sum()) for code in masks(trained).values()))
        assert all(torch.equal(code.mask, theta(trained, name) != 0) for name, code in masks(trained).items())
    assert zeros == sorted(zeros) and zeros[0] < zeros[1] < zeros[2]


def test_str_steers_one_common_threshold_whatever_s_has_learnt(net: nn.Module) -> None:
    rule = STR(Once(0.6), every=1)
    rule.begin(net, None, None, 10)
    with torch.no_grad():
        for k, (_, s) in enumerate(rule.thresholds(net).values()):
            s.sub_(k)
    rule.on_step({}, net, 0, 10)
    pairs = [
        (theta(net, name).detach().abs(), float(code.shift), float(s.detach()))
        for name, (code, s) in rule.thresholds(net).items()
    ]
    dropped = sum(int((w <= torch.tensor(s + c).exp() * (1 + 1e-5)).sum()) for w, c, s in pairs)
    assert dropped == round(0.6 * (8 * 32 + 32 * 4))
    assert pairs[0][1] == pairs[1][1], "the same quantile of log |w| - s"


def test_str_learns_only_how_tensors_differ(net: nn.Module) -> None:
    """What the s have in common is the quantile's business."""
    rule = STR(0.6, decay=0.5)
    rule.begin(net, None, None, 10)
    F.cross_entropy(net(torch.randn(8, 8)), torch.arange(8) % 4).backward()
    before = torch.stack([s.grad for _, s in rule.thresholds(net).values()])
    rule.on_grad({}, net, 0, 10)
    after = torch.stack([s.grad for _, s in rule.thresholds(net).values()])
    torch.testing.assert_close(after, before - before.mean())


def test_hard_concrete_equations_10_and_11() -> None:
    """arXiv:1712.01312: s = sigmoid((log u - log(1-u) + log a) / b), stretched to (g, z), clipped to [0, 1]."""
    assert (BETA, GAMMA, ZETA) == (2 / 3, -0.1, 1.1)
    code, scaled = HardConcrete("a", speed=1.0), torch.zeros(20000)
    gates = code.gates(scaled)
    assert float(gates.min()) >= 0 and float(gates.max()) <= 1
    assert bool((gates == 0).any()) and bool((gates == 1).any()) and bool(((gates > 0) & (gates < 1)).any())
    again = code.gates(scaled)
    assert torch.equal(gates, again), "a function of the name, the seed and the step"
    for other in (HardConcrete("b", speed=1.0), HardConcrete("a", seed=1, speed=1.0)):
        assert not torch.equal(gates, other.gates(scaled))
    code.step.fill_(1)
    assert not torch.equal(gates, code.gates(scaled))


@pytest.mark.parametrize("log_alpha", [-2.0, 0.0, 1.5])
def test_hard_concrete_equation_12_is_how_often_a_gate_is_not_zero(log_alpha: float) -> None:
    """arXiv:1712.01312: P(z != 0) = sigmoid(log a - b log(-g / z))."""
    code, scaled = HardConcrete(speed=1.0), torch.full((200000,), log_alpha)
    assert float((code.gates(scaled) != 0).float().mean()) == pytest.approx(float(code.opened(scaled)[0]), abs=0.004)


def test_hard_concrete_equation_13_in_eval_mode_and_its_first_probability() -> None:
    code = HardConcrete(start=0.8).eval()
    weight = torch.randn(3, 4)
    w, scaled = code.encode(weight)
    assert torch.equal(w, weight)
    torch.testing.assert_close(code.opened(scaled), torch.full((3, 4), 0.8))
    expected = (torch.sigmoid(10 * scaled) * 1.2 - 0.1).clamp(0, 1)
    torch.testing.assert_close(code.decode(w, scaled), weight * expected)


def test_gradients_of_log_alpha_are_those_of_the_equations() -> None:
    torch.manual_seed(0)
    code = HardConcrete().double()
    w, scaled = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda w, a: code.decode(w, a / 10), (w, scaled))
    assert torch.autograd.gradcheck(lambda a: code.opened(a / 10), (scaled,))


def test_l0_charges_the_expected_share_and_raises_its_price_while_there_are_too_many(net: nn.Module) -> None:
    rule = L0(Once(0.75), rate=0.5)
    state = rule.begin(net, None, None, 20)
    assert float(rule.expected(net).detach()) == pytest.approx(0.9, abs=1e-5) and float(state["price"]) == 0
    state = rule.on_step(state, net, 0, 20)
    assert float(state["price"]) == pytest.approx(0.5 * (0.9 - 0.25), abs=1e-5)
    charge = rule.loss(state, net, 1, 20, None, torch.zeros(()), None)  # type: ignore[arg-type]
    assert float(charge.detach()) == pytest.approx(float(state["price"]) * 0.9, abs=1e-5)
    charge.backward()  # type: ignore[union-attr]
    for _, scaled in rule.gates(net).values():
        assert bool((scaled.grad > 0).all()), "descent closes gates"


def test_l0_gates_end_as_masks_of_the_highest_alpha(net: nn.Module) -> None:
    rule = L0(0.75, until=0.5)
    state = rule.begin(net, None, None, 10)
    with torch.no_grad():
        for _, scaled in rule.gates(net).values():
            scaled.add_(torch.randn_like(scaled))
    alphas = {name: scaled.detach().clone() for name, (_, scaled) in rule.gates(net).items()}
    state = rule.on_step(state, net, 4, 10)
    x = torch.randn(4, 8)
    assert torch.equal(net.train()(x), net.train()(x)) and torch.equal(net(x), net.eval()(x)), "nothing is drawn now"
    flat = torch.cat([value.flatten() for value in alphas.values()])
    kept = torch.cat([code.mask.flatten() for code, _ in rule.gates(net).values()])
    assert int(kept.sum()) == len(flat) - round(0.75 * len(flat)) and flat[kept].min() >= flat[~kept].max()
    before = net(x)
    rule.end(state, net)
    assert torch.equal(net(x), before) and all(isinstance(chain[0], Masked) for chain in codes(net).values())


@pytest.mark.parametrize("rule", [STR(0.5), L0(0.5)])
def test_a_frozen_tensor_stays_frozen_and_a_mask_is_refused(rule: STR | L0, net: nn.Module, task: Task) -> None:
    net[0].requires_grad_(False)
    trained = Train(4, rules=(rule,))(net, task, Reference(net, task))
    assert not trained[0].weight.requires_grad and isinstance(theta(trained, "0.weight"), nn.Parameter)
    assert trained[2].weight.requires_grad and set(realize(trained).state_dict()) == set(net.state_dict())
    with pytest.raises(NotSupported, match=r"must be plain, but has a mask"):
        rule.begin(Prune(0.5)(net, None, None), None, None, 4)


def test_a_layer_that_is_stored_otherwise_is_refused(net: nn.Module) -> None:
    attach(net, "0.weight", SoftThreshold())
    with pytest.raises(NotSupported, match=r"SoftThreshold"):
        L0(0.5).begin(net, None, None, 4)
