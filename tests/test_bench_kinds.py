"""The networks of bench/kinds.py are trained ones, and its verdicts are right."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import kinds  # noqa: E402
from kinds_tables import Kind, Net, classes, runner  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@pytest.fixture(scope="module")
def job():
    return kinds.KINDS["weight_norm"].job()


def test_there_are_forty() -> None:
    assert len(kinds.KINDS) == 40


@pytest.mark.parametrize("name", kinds.KINDS)
def test_a_network_is_small_and_well_above_chance(name: str) -> None:
    kind = kinds.KINDS[name]
    model, given, judged = kind.job()
    assert not given.has("test") and judged.has("test") and not model.training
    assert sum(parameter.numel() for parameter in model.parameters()) < 13_000
    assert all(isinstance(model.get_submodule(layer), nn.Module) for layer in (*kind.last, *kind.heads))
    score = judged.score(runner(model), "test").value
    assert kind.good(score) and score <= 1, score


def test_a_network_that_guesses_is_not_above_chance() -> None:
    assert not any(kind.good(kind.chance) for kind in kinds.KINDS.values())


def test_the_same_network_is_nothing_smaller_and_half_of_it_is_right(job) -> None:
    dense, _, task = job
    same = kinds.judge(runner(dense), kinds.bytes_of(dense), dense, task)
    assert (same.what, same.drop, same.of_float32) == (kinds.LARGE, 0, 1)
    half = copy.deepcopy(dense).half()
    assert kinds.judge(runner(half), kinds.bytes_of(half), dense, task).what == kinds.RIGHT


def test_what_says_something_else_or_runs_on_one_size_is_wrong(job) -> None:
    dense, _, task = job

    def fixed(x: Tensor) -> Tensor:
        return dense(x.view(64, 8))

    assert kinds.judge(lambda x: dense(-x), 1, dense, task).what == kinds.WRONG
    assert "in place of" in kinds.judge(lambda x: dense(x)[:, :2], 1, dense, task).why
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        kinds.judge(fixed, 1, dense, task)


def test_bytes_count_storages_once_and_no_float_wider_than_float32() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    assert kinds.bytes_of(net) == 256 and kinds.bytes_of(net, widest=4) == 128
    net[1].weight = net[0].weight
    assert kinds.bytes_of(net) == 128
    assert kinds.bytes_of(net.half(), widest=4) == 32


def test_a_tool_that_raises_refuses_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Kind(Net, classes, last=("nowhere",))
    monkeypatch.setitem(kinds.KINDS, "wrong", wrong)
    verdict = kinds.attempt("wrong", "Torch-Pruning")
    assert verdict.what == kinds.REFUSED and "nowhere" in verdict.why


def test_a_run_that_does_not_end_is_ended_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "LIMIT", 0.2)
    assert kinds.process("MLP", "Torch-Pruning", None)["what"] == kinds.ENDLESS


@pytest.mark.slow  # a process for each run
def test_the_record_counts_runs_and_repeats_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(kinds, "RECORD", tmp_path / "kinds.json")
    for _ in range(2):
        kinds.main(["MLP", "regression (N, 1)", "--tools", "Torch-Pruning"])
    assert capsys.readouterr().out.count("Torch-Pruning") == 2
    record = json.loads((tmp_path / "kinds.json").read_text())
    assert record["runs"]["Torch-Pruning"].keys() == {"MLP", "regression (N, 1)"}
    assert sum(record["counts"]["Torch-Pruning"].values()) == 2
    with pytest.raises(SystemExit):
        kinds.main(["no such network"])
    assert torch.get_num_threads() == 1
