"""Using a result: the files of another point, predictions from arrays, what a machine offers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lilliput
from lilliput.search import doctor, kept
from lilliput.task import Task, predict


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Task, nn.Module]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=draw)
    y = (x @ torch.randn(8, 3, generator=draw)).argmax(1)
    torch.manual_seed(0)
    made = Task("toy", (x[:200], y[:200]), (x[200:], y[200:]))
    net = lilliput.run(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), made, [lilliput.Train(100)])
    out = tmp_path_factory.mktemp("kept") / "out"
    lilliput.shrink(net, made, floor="20%", trials=1, budget=None, workers=1, out=out)
    return out, made, net


def cli(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lilliput.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_files_of_a_point_that_was_not_chosen(searched: tuple[Path, Task, nn.Module], tmp_path: Path) -> None:
    folder, made, net = searched
    summary = json.loads((folder / "summary.json").read_text())
    listed = kept.points(folder)
    sizes = [point.row["packed_bytes"] for point in listed]
    assert sizes == sorted(sizes, reverse=True) and listed[0].row["name"] == "dense" and len(listed) > 2
    other = next(point for point in listed[1:] if point.key != summary["chosen"]["key"])
    for place, named in enumerate((other.row["name"], other.key, other.key[:10])):
        out = tmp_path / str(place)
        assert lilliput.pick(folder, named, out) == other
        assert (out / "model.lil").stat().st_size == other.row["packed_bytes"]
        assert made.score(lilliput.load(out)).value == pytest.approx(other.row["val"], abs=1e-6)
        again = lilliput.restore(out, net, made)
        assert torch.allclose(predict(again, made.example), predict(lilliput.load(out), made.example), atol=1e-4)


def test_a_point_that_nobody_knows_is_refused_by_name(searched: tuple[Path, Task, nn.Module], tmp_path: Path) -> None:
    folder, *_ = searched
    with pytest.raises(ValueError, match=r"must name one of the \d+ points .* got 'dens'|dense"):
        kept.pick(folder, "densest", tmp_path / "x")
    with pytest.raises(ValueError, match="points begin with it"):
        kept.pick(folder, "", tmp_path / "x")
    with pytest.raises(ValueError, match="another folder than"):
        kept.pick(folder, "dense", folder)
    with pytest.raises(ValueError, match="must be a folder that `lilliput shrink` wrote"):
        kept.points(tmp_path)
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_commands(searched: tuple[Path, Task, nn.Module], tmp_path: Path) -> None:
    folder, made, _ = searched
    assert "dense" in cli("pick", folder).stdout and len(json.loads(cli("pick", folder, "--json").stdout)) > 2
    assert cli("pick", folder, "dense", "--out", tmp_path / "dense").returncode == 0
    x = made.calibration(20)
    np.save(tmp_path / "x.npy", x.double().numpy())
    done = cli("predict", folder, tmp_path / "x.npy", "--out", tmp_path / "y.npz", "--batch", 7)
    assert done.returncode == 0 and "20 x 3" in done.stdout
    outputs = np.load(tmp_path / "y.npz")["output"]
    assert np.allclose(outputs, predict(lilliput.load(folder), x).numpy(), atol=1e-5)
    for arguments, said in (
        (("predict", folder, tmp_path / "none.npy"), "must be in a file that exists"),
        (("predict", folder, folder / "model.lil"), "must be a file of numpy's"),
        (("demo", "--out", folder), "got another search"),
    ):
        done = cli(*arguments)
        assert done.returncode == 2 and said in done.stderr.replace("\n", " "), done.stderr
    assert (folder / "records").is_dir(), "nothing of it is gone"
    assert cli("--version").stdout.strip() == f"lilliput {lilliput.__version__}"
    assert cli("-h").stdout == cli("--help").stdout and "doctor" in cli("-h").stdout


def test_what_a_machine_offers() -> None:
    rows = {row.what: row for row in doctor.found()}
    assert "torch" in rows["versions"].text and "workers" in rows["cores"].text
    assert rows["extra demo"].text == "installed" or "pip install 'lilliput[demo]'" in rows["extra demo"].text
    assert all(row.good or row.do for row in rows.values())
    printed = " ".join(cli("doctor").stdout.split())
    assert all(row.text in printed for row in rows.values() if row.what.startswith("extra ")), printed
    assert "lilliput[mnist1d]" in cli("tasks").stdout
