"""Facts from the papers behind distillation."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.distill.features import Features
from lilliput.distill.logits import Distill, divergence
from lilliput.reference import Reference
from lilliput.rule import parameters
from lilliput.task import Meaning, Task
from lilliput.task.meaning import Kind
from lilliput.train import Train, fit

GENERATOR = torch.Generator().manual_seed(0)
CLASSES = Meaning("logits")
STUDENT, TEACHER = torch.randn(16, 5, generator=GENERATOR), torch.randn(16, 5, generator=GENERATOR)


def test_hinton_equation_2_the_gradient_is_the_difference_of_the_soft_targets() -> None:
    """arXiv:1503.02531: dC/dz_i = (q_i - p_i) / T, here with the factor T^2 of section 2 and the mean over examples."""
    for t in (1.0, 3.0, 10.0):
        z = STUDENT.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(z, TEACHER, t, CLASSES), z)
        expected = t * (F.softmax(STUDENT / t, -1) - F.softmax(TEACHER / t, -1)) / len(z)
        torch.testing.assert_close(gradient, expected)


def test_hinton_equation_4_at_high_temperature_it_matches_centred_logits() -> None:
    """With logits of mean zero: T^2 dC/dz_i -> (z_i - v_i) / N, the gradient of half their squared distance over N."""
    z = (STUDENT - STUDENT.mean(1, keepdim=True)).requires_grad_()
    v = TEACHER - TEACHER.mean(1, keepdim=True)
    (gradient,) = torch.autograd.grad(divergence(z, v, 1e3, CLASSES), z)
    torch.testing.assert_close(gradient, (z.detach() - v) / 5 / len(z), rtol=0.02, atol=1e-4)


def test_at_temperature_one_it_is_the_divergence_of_the_outputs() -> None:
    p, q = F.softmax(TEACHER, -1), F.softmax(STUDENT, -1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(divergence(STUDENT, TEACHER, 1.0, CLASSES), expected)


@pytest.mark.parametrize("kind", ["logits", "probabilities", "bits", "directions", "values"])
def test_the_dense_outputs_are_the_minimum(kind: Kind) -> None:
    meaning = Meaning(kind)
    student, teacher = (F.softmax(x, -1) if kind == "probabilities" else x for x in (STUDENT, TEACHER))
    z = teacher.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(z, teacher, 1.0, meaning), z)
    assert (gradient - gradient.mean(1, keepdim=True)).abs().max() < 1e-6
    assert divergence(student, teacher, 4.0, meaning) > divergence(teacher, teacher, 4.0, meaning)


def test_fitnets_equation_3_vanishes_where_the_features_agree() -> None:
    """arXiv:1412.6550: half the squared divergence of the guided and the hint layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    other = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    narrow = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(8, 6)
    task = Task("hints", (x, torch.zeros(8).long()), (x, torch.zeros(8).long()))
    reference, rule = Reference(net, task), Features(("0",), weight=2.0)
    batch = task.batch(torch.arange(8), 0)
    losses = {}
    for name, student in (("same", copy.deepcopy(net)), ("other", other), ("narrow", narrow)):
        state = rule.begin(student, task, reference, 1)
        losses[name] = rule.loss(state, student, 0, 1, batch, student(x), reference)
        rule.end(state, student)
    assert float(losses["same"].detach()) == 0 < float(losses["other"].detach())
    losses["narrow"].backward()
    assert narrow[0].weight.grad.abs().sum() > 0 and net[0].weight.grad is None
    assert not any(module._forward_hooks for module in (*net, *other, *narrow))


WIDE = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
NARROW = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Dropout(0.2), nn.Linear(4, 3))
X = torch.randn(64, 6, generator=GENERATOR)
HINTS = Task("hints", (X, torch.arange(64) % 3), (X, torch.arange(64) % 3), batch_size=16)


def hinted(reference: Reference, until: int | None = None, **kept: Any) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A training by hints whose regressor is looked at through its checkpoints."""
    model = copy.deepcopy(NARROW)
    model[2].p = 0.0  # random numbers inside the network restart at a rung
    shown: list[dict[str, Any]] = []
    stage = Train(24, lr=0.05, rules=(Features(("0",), weight=3.0),), supervised=0.1, until=until)
    return fit(stage, model, HINTS, reference, save=lambda found: shown.append(copy.deepcopy(found)), **kept), shown


def test_fitnets_equation_3_the_regressor_is_trained_kept_and_resumed() -> None:
    """W_r maps the guided layer to the hint's width and is trained with it; a cut training goes on the same way."""
    whole, _ = hinted(Reference(copy.deepcopy(WIDE), HINTS))
    _, shown = hinted(Reference(copy.deepcopy(WIDE), HINTS), until=10)
    began = Features(("0",)).begin(copy.deepcopy(NARROW), HINTS, Reference(copy.deepcopy(WIDE), HINTS), 24)
    regressor = began["regressor 0"].weight
    assert regressor.shape == (8, 4)
    torch.testing.assert_close(regressor.T @ regressor, torch.eye(4))
    trained = shown[-1]["rules"][0]["regressor 0"]["weight"]
    assert float((trained - regressor).detach().abs().max()) > 0.05
    rest, _ = hinted(Reference(copy.deepcopy(WIDE), HINTS), load=lambda: shown[-1])
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True))
    assert whole.state_dict().keys() == NARROW.state_dict().keys(), "the regressor stays behind"


def test_fitnets_a_trained_regressor_brings_the_hints_closer() -> None:
    reference = Reference(copy.deepcopy(WIDE), HINTS)
    model, rule, losses = copy.deepcopy(NARROW).eval(), Features(("0",)), []
    sgd = torch.optim.SGD(model.parameters(), 0.0)  # only what it adds could learn, and it does not
    with rule.attached(model, sgd, reference=reference) as driver:
        extras = parameters(driver.state)
        sgd.param_groups[0]["lr"] = 0.0
        own = torch.optim.SGD(extras, 2.0)
        for _ in range(200):
            loss = driver.loss(X, model(X))
            loss.backward()
            own.step()
            own.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


def test_hints_are_computed_once_for_each_example() -> None:
    dense, calls = copy.deepcopy(WIDE), []
    dense.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    Train(40, rules=(Features(("0",)), Distill()))(copy.deepcopy(NARROW), HINTS, Reference(dense, HINTS))
    assert sum(calls) <= 2 * 64 + 2
    calls.clear()
    Train(10, rules=(Features(("0",)),))(copy.deepcopy(NARROW), HINTS, Reference(dense, HINTS, keep_bytes=100))
    assert sum(calls) >= 10 * 16, "beyond the limit of memory it runs again"


def test_features_of_other_places_are_refused() -> None:
    dense = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten())
    student = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten())
    with pytest.raises(ValueError, match=r"nothing but their width, got \(1, 3, 6\) and, dense, \(1, 4, 6\)"):
        Features(("0",)).begin(student, None, Reference(dense, example=torch.zeros(1, 2, 8)), 1)
    with pytest.raises(ValueError, match="Reference: an example must be given"):
        Features(("0",)).begin(student, None, Reference(dense), 1)


class Two(nn.Module):
    """Two heads, and a number that is no output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"loss": x.sum(), "heads": (self.first(x), self.second(x)), "cache": None}


def test_nested_outputs_are_summed_tensor_by_tensor() -> None:
    torch.manual_seed(0)
    dense, student = Two(), Two()
    task = Task("two", (X, None), (X, None), loss=lambda output, target: output["loss"] * 0, outputs="logits")
    batch = task.batch(torch.arange(16), 0)
    expected = sum(
        divergence(mine, theirs, 4.0, CLASSES)
        for mine, theirs in zip(student(X[:16])["heads"], dense(X[:16])["heads"], strict=True)
    )
    for reference in (Reference(dense, task), Reference(dense)):
        added = Distill().loss({}, student, 0, 1, batch, student(X[:16]), reference)
        torch.testing.assert_close(added, expected)
    with pytest.raises(ValueError, match=r"tensors of one shape at the same places, got \(16, 3\) and, dense, \{loss"):
        Distill().loss({}, student, 0, 1, batch, student(X[:16])["heads"][0], Reference(dense))


def test_several_labels_an_example_are_averaged_over() -> None:
    z, dense = torch.randn(2, 4, 5, 3, generator=GENERATOR)
    places = Meaning("logits", axis=-1)
    expected = divergence(z.flatten(0, 1), dense.flatten(0, 1), 2.0, CLASSES)
    torch.testing.assert_close(divergence(z, dense, 2.0, places), expected)
    torch.testing.assert_close(divergence(z.mT, dense.mT, 2.0, Meaning("logits", axis=1)), expected)


def test_a_reference_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"Distill: a reference must be given.*teacher=dense"):
        Distill().loss({}, nn.Identity(), 0, 1, None, STUDENT, None)
    with pytest.raises(ValueError, match="every path must name a module of the model, got '9'"):
        net = nn.Sequential(nn.Linear(2, 2))
        Features(("9",)).begin(net, None, Reference(net, Task("t", (STUDENT, None), (STUDENT, None))), 1)


def test_later_augmentations_are_taught_by_what_was_said_of_the_first() -> None:
    """With `draws` the dense network is asked that often for each example; every batch sees its answer to the first."""
    asked = []

    class Dense(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            asked.append(len(x))
            return super().forward(x)

    def shift(x: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        return x + (seeds % 7)[:, None].float()

    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(32, dtype=torch.long)
    task = Task("shifted", (x, y), (x, y), augment=shift, draws=8, batch_size=16)
    dense = Dense(4, 3)
    reference = Reference(dense, task)
    index = torch.arange(16)
    before = reference.outputs(task.batch(index, 1))
    asked.clear()
    late = task.batch(index, 5)
    assert torch.equal(reference.outputs(late, draws=2), before) and not asked, "known: nothing is computed"
    fresh = Reference(dense, task)
    assert torch.equal(fresh.outputs(late, draws=2), before), "unknown: computed from the inputs of the first"
    assert not torch.equal(fresh.outputs(late), before)
    asked.clear()
    reference = Reference(dense, task)
    fit(Train(16, rules=(Distill(draws=2),)), nn.Linear(4, 3), task, reference)
    assert sum(asked) <= 2 * 32 + 2, "eight epochs, two of which the dense network has seen"
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        Distill(draws=0)
