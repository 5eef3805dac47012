"""Bricken et al., Emergence of sparse representations from noise, ICML 2023; what it rests on, and what follows it."""

import pytest
import torch
from torch import nn

from lilliput import Linear, Prune, Reference, Task, Train
from lilliput.analyse.activity import FollowActivity, activities, activity
from lilliput.code.base import copy_model
from lilliput.prune.noise import STEP, Noise
from lilliput.train import fit


def patches(count=256, seed=0) -> torch.Tensor:
    """Vectors with structure: three of 24 fixed directions each."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(24, 16, generator=torch.Generator().manual_seed(9))
    coefficients = torch.rand(count, 24, generator=generator)
    chosen = torch.rand(count, 24, generator=generator).argsort(1) < 3
    return (coefficients * chosen) @ nn.functional.normalize(atoms)


def coding() -> Task:
    x, val = patches(), patches(128, 1)
    return Task("patches", train=(x, x), val=(val, val), loss="mse", metric="mse", batch_size=64)


def autoencoder(hidden=48) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, hidden), nn.ReLU(), nn.Linear(hidden, 16))


def trained(rules, steps=300, model=None):
    task, model = coding(), model or autoencoder()
    return Train(steps, lr=3e-3, weight_decay=0.0, rules=rules)(model, task, Reference(copy_model(model), task))


def test_noise_makes_activations_sparse_and_they_stay_sparse_without_it():
    task, plain = coding(), trained(())
    noisy = trained((Noise(0.5),))
    after = trained((), 100, noisy)
    active = [activity(model, task).active[0] for model in (plain, noisy, after)]
    assert active[1] < 0.7 * active[0] and active[2] < 0.9 * active[0], active


def test_the_charge_for_active_units():
    """Second order in sigma: E ||y(x + sigma eps) - t||^2 grows by sigma^2 ||V D W||_F^2 while no unit switches."""
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double(), torch.randn(1, 6).double()
    sigma = 1e-3
    rule = Noise(sigma)
    rule.begin(net, None, None, 1)
    with torch.no_grad():
        y, active = net.eval()(x), (net[0](x) > 0).double()
        jacobian = net[2].weight @ torch.diag(active[0]) @ net[0].weight
        moved = (net.train()(x.expand(40000, 6)) - y).square().sum(1).mean()
    torch.testing.assert_close(moved, sigma**2 * jacobian.square().sum(), rtol=0.03, atol=0)


@pytest.mark.parametrize("where", ["input", "1", "*", "1, 2"])
def test_noise_is_added_where_it_is_asked_for(where):
    net, x, seen = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity()), torch.zeros(4000, 8), {}
    rule = Noise(0.5, where, seed=3)
    rule.begin(net, None, None, 10)
    for name, module in net.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: seen.update({name: float(o.std())}))
    net.train()(x)
    variances = {"input": [1, 1, 1], "1": [0, 1, 1], "*": [1, 2, 3], "1, 2": [0, 1, 2]}[where]
    for value, wanted in zip(seen.values(), variances, strict=True):
        assert value == pytest.approx(0.5 * wanted**0.5, rel=0.02)
    assert not net.eval()(x).any()


def test_a_pruned_layer_is_a_place_too():
    net = Prune(0.5)(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), None, None)
    Noise(1.0, "*").begin(net, None, None, 1)
    assert len(net[0]._forward_hooks) == len(net[1]._forward_hooks) == 1


def test_noise_is_a_function_of_seed_place_and_step():
    def drawn(seed, step, where="0", steps=9):
        net, rule = nn.Sequential(nn.Identity(), nn.Identity()), Noise(1.0, where, seed)
        rule.begin(net, None, None, steps)
        if step:
            rule.on_step({}, net, step - 1, steps)
        return net.train()(torch.zeros(2, 5))

    assert torch.equal(drawn(0, 3), drawn(0, 3))
    others = [drawn(0, 3), drawn(1, 3), drawn(0, 4), drawn(0, 0), drawn(0, 3, "1"), drawn(0, 3, "input")]
    assert len({tuple(x.flatten().tolist()) for x in others}) == len(others)


def test_std_follows_a_schedule():
    net, x = nn.Sequential(nn.Identity()), torch.zeros(4000, 4)
    rule = Noise(Linear(1.0, 0.0))
    rule.begin(net, None, None, 4)
    for step in range(4):
        assert float(net.train()(x).std()) == pytest.approx(1 - step / 4, rel=0.05)
        rule.on_step({}, net, step, 4)
    assert torch.equal(net(x), x)


def test_every_floating_point_input_is_noisy():
    class Two(nn.Module):
        def forward(self, a, ids, *, b):
            return a, ids, b

    net = Two()
    rule = Noise(1.0)
    rule.begin(net, None, None, 1)
    a, ids, b = net.train()(torch.zeros(3, 2), torch.arange(3), b=torch.zeros(3, 2))
    assert a.std() > 0.2 and b.std() > 0.2 and not torch.equal(a, b) and torch.equal(ids, torch.arange(3))


def test_resumed_training_sees_the_same_noise():
    task, model, kept = coding(), autoencoder(), []
    stage = Train(12, lr=1e-2, rules=(Noise(Linear(0.5, 0.1)), Noise(0.1, "0")))
    whole = fit(stage, model, task, Reference(copy_model(model), task))
    fit(stage, model, task, Reference(copy_model(model), task), save=kept.append, stop=lambda step: step == 5)
    assert kept[0]["step"] == 5 and int(kept[0]["model"][STEP]) == 5
    again = fit(stage, model, task, Reference(copy_model(model), task), load=lambda: kept[0])
    assert whole.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_two_noises_leave_nothing_behind():
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    first, second = Noise(0.1, "0"), Noise(0.2, "0")
    for rule in (first, second):
        rule.begin(net, None, None, 5)
    first.end({}, net)
    assert len(net[0]._forward_hooks) == 1 and STEP in net[0]._buffers
    second.end({}, net)
    assert not net[0]._forward_hooks and not list(net.buffers())


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"std": -0.1}, "std must be at least 0"),
        ({"std": Linear(0.1, -1.0)}, "std must be at least 0"),
        ({"std": float("nan")}, "std must be at least 0"),
        ({"where": "layers.*"}, "where must be 'input' or match"),
    ],
)
def test_noise_settings(settings, wrong):
    with pytest.raises(ValueError, match=wrong):
        Noise(**settings).begin(autoencoder(), None, None, 1)


def test_activity_counts_what_is_not_zero():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1, 1))
        net[0].bias.copy_(torch.tensor([0.0, 0.0, -9.0]))
        net[3].weight.fill_(-1.0)
        net[3].bias.fill_(0.5)
    x = torch.tensor([[1.0, 2.0, 3.0, -1.0], [0.0, 0.0, 0.0, 0.0]]).view(2, 1, 2, 2)
    y = torch.zeros(2, dtype=torch.int64)
    seen = activity(net, Task("tiny", train=(x, y), val=(x, y)))
    assert seen.layers == ("1", "4") and seen.units == (3, 2) and seen.dead == (1, 0) and seen.examples == 2
    assert seen.active == pytest.approx((4 / 24, 0.5))
    assert str(seen).splitlines()[0] == "1: 16.7% active, 1 of 3 dead"
    assert not any(module._forward_hooks for module in net.modules())
    assert activity(net, Task("tiny", train=(x, y), val=(x, y)), where="0").active[0] == pytest.approx((4 + 4 + 8) / 24)


def test_activity_says_what_is_missing():
    task = coding()
    with pytest.raises(ValueError, match="must have activation modules"):
        activity(nn.Sequential(nn.Linear(16, 16)), task)
    with pytest.raises(ValueError, match="where must match a module"):
        activity(autoencoder(), task, where="encoder")
    with pytest.raises(ValueError, match="a task must be given"):
        FollowActivity().begin(autoencoder(), None, None, 1)
    with pytest.raises(ValueError, match="must be at least 1"):
        FollowActivity(every=0)


def test_activity_is_followed_over_a_training():
    task, model, kept = coding(), autoencoder(), []
    follow = FollowActivity(every=20, examples=64)
    stage = Train(100, lr=3e-3, rules=(Noise(0.5), follow))
    fit(stage, model, task, Reference(copy_model(model), task), save=kept.append, stop=lambda step: step == 60)
    seen = activities(kept[0]["rules"][1])
    assert [step for step, _ in seen["1"]] == [0, 20, 40, 60]
    assert seen["1"][-1][1] < seen["1"][0][1]
    untouched = fit(Train(100, lr=3e-3, rules=(Noise(0.5),)), model, task, Reference(copy_model(model), task))
    followed = fit(stage, model, task, Reference(copy_model(model), task))
    assert all(
        torch.equal(a, b) for a, b in zip(untouched.state_dict().values(), followed.state_dict().values(), strict=True)
    )
