"""Facts from the papers behind the scores, and what calibration promises for their statistics."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lilliput.code.base import codes
from lilliput.prune import scores, scores_of_inputs
from lilliput.prune.prune import Prune
from lilliput.prune.rounds import Rounds
from lilliput.registry import entries
from lilliput.statistics import inverse_fisher
from lilliput.statistics.calibrate import running, statistics, taken_from
from lilliput.statistics.sources import Labelled
from lilliput.task import Batch, Task

KNOWN = [entry.name for entry in entries("statistic")]
FROM_DATA = [name for name in KNOWN if taken_from(name) != "none"]
RUNNING = running()
SCORES = [entry.name for entry in entries("score")]


def small() -> tuple[nn.Module, Tensor, Tensor, Task, list[str]]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(48, 5), torch.arange(48) % 3
    return net, x, y, Task("small", (x, y), (x, y)), ["0.weight", "2.weight"]


def dense(net: nn.Module, names: list[str], loss: object) -> tuple[Tensor, Tensor]:
    """The gradient and the Hessian of a loss, over the weights `names` as one vector, in float64."""
    net = copy.deepcopy(net).double()
    shapes = [net.get_parameter(name).shape for name in names]

    def of(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes])
        weights = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        return loss(lambda x: functional_call(net, weights, (x,)))

    flat = torch.cat([net.get_parameter(name).detach().flatten() for name in names])
    return torch.autograd.functional.jacobian(of, flat), torch.autograd.functional.hessian(of, flat)


def together(measured: dict[str, dict[str, Tensor]], need: str) -> Tensor:
    return torch.cat([known[need].flatten() for known in measured.values()]).double()


def test_snip_equation_4_is_the_derivative_in_a_mask_on_the_connections() -> None:
    """arXiv:1810.02340: g_j = dL(c * w)/dc_j at c = 1, and s_j = |g_j| / sum |g_k|."""
    net, x, y, task, names = small()
    masks = {name: torch.ones_like(net.get_parameter(name), requires_grad=True) for name in names}
    weights = {name: mask * net.get_parameter(name).detach() for name, mask in masks.items()}
    slopes = torch.autograd.grad(F.cross_entropy(functional_call(net, weights, (x,)), y), list(masks.values()))
    measured = statistics(net, task, names, ["mean_gradient"], batch_size=20)
    for name, slope in zip(names, slopes, strict=True):
        score = scores.snip(net.get_parameter(name).detach(), **measured[name])
        torch.testing.assert_close(score, slope.abs(), rtol=1e-4, atol=1e-7)
        assert torch.equal(score, scores.saliency(net.get_parameter(name).detach(), **measured[name]))


def test_saliency_cancels_where_taylor_does_not() -> None:
    """Two batches whose gradients are opposite: the mean is zero, the root mean square is not."""
    net = nn.Linear(1, 1, bias=False)
    x, y = torch.ones(4, 1), net.weight.detach() + torch.tensor([[1.0], [1.0], [-1.0], [-1.0]])
    task = Task("opposite", (x, y), (x, y), None, "mse", "mse")
    known = statistics(net, task, ["weight"], ["mean_gradient", "gradient"], batch_size=2)["weight"]
    assert float(known["mean_gradient"]) == pytest.approx(0, abs=1e-6)
    assert float(known["gradient"]) == pytest.approx(2)


def test_grasp_equation_8_is_the_change_of_the_gradient_norm() -> None:
    """arXiv:2002.07376: S(-w) = -w Hg; H g against the exact Hessian, and against what the norm really loses."""
    net, x, y, task, names = small()
    g, hessian = dense(net, names, lambda f: F.cross_entropy(f(x.double()), y))
    measured = statistics(net, task, names, ["hessian_gradient"], batch_size=20)
    torch.testing.assert_close(together(measured, "hessian_gradient"), hessian @ g, rtol=1e-3, atol=1e-6)
    flat = torch.cat([net.get_parameter(name).detach().flatten() for name in names]).double()
    signed = flat * together(measured, "hessian_gradient")

    def norm(index: int, share: float) -> float:
        other = copy.deepcopy(net).double()
        with torch.no_grad():
            for name in names:
                p = other.get_parameter(name)
                if 0 <= index < p.numel():
                    p.view(-1)[index] *= 1 - share
                index -= p.numel()
        return float(dense(other, names, lambda f: F.cross_entropy(f(x.double()), y))[0].square().sum())

    for index in (int(signed.argmax()), int(signed.argmin()), 7):
        lost = (norm(index, -1e-4) - norm(index, 1e-4)) / 2e-4
        assert lost == pytest.approx(2 * float(signed[index]), rel=1e-2, abs=1e-6)


def test_grasp_keeps_what_the_gradient_flow_would_miss_most() -> None:
    """The paper removes the highest -w Hg: of signed scores the highest w Hg stay, in order below zero too."""
    weight, product = torch.tensor([[1.0, -1.0, 2.0, 1.0]]), torch.tensor([[3.0, 1.0, -1.0, 0.0]])
    score = scores.grasp(weight, hessian_gradient=product)
    assert (score > 0).all()
    assert score.flatten().argsort().tolist() == [2, 1, 3, 0], "-2 < -1 < 0 < 3"


def test_rising_keeps_the_order_of_any_float() -> None:
    signed = torch.tensor([-3e38, -1.0, -1 + 6e-8, -1e-30, 0.0, 1e-30, 1.0, 1 + 1.2e-7, 3e38])
    assert (scores.rising(signed).diff() > 0).all() and (scores.rising(signed) > 0).all()


def deep() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ).train()
    net(torch.randn(32, 2, 6, 6) + 1)
    return net.eval()


def test_synflow_theorem_2_every_layer_has_the_same_sum_of_scores() -> None:
    """arXiv:2006.05467: what flows into a cut of the network flows out of it; taken here as a share, it is 1."""
    net, x = deep(), torch.randn(8, 2, 6, 6)
    names = ["0.weight", "4.weight", "8.weight", "11.weight"]
    measured = statistics(net, Task("inputs", x, x), names, ["flow"])
    for name in names:
        assert float(scores.synflow(net.get_parameter(name).detach(), **measured[name]).sum()) == pytest.approx(1, 1e-5)


def test_synflow_theorem_1_every_hidden_neuron_conserves_it() -> None:
    """Sum over a neuron's incoming weights = sum over its outgoing ones."""
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(4, 5)
    measured = statistics(net, Task("inputs", x, x), ["0.weight", "2.weight"], ["flow"])
    into, out = (scores.synflow(net.get_parameter(name).detach(), **known) for name, known in measured.items())
    torch.testing.assert_close(into.sum(1), out.sum(0))


def test_synflow_of_a_linear_network_is_the_product_of_magnitudes() -> None:
    """R = 1^T |W_2| |W_1| 1, whatever the data and the labels are."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    first, second = (net[i].weight.detach().abs() for i in (0, 2))
    expected = first * second.sum(0)[:, None] / (second @ first).sum()
    for x in (torch.zeros(2, 4), torch.randn(2, 4)):
        known = statistics(net, Task("inputs", x, x), ["0.weight"], ["flow"])["0.weight"]
        torch.testing.assert_close(scores.synflow(net[0].weight.detach(), **known), expected)


def test_rounds_avoid_the_collapse_of_a_layer() -> None:
    """arXiv:2006.05467, section 5: in one round a wide layer's many small scores all go; in many, what is left of it
    gets stronger, and at the largest sparsity that leaves a path no layer is empty."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(8, 60, bias=False), nn.ReLU(), nn.Linear(60, 60, bias=False), nn.ReLU(), nn.Linear(60, 3, bias=False)
    )
    x = torch.randn(4, 8)
    task, total = Task("inputs", x, x), sum(p.numel() for p in net.parameters())
    pruned = Rounds(1 - 40 / total, rounds=25)(net, task, None)
    kept = [int((pruned[i].weight != 0).sum()) for i in (0, 2, 4)]
    assert sum(kept) == 40 and min(kept) >= 5, kept
    assert float(pruned(x).detach().abs().sum()) > 0
    once = Prune(1 - 40 / total, score="synflow")(net, task, None)
    assert min(int((once[i].weight != 0).sum()) for i in (0, 2, 4)) < min(kept)


def test_rounds_follow_the_exponential_schedule_and_refuse_none() -> None:
    """Algorithm 1: after round k the share (1 - s)^(k / n) is left; with one round it is Prune."""
    net, x, _, task, _ = small()
    assert torch.equal(
        Rounds(0.7, rounds=1, score="snip")(net, task, None)(x), Prune(0.7, score="snip")(net, task, None)(x)
    )
    masks = [~code.mask for chain in codes(Rounds(0.7, rounds=7)(net, task, None)).values() for code in chain]
    assert sum(int(mask.sum()) for mask in masks) == round(0.7 * 48)
    with pytest.raises(ValueError, match="Rounds: rounds must be at least 1, got 0"):
        Rounds(0.5, rounds=0)
    with pytest.raises(ValueError, match="sparsity must be in"):
        Rounds(90)


def test_obd_is_exact_on_a_quadratic() -> None:
    """LeCun et al. 1989, section 2.2: at a minimum of a quadratic, w = 0 costs exactly h w^2 / 2."""
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3, bias=False), torch.randn(64, 4)
    y = net(x).detach()
    task = Task("quadratic", (x, y), (x, y), None, "mse", "mse")
    known = statistics(net, task, ["weight"], ["curvature"])["weight"]
    _, hessian = dense(net, ["weight"], lambda f: F.mse_loss(f(x.double()), y.double()))
    torch.testing.assert_close(known["curvature"].flatten().double(), hessian.diagonal(), rtol=1e-5, atol=1e-7)
    score = scores.obd(net.weight.detach(), **known)
    for i, j in ((0, 0), (1, 3), (2, 2)):
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.weight[i, j] = 0.0
        assert float(F.mse_loss(other(x), y).detach()) == pytest.approx(float(score[i, j]), rel=1e-4)


def test_second_order_taylor_is_exact_on_a_quadratic_away_from_its_minimum() -> None:
    """arXiv:1906.10771, section 3: E(w) - E(w with w_m = 0) = g_m w_m - H_mm w_m^2 / 2."""
    torch.manual_seed(0)
    net, x, y = nn.Linear(4, 3), torch.randn(64, 4), torch.randn(64, 3)
    task = Task("quadratic", (x, y), (x, y), None, "mse", "mse")
    known = statistics(net, task, ["weight"], ["curvature", "mean_gradient"])["weight"]
    score = scores.taylor2(net.weight.detach(), **known)
    for i, j in ((0, 0), (1, 3), (2, 2)):
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.weight[i, j] = 0.0
        change = float((F.mse_loss(other(x), y) - F.mse_loss(net(x), y)).detach())
        assert abs(change) == pytest.approx(float(score[i, j]), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_curvature_is_the_gauss_newton_diagonal_of_a_likelihood(loss: str) -> None:
    """For one layer of logits the Hessian is the Gauss-Newton matrix: drawn labels estimate its diagonal."""
    torch.manual_seed(0)
    net, x = nn.Linear(3, 4 if loss == "cross_entropy" else 1), torch.randn(1, 3).repeat(500, 1)
    y = torch.arange(500) % 2
    task = Task("logits", (x, y), (x, y), None, loss, "accuracy")
    measured = statistics(net, task, ["weight"], ["curvature"], examples=500)
    _, hessian = dense(net, ["weight"], lambda f: task.loss(f(x[:1].double()), Batch(x[:1], y[:1])))
    torch.testing.assert_close(together(measured, "curvature"), hessian.diagonal(), rtol=0.25, atol=3e-3)
    other = Task("labels do not matter", (x, 1 - y), (x, y), None, loss, "accuracy")
    assert torch.equal(
        together(statistics(net, other, ["weight"], ["curvature"], examples=500), "curvature"),
        together(measured, "curvature"),
    )


def per_example(net: nn.Module, x: Tensor, y: Tensor, names: list[str]) -> Tensor:
    """(examples, weights): one gradient a row, in float64."""
    net = copy.deepcopy(net).double()
    weights = {name: net.get_parameter(name).detach() for name in names}
    of = torch.func.grad(lambda w, a, b: F.cross_entropy(functional_call(net, w, (a[None],)), b[None]))
    rows = torch.func.vmap(of, in_dims=(None, 0, 0))(weights, x.double(), y)
    return torch.cat([rows[name].flatten(1) for name in names], 1).detach()


def test_woodfisher_equation_3_against_the_dense_inverse_and_the_recursion() -> None:
    """arXiv:2004.14340: (F + damp I)^-1 of one block is the dense inverse, and what N Woodbury steps arrive at."""
    net, x, y, task, _ = small()
    g, damp = per_example(net, x, y, ["2.weight"]), 1e-3
    plain = copy.deepcopy(net).requires_grad_(False)
    parameters = {"2.weight": plain.get_parameter("2.weight").requires_grad_(True)}
    blocks = inverse_fisher.fisher_blocks(Labelled.of(plain, task, 48, 0), parameters, 18)["2.weight"]
    exact = torch.linalg.inv(g.T @ g / 48 + damp * torch.eye(18).double())
    torch.testing.assert_close(inverse_fisher.inverse(blocks, damp)[0], exact, rtol=1e-4, atol=1e-4)
    step = torch.eye(18).double() / damp
    for row in g:
        u = step @ row
        step = step - torch.outer(u, u) / (48 + row @ u)
    torch.testing.assert_close(inverse_fisher.inverse(blocks, damp)[0], step, rtol=1e-4, atol=1e-4)


def test_woodfisher_is_what_the_loss_gains_after_the_others_of_the_block_adapt() -> None:
    """Hassibi and Stork 1992: the least d^T A d / 2 with d_q = -w_q is w_q^2 / (2 [A^-1]_qq)."""
    net, x, y, task, names = small()
    measured = statistics(net, task, names, ["inverse_fisher"], examples=48)
    weight, g = net[0].weight.detach(), per_example(net, x, y, ["0.weight"])
    score = scores.woodfisher(weight, **measured["0.weight"]).flatten()
    fisher = g.T @ g / 48 + 1e-5 * torch.eye(30).double()
    for q in (0, 17, 29):
        rest = [i for i in range(30) if i != q]
        adapted = fisher[q, q] - fisher[q, rest] @ torch.linalg.solve(fisher[rest][:, rest], fisher[rest, q])
        assert float(score[q]) == pytest.approx(float(adapted) * float(weight.flatten()[q]) ** 2 / 2, rel=1e-2)
    plain = copy.deepcopy(net)
    data = Labelled.of(plain, task, 48, 0)
    small_blocks = inverse_fisher.fisher_blocks(data, {"0.weight": plain.get_parameter("0.weight")}, 8)["0.weight"]
    assert small_blocks.shape == (4, 8, 8)
    torch.testing.assert_close(small_blocks[1], fisher[8:16, 8:16] - 1e-5 * torch.eye(8).double(), rtol=1e-4, atol=1e-7)


def test_inverse_fisher_in_passes_equals_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _, _, task, names = small()
    whole = statistics(net, task, names, ["inverse_fisher"])
    monkeypatch.setattr(inverse_fisher, "HELD_BYTES", 1)
    parts = statistics(net, task, names, ["inverse_fisher"])
    assert all(torch.equal(whole[n]["inverse_fisher"], parts[n]["inverse_fisher"]) for n in names)


def test_lamp_is_one_at_the_largest_weight_and_a_share_of_what_survives_below() -> None:
    """arXiv:2010.07611: w_u^2 / sum of w_v^2 over v >= u."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 2)
    score, squares = scores.lamp(weight), weight.square()
    assert float(score.max()) == 1 and int(score.argmax()) == int(weight.abs().argmax())
    for u in range(24):
        survive = squares[squares >= squares.flatten()[u]].sum()
        assert float(score.flatten()[u]) == pytest.approx(float(squares.flatten()[u] / survive), rel=1e-5)
    assert torch.equal(scores.lamp(weight * 1e-3).argsort(), score.argsort()), "the scale of a layer does not matter"
    assert torch.equal(scores.lamp(torch.zeros(2, 2)), torch.zeros(2, 2))
    assert scores.lamp(torch.ones(4)).tolist() == pytest.approx([1 / 4, 1 / 3, 1 / 2, 1]), "ties go by position"


def test_lamp_prunes_layers_of_unlike_scale_alike_where_magnitude_empties_the_smaller() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    with torch.no_grad():
        net[1].weight.mul_(1e-3)
    kept = [
        [int((layer.weight != 0).sum()) for layer in Prune(0.9, score=score)(net, None, None)]
        for score in ("lamp", "magnitude")
    ]
    assert sum(kept[0]) == sum(kept[1]) == 80 and min(kept[0]) > 25 and min(kept[1]) == 1


def test_movement_is_high_where_weights_leave_zero() -> None:
    """arXiv:2005.07683, section 4: S adds up -w dL/dw, and |w| grows where w and its gradient differ in sign."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
    target, held = torch.tensor([2.0, 0.5, -2.0, -0.5]), torch.zeros(4)
    for _ in range(5):
        gradient = torch.autograd.grad((weight - target).square().sum(), weight)[0]
        held = RUNNING["movement"](held, weight.detach(), gradient)
        weight.data -= 0.05 * gradient
    assert (held > 0).tolist() == [True, False, True, False]
    score = scores.movement(weight.detach(), movement=held)
    assert (score > 0).all() and torch.equal(score.argsort(), held.argsort())


def test_running_statistics_of_a_constant_gradient_approach_it() -> None:
    gradient, weight = torch.tensor([3.0, -2.0]), torch.ones(2)
    held = {need: torch.zeros(2) for need in RUNNING}
    for _ in range(200):
        held = {need: update(held[need], weight, gradient) for need, update in RUNNING.items()}
    torch.testing.assert_close(held["gradient"], gradient.abs())
    torch.testing.assert_close(held["mean_gradient"], gradient)
    torch.testing.assert_close(held["movement"], -200 * gradient)


def test_ria_equation_is_relative_importance_times_the_root_of_the_input_norm() -> None:
    """Zhang et al., ICLR 2024: (|w| / column sum + |w| / row sum) ||x||^0.5; scaling a whole row keeps half of it."""
    weight, norm = torch.tensor([[1.0, -3.0], [3.0, 1.0]]), torch.tensor([[4.0, 9.0]])
    expected = torch.tensor([[1 / 4 + 1 / 4, 3 / 4 + 3 / 4], [3 / 4 + 3 / 4, 1 / 4 + 1 / 4]]) * torch.tensor([2.0, 3.0])
    torch.testing.assert_close(scores_of_inputs.ria(weight, input_norm=norm), expected)
    assert scores_of_inputs.ria(torch.zeros(2, 2), input_norm=norm).isfinite().all()


def test_data_needed_says_what_a_score_takes() -> None:
    needed = {name: scores.data_needed(name) for name in SCORES}
    assert {name for name, data in needed.items() if data == "none"} == {"magnitude", "random", "lamp"}
    assert {name for name, data in needed.items() if data == "inputs"} == {"synflow", "obd", "wanda", "ria"}
    for name in SCORES:
        said = {"none": "Needs no data", "inputs": "input", "labels": "labels"}[needed[name]]
        text = str(scores.lookup(name).__doc__)
        assert said in text and ("Source:" in text or name == "random")
    with pytest.raises(KeyError, match=r"known score, got 'snipp'\. Did you mean 'snip'"):
        scores.data_needed("snipp")


MEASURED = [name for name in SCORES if name != "movement"]


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("score", MEASURED)
def test_prune_takes_every_score_once_and_while_training(score: str, labels: bool) -> None:
    net, x = deep(), torch.randn(9, 2, 6, 6)
    task = Task("images", (x, torch.arange(9) % 3) if labels else x, x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruned = Prune(0.5, score=score)(net, task, None)
    total = sum(p.numel() for name, p in net.named_parameters() if p.dim() > 1)
    assert sum(int((~code.mask).sum()) for chain in codes(pruned).values() for code in chain) == total // 2
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items()) and not net.training
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    adam = torch.optim.Adam(net.parameters())
    with Prune(0.5, score=score, every=1).attached(net, adam, steps=2, task=task):
        for _ in range(2):
            adam.zero_grad()
            F.cross_entropy(net(x), torch.arange(9) % 3).backward()
            adam.step()
    assert sum(int((~code.mask).sum()) for chain in codes(net).values() for code in chain) == total // 2


class Words(nn.Module):
    """Tokens, attention and a recurrent layer: what has no second derivative when fused."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.read, self.more = nn.GRU(8, 6, batch_first=True), nn.LSTM(6, 6, batch_first=True)
        self.say = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.say(self.more(self.read(self.mix(self.table(tokens)))[0])[0][:, -1])


@pytest.mark.parametrize("score", MEASURED)
def test_tokens_attention_and_recurrence(score: str) -> None:
    torch.manual_seed(0)
    net, x = Words().eval(), torch.randint(0, 11, (6, 5))
    pruned = Prune(0.5, score=score)(net, Task("words", (x, torch.arange(6) % 3), x), None)
    assert sum(int((~code.mask).sum()) for chain in codes(pruned).values() for code in chain) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_of_other_precisions_are_taken_in_float32(dtype: torch.dtype) -> None:
    net, x, y, _, names = small()
    net = net.to(dtype)
    task = Task("half", (x.to(dtype), y), (x, y))
    measured = statistics(net, task, names, [*KNOWN])
    same = statistics(copy.deepcopy(net).float(), Task("single", (x.to(dtype).float(), y), (x, y)), names, [*KNOWN])
    for name in names:
        assert set(measured[name]) == set(KNOWN)
        for need, value in measured[name].items():
            assert value.dtype == (torch.float64 if need == "hessian" else torch.float32), need
            torch.testing.assert_close(value, same[name][need])
    assert net[0].weight.dtype == dtype


def test_statistics_are_a_function_of_the_seed() -> None:
    net, x, _, _, names = small()
    task = Task("drawn", x, x)
    needs = [*KNOWN]
    one, again, other = (statistics(net, task, names, needs, seed=seed) for seed in (0, 0, 1))
    for need in needs:
        assert all(torch.equal(one[name][need], again[name][need]) for name in names), need
    for need in ("gradient", "mean_gradient", "hessian_gradient", "curvature", "inverse_fisher", "noise"):
        assert any(not torch.equal(one[name][need], other[name][need]) for name in names), need


def test_what_cannot_be_measured_is_said() -> None:
    net, _, _, task, names = small()
    with pytest.raises(ValueError, match="movement must be gathered while training"):
        Prune(0.5, score="movement")(net, task, None)
    for need in FROM_DATA:
        with pytest.raises(ValueError, match=f"a task must be given for {need}"):
            statistics(net, None, names, [need])
    with pytest.raises(ValueError, match="flow must reach the output"):
        statistics(nn.Sequential(net, nn.Softmax(-1)), task, ["0.0.weight"], ["flow"])
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken[0].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"weights must be numbers, got NaN in 0\.weight"):
        statistics(broken, task, names, ["curvature"])
    with pytest.raises(ValueError, match=r"mean_gradient must be finite, got NaN or infinity for 2\.weight"):
        statistics(broken, task, ["2.weight"], ["mean_gradient"])


def test_layers_of_one_channel_frozen_and_unused_weights() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.unused, self.say = nn.Conv2d(1, 1, 1), nn.Linear(3, 3), nn.Linear(4, 2)
            self.say.weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.say(self.one(x).flatten(1))

    net, x = Odd(), torch.randn(6, 1, 2, 2)
    measured = statistics(
        net, Task("odd", (x, torch.arange(6) % 2), x), ["one.weight", "unused.weight", "say.weight"], [*KNOWN]
    )
    for need in ("gradient", "mean_gradient", "hessian_gradient", "curvature", "flow"):
        assert not measured["unused.weight"][need].any() and measured["say.weight"][need].any(), need
    assert not net.say.weight.requires_grad


def test_the_page_lists_every_score_with_the_data_it_needs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prune" / "scores.md").read_text(encoding="utf-8")
    table = page[page.index("## All scores") : page.index("## Prune in rounds")]
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (\w+) \|[^|]*\|$", table, re.MULTILINE))
    assert rows == {name: scores.data_needed(name) for name in SCORES}
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL))
    exec(code, {"__name__": "page"})
    assert all(f"`{name}`" in page for name in KNOWN)
