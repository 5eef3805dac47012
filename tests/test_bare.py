"""Structures without training: rows and tables that hardly matter leave before anything is trained."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lilliput
from lilliput import Task
from lilliput.graph.drop_tables import DropTables
from lilliput.graph.fold_rows import FoldRows
from lilliput.proposal import Known
from lilliput.recipe import Recipe
from lilliput.runner import Runner
from lilliput.search.space import Space
from lilliput.store import Store


class Shop(nn.Module):
    """Two tables and numbers; only the frequent rows of one table say something."""

    def __init__(self) -> None:
        super().__init__()
        self.goods, self.noise, self.net = nn.Embedding(3000, 8), nn.Embedding(500, 8), nn.Linear(18, 2)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        return self.net(torch.cat([self.goods(ids[:, 0]), self.noise(ids[:, 1]), numbers], 1))


def shop() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    share = 1 / torch.arange(1, 2001).float() ** 1.3
    goods = torch.multinomial(share, 1500, True) * 3 % 3000
    ids, numbers = torch.stack([goods, torch.randint(0, 500, (1500,))], 1), torch.randn(1500, 2)
    y = ((goods < 30) | (numbers[:, 0] > 0.5)).long()
    model = Shop()
    optimizer = torch.optim.AdamW([*model.goods.parameters(), *model.net.parameters()], 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:1000], numbers[:1000]), y[:1000]).backward()
        optimizer.step()
    with torch.no_grad():
        model.noise.weight *= 0.01
    data = {"train": ((ids[:1000], numbers[:1000]), y[:1000]), "val": ((ids[1000:], numbers[1000:]), y[1000:])}
    return model.eval(), Task("shop", **data)


def test_what_hardly_matters_leaves_without_training(tmp_path: Path) -> None:
    model, task = shop()
    model.requires_grad_(False)  # nothing may be trained
    result = lilliput.shrink(model, task, floor="3%", trials=1, out=tmp_path, workers=1)
    rows = [row for row in result.front if "8 bits without training" in row["name"]]
    stages = {type(stage) for row in rows for stage in Recipe.parse(row["recipe"]).stages}
    assert {DropTables, FoldRows} <= stages
    eight = 3500 * 8 + 18 * 2  # bytes that 8 bits alone take at least
    assert min(row["packed_bytes"] for row in rows) < eight / 4
    assert result.chosen["packed_bytes"] < eight / 4
    assert lilliput.load(tmp_path)(*task.split("val")[0]).shape == (500, 2)


def test_what_is_trained_begins_there(tmp_path: Path) -> None:
    model, task = shop()
    space = Space.of(Runner(model, task, Store(tmp_path)), Known(bare={"DropTables": 1, "FoldRows": 7}))
    first = space.starters()[0]
    assert first["DropTables"] == 1 and first["FoldRows"] == 7
