"""Networks of every kind: each is shrunk or left alone with a reason, and never broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Task
from lilliput.export.onnx import Session
from lilliput.search import finish
from lilliput.task import call, take

pytestmark = pytest.mark.slow  # each runs a whole search

EXAMPLES = 96


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return y


class TiedWords(nn.Module):
    """A language model's habit: the output layer is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner, self.out = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu(self.inner(self.words(ids).mean(1))))
        return y


class Unused(nn.Module):
    """A layer and a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(4, 4)
        self.loose = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.relu(self.a(x)))
        return y


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.again, self.b = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.again(F.relu(self.again(F.relu(self.a(x))))))
        out: Tensor = self.b(y)
        return out


class Own(nn.Module):
    """Parameters and a buffer of its own."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8, 12) * 0.4)
        self.out = nn.Linear(12, 3)
        self.register_buffer("shift", torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu((x * self.scale) @ self.mix + self.shift))
        return y


class Recurrent(nn.Module):
    """The last step of a recurrent layer."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.out = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.layer(x)[0][:, -1])
        return y


class Attention(nn.Module):
    """torch's own attention in a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        h = self.norm(x)
        y: Tensor = self.out((x + self.attention(h, h, h, need_weights=False)[0]).mean(1))
        return y


class Heads(nn.Module):
    """Attention written by hand, and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.qkv, self.join = nn.Linear(4, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.thin, self.out = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 2, 8).permute(2, 0, 3, 1, 4)
        x = x + self.join(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        x = x + self.thin(F.gelu(self.wide(x)))
        y: Tensor = self.out(x.mean(1))
        return y


class TwoInputs(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 12), nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu(self.a(left) + self.b(right)))
        return y


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    model[0].requires_grad_(False)
    return model


def all_frozen() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).requires_grad_(False)


def conv1d() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(2, 12, 3, padding=1),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Conv1d(12, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


def norm_first() -> nn.Module:
    """A batch norm that no layer comes before: it stays one."""
    return nn.Sequential(
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, 3))


def bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(64, 8, mode="mean"), nn.Linear(8, 3))


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(4, 16), layer, nn.Flatten(), nn.Linear(80, 3))


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(EXAMPLES, *shape)


def words(count: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, count, (EXAMPLES, 5))


def kind(
    name: str, build: Callable[[], nn.Module], data: Callable[[], Any], skipped: str = "", slow: bool = False
) -> Any:
    """skipped: what must be among the reasons for leaving something alone."""
    return pytest.param(build, data, skipped, id=name, marks=[pytest.mark.slow] if slow else [])


KINDS = [
    kind("tied", Tied, normal(8), "shares a parameter"),
    kind("tied words", TiedWords, words(12), "shares a parameter"),
    kind("unused", Unused, normal(8), "no run of the example joins it to the output"),
    kind("a frozen layer", frozen, normal(8), "is frozen"),
    kind("all frozen", all_frozen, normal(8), "no parameter may be trained"),
    kind("called twice", Twice, normal(8), "is called 2 times"),
    kind("own parameters", Own, normal(8), "has parameters of its own"),
    kind("LSTM", lambda: Recurrent(nn.LSTM(4, 12, batch_first=True)), normal(6, 4)),
    kind("GRU", lambda: Recurrent(nn.GRU(4, 12, batch_first=True)), normal(6, 4), slow=True),
    kind(
        "two-way LSTM",
        lambda: Recurrent(nn.LSTM(4, 8, 2, batch_first=True, bidirectional=True)),
        normal(6, 4),
        slow=True,
    ),
    kind("attention", Attention, normal(5, 4), "share its embed_dim"),
    kind("heads", Heads, normal(5, 4), "the model fails without some of them", slow=True),
    kind("encoder", encoder, normal(5, 4), "share its embed_dim", slow=True),
    kind("Conv1d", conv1d, normal(2, 16)),
    kind("grouped", grouped, normal(3, 8, 8)),
    kind("depthwise", depthwise, normal(3, 8, 8)),
    kind("norm first", norm_first, normal(3, 8, 8), slow=True),
    kind("dropout", dropout, normal(8), slow=True),
    kind("two inputs", TwoInputs, lambda: (torch.randn(EXAMPLES, 8), torch.randn(EXAMPLES, 4)), slow=True),
    kind("named inputs", TwoInputs, lambda: {"left": torch.randn(EXAMPLES, 8), "right": torch.randn(EXAMPLES, 4)}),
    kind("bag of words", bag, words(64)),
]


def toy(build: Callable[[], nn.Module], data: Callable[[], Any]) -> tuple[nn.Module, Task]:
    """A network with random weights and the task to say what it says."""
    torch.manual_seed(0)
    model, inputs = build().eval(), data()
    with torch.no_grad():
        outputs = call(model, inputs)
    targets = (outputs - outputs.mean(0)).argmax(1)
    splits = [(take(inputs, part), targets[part]) for part in (slice(0, 64), slice(64, 80), slice(80, EXAMPLES))]
    return model, Task("toy", *splits)


@pytest.mark.parametrize(("build", "data", "skipped"), KINDS)
def test_it_is_shrunk_or_left_alone_and_never_broken(
    build: Callable[[], nn.Module],
    data: Callable[[], Any],
    skipped: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.02)
    model, task = toy(build, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = lilliput.shrink(model, task, floor=0.99, trials=1, out=tmp_path / "out")
    summary, chosen = result.summary, result.chosen
    assert chosen is not None and chosen["packed_bytes"] < 0.9 * summary["dense"]["packed_bytes"]
    reasons = [(item["name"], item["reason"]) for item in summary["left_alone"]]  # a module may have several
    assert any(skipped in reason for _, reason in reasons), reasons
    for row in summary["points"]:
        assert row["status"] != "failed", row["reason"]
    # Every tensor is narrower in some point, or its layer is left alone with a reason.
    for layer in chosen["layers"]:
        alone = any(layer["name"] == name or layer["name"].startswith(f"{name}.") for name, _ in reasons)
        assert layer["bits"] < 32 or alone, (layer, reasons)
    # The three artifacts are one function, and score what the summary says.
    inputs, _ = task.split("val")
    exported = torch.from_numpy(Session(result.folder / "model.onnx").outputs(inputs))
    packed = call(lilliput.load(result.folder), inputs)
    torch.testing.assert_close(packed, exported, atol=1e-4, rtol=1e-4)
    assert result.model is not None
    with torch.no_grad():
        torch.testing.assert_close(call(result.model, inputs), exported, atol=1e-3, rtol=1e-3)
    assert task.rate(exported, "val").value == pytest.approx(chosen["val"], abs=1e-6)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_without_weights_is_refused(tmp_path: Path) -> None:
    x = torch.randn(16, 3)
    with pytest.raises(ValueError, match="There is nothing to make smaller"):
        lilliput.shrink(nn.Flatten(), Task("toy", (x, x[:, 0] > 0), (x, x[:, 0] > 0)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_from_a_model_are_escaped_in_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.02)
    evil = "<script>alert(1)</script>"
    model, task = toy(lambda: nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), normal(8))
    named = nn.Sequential()
    for name, module in zip((evil, "relu", f"<img src=x onerror={evil}>"), model, strict=True):
        named.add_module(name, module)
    task.name = f"{evil} & co"
    result = lilliput.shrink(named, task, floor=0.99, trials=1, out=tmp_path / "out")
    page = (result.folder / "report.html").read_text(encoding="utf-8")
    assert evil not in page and "<img src=x" not in page and "alert(1)" in page
