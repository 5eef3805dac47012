"""Facts from the papers behind distillation."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.distill.features import Features
from lilliput.distill.logits import Distill, distance
from lilliput.stage import Reference
from lilliput.task import Task

GENERATOR = torch.Generator().manual_seed(0)
STUDENT, TEACHER = torch.randn(16, 5, generator=GENERATOR), torch.randn(16, 5, generator=GENERATOR)


def test_hinton_equation_2_the_gradient_is_the_difference_of_the_soft_targets() -> None:
    """arXiv:1503.02531: dC/dz_i = (q_i - p_i) / T, here with the factor T^2 of section 2 and the mean over examples."""
    for t in (1.0, 3.0, 10.0):
        z = STUDENT.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(distance(z, TEACHER, t, "cross_entropy"), z)
        expected = t * (F.softmax(STUDENT / t, -1) - F.softmax(TEACHER / t, -1)) / len(z)
        torch.testing.assert_close(gradient, expected)


def test_hinton_equation_4_at_high_temperature_it_matches_centred_logits() -> None:
    """With logits of mean zero: T^2 dC/dz_i -> (z_i - v_i) / N, the gradient of half their squared distance over N."""
    z = (STUDENT - STUDENT.mean(1, keepdim=True)).requires_grad_()
    v = TEACHER - TEACHER.mean(1, keepdim=True)
    (gradient,) = torch.autograd.grad(distance(z, v, 1e3, "cross_entropy"), z)
    torch.testing.assert_close(gradient, (z.detach() - v) / 5 / len(z), rtol=0.02, atol=1e-4)


def test_at_temperature_one_it_is_the_divergence_of_the_outputs() -> None:
    p, q = F.softmax(TEACHER, -1), F.softmax(STUDENT, -1)
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distance(STUDENT, TEACHER, 1.0, "cross_entropy"), expected)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce", "cosine", "mse"])
def test_the_dense_outputs_are_the_minimum(loss: str) -> None:
    z = TEACHER.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(z, TEACHER, 4.0, loss), z)
    assert gradient.abs().max() < 1e-6
    assert distance(STUDENT, TEACHER, 4.0, loss) > distance(TEACHER, TEACHER, 4.0, loss)


def test_fitnets_equation_3_vanishes_where_the_features_agree() -> None:
    """arXiv:1412.6550: half the squared distance of the guided and the hint layer."""
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


def test_a_reference_is_asked_for() -> None:
    with pytest.raises(ValueError, match="Distill: a reference must be given"):
        Distill().loss({}, nn.Identity(), 0, 1, None, STUDENT, None)
    with pytest.raises(ValueError, match="every path must name a module of the model, got '9'"):
        net = nn.Sequential(nn.Linear(2, 2))
        Features(("9",)).begin(net, None, Reference(net, Task("t", (STUDENT, None), (STUDENT, None))), 1)
