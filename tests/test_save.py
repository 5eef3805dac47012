"""save and deploy: a coded model is as small in each file as its codes count, and computes the same in each runtime."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import lilliput
from lilliput.code.base import codes, pack, realize
from lilliput.errors import NotSupported, StoreError
from lilliput.export.onnx import Session


class Tied(nn.Module):
    """An embedding whose table the output layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Embedding(512, 512), nn.Linear(512, 512, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.embed(ids).mean(1))


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 128, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1]


class Turned(nn.Module):
    """Pairs of numbers turned by angles that are kept as complex numbers, as the rotary positions of Llama are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("phase", torch.polar(torch.ones(8), torch.arange(8.0)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.inner(x).reshape(-1, 8, 2))
        return self.out(torch.view_as_real(pairs * self.phase).flatten(1))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(512, 512, bias=False), nn.ReLU(), nn.Linear(512, 4))


def vectors() -> Tensor:
    return torch.randn(4, 512)


def ids() -> Tensor:
    return torch.randint(0, 512, (4, 5))


def conv(kind: type[nn.Module], **settings: object) -> nn.Module:
    return nn.Sequential(kind(64, 64, 3, padding=1, **settings), nn.ReLU())


CASES = {
    # name: model, input, tensor, the operators that compute from the factors, and the most bytes of either file
    "linear": (linear, vectors, "0.weight", {"Product"}, 44_000),
    "root": (lambda: nn.Linear(512, 512), vectors, "weight", {"Product"}, 36_000),
    "embedding": (lambda: nn.Sequential(nn.Embedding(512, 512)), ids, "0.weight", {"Gather", "Product"}, 34_000),
    "padding": (lambda: nn.Sequential(nn.Embedding(512, 512, 3)), ids, "0.weight", {"Gather", "Product"}, 34_000),
    "tied": (Tied, ids, "embed.weight", {"Gather", "Product"}, 34_000),
    "conv1d": (lambda: conv(nn.Conv1d), lambda: torch.randn(2, 64, 9), "0.weight", {"Conv"}, 10_000),
    "conv2d": (lambda: conv(nn.Conv2d), lambda: torch.randn(2, 64, 5, 5), "0.weight", {"Conv"}, 22_500),
    "grouped": (lambda: conv(nn.Conv2d, groups=2), lambda: torch.randn(2, 64, 5, 5), "0.weight", {"Product"}, 13_000),
    "lstm": (Last, lambda: torch.randn(2, 3, 16), "lstm.weight_hh_l0", {"Product", "LSTM"}, 60_000),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "nested"),
    [*((name, "") for name in CASES), ("tied", "uniform"), ("conv2d", "uniform"), ("lstm", "uniform")],
)
def test_low_rank_is_small_in_both_files_and_computes_the_same(name: str, nested: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, inputs, tensor, operators, most = CASES[name]
    model, x = make().eval(), inputs()
    lilliput.attach(model, tensor, lilliput.LowRank(8))
    if nested:
        lilliput.attach(model, tensor, lilliput.Uniform(8))
    with torch.no_grad():
        expected = model(x)
    sizes = lilliput.save(model, x, tmp_path)
    assert sizes == {file: (tmp_path / file).stat().st_size for file in sizes}
    room = 2600 if name == "lstm" else 900  # the graph; that of a coded recurrent layer puts its gates in order
    assert max(sizes["model.onnx"], sizes["model.lil"]) < most + room
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators <= {"Product" if kind in ("MatMul", "Gemm") else kind for kind in kinds}
    deployed = lilliput.deploy(model)(x).detach().numpy()
    for outputs in (lilliput.load(tmp_path)(x).numpy(), Session(tmp_path / "model.onnx").outputs(x), deployed):
        np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)
    assert codes(model) and torch.equal(model(x), expected)
    if nested:
        counted = sum(stored.storage().size_bytes for stored in pack(lilliput.build(model)).values())
        assert sizes["model.lil"] < counted + room


def test_two_products_run_in_the_runtime_and_in_the_engine(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 512)), torch.randn(1, 512)
    lilliput.attach(model, "0.weight", lilliput.LowRank(8))
    sizes = lilliput.save(model, x, tmp_path)
    assert sizes["model.onnx"] < 40_000 and sizes["model.lil"] < 40_000
    Session(tmp_path / "model.onnx", optimised=str(tmp_path / "run.onnx"))
    assert [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node] == ["Gemm", "Gemm"]
    engine = lilliput.compile(tmp_path / "model.onnx", tmp_path / "engine")
    assert [layer["op"] for layer in engine.manifest["layers"]] == ["MatMul", "MatMul"]
    np.testing.assert_allclose(engine(x.numpy()), model(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_mask_over_factors_costs_a_bit_an_entry_and_the_factors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(512, 512, bias=False)), torch.randn(3, 512)
    lilliput.attach(model, "0.weight", lilliput.Masked(torch.rand(512, 512) < 0.5))
    lilliput.attach(model, "0.weight", lilliput.LowRank(8))
    expected = model(x).detach()
    sizes = lilliput.save(model, x, tmp_path)
    assert max(sizes["model.onnx"], sizes["model.lil"]) < 512 * 64 + 4 * 8 * 1024 + 900
    np.testing.assert_allclose(Session(tmp_path / "model.onnx").outputs(x), expected, rtol=1e-4, atol=1e-5)


def test_masks_over_the_factors_of_a_tied_tensor_stay_with_both_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied(), ids()
    lilliput.attach(model, "embed.weight", lilliput.LowRank(8))
    lilliput.attach(model, "embed.weight", lilliput.Uniform(4))
    built = lilliput.build(model)
    torch.testing.assert_close(built(x), model(x), rtol=1e-4, atol=1e-4)
    shared = [name for name, stored in pack(built).items() if stored.refers]
    assert len(shared) == 2 and all(code[-1].bits == 4 for code in codes(built).values())
    assert lilliput.save(model, x, tmp_path)["model.lil"] < 8 * 1024 // 2 + 1100


def test_what_would_save_nothing_or_cannot_be_built_is_decoded() -> None:
    torch.manual_seed(0)
    full, x = nn.Sequential(nn.Linear(16, 16)), torch.randn(2, 16)
    lilliput.attach(full, "0.weight", lilliput.LowRank(8))
    assert type(lilliput.deploy(full)[0]) is nn.Linear and len(lilliput.build(full)[0]) == 2
    torch.testing.assert_close(lilliput.deploy(full)(x), full(x))
    limited = nn.Sequential(nn.Embedding(64, 64, max_norm=1.0))
    lilliput.attach(limited, "0.weight", lilliput.LowRank(2))
    assert type(lilliput.deploy(limited)[0]) is nn.Embedding
    attention = nn.MultiheadAttention(64, 2)
    lilliput.attach(attention, "out_proj.weight", lilliput.LowRank(2))
    assert isinstance(lilliput.deploy(attention).out_proj, nn.Linear)


def test_a_layer_that_is_called_twice_is_built_once() -> None:
    layer = nn.Linear(64, 64)
    model, x = nn.Sequential(layer, nn.ReLU(), layer), torch.randn(2, 64)
    lilliput.attach(model, "0.weight", lilliput.LowRank(2))
    deployed = lilliput.deploy(model)
    assert deployed[0] is deployed[2] and len(deployed[0]) == 2
    torch.testing.assert_close(deployed(x), model(x))
    torch.testing.assert_close(deployed[0].weight, realize(model)[0].weight)
    assert deployed[0].bias is not None


def test_a_code_that_refuses_names_itself_the_tensor_and_the_reason() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for tensor, code, reason in (
        ("0.bias", lilliput.LowRank(2), r"LowRank cannot store 0\.bias: it has 1 axes"),
        ("0.weight", lilliput.Masked(torch.ones(4, 4)), r"Masked cannot store 0\.weight: the mask has the shape"),
    ):
        with pytest.raises(NotSupported, match=reason):
            lilliput.attach(model, tensor, code)
        assert not codes(model) and type(model[0]) is nn.Linear
    lilliput.attach(model, "0.weight", lilliput.LowRank(2))
    with pytest.raises(NotSupported, match="Masked cannot store"):
        lilliput.attach(model, "0.weight", lilliput.Masked(torch.ones(8, 2)))  # it fits one factor, not the other
    assert [type(code) for code in codes(model)["0.weight"]] == [lilliput.LowRank]


def test_nothing_is_written_where_a_file_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        lilliput.save(nn.Linear(4, 4), torch.zeros(1, 4), tmp_path / "taken" / "out")


def test_encode_attaches_any_code_and_is_plain_data() -> None:
    stage = lilliput.Encode(lilliput.LowRank(8), where="0")
    recipe = lilliput.Recipe((stage, lilliput.Encode({"code": "Uniform", "bits": 4}, where="2")))
    assert recipe.data() == [
        {"stage": "Encode", "code": {"code": "LowRank", "rank": 8}, "where": "0"},
        {"stage": "Encode", "code": {"code": "Uniform", "bits": 4}, "where": "2"},
    ]
    assert lilliput.Recipe.parse(recipe.data()) == recipe and hash(stage) == hash(
        lilliput.Encode(stage.code, where="0")
    )
    model = linear()
    for stage in recipe.stages:
        model = stage(model, None, None)
    assert [type(chain[0]).__name__ for chain in codes(model).values()] == ["LowRank", "Uniform"]
    with pytest.raises(KeyError, match="Did you mean 'LowRank'"):
        lilliput.Encode({"code": "LowRnk", "rank": 8})
    with pytest.raises(TypeError, match="LowRank: its settings must be"):
        lilliput.Encode({"code": "LowRank", "ranks": 8})
    with pytest.raises(TypeError, match="Masked: a mask must be given"):
        lilliput.Encode({"code": "Masked"})


def test_complex_numbers_are_saved_and_restored(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Turned().eval(), torch.randn(5, 16)
    lilliput.attach(net, "inner.weight", lilliput.LowRank(2))
    lilliput.save(net, x[:1], tmp_path)
    expected = net(x).detach()
    for made in (Session(tmp_path / "model.onnx"), lilliput.load(tmp_path), lilliput.restore(tmp_path, Turned())):
        torch.testing.assert_close(made(x), expected, atol=1e-5, rtol=1e-5)
