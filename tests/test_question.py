"""The question: what a point costs, and how far it is from what is asked."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lilliput.cost.peak import peak_bytes
from lilliput.engine.memory import peak_bytes as planned_bytes
from lilliput.onnx.trace import trace
from lilliput.search.account import misses
from lilliput.search.choose import Choice
from lilliput.search.question import Question, question

COSTS = {
    "onnx_bytes": 30_000, "packed_bytes": 9_000, "macs": 5_000, "latency_ms": 0.4, "engine_ms": 0.1,
    "peak_bytes": 2_000_000, "engine_peak_bytes": 50_000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "price"),
    [
        ({}, 9_000),
        ({"file": "onnx"}, 30_000),
        ({"objective": "macs"}, 5_000),
        ({"objective": "latency"}, 0.1),
        ({"objective": "latency", "runtime": "ort"}, 0.4),
        ({"objective": "latency", "runtime": "engine"}, 0.1),
        ({"objective": "memory"}, 50_000),
        ({"objective": "memory", "runtime": "ort"}, 2_000_000),
    ],
)
def test_a_price_is_that_of_the_file_and_runtime_that_are_asked_for(asked: dict[str, Any], price: float) -> None:
    assert question(**asked).price(COSTS) == price


def test_what_was_not_measured_has_no_price_and_fits_no_limit() -> None:
    assert question(objective="latency").price({"packed_bytes": 9}) == math.inf
    assert not question(max_latency_ms=3).fits({"packed_bytes": 9})
    assert question(objective="latency", runtime="engine").price({"latency_ms": 1.0}) == math.inf


def test_a_limit_is_about_the_asked_file() -> None:
    assert question(max_bytes="10kB").fits(COSTS) and not question(max_bytes="10kB", file="onnx").fits(COSTS)
    assert question(max_bytes="10kB", max_latency_ms=0.05).excess(COSTS) == pytest.approx(2)
    assert question(max_peak="64KB").fits(COSTS) and not question(max_peak="64KB", runtime="ort").fits(COSTS)


def test_lack_is_zero_for_what_is_asked_and_grows_with_what_is_missing() -> None:
    half = question(floor="0.5%")
    assert half.lack(COSTS, 0.005, 0.99) == 0 and half.lack(COSTS, 0.01, 0.99) == pytest.approx(1)
    assert question(floor=0.0).lack(COSTS, 0.0, 0.99) == 0 and question(floor=0.0).lack(COSTS, 0.1, 0.99) == math.inf
    assert question(max_bytes=4500).lack(COSTS, 0.3, 0.99) == pytest.approx(1), "a limit turns the floor off"


def test_the_dense_network_costs_what_was_given() -> None:
    assert question().before(COSTS) == 30_000 and question(objective="latency").before(COSTS) == 0.4
    assert question(objective="memory").before(COSTS) == 50_000


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"file": "zip"}, "file must be one of lil, onnx, got 'zip'"),
        ({"runtime": "tvm"}, "runtime must be one of ort, engine, got 'tvm'"),
        ({"objective": "energy"}, "objective must be one of size, latency, macs, memory"),
        ({"max_latency_ms": 0.0}, "max-latency-ms must be above 0"),
        ({"max_peak": "much"}, "max-peak must be a size"),
    ],
)
def test_what_no_search_can_answer_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        question(**asked)


def test_prices_are_written_with_their_unit() -> None:
    assert Question("memory").written(51_000) == "51.0 kB" and Question().written(math.inf) == "not measured"
    assert Question(file="onnx").measure == "model.onnx"
    assert Question("latency", runtime="engine").measure == "latency in the engine"


def test_memory_grows_with_what_a_run_holds() -> None:
    """1,024 x 4,096 float32 weights are 16.8 MB wherever they are kept."""
    small, large = (
        (trace(nn.Linear(width, 4096), torch.zeros(1, width)).proto, torch.zeros(1, width)) for width in (16, 1024)
    )
    held = 4 * 1024 * 4096
    assert planned_bytes(large[0]) >= held > 8 * planned_bytes(small[0])
    measured = np.array([peak_bytes(*each) for each in (small, large)])
    assert measured[1] - measured[0] > 0.9 * held and measured[0] < 0.5 * held


def test_misses_that_are_typed_alike_are_one_the_cheaper() -> None:
    """Two floors that round to the same text would share one folder of files."""
    bound = np.array([0.0098, 0.0101, 0.0109, 0.0151])
    none = np.zeros(4)
    eligible = bound <= 0.01
    made = Choice(0, bound, bound, np.zeros((4, 2)), bound, none, 0.9, eligible, near=(1, 2, 3))
    costs = [{"packed_bytes": size} for size in (1000, 900, 800, 700)]
    rows = misses(question(floor="1%"), {"onnx_bytes": 90_000, "packed_bytes": 90_000}, costs, made, 0.99)
    assert [(row["option"], row["price"]) for row in rows] == [("1.1%", 800), ("1.6%", 700)]
