"""What holds for every rule: it does the same in our loop and attached to an optimizer that is not ours."""

import torch

from lilliput.code.base import copy_model
from lilliput.rule import Rule
from lilliput.stage import Reference
from lilliput.train import Train, _optimizer, fit

STEPS = 4
# Their codes hold parameters that the model did not have: applied as stages, before the optimizer is made.
ADDS = ("STR", "L0")


def hand_made(rule, model, task):
    """The loop of Train, written by somebody else."""
    reference = Reference(copy_model(model).eval(), task)
    model = (rule(model, task, reference) if type(rule).__name__ in ADDS else copy_model(model)).train()
    optimizer = _optimizer(Train(STEPS, lr=0.05, optimizer="sgd"), model)
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    with rule.attached(model, optimizer, steps=STEPS, task=task, reference=reference) as driver:
        for batch in task.batches(STEPS, 0):
            output = model(batch.inputs)
            loss = task.supervised(output, batch)
            if rule.has_loss:
                loss = loss + driver.loss(batch, output)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval(), driver


def test_the_same_in_both_loops(rule, model, task):
    theirs, driver = hand_made(rule, model, task)
    stage = Train(STEPS, lr=0.05, rules=(rule,), optimizer="sgd", clip=0.0)
    ours = fit(stage, model, task, Reference(copy_model(model), task))
    assert driver.step == STEPS
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, msg=name)


def test_state_is_tensors_and_moments_return_it(rule, model, task):
    reference = Reference(copy_model(model), task)
    model = copy_model(model).train()
    state = rule.begin(model, task, reference, STEPS)
    batch = next(iter(task.batches(1, 0)))
    output = model(batch.inputs)
    added = rule.penalty(state, model, batch, output, reference)
    assert (added is not None) == rule.has_loss
    if added is not None:
        assert added.dim() == 0 and added.isfinite() and added.requires_grad
    task.supervised(output, batch).backward()
    for moment in (rule.on_grad, rule.on_step):
        state = moment(state, model, 0, STEPS)
        assert all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items())
    assert isinstance(rule.end(state, model), dict)


def test_no_hook_stays_behind(rule, model, task):
    trained, _ = hand_made(rule, model, task)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in trained.modules())


def test_a_copied_state_drives_on_the_same_way(rule, model, task):
    """A checkpoint holds the model and the state, and no more."""
    model = copy_model(model).train()
    state = rule.begin(model, task, Reference(copy_model(model), task), STEPS)
    batch = next(iter(task.batches(1, 0)))
    task.supervised(model(batch.inputs), batch).backward()
    state = rule.on_grad(state, model, STEPS - 1, STEPS)
    twin, copied = copy_model(model), {key: value.clone() for key, value in state.items()}
    for which, kept in ((model, state), (twin, copied)):
        rule.on_step(kept, which, STEPS - 1, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_says_whether_it_has_a_loss(rule):
    assert rule.has_loss == (type(rule).penalty is not Rule.penalty)
