"""Facts of WoodFisher (arXiv:2004.14340): surgery with the Fisher information's inverse."""

import pytest
import torch
from torch import Tensor, nn

from lilliput.prune.masks import masks
from lilliput.prune.patterns import parse
from lilliput.prune.prune import Prune
from lilliput.prune.woodfisher import WoodFisher, surgery
from lilliput.statistics import inverse_fisher as fisher
from lilliput.statistics.sources import Labelled
from lilliput.task import Batch, Task, predict


def blocks(size: int, count: int = 1) -> Tensor:
    g = torch.randn(count, size, 3 * size, generator=torch.Generator().manual_seed(0)).double()
    return g @ g.transpose(1, 2) / (3 * size)


def test_the_update_of_one_weight_and_what_it_costs() -> None:
    """dw = -w_q F^-1 e_q / [F^-1]_qq sets w_q to zero and raises the quadratic by w_q^2 / (2 [F^-1]_qq), by which q is
    chosen: against every other q, and against every other move that sets w_q to zero."""
    F, w = blocks(6), torch.randn(1, 6, generator=torch.Generator().manual_seed(1)).double()
    new, mask = surgery(w, F, 1 / 6, parse("elements"), damp=0.0)
    q, inverse = int((~mask)[0].nonzero()), F[0].inverse()
    step = -w[0, q] * inverse[:, q] / inverse[q, q]
    torch.testing.assert_close(new[0], w[0] + step)
    rises = w[0].square() / (2 * inverse.diagonal())
    assert q == int(rises.argmin()) and new[0, q] == 0
    assert float(step @ F[0] @ step / 2) == pytest.approx(float(rises[q]))
    for other in torch.randn(50, 6, generator=torch.Generator().manual_seed(2)).double() * 0.1:
        moved = step + other * (torch.arange(6) != q)
        assert float(moved @ F[0] @ moved / 2) >= float(rises[q])


def test_several_at_once_is_the_joint_update_not_a_sum_of_single_ones() -> None:
    F, w = blocks(8), torch.randn(1, 8, generator=torch.Generator().manual_seed(1)).double()
    new, mask = surgery(w, F, 0.5, parse("elements"), damp=0.0)
    inverse, Q = F[0].inverse(), (~mask)[0].nonzero()[:, 0]
    step = -inverse[:, Q] @ torch.linalg.solve(inverse[Q[:, None], Q], w[0, Q])
    torch.testing.assert_close(new[0], w[0] + step)

    def rise(step: Tensor) -> float:
        return float(step @ F[0] @ step / 2)

    single = sum(-w[0, q] * inverse[:, q] / inverse[q, q] for q in Q.tolist())
    single = torch.where(mask[0], single, -w[0])
    assert rise(step) <= rise(single) and rise(step) <= rise(torch.where(mask[0], 0.0, -w[0]))


def test_blocks_do_not_see_each_other() -> None:
    F, w = blocks(4, 3), torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double()
    F[2, 2:] = F[2, :, 2:] = 0  # ten weights in three blocks of four: padding
    new, mask = surgery(w, F, 0.3, parse("elements"), damp=1e-6)
    changed = (new != w).flatten()
    intact = mask.flatten()[:8].view(2, 4).all(1)
    assert int(mask.sum()) == 7 and not changed[:8].view(2, 4)[intact].any()


def small() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))
    x = torch.randn(96, 8)
    y = net(x).argmax(1)
    return net, Task("small", train=(x, y), val=(x, y))


@pytest.mark.parametrize("pattern", ["elements", "even", "2:4", "block 2x1"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_masks_are_exact_and_what_is_gone_stays_gone(pattern: str, rounds: int) -> None:
    net, task = small()
    result = WoodFisher(0.5, rounds, pattern, size=7)(net, task, None)
    for i, name in ((0, "0.weight"), (2, "2.weight")):
        mask = masks(result)[name].mask
        assert int(mask.sum()) == mask.numel() // 2 and torch.equal(result[i].weight != 0, mask)
        assert torch.equal(parse(pattern)(mask.double(), 0.5), mask)


def test_first_round_is_surgery_on_the_fisher_information() -> None:
    net, task = small()
    result = WoodFisher(0.5, rounds=1, size=8)(net, task, None)
    examples = Labelled.of(net, task, 256, 0)
    F = fisher.fisher_blocks(examples, {"2.weight": net[2].weight}, 8)["2.weight"]
    new, mask = surgery(net[2].weight.detach(), F, 0.5, parse("elements"))
    assert torch.equal(masks(result)["2.weight"].mask, mask)
    torch.testing.assert_close(result[2].weight.detach(), new)


def test_the_update_keeps_the_loss_lower_than_the_score_alone() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)), torch.randn(96, 8)
    y = (x[:, :4] + 0.5 * torch.randn(96, 4)).argmax(1)
    task, losses = Task("noisy", train=(x, y), val=(x, y)), {}
    for _ in range(300):  # to where the gradient is small, as surgery takes it to be
        gradients = torch.autograd.grad(task.loss(net(x), Batch(x, y)), list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                parameter -= 0.5 * gradient
    for stage in (WoodFisher(0.3), Prune(0.3, score="woodfisher", allocation="uniform")):
        losses[type(stage).__name__] = float(task.loss(predict(stage(net, task, None), x), Batch(x, y)))
    assert losses["WoodFisher"] < losses["Prune"]


def test_any_layer_can_be_pruned_and_errors_say_what_to_do() -> None:
    net = nn.Sequential(nn.Embedding(10, 8), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randint(0, 10, (40, 3), generator=torch.Generator().manual_seed(0))
    task = Task("words", train=(x, torch.arange(40) % 3), val=(x, torch.arange(40) % 3))
    result = WoodFisher(0.5, rounds=1)(net, task, None)
    assert set(masks(result)) == {"0.weight", "2.weight"} and not WoodFisher(0.5).skipped(net)
    with pytest.raises(ValueError, match="Pass task="):
        WoodFisher(0.5)(net, None, None)
    for settings in ({"damp": 0.0}, {"size": 0}, {"rounds": 0}, {"sparsity": 50}, {"allocation": "global"}):
        with pytest.raises(ValueError, match="WoodFisher"):
            WoodFisher(**{"sparsity": 0.5, **settings})
