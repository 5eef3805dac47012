"""Small trained networks of different kinds: a short search of each is never worse than plain 8 bits."""

import os
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
from lilliput.task import call

pytestmark = pytest.mark.slow  # each runs a whole search

SECONDS = float(os.environ.get("LILLIPUT_TEST_SECONDS", "6"))  # of each search
TRAIN, VAL = 1200, 400


class Residual(nn.Module):
    """Convolutions in two dimensions around which the signal may pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, 12, 3, padding=1), nn.Linear(12, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, padding=1)
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        y: Tensor = self.out(x.mean((2, 3)))
        return y


class Mobile(nn.Module):
    """Depthwise convolutions that hold a padding module of their own, expanded and narrowed, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.deep = nn.Sequential(
            nn.ZeroPad2d(1), nn.Conv2d(24, 24, 3, groups=24, bias=False), nn.BatchNorm2d(24), nn.ReLU6()
        )
        self.thin, self.out = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.thin(self.deep(self.wide(x)))
        y: Tensor = self.out(x.mean((2, 3)))
        return y


class Reader(nn.Module):
    """A recurrent layer, read at the last real step of each series."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 24, batch_first=True), nn.Linear(24, 3)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        states = self.lstm(series)[0]
        place = (lengths - 1).reshape(-1, 1, 1).expand(-1, 1, states.shape[2])
        y: Tensor = self.out(states.gather(1, place).squeeze(1))
        return y


class BothWays(nn.Module):
    """The last step of a recurrent layer that reads in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(3, 16, batch_first=True, bidirectional=True), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.gru(x)[0].mean(1))
        return y


class Tokens(nn.Module):
    """torch's own transformer encoder on embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.table, self.encoder, self.out = nn.Embedding(20, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(self.encoder(self.table(ids)).mean(1))
        return y


class Recommender(nn.Module):
    """Tables, their inner products, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 8) for rows in (200, 80, 10))
        self.below, self.above = nn.Linear(4, 8), nn.Sequential(nn.Linear(14, 24), nn.ReLU(), nn.Linear(24, 1))

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        dense = F.relu(self.below(numbers))
        rows = torch.stack([dense, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(rows, rows.transpose(1, 2)).flatten(1)[:, [1, 2, 3, 6, 7, 11]]
        y: Tensor = self.above(torch.cat([dense, products], 1))
        return y


class TwoHeads(nn.Module):
    """A class and a number from one body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.kind, self.size = nn.Linear(48, 3), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.kind(h), self.size(h)


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Noisy 12x12 pictures of stripes in four directions."""
    labels, grid = torch.randint(0, 4, (count,)), torch.arange(12.0)
    angle, shift = labels * torch.pi / 4, torch.rand(count) * 6
    across = grid[None, :, None] * angle.cos()[:, None, None] + grid[None, None] * angle.sin()[:, None, None]
    return ((across + shift[:, None, None]).sin() + 0.6 * torch.randn(count, 12, 12))[:, None], labels


def waves(count: int) -> tuple[Tensor, Tensor]:
    """Noisy signals of four frequencies."""
    labels, time = torch.randint(0, 4, (count,)), torch.arange(32.0)
    phase = torch.rand(count, 1) * 6
    return ((time * (labels + 1)[:, None] / 6 + phase).sin() + 0.5 * torch.randn(count, 32))[:, None], labels


def numbers(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8)
    return x, (x[:, :1] * x[:, 1:2] + x[:, 2:3].relu() - 0.5 * x[:, 3:4] + 0.1 * torch.randn(count, 1))


def series(count: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    x, lengths = torch.randn(count, 10, 3), torch.randint(4, 11, (count,))
    known = torch.arange(10)[None] < lengths[:, None]
    return (x * known[..., None], lengths), ((x * known[..., None]).sum(1)).argmax(1)


def steps(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 10, 3)
    return x, x.sum(1).argmax(1)


def said(count: int) -> tuple[Tensor, Tensor]:
    """Which of three groups of tokens is the most frequent in a text."""
    ids = torch.randint(0, 20, (count, 9))
    return ids, torch.stack([(ids % 3 == group).sum(1) for group in range(3)], 1).argmax(1)


def clicks(count: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    ids = torch.stack([torch.randint(0, rows, (count,)) for rows in (200, 80, 10)], 1)
    x, chance = torch.randn(count, 4), torch.cos(ids[:, 0] * 1.7) + torch.sin(ids[:, 1] * 2.3)
    return (ids, x), (torch.rand(count) < torch.sigmoid(2 * chance + x[:, 0])).float()[:, None]


def mixtures(count: int) -> tuple[Tensor, Tensor]:
    torch_state = torch.get_rng_state()
    torch.manual_seed(9)
    mix = torch.randn(4, 24)
    torch.set_rng_state(torch_state)
    x = (torch.randn(count, 4) @ mix).tanh()
    return x, x


def both(count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(count, 8)
    return x, (x[:, :3].argmax(1), x[:, 3:4] * x[:, 4:5])


def both_losses(output: Any, target: Any) -> Tensor:
    return F.cross_entropy(output[0], target[0]) + F.mse_loss(output[1], target[1])


def first_right(output: Any, target: Any) -> Tensor:
    return (output[0].argmax(1) == target[0]).float()


TRAINED: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any], dict[str, Any]]] = {
    "MLP regression": (
        lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)),
        numbers, {"loss": "mse", "metric": "r2"},
    ),
    "1-D CNN": (
        lambda: nn.Sequential(nn.Conv1d(1, 16, 5, 2), nn.ReLU(), nn.Conv1d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(),
                              nn.Linear(96, 4)),
        waves, {},
    ),
    "residual CNN": (Residual, stripes, {}),
    "mobile CNN": (Mobile, stripes, {}),
    "LSTM with lengths": (Reader, series, {}),
    "two-way GRU": (BothWays, steps, {}),
    "transformer": (Tokens, said, {}),
    "bag of words": (lambda: nn.Sequential(nn.EmbeddingBag(20, 16, mode="mean"), nn.Linear(16, 3)), said, {}),
    "recommender": (Recommender, clicks, {"loss": "bce", "metric": "auc"}),
    "autoencoder": (
        lambda: nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 4), nn.Linear(4, 48), nn.ReLU(),
                              nn.Linear(48, 24)),
        mixtures, {"loss": "mse", "metric": "r2"},
    ),
    "two outputs": (TwoHeads, both, {"loss": both_losses, "metric": first_right}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_a_short_search_is_never_worse_than_plain_eight_bits(name: str, tmp_path: Path) -> None:
    build, data, settings = TRAINED[name]
    torch.manual_seed(0)
    task = Task("kind", train=data(TRAIN), val=data(VAL), **settings)
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for batch in task.batches(400, seed=0):
        optimizer.zero_grad()
        task.loss(call(model, batch.inputs), batch).backward()
        optimizer.step()
    plain = lilliput.save(lilliput.Quantize(8)(model.eval(), task, None), task.example, tmp_path / "plain")
    result = lilliput.shrink(model, task, floor="4%", budget=SECONDS, out=tmp_path / "out")
    assert result.met and result.chosen is not None, result.summary["chosen"]
    assert result.chosen["packed_bytes"] <= plain["model.lil"]
    assert (result.folder / "model.lil").stat().st_size == result.chosen["packed_bytes"]
    inputs, _ = task.split("val")
    torch.testing.assert_close(
        call(lilliput.load(result.folder), inputs),
        Session(result.folder / "model.onnx").predict(inputs),
        atol=1e-3,
        rtol=1e-3,
    )
    assert task.loss_of(task.score(model).value, task.score(Session(result.folder / "model.onnx")).value) <= 0.04
