"""Classes and groups: what each loses is told, and each may have a floor of its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lilliput
from lilliput.report.page import page
from lilliput.search import parts
from lilliput.search.question import Question, question
from lilliput.task import Score, Task

N = 400
LABELS = torch.arange(N) % 4
X = torch.eye(4)[LABELS] * 5


def score(wrong: list[int]) -> Score:
    """A network that is right but for these examples, which it takes for the next class."""
    answers = LABELS.clone()
    answers[wrong] = (answers[wrong] + 1) % 4
    return task().rate(torch.eye(4)[answers], "val")


def task(**settings) -> Task:
    return Task("parts", train=(X, LABELS), val=(X, LABELS), **settings)


def test_each_class_and_each_group_has_its_row() -> None:
    grouped = task(groups={"val": ["north"] * 100 + ["south"] * 300})
    assert list(grouped.parts("val")) == ["class 0", "class 1", "class 2", "class 3", "north", "south"]
    assert not grouped.parts("train").keys() & {"north", "south"}
    dense, chosen = score([]), score([1, 5, 9, 13, 102])
    rows = {row["part"]: row for row in parts.rows(grouped, "val", dense, chosen, 0.9)}
    assert rows["class 1"]["drop"] == pytest.approx(0.04) and rows["class 2"]["drop"] == pytest.approx(0.01)
    assert rows["north"]["drop"] == pytest.approx(0.04) and rows["south"]["drop"] == pytest.approx(1 / 300, abs=1e-6)
    assert rows["class 0"]["drop"] == 0 < rows["class 0"]["bound"] < 0.015
    assert next(iter(rows)) in ("class 1", "north"), "the part that loses most comes first"
    found = parts.changed(grouped, "val", dense, chosen)
    assert found is not None and found["count"] == 5 and found["of"] == N
    assert found["examples"][0] == {"example": 1, "dense": 1, "chosen": 2}


def test_the_bound_of_the_worst_part_is_above_that_of_all() -> None:
    dense, spread, gathered = score([]), score([0, 1, 2, 3]), score([0, 4, 8, 12])
    both = parts.bounds(task(), dense, [dense, spread, gathered], 0.9)
    assert both[0] == 0 < both[1] < 0.05 < both[2]


def test_fewer_outcomes_than_examples_are_no_parts() -> None:
    labels = LABELS.clone()
    labels[:10] = -100
    padded = Task("padded", train=(X, labels), val=(X, labels))
    before, after = (padded.rate(torch.eye(4)[LABELS], "val") for _ in range(2))
    assert parts.rows(padded, "val", before, after, 0.9) == [] and parts.bounds(padded, before, [after], 0.9)[0] == 0


def test_groups_must_fit_their_split() -> None:
    with pytest.raises(ValueError, match=r"groups of val must be 400 names, got shape \(3,\)"):
        task(groups={"val": ["a", "b", "c"]})
    with pytest.raises(ValueError, match="one of the splits"):
        task(groups={"test": ["a"]})


def test_the_question_keeps_what_the_worst_class_may_lose() -> None:
    asked = question(worst_class="3%")
    assert asked.worst_points(0.9) == 0.03 and Question.read(json.loads(json.dumps(asked.data()))) == asked
    assert question().worst_points(0.9) == np.inf
    with pytest.raises(ValueError, match="worst-class must be at least 0"):
        question(worst_class="three")


def unfair() -> tuple[nn.Module, Task]:
    """A class of 60 in 2,000 that a narrow network gives up first."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(1940) % 3, torch.full((60,), 3)])
    x = torch.randn(2000, 12, generator=draw) + 2.2 * torch.eye(12)[labels]
    x[labels == 3] = torch.randn(60, 12, generator=draw) + torch.eye(12)[3:7].sum(0) * 1.2
    order = torch.randperm(2000, generator=draw)
    x, labels = x[order], labels[order]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 4))
    made = Task("unfair", train=(x[:1000], labels[:1000]), val=(x[1000:], labels[1000:]))
    return lilliput.run(net, made, [lilliput.Train(steps=300)]), made


def test_a_search_keeps_the_floor_of_the_worst_class(tmp_path: Path) -> None:
    model, made = unfair()
    results = {}
    for worst in (None, "12%"):
        out = tmp_path / str(worst)
        results[worst] = lilliput.shrink(
            model, made, floor="3%", trials=3, budget=None, worst_class=worst, workers=1, out=out, seed=1
        ).summary
    for summary in results.values():
        assert [row["part"] for row in summary["parts"]] and summary["changed"]["of"] == 1000
    kept = results["12%"]
    assert kept["worst_class"] == 0.12
    assert kept["chosen"]["name"] == "dense" or max(row["bound"] for row in kept["parts"]) <= 0.12 + 1e-9
    # What is smaller without it has a class that pays more.
    free = results[None]
    assert free["chosen"]["packed_bytes"] <= kept["chosen"]["packed_bytes"]
    html = page(tmp_path / "12%")
    assert "Who pays" in html and "class 3" in html


@pytest.mark.parametrize("settings", [{"metric": "f1"}, {"loss": "mse", "metric": "mse"}])
def test_a_floor_of_classes_that_no_outcome_tells_of_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    targets = X if "loss" in settings else LABELS
    made = Task("untold", train=(X, targets), val=(X, targets), **settings)
    with pytest.raises(ValueError, match="worst_class must have classes or groups, and an outcome"):
        lilliput.shrink(nn.Linear(4, 4), made, trials=1, budget=None, worst_class="3%", workers=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_takes_it(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "lilliput.cli",
        "shrink",
        "mnist1d-mlp",
        "--worst-class",
        "most",
        "--out",
        tmp_path / "x",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "worst-class must be at least 0 and below 100%, got most" in done.stderr
