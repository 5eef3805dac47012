"""Facts of SparseGPT (arXiv:2301.00774), and what every method that goes layer by layer promises."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lilliput.code.base import attach, codes
from lilliput.data.mnist1d import mnist1d_mlp
from lilliput.errors import NotSupported
from lilliput.nets.bert import SentenceBert
from lilliput.prune import layers
from lilliput.prune.masks import masks
from lilliput.prune.obc import OBC
from lilliput.prune.patterns import parse
from lilliput.prune.prune import Prune
from lilliput.prune.reconstruct import Reconstruct
from lilliput.prune.sparsegpt import SparseGPT, sparsegpt
from lilliput.quant.uniform import Uniform
from lilliput.statistics.hessian import damped, products, unfold
from lilliput.task import Task, predict


def layer(rows: int = 16, d: int = 32, samples: int = 200) -> tuple[Tensor, Tensor]:
    """Weights and H of a layer, in float64: inputs of different size, any two correlated by a half."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(1, samples, generator=generator) + torch.randn(d, samples, generator=generator)
    X = X.double() * torch.linspace(0.5, 2, d)[:, None]
    return torch.randn(rows, d, generator=generator).double(), (X @ X.T)[None]


def task_of(x: Tensor) -> Task:
    return Task("some", train=(x, None), val=(x, None), loss="mse", metric="mse")


def test_the_update_is_the_best_that_the_columns_behind_can_do() -> None:
    """One column dropped: the columns to its right solve least squares on what its output was."""
    W, H = layer(3, 6)
    only = torch.ones_like(W, dtype=torch.bool)
    only[:, 2] = False

    class Second(type(parse("elements"))):  # a pattern that drops the third column
        def __call__(self, score: Tensor, sparsity: float) -> Tensor:
            return only

    new, mask = sparsegpt(W, H, 1 / 6, Second(), damp=0.0)
    assert torch.equal(mask, only) and torch.equal(new[:, :2], W[:, :2])
    gap = torch.linalg.solve(H[0, 3:, 3:], H[0, 3:, 2])[None] * W[:, 2:3]
    torch.testing.assert_close(new[:, 3:], W[:, 3:] + gap)


@pytest.mark.parametrize("width", [4, 16, 128])
def test_algorithm_1_lazy_updates_change_nothing_for_a_given_mask(width: int) -> None:
    W, H = layer()
    H = damped(H, 0.01)[0]
    new, mask = sparsegpt(W, H, 0.5, parse("2:4"), width=width, damp=0.0)
    assert torch.equal(mask, sparsegpt(W, H, 0.5, parse("2:4"), width=32, damp=0.0)[1])
    plain = W.clone()
    for j in range(W.shape[1]):  # without blocks, from the definition: the inverse of what is left
        left = H[0, j:, j:].inverse()
        plain[:, j:] -= (plain[:, j] * ~mask[:, j])[:, None] / left[0, 0] * left[0]
    torch.testing.assert_close(new, plain * mask)


@pytest.mark.parametrize("pattern", ["elements", "even", "2:4", "1:4", "4:8", "block 4x1", "block 1x4", "block 2x2"])
@pytest.mark.parametrize("method", [SparseGPT, OBC])
def test_masks_are_exact(method: type, pattern: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 8)), torch.randn(100, 24)
    kind = parse(pattern)
    sparsity = min(0.6, kind.most)
    result = method(sparsity, pattern=pattern)(net, task_of(x), None)
    for name, code in masks(result).items():
        assert torch.equal(kind(code.mask.double(), sparsity), code.mask), name
        zeros = int((result.get_submodule(name[0]).weight == 0).sum())
        plain = kind(net.get_parameter(name).detach().abs(), sparsity)
        assert zeros == int((~plain).sum()) == int((~code.mask).sum())


@pytest.mark.parametrize("width", [1, 3, 7, 16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.98, 0.999])
def test_counts_are_exact_in_blocks_of_any_width(width: int, sparsity: float) -> None:
    W, H = layer(6, 16)
    for pattern in ("elements", "even", "block 2x1", "block 1x2"):
        _, mask = sparsegpt(W, H, sparsity, parse(pattern), width=width)
        assert int(mask.sum()) == int(parse(pattern)(W.abs(), sparsity).sum())


def test_dead_inputs_go_first_and_break_nothing() -> None:
    """As in the paper's implementation: H_jj = 1 and no weight where an input is always zero."""
    W, H = layer(8, 16, 5)  # fewer samples than inputs: singular
    H[:, 3] = H[:, :, 3] = 0
    for pattern in ("elements", "2:4"):
        new, mask = sparsegpt(W, H, 0.5, parse(pattern))
        assert new.isfinite().all() and not mask[:, 3].any() and int(mask.sum()) == 64
    new, mask = sparsegpt(W, torch.zeros(1, 16, 16).double(), 0.5, parse("elements"))
    assert torch.equal(new, W * mask) and int(mask.sum()) == 64


@pytest.mark.parametrize(("conv", "shape"), [
    (nn.Conv1d(3, 4, 5, stride=2, padding=1), (2, 3, 11)),
    (nn.Conv2d(4, 6, 3, padding="same", dilation=2, groups=2), (2, 4, 7, 5)),
    (nn.Conv2d(4, 4, (3, 1), stride=2, padding=(1, 0), groups=4, padding_mode="reflect"), (2, 4, 6, 6)),
    (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 3))])  # fmt: skip
def test_a_convolution_is_a_product_with_its_unfolded_inputs(conv: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = unfold(conv, x)
    y = conv.weight.view(conv.groups, -1, rows.shape[1]) @ rows  # (groups, out / groups, samples)
    expected = conv(x) - conv.bias.view(1, -1, *(1,) * (len(shape) - 2))
    torch.testing.assert_close(y.flatten(0, 1), expected.transpose(0, 1).flatten(1))
    torch.testing.assert_close(products(conv, x), (rows.double() @ rows.double().transpose(1, 2)), rtol=1e-4, atol=1e-4)


def test_a_layer_sees_what_the_pruned_ones_before_it_give(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(150, 12)
    result = SparseGPT(0.5)(net, task_of(x), None)
    seen = torch.relu(result[0](x)).detach()
    new, mask = sparsegpt(net[2].weight.detach(), products(net[2], seen), 0.5, parse("elements"))
    assert torch.equal(masks(result)["2.weight"].mask, mask)
    torch.testing.assert_close(result[2].weight, new, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(layers, "HELD_BYTES", 0)  # as many passes as layers, in batches
    again = SparseGPT(0.5)(net, task_of(x), None)
    torch.testing.assert_close(again[2].weight, result[2].weight, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_called_twice_is_matched_on_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(torch.relu(self.inner(x)))

    torch.manual_seed(0)
    net, x = Twice(), torch.randn(90, 8)
    result = SparseGPT(0.5)(net, task_of(x), None)
    both = products(net.inner, x) + products(net.inner, torch.relu(net.inner(x)))
    new, _ = sparsegpt(net.inner.weight.detach(), both, 0.5, parse("elements"))
    torch.testing.assert_close(result.inner.weight, new, rtol=1e-4, atol=1e-5)
    assert set(masks(result)) == {"inner.weight"}  # what is never called has no inputs


@pytest.mark.parametrize("method", [SparseGPT(0.5, pattern="2:4", where="layers.*"), OBC(0.4, where="layers.*")])
def test_attention_is_pruned_and_embeddings_are_left(method: SparseGPT) -> None:
    torch.manual_seed(0)
    net = SentenceBert(words=50, layers=2, width=16, heads=2, hidden=32)
    inputs = {"input_ids": torch.randint(0, 50, (40, 6)), "attention_mask": torch.ones(40, 6, dtype=torch.long)}
    task = Task("texts", train=(inputs, None), val=(inputs, None), loss="mse", metric="mse")
    result = method(net, task, None)
    assert len(masks(result)) == 12 and "layers.1.attention.query.weight" in masks(result)
    assert predict(result, inputs).isfinite().all()
    everything = type(method)(0.5)
    assert list(everything.skipped(net)) == ["word.weight", "position.weight"]
    assert "inputs cannot be seen" in everything.skipped(net)["word.weight"]


def test_allocations() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 4)), torch.randn(64, 32)
    pairs = SparseGPT(allocation=(("0.weight", 0.75),))(net, task_of(x), None)
    assert {name: code.sparsity for name, code in masks(pairs).items()} == {"0.weight": 0.75}
    kernel = masks(SparseGPT(0.6, allocation="erk")(net, task_of(x), None))
    assert kernel["1.weight"].sparsity < 0.6 < kernel["0.weight"].sparsity


def test_errors_say_what_to_do() -> None:
    net, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(8, 4)
    for settings, words in [
        ({"sparsity": 90}, "For 90% write 0.9"),
        ({}, "sparsity must be given"),
        ({"sparsity": 0.5, "allocation": "global"}, "before the next one is seen"),
        ({"sparsity": 0.5, "pattern": "channel"}, "lilliput.graph"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "at most 0.5"),
        ({"sparsity": 0.5, "damp": -1}, "damp"),
        ({"sparsity": 0.5, "examples": 0}, "examples"),
        ({"sparsity": 0.5, "width": 0}, "width"),
    ]:
        with pytest.raises(ValueError, match=words):
            SparseGPT(**settings)
    with pytest.raises(ValueError, match="Pass task="):
        SparseGPT(0.5)(net, None, None)
    with pytest.raises(ValueError, match="inputs cannot be seen"):
        SparseGPT(0.5)(nn.Embedding(3, 4), task_of(torch.zeros(4, 1).long()), None)
    with pytest.raises(ValueError, match=r"inputs of 0\.weight must be finite"):
        SparseGPT(0.5)(net, task_of(torch.full((4, 4), torch.nan)), None)
    coded = copy.deepcopy(net)
    attach(coded, "0.weight", Uniform())
    with pytest.raises(NotSupported, match="Prune first"):
        SparseGPT(0.5)(coded, task_of(x), None)


@pytest.mark.slow
def test_half_of_a_trained_network_goes_for_less_than_by_magnitude() -> None:
    net, task = mnist1d_mlp()
    scores = {}
    for stage in (Prune(0.5, allocation="uniform"), SparseGPT(0.5)):
        result = stage(net, task, None)
        assert all(code[0].sparsity == 0.5 for code in codes(result).values())
        scores[type(stage).__name__] = task.score(result, "val").value
        if isinstance(stage, Prune):
            scores["Reconstruct"] = task.score(Reconstruct()(result, task, None), "val").value
    dense = task.score(net, "val").value
    assert scores["Prune"] < scores["Reconstruct"] < dense + 0.02
    assert scores["SparseGPT"] > scores["Prune"]
