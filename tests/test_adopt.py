"""Networks as people have them are shrunk: wrapped, in other precisions, with weights that are computed from others."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import lilliput
from lilliput.code.adopt import adopted
from lilliput.onnx.session import Session
from lilliput.onnx.trace import trace
from lilliput.task import Task

DRAW = torch.Generator().manual_seed(0)
X = torch.randn(240, 8, generator=DRAW)
TASK = Task("toy", (X[:160], (Y := (X @ torch.randn(8, 3, generator=DRAW)).argmax(1))[:160]), (X[160:], Y[160:]))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = lilliput.run(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), TASK, [lilliput.Train(60)])
    assert isinstance(made, nn.Sequential)
    return made


class Wrapped(nn.Module):
    """A network whose forward pass Accelerate has replaced by one that casts."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self._original_forward = self.forward
        self.forward = lambda x: self.net(x).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Remembers(nn.Module):
    """A network that keeps its last activation, with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.seen: dict[str, list[Tensor]] = {"last": []}

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.net[0](x)
        self.seen["last"] = [self.last]
        return self.net[2](self.net[1](self.last))


class Reshapes(nn.Module):
    """A network that asks for the length of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.reshape(len(x), -1))


def used(model: nn.Module) -> nn.Module:
    model(X)
    return model


def changed(how, **settings) -> nn.Module:
    model = net()
    how(model[0], **settings)
    return model


KINDS = {
    "half": lambda: net().half(),
    "bfloat16": lambda: net().bfloat16(),
    "float64": lambda: net().double(),
    "data parallel": lambda: nn.DataParallel(net()),
    "compiled": lambda: torch.compile(net(), backend="eager"),
    "compiled and parallel": lambda: torch.compile(nn.DataParallel(net()), backend="eager"),
    "weight norm": lambda: changed(parametrizations.weight_norm),
    "spectral norm": lambda: changed(nn.utils.spectral_norm),
    "orthogonal": lambda: changed(parametrizations.orthogonal),
    "pruned": lambda: changed(prune.l1_unstructured, name="weight", amount=0.5),
    "remembers": lambda: used(Remembers()),
    "Accelerate": Wrapped,
    "len": Reshapes,
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_adopted_computes_the_same_with_plain_float32_parameters(kind: str) -> None:
    model = KINDS[kind]().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = adopted(model)
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        expected = model(X.to(dtype)).float()
        assert torch.allclose(
            plain(X), expected, atol=0.05 if dtype in (torch.half, torch.bfloat16) or kind == "Accelerate" else 1e-5
        )
    assert {p.dtype for p in (*plain.parameters(), *plain.buffers())} == {torch.float32}
    weights = [name for name, p in plain.named_parameters() if p.dim() > 1]
    assert len(weights) == 2 and all(name.endswith(("0.weight", "2.weight")) for name in weights)
    assert all(p.requires_grad and p.is_leaf for p in plain.parameters())
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before), "it stays"
    made = Session(trace(plain, X[:2]).proto)
    assert torch.allclose(made(X[:7]), plain(X[:7]), atol=1e-4), "with any number of examples"


def test_zeros_of_torch_s_pruning_stay_zeros() -> None:
    model = changed(prune.l1_unstructured, name="weight", amount=0.5)
    assert int((adopted(model).get_parameter("0.weight") == 0).sum()) == 128


class Padded(nn.Module):
    """A transformer that is told what is padding: torch's own makes nested tensors of it."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.embed, self.body = nn.Embedding(9, 8), nn.TransformerEncoder(layer, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        read: Tensor = self.body(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return read


def test_a_transformer_told_what_is_padding_is_exported() -> None:
    torch.manual_seed(0)
    model, tokens = Padded(), torch.tensor([[3, 4, 5, 6], [7, 8, 0, 0], [1, 2, 3, 0]])
    plain = adopted(model)
    expected = model.eval()(tokens).detach()  # with gradients, where torch pads too
    with torch.no_grad():
        assert torch.allclose(plain(tokens), expected, atol=1e-5)
    assert model.body.use_nested_tensor, "it stays as it is"
    assert torch.allclose(Session(trace(plain, tokens[:1]).proto)(tokens), expected, atol=1e-5)


def test_a_script_is_refused_by_what_it_is() -> None:
    with pytest.raises(ValueError, match="got a TorchScript module"):
        with pytest.warns(DeprecationWarning):
            scripted = torch.jit.script(net())
        adopted(scripted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["half", "weight norm", "remembers", "len"])
def test_it_is_shrunk(kind: str, tmp_path: Path) -> None:
    result = lilliput.shrink(KINDS[kind](), TASK, floor="20%", trials=1, budget=None, workers=1, out=tmp_path / "out")
    names = [point["name"] for point in result.summary["points"] if point["status"] == "done"]
    assert result.met and any("width" in name for name in names) and result.chosen is not None
    assert result.chosen["packed_bytes"] < result.summary["dense"]["packed_bytes"] / 2


class Auxiliary(nn.Module):
    """A network with a second head that only its own training sees."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Dropout(0.1)
        self.head, self.second = nn.Linear(32, 3), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.drop(self.norm(self.body(x)).relu())
        return (self.head(x), self.second(x)) if self.training else self.head(x)


@pytest.mark.slow
def test_a_branch_that_only_training_sees_is_left_out_of_ours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained = lilliput.run(Auxiliary(), TASK, [lilliput.Train(80)])
    assert TASK.score(trained).value > 0.7
    assert int(trained.get_submodule("norm").num_batches_tracked) == 80, "norms train"
    result = lilliput.shrink(trained, TASK, floor="30%", trials=2, budget=None, workers=1, out=tmp_path / "out")
    names = [point["name"] for point in result.summary["points"] if point["status"] == "done"]
    assert any("width" in name for name in names), result.summary["points"]


class Inside(nn.Module):
    """Casts in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.last(self.first(x).relu()).float()


class Around(Inside):
    """Casts around its forward pass."""

    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.first(x).relu()).float()
        return found


@pytest.mark.parametrize("kind", [Inside, Around])
def test_a_forward_pass_under_autocast_is_computed_in_float32(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(40, 8)
    plain = nn.Sequential(model.first, nn.ReLU(), model.last)
    found = adopted(model)
    torch.testing.assert_close(found(x), plain(x))
    assert not torch.equal(model(x), plain(x)), "the model itself casts as before"
    y = plain(x).argmax(1)
    task = lilliput.Task("cast", train=(x, y), val=(x, y))
    assert lilliput.shrink(model, task, "20%", trials=1, train=False, workers=1, out=tmp_path / "o").met
