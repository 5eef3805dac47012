"""What holds for every rule: it does the same in our loop and attached to an optimizer that is not ours."""

import copy
from dataclasses import dataclass, replace
from typing import get_args, get_type_hints

import pytest
import torch

from lilliput import registry
from lilliput.code.base import codes, copy_model
from lilliput.recipe import Recipe
from lilliput.rule import parameters
from lilliput.runner import Runner
from lilliput.schedule import Schedule
from lilliput.stage import Reference
from lilliput.store import Store
from lilliput.task import predict
from lilliput.train import Train, _optimizer, fit

STEPS = 4


def hand_made(rule, model, task):
    """The loop of Train, written by somebody else."""
    reference = Reference(copy_model(model).eval(), task)
    model = copy_model(model).train()
    state = rule.begin(model, task, reference, STEPS)  # first, since codes and extras may bring parameters
    optimizer = _optimizer(Train(STEPS, lr=0.05, optimizer="sgd"), [*model.parameters(), *parameters(state)])
    for group in optimizer.param_groups:
        group["lr"] = 0.05
    with rule.attached(model, optimizer, steps=STEPS, reference=reference, state=state) as driver:
        for batch in task.batches(STEPS, 0):
            batch = driver.batch(batch)
            output = model(batch.inputs)
            loss = task.loss(output, batch)
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


def test_state_is_tensors_and_modules_and_moments_return_it(rule, model, task):
    reference = Reference(copy_model(model), task)
    model = copy_model(model).train()
    state = rule.begin(model, task, reference, STEPS)
    batch = next(iter(task.batches(1, 0)))
    output = model(batch.inputs)
    added = rule.loss(state, model, 0, STEPS, batch, output, reference)
    assert (added is not None) == rule.has_loss
    if added is not None:
        assert added.dim() == 0 and added.isfinite() and added.requires_grad
    task.loss(output, batch).backward()
    for moment in (rule.on_grad, rule.on_step):
        state = moment(state, model, 0, STEPS)
        assert all(isinstance(key, str) for key in state)
        assert all(isinstance(value, torch.Tensor | torch.nn.Module) for value in state.values())
    assert isinstance(rule.end(state, model), dict)


def test_no_hook_stays_behind(rule, model, task):
    trained, _ = hand_made(rule, model, task)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in trained.modules())


@pytest.mark.parametrize("until", [None, 2])
def test_a_result_from_the_store_is_the_same_and_nothing_is_measured_for_it(
    rule, model, task, until, tmp_path, monkeypatch
):
    recipe = Recipe((Train(STEPS, lr=0.05, rules=(rule,), optimizer="sgd", until=until),))
    first = Runner(model, task, Store(tmp_path)).make(recipe)

    def again(*unused):
        raise AssertionError("begin is not called for a result that is there")

    monkeypatch.setattr(type(rule), "begin", again)
    trained = Runner(model, task, Store(tmp_path)).make(recipe)
    assert torch.equal(predict(first, task.example), predict(trained, task.example))
    assert [type(code) for chain in codes(first).values() for code in chain] == [
        type(code) for chain in codes(trained).values() for code in chain
    ]
    if until is None:
        state = first.state_dict()
        assert state.keys() == trained.state_dict().keys()
        assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())


def test_a_copied_state_drives_on_the_same_way(rule, model, task):
    """A checkpoint holds the model and the state, and no more."""
    model = copy_model(model).train()
    state = rule.begin(model, task, Reference(copy_model(model), task), STEPS)
    batch = next(iter(task.batches(1, 0)))
    task.loss(model(batch.inputs), batch).backward()
    state = rule.on_grad(state, model, STEPS - 1, STEPS)
    twin, copied = copy_model(model), copy.deepcopy(state)
    for which, kept in ((model, state), (twin, copied)):
        rule.on_step(kept, which, STEPS - 1, STEPS)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_the_registry_knows_whether_it_has_a_loss(rule):
    (entry,) = (entry for entry in registry.entries("rule") if entry.name == type(rule).__name__)
    assert entry.has_loss == rule.has_loss


# ------------------------------------------------------------------------------------------------------------ schedules


@dataclass(frozen=True)
class Table:
    """A schedule by a list of values; the last of them is where it ends, whatever the number of steps."""

    values: tuple[float, ...]

    def __call__(self, step, steps):
        return self.values[step] if steps == len(self.values) - 1 else self.values[-1]


LONG = 8
RISING = (*(0.1 + 0.04 * step for step in range(LONG)), 0.5)
# Settings with which every step may show the value of its schedule.
PACE = {"every": 1}
START = {"Growing": {"start": 0.0}}


def scheduled(rule):
    """The fields of a rule that take a number or a schedule."""
    return [name for name, hint in get_type_hints(type(rule)).items() if Schedule in get_args(hint)]


def events(rule, model, task):
    """What a training shows: at each step the loss that is added and the gradients, then the weights and the state."""
    reference = Reference(copy_model(model).eval(), task)
    model = copy_model(model).train()
    state, shown = rule.begin(model, task, reference, LONG), []
    optimizer = torch.optim.SGD([*model.parameters(), *parameters(state)], 0.05)
    for step, batch in enumerate(task.batches(LONG, 0)):
        batch = rule.batch(state, model, step, LONG, batch)
        output = model(batch.inputs)
        added = rule.loss(state, model, step, LONG, batch, output, reference)
        optimizer.zero_grad()
        (task.loss(output, batch) + (0 if added is None else added)).backward()
        state = rule.on_grad(state, model, step, LONG)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        shown.append([output.detach(), torch.zeros(()) if added is None else added.detach(), *gradients])
        optimizer.step()
        state = rule.on_step(state, model, step, LONG)
        kept = [*model.state_dict().values(), *(state[key] for key in sorted(state))]
        shown.append([value.clone() for value in kept if isinstance(value, torch.Tensor)])
    rule.end(state, model)
    return shown


def same(first, second):
    return len(first) == len(second) and all(map(torch.equal, first, second))


def test_every_scheduled_setting_follows_its_schedule(rule, model, task):
    """Where two schedules part at step k, the trainings do: not before the update that leads to k, nor after step k."""
    pace = {key: value for key, value in PACE.items() if hasattr(rule, key)} | START.get(type(rule).__name__, {})
    for field in scheduled(rule):
        whole = events(replace(rule, **pace, **{field: Table(RISING)}), model, task)
        for k in range(1, LONG // 2):
            other = tuple(value + 0.05 * (k <= step < LONG) for step, value in enumerate(RISING))
            shown = events(replace(rule, **pace, **{field: Table(other)}), model, task)
            agree = [same(a, b) for a, b in zip(whole, shown, strict=True)]
            assert all(agree[: 2 * k - 1]) and not all(agree[2 * k - 1 : 2 * k + 2]), (field, k, agree)
