"""Forge: networks are compiled beside a search, once, and what cannot be compiled says why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lilliput
from lilliput.onnx.session import Session
from lilliput.onnx.trace import trace
from lilliput.search import finish, forge
from lilliput.search.forge import Forge, forging
from lilliput.search.network import Network


def network(width: int) -> nn.Module:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 3)).eval()


def test_files_are_compiled_beside_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 12)
    first, second, large = (trace(network(width), x[:1]).proto for width in (8, 16, 32))
    with forging(True) as made:
        assert isinstance(made, Forge) and made.sessions(first) == [] and made.expected_s() == 0
        for proto in (first, second, first):
            made.start(proto)
        made.tune(second)
        for proto in (first, second):
            session = made.sessions(proto, seconds=120)[0]
            np.testing.assert_allclose(session.predict(x), Session(proto).predict(x), atol=1e-4)
        assert made.expected_s() > 0 and len(made._quick) == 2
        monkeypatch.setattr(forge, "VALUE_BYTES", 1e15)
        made.start(large)
        assert made.sessions(large, seconds=1) == [] and "more memory than there is" in made.reason(large)
        folder = made._folder
        assert folder.exists()
    assert not folder.exists()
    with forging(False) as none:
        assert none is None


def test_the_dense_network_compiled_is_a_point_of_a_search_for_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish, "SECONDS_EACH", 0.1)
    monkeypatch.setattr(Network, "trained", lambda self, job, pool, beside: None)
    x = torch.randn(160, 12)
    model = network(32)
    with torch.no_grad():
        y = model(x).argmax(1)
    task = lilliput.Task("small", train=(x[:60], y[:60]), val=(x[60:], y[60:]))
    found = lilliput.shrink(model, task, floor="5%", budget="120s", objective="latency", out=tmp_path / "out")
    dense = found.summary["dense"]
    assert dense["engine_ms"] > 0
    assert found.met and found.chosen is not None
    fastest = min(found.chosen[key] for key in ("latency_ms", "engine_ms") if found.chosen.get(key))
    assert fastest <= 1.1 * min(dense["engine_ms"], dense["latency_ms"])
