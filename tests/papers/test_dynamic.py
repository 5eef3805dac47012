"""Facts from the papers behind sparse training: what moves, how much, from where, and what the optimizer remembers."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.code.base import codes, realize
from lilliput.code.names import theta
from lilliput.prune import patterns
from lilliput.prune.acdc import ACDC
from lilliput.prune.growing import Growing
from lilliput.prune.l0 import L0
from lilliput.prune.masks import masks
from lilliput.prune.movement import Movement
from lilliput.prune.prune import Prune
from lilliput.prune.rigl import RigL
from lilliput.prune.soft_threshold import STR
from lilliput.prune.sparse import SET, StaticSparse
from lilliput.prune.ste import STE
from lilliput.prune.topkast import TopKAST
from lilliput.schedule import Cubic, Cyclic, Once, Steps
from lilliput.stage import Reference
from lilliput.task import Task
from lilliput.train import Train, fit

STEPS = 20
RULES: dict[str, Any] = {
    "static": StaticSparse(0.75),
    "set": SET(0.75, every=3),
    "rigl": RigL(0.75, every=3),
    "ste": STE(0.75, every=1),
    "sr-ste": STE(0.5, "2:4", "uniform", every=2, decay=0.01),
    "topkast": TopKAST(0.75, every=2),
    "acdc": ACDC(0.75, phases=3),
    "movement": Movement(0.75, every=2),
    "growing": Growing(0.75, every=2),
    "growing-schedule": Growing(Cubic(0.75, begin=0.1, end=0.6), start=0.1, every=2),
    "str": STR(0.75, every=2),
    "l0": L0(0.75),
    "cyclic": Prune(Cyclic(0.75), every=1),
    "steps": Prune(Steps(0.75), every=1),
    "blocks": STE(0.75, "block 2x2", "uniform"),
    "kast-even": TopKAST(0.75, "even", "erk", every=1),
}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture
def task() -> Task:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    return Task(
        "corners", (x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()), (x, torch.zeros(64).long()), batch_size=16
    )


def zeros(net: nn.Module) -> int:
    return sum(int((~code.mask).sum()) for code in masks(net).values())


class Loop:
    """A plain training loop with a rule attached, a step at a time."""

    def __init__(self, net: nn.Module, rule: Any, steps: int = STEPS, optimizer: Any = None) -> None:
        self.net, self.rule, self.x = net.train(), rule, torch.randn(32, 8)
        self.optimizer = optimizer or torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        self.context = rule.attached(net, self.optimizer, steps=steps)
        self.driver = self.context.__enter__()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), torch.arange(32) % 4)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def dense_gradients(self) -> dict[str, Tensor]:
        """dL/dW by tensor, for all entries, from a plain copy of the network as it is now."""
        plain = realize(self.net)
        F.cross_entropy(plain(self.x), torch.arange(32) % 4).backward()
        return {name: value.grad for name, value in plain.named_parameters() if value.dim() > 1}


@pytest.mark.parametrize("name", RULES)
def test_the_count_is_exact_at_the_end_and_no_tensor_is_empty(name: str, net: nn.Module, task: Task) -> None:
    trained = Train(STEPS, lr=0.01, rules=(RULES[name],))(net, task, Reference(net, task))
    by_name, share = masks(trained), 0.5 if name == "sr-ste" else 0.75
    total = sum(code.mask.numel() for code in by_name.values())
    # Each tensor's count is rounded, or each row's.
    slack = 0 if RULES[name].allocation != "erk" else len(by_name) if name != "kast-even" else 26
    assert len(by_name) == 3 and abs(zeros(trained) - round(share * total)) <= slack
    for layer, code in by_name.items():
        weight = theta(trained, layer)
        assert code.mask.any() and not code.straight
        decoded = trained[int(layer[0])].weight
        assert torch.equal(decoded, weight * code.mask) and bool((decoded[~code.mask] == 0).all())


@pytest.mark.parametrize("name", RULES)
def test_a_checkpoint_and_the_rest_are_the_whole(name: str, net: nn.Module, task: Task) -> None:
    stage, reference = Train(STEPS, lr=0.01, rules=(RULES[name],), batch_size=16), Reference(net, task)
    whole, kept = fit(stage, net, task, reference).state_dict(), []
    fit(replace(stage, until=10), net, task, reference, save=kept.append)
    rest = fit(stage, net, task, reference, load=lambda: kept[-1]).state_dict()
    assert kept[-1]["step"] == 10 and whole.keys() == rest.keys()
    assert all(torch.equal(value, rest[key]) for key, value in whole.items())


def test_static_masks_never_move_and_are_those_of_the_seed(net: nn.Module) -> None:
    """arXiv:2202.02643, section 3: a random mask per layer, fixed before training."""
    loop = Loop(net, StaticSparse(0.75))
    before = {name: code.mask.clone() for name, code in masks(net).items()}
    for _ in range(5):
        loop.step()
    assert all(torch.equal(code.mask, before[name]) for name, code in masks(net).items())
    assert zeros(net) == pytest.approx(0.75 * (8 * 32 + 32 * 16 + 16 * 4), abs=2)


def test_set_moves_a_share_and_keeps_every_count(net: nn.Module) -> None:
    """arXiv:1707.04780, algorithm 1: what is removed is regrown, at random, from zero."""
    loop = Loop(net, SET(0.75, every=2, fraction=0.5), steps=12)
    counts = {name: int(code.mask.sum()) for name, code in masks(net).items()}
    moved = 0
    for step in range(1, 9):
        before = {name: code.mask.clone() for name, code in masks(net).items()}
        loop.step()
        for name, code in masks(net).items():
            assert int(code.mask.sum()) == counts[name]
            grown = code.mask & ~before[name]
            moved += int(grown.sum())
            assert bool((theta(net, name)[grown] == 0).all()) and (step % 2 == 0 or not grown.any())
            momenta = loop.optimizer.state[theta(net, name)]["momentum_buffer"]
            assert bool((momenta[code.mask ^ before[name]] == 0).all())
    assert moved > 50


def test_rigl_grows_exactly_where_the_dense_gradient_is_largest(net: nn.Module) -> None:
    """arXiv:1911.11134, algorithm 1: drop by |theta|, grow argtop-k of |dL/dtheta| among the rest, at zero."""
    loop = Loop(net, RigL(0.75, every=2, fraction=0.4), steps=40)
    loop.step()
    before = {name: code.mask.clone() for name, code in masks(net).items()}
    gradients = loop.dense_gradients()
    loop.step()
    for name, code in masks(net).items():
        grown, dropped = code.mask & ~before[name], before[name] & ~code.mask
        assert int(grown.sum()) == int(dropped.sum()) > 0
        score = gradients[name].abs().masked_fill(before[name], -1.0)
        expected = patterns.drop(score, score.numel() - int(grown.sum()))
        assert torch.equal(grown, expected)
        weight = theta(net, name)
        assert bool((weight[grown] == 0).all())
        assert bool((loop.optimizer.state[weight]["momentum_buffer"][grown] == 0).all())


def test_rigl_trains_kept_entries_only(net: nn.Module) -> None:
    loop = Loop(net, RigL(0.75, every=100))
    for _ in range(3):
        loop.step()
    assert all(bool((theta(net, name)[~code.mask] == 0).all()) for name, code in masks(net).items())


def test_ste_uses_the_largest_and_trains_them_all(net: nn.Module) -> None:
    """arXiv:2102.04010, equation 2: the gradient at the masked weights is applied to the dense ones."""
    loop = Loop(net, STE(Once(0.75), every=1), optimizer=torch.optim.SGD(net.parameters(), 0.1))
    for _ in range(3):
        before = {name: theta(net, name).detach().clone() for name in masks(net)}
        flat = torch.cat([value.abs().flatten() for value in before.values()])
        kept = torch.cat([code.mask.flatten() for code in masks(net).values()])
        assert flat[kept].min() >= flat[~kept].max() and zeros(net) == round(0.75 * len(flat))
        gradients = loop.dense_gradients()
        loop.step()
        for name, value in before.items():
            torch.testing.assert_close(theta(net, name), value - 0.1 * gradients[name])


def test_sr_ste_pulls_only_what_is_dropped(net: nn.Module) -> None:
    """arXiv:2102.04010, equation 4: w <- w - lr (g + lambda (1 - m) w)."""
    loop = Loop(net, STE(Once(0.5), "2:4", "uniform", decay=0.3), optimizer=torch.optim.SGD(net.parameters(), 0.1))
    before = {name: (theta(net, name).detach().clone(), code.mask.clone()) for name, code in masks(net).items()}
    gradients = loop.dense_gradients()
    loop.step()
    for name, (weight, mask) in before.items():
        torch.testing.assert_close(theta(net, name), weight - 0.1 * (gradients[name] + 0.3 * ~mask * weight))
    assert all((code.mask.reshape(-1, 4).sum(1) == 2).all() for code in masks(net).values())


def test_topkast_the_backward_set_holds_the_forward_set_and_the_rest_stays(net: nn.Module) -> None:
    """arXiv:2106.03517, sections 2.1 and 2.2: A = top D, B = top D + M of |theta|; theta outside B is not updated."""
    loop = Loop(
        net,
        TopKAST(0.8, explore=0.2, every=1, until=0.5),
        optimizer=torch.optim.AdamW(net.parameters(), 0.05, weight_decay=0.1),
    )
    total = sum(code.mask.numel() for code in masks(net).values())
    for step in range(STEPS - 1):
        wide = {name: loop.driver.state[f"trained {name}"].bool() for name in masks(net)}
        before = {name: theta(net, name).detach().clone() for name in masks(net)}
        forward = {name: code.mask.clone() for name, code in masks(net).items()}
        assert all(bool((wide[name] | ~forward[name]).all()) for name in wide)
        assert sum(int(part.sum()) for part in wide.values()) == total - round((0.6 if step < 10 else 0.8) * total)
        assert sum(int(part.sum()) for part in forward.values()) == total - round(0.8 * total)
        loop.step()
        for name, value in before.items():
            stays = theta(net, name) == value
            assert bool(stays[~wide[name]].all()) and not bool(stays[wide[name]].all())
            changed = wide[name] ^ loop.driver.state[f"trained {name}"].bool()
            assert bool((loop.optimizer.state[theta(net, name)]["exp_avg"][changed] == 0).all())


def test_topkast_regulariser_is_stronger_by_the_density_on_what_explores(net: nn.Module) -> None:
    """arXiv:2106.03517, section 2.3: weights of B outside A are charged 1 / D times as much."""
    plain, charged = (TopKAST(0.75, explore=0.25, decay=decay) for decay in (0.0, 0.5))
    twin = nn.Sequential(*[nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)])
    twin.load_state_dict(net.state_dict())
    state, other = plain.begin(net, None, None, 10), charged.begin(twin, None, None, 10)
    for model in (net, twin):
        F.cross_entropy(model(torch.ones(4, 8)), torch.arange(4)).backward()
    plain.on_grad(state, net, 0, 10)
    charged.on_grad(other, twin, 0, 10)
    for name, code in masks(net).items():
        weight, added = theta(net, name).detach(), theta(twin, name).grad - theta(net, name).grad
        wide = state[f"trained {name}"].bool()
        torch.testing.assert_close(added[code.mask], 0.5 * weight[code.mask])
        torch.testing.assert_close(added[wide & ~code.mask], 0.5 * weight[wide & ~code.mask] / 0.25)
        assert bool((added[~wide] == 0).all())


def test_acdc_alternates_ends_compressed_and_comes_back_from_zero(net: nn.Module) -> None:
    """arXiv:2106.12379, algorithm 1: dense warm-up, compressed and decompressed phases, compressed in the end."""
    rule = ACDC(0.75, phases=3, warmup=0.1, until=0.7)
    phases = [rule.compressed(step, 100) for step in range(100)]
    assert [(key, len(list(group))) for key, group in itertools.groupby(phases)] == [
        (False, 10),
        (True, 15),
        (False, 15),
        (True, 15),
        (False, 15),
        (True, 30),
    ]
    loop, total = Loop(net, rule), sum(value.numel() for value in net.parameters() if value.dim() > 1)
    for step in range(STEPS - 1):
        before = {name: code.mask.clone() for name, code in masks(net).items()}
        loop.step()
        now, then = rule.compressed(step, STEPS), rule.compressed(step + 1, STEPS)
        assert zeros(net) == (round(0.75 * total) if then else 0)
        for name, code in masks(net).items():
            weight, momenta = theta(net, name), loop.optimizer.state[theta(net, name)]["momentum_buffer"]
            if then:
                assert bool((weight[~code.mask] == 0).all())
                assert not now or torch.equal(code.mask, before[name]), "fixed within a phase"
            if now != then:
                moved = code.mask ^ before[name]
                assert bool((weight[moved] == 0).all()) and bool((momenta[moved] == 0).all())


def test_movement_scores_are_what_steps_against_the_gradient_do_to_magnitudes(net: nn.Module) -> None:
    """arXiv:2005.07683, equation 2 and section 4: S <- S - dL/dW W, dense; weights train where they are kept."""
    loop = Loop(net, Movement(Once(0.5), every=1), optimizer=torch.optim.SGD(net.parameters(), 0.1))
    expected = {name: torch.zeros_like(theta(net, name)) for name in masks(net)}
    for _ in range(3):
        before = {name: (theta(net, name).detach().clone(), code.mask.clone()) for name, code in masks(net).items()}
        gradients = loop.dense_gradients()
        loop.step()
        for name, (weight, mask) in before.items():
            expected[name] -= gradients[name] * weight
            torch.testing.assert_close(loop.driver.state[f"score {name}"], expected[name])
            torch.testing.assert_close(theta(net, name), weight - 0.1 * gradients[name] * mask)
        flat = torch.cat([value.flatten() for value in expected.values()])
        kept = torch.cat([code.mask.flatten() for code in masks(net).values()])
        assert flat[kept].mean() > flat[~kept].mean() and flat[kept].topk(300).values.min() >= flat[~kept].max()


def test_growing_charges_one_set_ever_more_and_then_cuts_it(net: nn.Module) -> None:
    """arXiv:2012.09243, section 3.1: unimportant weights are chosen by magnitude once; their penalty alone grows."""
    rule = Growing(0.75, most=2.0, start=0.2, until=0.8, every=3)
    factors = [rule.factor(step, STEPS) for step in range(4, 16)]
    assert factors == sorted(factors) and factors[0] == factors[2] < factors[3] and factors[-1] == 2.0
    loop = Loop(net, rule, optimizer=torch.optim.SGD(net.parameters(), 0.1))
    for step in range(STEPS - 1):
        before = {name: theta(net, name).detach().clone() for name in masks(net)}
        state, gradients = dict(loop.driver.state), loop.dense_gradients()
        if step == 4:
            first = state
            flat = torch.cat([value.abs().flatten() for value in before.values()])
            kept = torch.cat([state[f"keep {name}"].flatten() for name in before])
            assert flat[kept].min() >= flat[~kept].max()
        loop.step()
        assert (zeros(net) > 0) == (step + 1 >= 16)
        for name, value in before.items() if 4 <= step < 15 else ():
            assert torch.equal(state[f"keep {name}"], first[f"keep {name}"])
            pull = rule.factor(step, STEPS) * value * ~state[f"keep {name}"]
            torch.testing.assert_close(theta(net, name), value - 0.1 * (gradients[name] + pull))
    assert all(torch.equal(code.mask, first[f"keep {name}"]) for name, code in masks(net).items())


def test_iterative_and_cyclical_schedules() -> None:
    """Equal relative shares (arXiv:1506.02626); up and back `rounds` times, ending at the target (arXiv:2202.01290)."""
    steps = Steps(0.875, rounds=3, begin=0.2, end=0.6)
    seen = sorted({round(1 - steps(step, 100), 6) for step in range(101)})
    assert seen == [0.125, 0.25, 0.5, 1.0]
    assert [steps(step, 10) > steps(step - 1, 10) for step in (2, 4, 6)] == [True] * 3
    assert Steps(0.9, rounds=1)(100, 100) == 0.9
    cyclic = [Cyclic(0.9, rounds=4, end=0.8)(step, 100) for step in range(101)]
    falls = [step for step in range(1, 101) if cyclic[step] < cyclic[step - 1]]
    assert falls == [20, 40, 60] and cyclic[-1] == 0.9 == cyclic[80] and max(cyclic) == 0.9
    once = [Once(0.9, when=0.3)(step, 10) for step in range(11)]
    assert once == [0.0] * 3 + [0.9] * 8


def test_cyclical_pruning_lets_weights_return(net: nn.Module) -> None:
    loop = Loop(net, Prune(Cyclic(0.75, rounds=2, end=1.0), every=1))
    counts = []
    for _ in range(STEPS):
        loop.step()
        counts.append(zeros(net))
    assert counts[9] < counts[8] and counts[-1] == round(0.75 * 832)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: STE(90), "STE: sparsity must be in"),
        (lambda: STE(0.9, "2:4"), "at most 0.5 with pattern '2:4'"),
        (lambda: STE(0.9, decay=-1), "decay must be at least 0"),
        (lambda: TopKAST(0.9, explore=2), "explore must be in"),
        (lambda: ACDC(0.9, phases=0), "phases must be at least 1"),
        (lambda: Growing(0.9, start=0.9, until=0.5), "start <="),
        (lambda: Movement(0.9, every=0), "every must be at least 1"),
        (lambda: STR(2.0), "STR: sparsity must be in"),
        (lambda: L0(0.9, until=0), "until must be in"),
        (lambda: TopKAST(0.9, allocation="globl"), "global"),
    ],
)
def test_wrong_settings_are_refused(make: Any, text: str) -> None:
    with pytest.raises((ValueError, KeyError), match=text):
        make()


def test_nothing_left_to_prune_is_said(net: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"STE: some tensor must be left to prune"):
        STE(0.5, "block 5x1", where="0").begin(net, None, None, 10)
    assert not codes(net)
