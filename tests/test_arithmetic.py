"""Arithmetic in a search: tried where time is asked for, measured, and from the least harmful to the fastest."""

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import ModelProto
from torch import nn

import lilliput
from lilliput.search import arithmetic, finish
from lilliput.search.network import Network


@pytest.fixture
def shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A search without trainings over a network of three wide convolutions."""
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.05)
    monkeypatch.setattr(Network, "trained", lambda self, job, pool, beside: None)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 4),
    ).eval()
    x = torch.randn(48, 3, 24, 24) * torch.linspace(0.2, 3, 48)[:, None, None, None]
    with torch.no_grad():
        y = model(x).argmax(1)
    task = lilliput.Task("wide", train=(x[:24], y[:24]), val=(x[24:], y[24:]))

    def search(**asked: Any) -> Any:
        return lilliput.shrink(model, task, floor="10%", budget="60s", out=tmp_path / "out", **asked)

    return search


def test_no_time_is_spent_on_arithmetic_where_none_is_asked_for(shrunk: Any) -> None:
    found = shrunk()
    skipped = {row["name"]: row["reason"] for row in found.summary["left_alone"]}
    assert "time is not asked for" in skipped["8-bit arithmetic"]
    assert not any("arithmetic" in point["name"] for point in found.summary["points"])


def test_integers_are_a_point_where_they_pay(shrunk: Any) -> None:
    found = shrunk(objective="latency", runtime="ort")
    points = [point for point in found.summary["points"] if "static 8-bit arithmetic" in point["name"]]
    skipped = [row for row in found.summary["left_alone"] if row["name"] == "static 8-bit arithmetic"]
    assert points or skipped
    for point in points:
        assert point["onnx_bytes"] < found.summary["dense"]["onnx_bytes"] / 2
    assert found.met and found.chosen is not None


def test_what_harms_more_must_be_faster() -> None:
    made = [
        arithmetic.Candidate(ModelProto(), name, [], name, harm, time, hoped=time)
        for name, harm, time in (("slow", 0.0, 0.97), ("safe", 1e-4, 0.7), ("same", 2e-4, 0.69), ("bold", 1e-3, 0.5))
    ]
    assert [candidate.name for candidate in arithmetic.worth(made)] == ["safe", "bold"]
    hoped = arithmetic.Candidate(ModelProto(), "hoped", [], "hoped", 0.0, 0.9, hoped=0.4)
    assert [candidate.name for candidate in arithmetic.worth([hoped, *made])] == ["hoped", "safe", "bold"]
