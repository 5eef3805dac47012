"""Coded networks: choosing tensors, nesting, tied weights, and the kinds of layer that are easily broken."""

import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.code.base import attach, codes, copy_model, pack, realize
from lilliput.code.deploy import build
from lilliput.code.low_rank import LowRank
from lilliput.code.masked import Masked
from lilliput.code.names import find
from lilliput.errors import NotSupported
from lilliput.export.onnx import Session, trace
from lilliput.factor.svd import Factorize
from lilliput.prune.prune import Prune
from lilliput.quant.activations import Activation, QuantizeActivations
from lilliput.quant.half import Half
from lilliput.quant.quantize import Quantize
from lilliput.quant.uniform import Uniform
from lilliput.stored.shared import Shared
from lilliput.task import Task


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Tied(nn.Module):
    """A decoder that shares the encoder's matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.mid = nn.Embedding(10, 8), nn.Linear(8, 10, bias=False), nn.Linear(8, 8)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mid(self.embed(x)).mean(1))


class Unused(nn.Module):
    """A layer and a parameter that no forward pass reads, a frozen layer, and a module that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.extra = nn.Parameter(torch.randn(8, 4))
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.used(self.used(x)))


class Own(nn.Module):
    """A custom module with parameters of its own, read by name and by index."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 8), torch.randn(8, 8)])
        self.scale = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = F.relu(x @ weight)
        return x @ self.scale.T


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(8, 6, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0][:, -1]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].mean(1)


def transformer() -> nn.Module:
    return nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.ConvTranspose2d(8, 4, 2),
        nn.Flatten(),
    )


def normalised() -> nn.Module:
    weight_norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))


ODD = {
    "normalised": (normalised, lambda: torch.randn(12, 8)),
    "tied": (Tied, lambda: torch.randint(0, 10, (12, 5))),
    "unused": (Unused, lambda: torch.randn(12, 8)),
    "own": (Own, lambda: torch.randn(12, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), lambda: torch.randn(12, 5, 8)),
    "gru": (lambda: Recurrent(nn.GRU), lambda: torch.randn(12, 5, 8)),
    "attention": (Attention, lambda: torch.randn(12, 5, 8)),
    "transformer": (transformer, lambda: torch.randn(12, 5, 8)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.ReLU(), nn.Flatten()), lambda: torch.randn(12, 4, 9)),
    "groups": (convolutions, lambda: torch.randn(12, 4, 6, 6)),
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(
    "stage",
    [
        Prune(0.5),
        Prune(0.5, "taylor"),
        Prune(0.5, pattern="2:4", allocation="uniform"),
        Quantize(4),
        Factorize(rank=1),
        Prune(0.4, "wanda"),
    ],
    ids=["magnitude", "taylor", "2:4", "quantize", "factorize", "wanda"],
)
def test_odd_networks_are_shrunk_or_left_alone_with_a_reason(name: str, stage) -> None:
    torch.manual_seed(0)
    make, inputs = ODD[name]
    model, x = make().eval(), inputs()
    with torch.no_grad():
        before = model(x)
    task = Task("odd", (x, torch.zeros_like(before)), (x, torch.zeros_like(before)), loss="mse", metric="mse")
    try:
        shrunk = stage(model, task, None)
    except ValueError as error:
        skipped = stage.skipped(model)
        assert skipped and all(skipped.values()) and next(iter(skipped.values())) in str(error)
        return
    skipped = stage.skipped(model)
    assert all(skipped.values())
    with torch.no_grad():
        after, plain = shrunk(x), realize(shrunk)
        assert after.isfinite().all() and not torch.equal(after, before)
        torch.testing.assert_close(plain(x), after)
        assert torch.equal(model(x), before)
    touched = set(codes(shrunk)) if not isinstance(stage, Factorize) else set(stage.ranks(model))
    weights = set(find(model))
    assert weights <= touched | set(skipped), "a tensor that is neither coded nor left alone with a reason"
    shrunk.train()
    shrunk(x).square().mean().backward()
    torch.testing.assert_close(copy_model(shrunk).eval()(x), shrunk.eval()(x))


def test_tied_weights_stay_one_tensor() -> None:
    model = Tied()
    for stage in (Prune(0.5), Quantize(4)):
        shrunk = stage(model, None, None)
        assert shrunk.out.weight is shrunk.embed.weight and set(stage.skipped(model)) == {"embed.weight"}
        assert "mid.weight" in codes(shrunk)
    coded, x = copy_model(model), torch.randint(0, 10, (3, 5))
    attach(coded, "out.weight", Uniform(4))
    assert set(codes(coded)) == {"embed.weight"} and torch.equal(coded.out.weight, coded.embed.weight)
    for plain in (realize(coded), realize(copy_model(coded))):
        assert plain.out.weight is plain.embed.weight
        torch.testing.assert_close(plain(x), coded(x))
    stored = pack(coded)
    assert isinstance(stored["out.weight"], Shared) and stored["out.weight"].storage().bits == 0
    coded(x).sum().backward()
    assert len([p for p in coded.parameters() if p.grad is not None]) == 4  # one weight, one scale; mid has two


def test_another_parametrization_is_left_alone_and_realized() -> None:
    model, x = normalised(), torch.randn(3, 8)
    assert "WeightNorm computes it" in Prune(0.5).skipped(model)["0.weight"]
    with pytest.raises(NotSupported, match="remove_parametrizations"):
        attach(copy_model(model), "0.weight", Half())
    shrunk = Quantize(8)(model, None, None)
    assert set(codes(shrunk)) == {"2.weight", "0.bias", "2.bias"}
    np.testing.assert_array_equal(pack(shrunk)["0.weight"].decode(), shrunk[0].weight.detach().numpy())
    torch.testing.assert_close(realize(shrunk)(x), shrunk(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_float_types_keep_their_type(dtype: torch.dtype) -> None:
    model, x = net().to(dtype), torch.randn(3, 8, dtype=dtype)
    for stage in (Prune(0.5), Quantize(4), Factorize(rank=2)):
        coded = stage(model, None, None)
        assert coded(x).dtype == dtype and all(p.dtype == dtype for p in realize(coded).parameters())
        coded(x).sum().backward()


def test_where_chooses_by_glob_and_names_near_misses() -> None:
    assert find(net(), "0") == ["0.weight"] and find(net(), "0,2") == find(net()) == ["0.weight", "2.weight"]
    assert find(net(), "0.bias") == ["0.bias"]
    with pytest.raises(ValueError, match=r"Prune: where must match .* got 'layer0'"):
        Prune(0.5, where="layer0")(net(), None, None)


def test_quantizing_under_a_mask_keeps_the_zeros_and_fits_the_kept() -> None:
    model = Prune(0.75)(net(), None, None)
    theta = model[0].parametrizations.weight.original
    with torch.no_grad():
        theta += 100 * ~model[0].parametrizations.weight[0].mask  # what a mask drops must not stretch the range
    for rule in ("minmax", "mse", "percentile"):
        coded = Quantize(8, range=rule)(model, None, None)
        assert [type(code).__name__ for code in codes(coded)["0.weight"]] == ["Masked", "Uniform"]
        assert ((coded[0].weight == 0) >= (model[0].weight == 0)).all()
        assert (coded[0].weight - model[0].weight).abs().max() < 0.01
        assert torch.equal(realize(coded)[0].weight, coded[0].weight)


def test_codes_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(NotSupported, match="Prune first, then quantize"):
        Prune(0.5)(Quantize(8)(net(), None, None), None, None)
    with pytest.raises(NotSupported, match="must not be quantized yet"):
        Quantize(4)(Quantize(8)(net(), None, None), None, None)
    with pytest.raises(ValueError, match="realize it first"):
        Factorize(rank=1)(Prune(0.5)(net(), None, None), None, None)


def test_factors_can_be_quantized_and_still_be_built() -> None:
    model, x = net(), torch.randn(3, 8)
    attach(model, "0.weight", LowRank(2))
    attach(model, "0.weight", Uniform(8))
    built = build(model)
    assert sorted(tuple(p.shape) for p in realize(built)[0].parameters()) == [(2, 8), (16,), (16, 2)]
    torch.testing.assert_close(built(x), model(x))
    assert {name: type(code[0]) for name, code in codes(built).items()} == {
        "0.0.weight": Uniform,
        "0.1.weight": Uniform,
    }


def test_prune_again_only_adds_zeros() -> None:
    first = Prune(0.5)(net(), None, None)
    second = Prune(0.8)(first, None, None)
    assert ((second[0].weight == 0) >= (first[0].weight == 0)).all()
    zeros = sum(int((layer.weight == 0).sum()) for layer in (second[0], second[2]))
    assert zeros == round(0.8 * 192) and len(codes(second)["0.weight"]) == 1


def test_bits_are_given_by_name_and_biases_in_half() -> None:
    coded = Quantize(8, allocation=(("2.weight", 2),))(net(), None, None)
    assert codes(coded)["0.weight"][0].bits == 8 and codes(coded)["2.weight"][0].bits == 2
    assert isinstance(codes(coded)["0.bias"][0], Half)
    assert "0.bias" not in codes(Quantize(8, biases="float32")(net(), None, None))
    with pytest.raises(ValueError, match=r"allocation must name .* got '3.weight'.*'2.weight'"):
        Quantize(8, allocation=(("3.weight", 2),))(net(), None, None)


def test_a_group_that_does_not_divide_falls_back_to_channels() -> None:
    coded = Quantize(4, per=16)(nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 4)), None, None)
    assert codes(coded)["0.weight"][0].per == 16 and codes(coded)["1.weight"][0].per == "channel"
    with pytest.raises(ValueError, match="must divide the 6 values"):
        Uniform(4, per=4).encode(torch.randn(2, 6))


def test_weights_that_are_not_finite_are_refused() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weights must be finite"):
        Quantize(8)(model, None, None)


def test_a_coded_state_is_plain_tensors() -> None:
    """A store writes state dicts and reads them with weights_only."""
    model = Quantize(4)(Prune(0.5)(net(), None, None), None, None)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Quantize(4)(Prune(0.5)(net(), None, None), None, None)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_a_mask_keeps_its_gradient_and_its_shape() -> None:
    code = Masked(torch.tensor([[True, False]]))
    theta = torch.tensor([[2.0, 3.0]], requires_grad=True)
    code(theta).sum().backward()
    assert theta.grad is not None and theta.grad.tolist() == [[1.0, 0.0]] and code.sparsity == 0.5


def activations() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(32, 1, 6, 6)
    return model, Task("pictures", (x, torch.zeros(32).long()), (x, torch.zeros(32).long()))


def test_activations_are_rounded_once_and_survive_copies() -> None:
    model, task = activations()
    x, _ = task.split("val")
    coded = QuantizeActivations(4)(model, task, None)
    names = [name for name, module in coded.named_modules() if isinstance(module, Activation)]
    assert names == ["1.output_code"], "neither what feeds a ReLU nor the answer is rounded"
    out = coded(x)
    assert coded[:2](x).unique().numel() <= 16 and (out - model(x)).abs().max() < 0.5
    assert QuantizeActivations(4, where="3")(model, task, None)(x).unique().numel() <= 16
    assert torch.equal(copy_model(coded)(x), out)
    assert (realize(Quantize(8)(coded, None, None))(x) - out).abs().max() < 0.1
    other = QuantizeActivations(4)(model, task, None)
    other[1].output_code.scale.fill_(9.0)
    other.load_state_dict(coded.state_dict())
    assert torch.equal(other(x), out)
    coded.train()(x).sum().backward()
    assert coded[0].weight.grad.abs().sum() > 0
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("bits", [8, 3])
def test_activations_export_as_quantize_and_dequantize(bits: int) -> None:
    model, task = activations()
    coded = QuantizeActivations(bits)(model, task, None)
    structure = trace(coded, task.example)
    kinds = [node.op_type for node in structure.proto.graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 1
    x, _ = task.split("val")
    with torch.no_grad():
        np.testing.assert_allclose(Session(structure.write(pack(coded))).outputs(x), coded(x).numpy(), atol=1e-5)


def test_wrong_settings_say_what_to_do() -> None:
    for make, text in (
        (lambda: Prune(90), r"Prune: sparsity must be in \[0, 1\), got 90. For 90% write 0.9."),
        (lambda: Prune(), "sparsity must be given"),
        (lambda: Prune(0.6, pattern="2:4"), "at most 0.5 with pattern '2:4'"),
        (lambda: Quantize(1), "bits must be from 2 to 16, got 1"),
        (lambda: Factorize(), "exactly one of"),
        (lambda: Factorize(energy=90.0), r"energy must be in \(0, 1\), got 90"),
        (lambda: QuantizeActivations(16), "bits must be from 2 to 8"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    for make, text in (
        (lambda: Prune(0.5, score="magnitud"), "Did you mean 'magnitude'"),
        (lambda: Prune(0.5, pattern="4x1"), "got '4x1'"),
        (lambda: Prune(0.5, allocation="globl"), "Did you mean 'global'"),
        (lambda: Quantize(8, range="mean"), "Quantize: range must be a known range, got 'mean'"),
        (lambda: Quantize(8, grid="unifrm"), "Quantize: grid .*Did you mean 'uniform'"),
        (lambda: Quantize(8, rounding="gtpq"), "Quantize: rounding .*Did you mean 'gptq'"),
        (lambda: QuantizeActivations(range="minmx"), "QuantizeActivations: range .*Did you mean 'minmax'"),
        (lambda: Uniform(8, range="minmx"), "Uniform: range .*Did you mean 'minmax'"),
    ):
        with pytest.raises(KeyError, match=text):
            make()
    with pytest.raises(ValueError, match=r"2:4: groups of 4 must divide the 6 values .* Leave this tensor out"):
        Prune(0.5, pattern="2:4")(nn.Sequential(nn.Linear(6, 2)), None, None)
    with pytest.raises(ValueError, match="a task must be given"):
        Prune(0.5, score="wanda")(net(), None, None)


def test_a_module_held_in_two_places_is_coded_once_and_not_split() -> None:
    layer = nn.Linear(8, 8)
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(3, 8)
    pruned = Prune(0.5)(model, None, None)
    assert pruned[0] is pruned[2] and list(codes(pruned)) == ["0.weight"]
    plain = realize(pruned)
    assert plain[0] is plain[2]
    torch.testing.assert_close(plain(x), pruned(x))
    assert Factorize(rank=1).skipped(model) == {"0.weight": "the layer is held in several places"}


def test_the_transposed_linear_layer_of_gpt2() -> None:
    kind = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(kind(6, 8)).eval()  # weight (in, out) = (8, 6)
    x = torch.randn(20, 8) * torch.arange(8)
    task = Task("gpt", (x, torch.zeros(20, 6)), (x, torch.zeros(20, 6)), loss="mse", metric="mse")
    pruned = Prune(0.5, "wanda")(model, task, None)
    assert (pruned[0].weight[0] == 0).all() and int((pruned[0].weight == 0).sum()) == 24, "input 0 is always zero"
    assert Prune(0.5, "wanda")(pruned, task, None)[0].weight.equal(pruned[0].weight)
    assert "neither linear nor a convolution" in Factorize(rank=1).skipped(model)["0.weight"]
