"""Facts of Optimal Brain Compression (arXiv:2208.11580), and of reconstruction under a given mask."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from lilliput.prune.masks import masks
from lilliput.prune.obc import OBC, obc, traces
from lilliput.prune.patterns import parse
from lilliput.prune.prune import Prune
from lilliput.prune.reconstruct import Reconstruct, reconstruct
from lilliput.prune.sparsegpt import sparsegpt
from lilliput.stage import Reference
from lilliput.statistics.hessian import damped
from lilliput.task import Task


def layer(rows: int, d: int, samples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, inputs and H of a layer whose inputs have something to do with each other, in float64."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(d, d, generator=generator).double() @ torch.randn(d, samples, generator=generator).double()
    return torch.randn(rows, d, generator=generator).double(), X, (X @ X.T)[None]


def error(W: Tensor, new: Tensor, H: Tensor) -> float:
    return float(((W - new) @ H[0] * (W - new)).sum())


def best(w: Tensor, kept: list[int], X: Tensor) -> tuple[float, Tensor]:
    """By least squares on the kept inputs, from scratch: the error and the weights."""
    new = torch.zeros_like(w)
    if kept:
        new[kept] = torch.linalg.lstsq(X[kept].T, X.T @ w, driver="gelsd").solution
    return float((X.T @ (w - new)).square().sum()), new


def test_reconstruct_is_least_squares_on_the_kept_columns() -> None:
    W, X, H = layer(10, 24)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[3], mask[4] = False, True
    new = reconstruct(W, mask, H)
    for w, kept, row in zip(W, mask, new, strict=True):
        torch.testing.assert_close(row, best(w, kept.nonzero()[:, 0].tolist(), X)[1])
    torch.testing.assert_close(new[4], W[4])
    assert not new[3].any() and new.dtype == W.dtype and reconstruct(W.float(), mask, H).dtype == torch.float32


def test_reconstruct_of_groups_is_that_of_each() -> None:
    (a, _, H), (b, _, K) = layer(4, 8), layer(4, 8, seed=1)
    W, mask = torch.cat([a, b]), torch.arange(64).view(8, 8) % 3 != 0
    both = reconstruct(W.view(8, 2, 2, 2), mask.view(8, 2, 2, 2), torch.cat([H, K])).view(8, 8)
    torch.testing.assert_close(both, torch.cat([reconstruct(a, mask[:4], H), reconstruct(b, mask[4:], K)]))


def test_algorithm_1_every_step_is_the_best_one_and_its_update_least_squares() -> None:
    """A row of six against all that could be dropped next, each with weights from scratch."""
    W, X, H = layer(3, 6)
    order, loss = traces(W[None], H, parse("elements"))
    for w, chosen, lost in zip(W, order.tolist(), loss, strict=True):
        kept, before = list(range(6)), 0.0
        for p, rise in zip(chosen, lost, strict=True):
            errors = {q: best(w, [k for k in kept if k != q], X)[0] for q in kept}
            assert p == min(errors, key=errors.get)
            assert float(rise) == pytest.approx(errors[p] - before, rel=1e-6, abs=1e-7)
            kept.remove(p)
            before = errors[p]
        assert float(lost.sum()) == pytest.approx(float((X.T @ w).square().sum()))


def test_compact_matrices_change_nothing() -> None:
    """Above 16 inputs what is gone leaves the matrices: the order of a plain greedy loop."""
    W, _, H = layer(2, 40)
    order, _ = traces(W[None], H, parse("elements"))
    for w, chosen in zip(W.clone(), order.tolist(), strict=True):
        inverse, left = H[0].inverse(), torch.ones(40, dtype=torch.bool)
        for p in chosen:
            assert p == int((w.square() / inverse.diagonal()).masked_fill(~left, torch.inf).argmin())
            w -= w[p] / inverse[p, p] * inverse[p].clone()
            inverse -= torch.outer(inverse[p], inverse[p]) / inverse[p, p]
            left[p], w[p] = False, 0
            inverse[p, p] = 1.0


def test_the_global_step_takes_the_cheapest_next_removal_wherever_it_is() -> None:
    W, _, H = layer(5, 8)
    H = damped(H, 0.01)[0]
    order, loss = traces(W[None], H, parse("elements"))
    mask, at = torch.ones_like(W, dtype=torch.bool), [0] * 5
    for _ in range(20):  # the paper's heap
        row = min((r for r in range(5) if at[r] < 8), key=lambda r: float(loss[r, at[r]]))
        mask[row, order[row, at[row]]] = False
        at[row] += 1
    new, kept = obc(W, H, 0.5, parse("elements"), damp=0.0)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(new, reconstruct(W, mask, H))


@pytest.mark.parametrize("pattern", ["block 1x2", "block 2x1", "block 2x2"])
def test_blocks_go_by_what_they_cost_together(pattern: str) -> None:
    W, X, H = layer(2, 6)
    order, loss = traces(W[None], H, parse(pattern))
    down, across = map(int, pattern[6:].split("x"))
    assert order.shape == (2 // down, 6 // across)
    for rows, chosen, lost in zip(W.split(down), order.tolist(), loss, strict=True):
        options = []
        for b in range(6 // across):
            kept = [k for k in range(6) if k // across != b]
            options.append(sum(best(w, kept, X)[0] for w in rows))
        assert chosen[0] == min(range(len(options)), key=options.__getitem__)
        assert float(lost[0]) == pytest.approx(min(options))
        assert float(lost.sum()) == pytest.approx(float((rows @ X).square().sum()))


def test_two_of_four_is_exact_and_near_the_best_of_all_masks() -> None:
    W, X, H = layer(6, 8)
    new, mask = obc(W, H, 0.5, parse("2:4"), damp=0.0)
    assert (mask.view(-1, 4).sum(1) == 2).all()
    for w, row, got in zip(W, mask, new, strict=True):
        pairs = list(itertools.combinations(range(4), 2))
        least = min(best(w, [*a, *(4 + k for k in b)], X)[0] for a in pairs for b in pairs)
        error = best(w, row.nonzero()[:, 0].tolist(), X)[0]
        assert least <= error * (1 + 1e-9) and float((X.T @ (w - got)).square().sum()) == pytest.approx(error)
    intact = obc(W, H, 0.25, parse("2:4"), damp=0.0)[1].view(-1, 4).sum(1)
    assert sorted(intact.tolist()) == [2] * 6 + [4] * 6


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.9])
def test_order_of_the_methods_on_one_layer(sparsity: float) -> None:
    """By definition, for any mask: no weights under it do better than reconstruct's. Which mask is better is seen, on
    inputs of different size of which any two are correlated by a half; on much stronger correlations SparseGPT, whose
    last columns have none behind them, falls behind the best weights under the mask of magnitudes.
    """
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1, 500, generator=generator) + torch.randn(64, 500, generator=generator)
    X = X.double() * torch.linspace(0.5, 2, 64)[:, None]
    W, H = torch.randn(32, 64, generator=generator).double(), (X @ X.T)[None]
    even, elements = parse("even"), parse("elements")
    magnitude, wanda = even(W.abs(), sparsity), even(W.abs() * H[0].diagonal().sqrt(), sparsity)
    greedy, forward = (method(W, H, sparsity, elements, damp=1e-6) for method in (obc, sparsegpt))
    for new, mask in ((*forward,), (W * wanda, wanda), (W * magnitude, magnitude)):
        assert error(W, reconstruct(W, mask, H), H) <= error(W, new, H)
    errors = [error(W, new, H) for new in (greedy[0], forward[0], reconstruct(W, magnitude, H), W * wanda,
                                           W * magnitude)]  # fmt: skip
    assert errors == sorted(errors)


def test_singular_inputs_are_damped_and_dead_ones_go_first() -> None:
    W, _, H = layer(8, 16, samples=5)
    H[:, 3] = H[:, :, 3] = 0
    for pattern in ("elements", "even", "2:4"):
        new, mask = obc(W, H, 0.5, parse(pattern))
        assert new.isfinite().all() and not mask[:, 3].any() and int(mask.sum()) == 64
    # A kept weight of a dead input keeps its value.
    every = torch.ones_like(W, dtype=torch.bool)
    torch.testing.assert_close(reconstruct(W, every, damped(H, 0.01)[0]), W)


def test_a_depthwise_convolution_goes_group_by_group() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 4, 1)), torch.randn(40, 6, 6, 6)
    task = Task("maps", train=(x, None), val=(x, None), loss="mse", metric="mse")
    y = net(x).detach()
    errors = [
        float((stage(net, task, None)(x).detach() - y).square().mean())
        for stage in (OBC(0.5), Prune(0.5, allocation="uniform"))
    ]
    assert errors == sorted(errors)


def test_reconstruct_after_any_pruning_lowers_the_error_and_keeps_the_mask() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(60, 5))
    x = torch.randn(300, 2, 12)
    task = Task("some", train=(x, None), val=(x, None), loss="mse", metric="mse")
    y = net(x).detach()
    for pattern in ("elements", "block 1x2", "channel"):
        before = Prune(0.5, pattern=pattern, allocation="uniform")(net, task, None)
        for reference in (None, Reference(net, task)):
            after = Reconstruct()(before, task, reference)
            assert all(torch.equal(masks(before)[name].mask, code.mask) for name, code in masks(after).items())
            errors = [float((model(x).detach() - y).square().mean()) for model in (after, before)]
            assert errors == sorted(errors)
    assert Reconstruct().skipped(before) == {}


def test_reconstruct_errors() -> None:
    with pytest.raises(ValueError, match="damp above 0"):
        Reconstruct(damp=0.0)
    net = nn.Sequential(nn.Linear(4, 4))
    task = Task("some", train=(torch.randn(4, 4), None), val=(torch.randn(4, 4), None), loss="mse", metric="mse")
    with pytest.raises(ValueError, match="Pass task="):
        Reconstruct()(Prune(0.5)(net, task, None), None, None)
    two = Prune(0.5, where="0")(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), task, None)
    with pytest.raises(ValueError, match=r"Masked are 0\.weight"):
        Reconstruct(where="1")(two, task, None)
    assert not masks(Reconstruct()(net, task, None))  # nothing is masked, so nothing is to be made up for
