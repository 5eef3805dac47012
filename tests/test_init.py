"""lilliput init: the file that it writes opens as a target; questions may be answered by options."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from lilliput.cli import app
from lilliput.cli.init import written

NET = """from torch import nn


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
"""
DATA = """import numpy as np


def splits():
    x = np.random.default_rng(0).normal(size=(90, 4)).astype("float32")
    y = x.argmax(1) % 3
    return (x[:30], y[:30]), (x[30:60], y[30:60]), (x[60:], y[60:])
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NET)
    Path("mydata.py").write_text(DATA)
    draw = np.random.default_rng(0)
    x = draw.normal(size=(90, 4)).astype("float32")
    np.savez("one.npz", x=x, y=x.argmax(1) % 3)
    np.savez("parts.npz", x_train=x[:50], y_train=x[:50].argmax(1) % 3, x_val=x[50:], y_val=x[50:].argmax(1) % 3)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    torch.save(net.state_dict(), "net.pt")
    return tmp_path


@pytest.mark.parametrize("data", ["one.npz", "parts.npz", "mydata.py:splits"])
def test_what_is_written_can_be_shrunk(data: str, place: Path) -> None:
    asked = ["--network", "nets.py:Net", "--weights", "net.pt", "--data", data, "--outputs", "classes"]
    done = CliRunner().invoke(app, ["init", *asked])
    assert done.exit_code == 0 and "lilliput shrink mine.py:network --dry-run" in done.stdout
    planned = subprocess.run(
        [sys.executable, "-m", "lilliput.cli", "shrink", "mine.py:network", "--dry-run"],
        cwd=place, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert planned.returncode == 0, planned.stderr


def test_questions_are_asked_for_what_is_not_given(place: Path) -> None:
    done = CliRunner().invoke(app, ["init", "own.py"], input="nets:Net\n\nmydata:splits\nyes-no\n")
    assert done.exit_code == 0, done.output
    text = Path("own.py").read_text()
    assert "model = Net()" in text and "load_state_dict" not in text and "loss='bce'" in text
    again = CliRunner().invoke(app, ["init", "own.py"])
    assert again.exit_code == 2 and "--force" in again.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("nets", "", "one.npz", "classes"), "network must be package.module:Name"),
        (("nets:Net", "", "gone.npz", "classes"), "the file must exist"),
        (("nets:Net", "", "odd.npz", "classes"), "must hold x and y"),
        (("nets:Net", "", "mydata:splits", "words"), "outputs must be one of classes"),
    ],
)
def test_answers_that_do_not_fit_are_refused(given: tuple[str, str, str, str], said: str, place: Path) -> None:
    np.savez("odd.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match=said):
        written(Path("mine.py"), *given)
