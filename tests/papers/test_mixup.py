"""Facts from mixup, and from distillation on mixtures."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.distill.logits import Distill
from lilliput.distill.mixup import Mixup
from lilliput.errors import NotSupported
from lilliput.reference import Reference
from lilliput.schedule import Linear
from lilliput.task import Batch, Task
from lilliput.train import Train

GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.randn(48, 5, generator=GENERATOR), torch.arange(48) % 3
TASK = Task("mix", (X, Y), (X, Y), batch_size=16)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))


def mixture(rule: Mixup, batch: Batch, step: int = 0) -> tuple[float, torch.Tensor, Batch]:
    """lambda, the partner of each example, and the mixed batch."""
    named = replace(batch, inputs=torch.eye(len(batch.inputs)))
    shares = rule.batch(rule.begin(nn.Identity(), None, None, 9), nn.Identity(), step, 9, named).inputs
    share = float(shares.diagonal().min())
    partner = (shares - share * torch.eye(len(shares))).argmax(1)
    return share, partner, rule.batch({}, nn.Identity(), step, 9, batch)


def test_mixup_section_1_inputs_and_targets_are_mixed_alike() -> None:
    batch = TASK.batch(torch.arange(16), 0)
    share, partner, mixed = mixture(Mixup(1.0, classes=3), batch)
    torch.testing.assert_close(mixed.inputs, share * X[:16] + (1 - share) * X[:16][partner])
    soft = F.one_hot(Y[:16], 3).float()
    torch.testing.assert_close(mixed.targets, share * soft + (1 - share) * soft[partner])
    # Cross entropy is linear in the target, so it is the same mixture of two losses.
    output = torch.randn(16, 3, generator=GENERATOR)
    both = [F.cross_entropy(output, target) for target in (Y[:16], Y[:16][partner])]
    torch.testing.assert_close(TASK.loss(output, mixed), share * both[0] + (1 - share) * both[1])


def test_draws_are_a_function_of_the_seed_and_the_step() -> None:
    batch = TASK.batch(torch.arange(16), 0)
    rule = Mixup(0.5, classes=3)
    same, later, other = (
        mixture(rule, batch, 4)[2].inputs,
        mixture(rule, batch, 5)[2].inputs,
        mixture(replace(rule, seed=1), batch, 4)[2].inputs,
    )
    assert torch.equal(same, mixture(rule, batch, 4)[2].inputs)
    assert not torch.equal(same, later) and not torch.equal(same, other)


def test_a_small_alpha_mixes_little_and_none_not_at_all() -> None:
    batch = TASK.batch(torch.arange(16), 0)
    shares = [
        [float(Mixup(alpha, classes=2).batch({}, nn.Identity(), step, 9, line()).inputs.amax()) for step in range(200)]
        for alpha in (0.1, 8.0)
    ]
    # E max(lambda, 1 - lambda): close to 1 for a small alpha, close to one half for a large one.
    little, evenly = shares[0], [share for share in shares[1] if share < 1]  # at 1 everyone is their own partner
    assert sum(little) / 200 > 0.9 and sum(evenly) / len(evenly) < 0.65
    assert Mixup(0.0).batch({}, nn.Identity(), 0, 9, batch) is batch
    assert Mixup(Linear(0.0, 1.0), classes=3).batch({}, nn.Identity(), 0, 9, batch) is batch


def line() -> Batch:
    """Two examples at 0 and 1, which are always each other's partner or their own."""
    return Batch(torch.eye(2), None, None, 0)


def test_numbers_and_bits_are_mixed_as_numbers() -> None:
    for targets, rule, state in (
        (torch.rand(16, 2, generator=GENERATOR), Mixup(1.0), {}),
        (Y[:16] % 2, Mixup(1.0), {"classes": torch.tensor(1)}),
    ):
        batch = Batch(torch.eye(16), targets, torch.arange(16), 0)
        mixed = rule.batch(state, nn.Identity(), 0, 9, batch)
        torch.testing.assert_close(mixed.targets, mixed.inputs @ targets.float())


def test_unlabelled_examples_are_mixed_among_themselves() -> None:
    batch = Batch(torch.eye(16), torch.ones(10, 1), torch.arange(16), 0)
    mixed = Mixup(1.0).batch({}, nn.Identity(), 0, 9, batch)
    assert mixed.targets.shape == (10, 1)
    assert mixed.inputs[:10, 10:].abs().sum() == 0 == mixed.inputs[10:, :10].abs().sum()


def test_patient_teachers_see_the_same_mixture() -> None:
    """arXiv:2106.05237, section 3: one and the same input for student and teacher, so that outputs can agree."""
    dense = net().eval()
    seen = []
    dense.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].clone()))
    student = net()
    shown = []
    student.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0].clone()))
    Train(3, lr=0.01, rules=(Mixup(1.0), Distill()), supervised=0.0)(student, TASK, Reference(dense, TASK))
    asked = [x for x in shown if len(x) == 16]
    assert len(asked) == 3 and all(any(torch.equal(x, y) for y in seen) for x in asked)
    assert not any(bool((x[:, None] == X).all(-1).any(1).all()) for x in asked), "none is the batch as it was"


def test_it_trains() -> None:
    x = torch.randn(96, 5, generator=GENERATOR)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0)
    task = Task("corners", (x, y), (x, y), batch_size=16)
    trained = Train(150, lr=0.02, rules=(Mixup(0.2),))(net(), task, Reference(net(), task))
    assert task.score(trained).value > task.score(net()).value + 0.3


def test_what_cannot_be_mixed_is_refused() -> None:
    ids = Batch(torch.randint(9, (4, 3)), None, None, 0)
    with pytest.raises(NotSupported, match=r"inputs must be floating-point tensors to be mixed, got torch.int64"):
        Mixup().batch({}, nn.Identity(), 0, 9, ids)
    with pytest.raises(ValueError, match="classes must be given for integer targets without a task"):
        Mixup().batch({}, nn.Identity(), 0, 9, Batch(X, Y, None, 0))
    with pytest.raises(ValueError, match="alpha and classes must be at least 0"):
        Mixup(-1.0)
