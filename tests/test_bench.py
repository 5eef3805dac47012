"""The rival and the tables of bench/: what a person is told by them is right."""

import ast
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Task
from lilliput.export.onnx import Session

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import anytime  # noqa: E402
import held  # noqa: E402
import rival  # noqa: E402
import rival_family  # noqa: E402
import rival_files  # noqa: E402


class Words(nn.Module):
    """A table of words, few of which say anything, and a perceptron."""

    def __init__(self, rows: int = 400, width: int = 16, hidden: int = 32) -> None:
        super().__init__()
        self.rows, self.width, self.hidden = rows, width, hidden
        self.table, self.inner, self.out = nn.Embedding(rows, width), nn.Linear(width, hidden), nn.Linear(hidden, 2)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu(self.inner(self.table(ids).mean(1))))
        return y


def texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Eight words each; which of the first two is the more frequent decides."""
    generator = torch.Generator().manual_seed(seed)
    rare = torch.randint(2, 400, (count, 8), generator=generator)
    telling = torch.randint(0, 2, (count, 8), generator=generator)
    ids = torch.where(torch.rand(count, 8, generator=generator) < 0.8, telling, rare)
    return ids, ((ids == 1).sum(1) > (ids == 0).sum(1)).long()


def job() -> tuple[nn.Module, Task]:
    task = Task("words", train=texts(1500, 0), val=texts(400, 1), test=texts(400, 2))
    torch.manual_seed(0)
    model = Words()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for batch in task.batches(200, seed=0):
        optimizer.zero_grad()
        task.loss(model(batch.inputs), batch).backward()
        optimizer.step()
    return model.eval(), task


def test_a_drop_has_the_error_of_paired_examples() -> None:
    x, y = torch.eye(2)[[0, 0, 1, 1] * 25], torch.tensor([0, 0, 1, 1] * 25)
    for metric in ("accuracy", "f1"):
        task = Task("pairs", train=(x, y), val=(x, y), test=(x, y), metric=metric)
        same = held.drop(task, lambda x: x, lambda x: 2 * x, floor=0.0)
        assert same is not None and same["drop"] == 0 and same["standard_error"] == 0 and same["held"]
        worse = held.drop(task, lambda x: x, lambda x: x * torch.tensor([1.0, 0.0]), floor=0.2)
        assert worse is not None and worse["drop"] > 0.4 and 0.02 < worse["standard_error"] < 0.08 and not worse["held"]
    assert held.drop(Task("two", train=(x, y), val=(x, y)), lambda x: x, lambda x: x, floor=0.0) is None


def test_folded_rows_are_one_and_leave_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Words().eval()
    order = torch.arange(400).flip(0)
    rival_family.fold(model, "table", order, 40)
    ids = torch.tensor([[3] * 8, [5] * 8, [399] * 8, [398] * 8])
    outputs = model(ids)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[2] - outputs[3]).abs().max() > 1e-3
    proto = rival_files.exported(model, ids)
    small = rival_files.int8_weights(proto)
    assert small.ByteSize() < 400 * 16
    np.testing.assert_allclose(Session(proto).outputs(ids), outputs.detach(), atol=1e-5)
    onnx.checker.check_model(small, full_check=True)


def test_a_network_says_what_of_it_may_be_smaller() -> None:
    model, task = job()
    work = rival_family.Work(model, task, 0.01, 1.0, 0)
    plan = rival_family.Plan(tuple(rival_family.arguments(model).items()))
    assert rival.knobs(work, plan) == [("width", None), ("hidden", None)]
    assert rival_family.arguments(nn.Sequential(nn.Linear(2, 2))) == {}


@pytest.mark.slow
def test_the_rival_stays_within_the_floor_and_counts_its_seconds() -> None:
    model, task = job()
    record, small, dense = rival.rival(model, task, floor=0.02, seconds=8.0)
    assert task.score(model).value - task.score(Session(small)).value <= 0.02
    assert small.ByteSize() == record["bytes"] < dense.ByteSize() / 8
    assert record["seconds"] < 16 and record["held_out"]["examples"] == 400
    assert any("table keeps" in attempt["plan"] for attempt in record["attempts"])


def test_a_run_on_record_for_a_commit_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(anytime, "RECORD", tmp_path / "anytime.json")
    monkeypatch.setattr(anytime, "commit", lambda: "abc")
    asked: list[int] = []

    def measure(seed: int) -> dict[str, Any]:
        asked.append(seed)
        return {"value": [0.8, 0.9, 1.0][seed]}

    monkeypatch.setattr(anytime, "ROWS", {"steps": anytime.Speed(0.85, measure)})
    anytime.main(["steps", "--seeds", "0", "1"])
    anytime.main([])
    assert asked == [0, 1, 2]
    row = anytime.read()["rows"]["steps"]
    assert row["median"] == 0.9 and row["reached"] and list(row["runs"]) == ["0", "1", "2"]
    monkeypatch.setattr(anytime, "commit", lambda: "def")
    anytime.main(["steps", "--seeds", "0"])
    row = anytime.read()["rows"]["steps"]
    assert row["median"] == 0.8 and not row["reached"] and list(row["runs"]) == ["0"], "runs of two commits never mix"
    with pytest.raises(SystemExit):
        anytime.main(["no-such-row"])
    assert "no row no-such-row" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["bench", "scripts", "examples"])
def test_every_name_that_a_script_imports_is_there(folder: str) -> None:
    """Imports inside functions too: a benchmark of hours must not end in one."""
    missing = []
    for file in sorted((Path(__file__).parents[1] / folder).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lilliput":
                missing += [
                    f"{file.name}: {node.module}.{alias.name}" for alias in node.names if not there(node, alias)
                ]
    assert not missing


def there(node: ast.ImportFrom, alias: ast.alias) -> bool:
    """Whether a module has a name, or is a package that holds a module of it."""
    try:
        found = importlib.import_module(node.module or "")
        return hasattr(found, alias.name) or bool(importlib.import_module(f"{node.module}.{alias.name}"))
    except ModuleNotFoundError:
        return False
