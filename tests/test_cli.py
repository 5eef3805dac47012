"""The command line: real processes, exit statuses, and errors that say what must hold, what came, what to do."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from lilliput.cli import app

pytestmark = pytest.mark.slow  # real processes

TARGETS = '''
import numpy as np
import torch
from torch import nn
from lilliput import Task

torch.manual_seed(0)
X = torch.randn(160, 8)
Y = (X @ torch.randn(8, 3)).argmax(1)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def task(x=X, y=Y, **settings):
    return Task("toy", (x[:96], y[:96]), (x[96:128], y[96:128]), (x[128:], y[128:]), **settings)


def good():
    model = network()
    with torch.no_grad():
        y = model(X).argmax(1)
    return model, task(y=y)


def wrong_shape():
    return network(), task(x=X[:, :5])


def wrong_targets():
    return network(), task(y=Y + 7)


def empty_loader():
    return network(), Task("toy", torch.utils.data.DataLoader([]), (X, Y))


def lengths():
    return network(), Task("toy", (X, Y[:5]), (X, Y))


def nan_metric():
    return network(), task(metric=lambda outputs, targets: outputs.mean() * float("nan"))


def nan_outputs():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    return model, task()


def no_task():
    return network()


def raises():
    return network().missing


def two_outputs():
    class Two(nn.Linear):
        def forward(self, x):
            return x, super().forward(x)
    return Two(8, 3), task()


class Moody(nn.Module):
    """Cannot be exported: what it does depends on the values it sees."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 3)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else -self.a(x)


def cannot_export():
    return Moody(), task()


not_a_function = 3
'''


def lilliput(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "lilliput.cli", *arguments], cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "toy_targets.py").write_text(TARGETS)
    return folder


@pytest.fixture(scope="module")
def shrunk(place: Path) -> subprocess.CompletedProcess[str]:
    """One search in a real process."""
    return lilliput(
        "shrink", "toy_targets.py:good", "--floor", "40%", "--trials", "1", "--out", "found", "--json", cwd=place
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from lilliput.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'optuna', 'onnx', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n") and "shrink" in done.stdout


@pytest.mark.parametrize(
    "command", [[], ["shrink"], ["demo"], ["tasks"], ["methods"], ["run"], ["report"], ["measure"], ["evidence"]]
)
def test_every_help_shows_one_example(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"])
    assert done.exit_code == 0 and done.output.count("Example: lilliput ") == 1


def test_tasks_and_methods_are_listed(place: Path) -> None:
    tasks = CliRunner().invoke(app, ["tasks"], env={"COLUMNS": "200"})
    methods = CliRunner().invoke(app, ["methods"])
    assert all(name in tasks.output for name in ("digits", "mnist1d-cnn", "languages", "sentences"))
    assert all(name in methods.output for name in ("Prune", "Quantize", "Distill", "Student", "magnitude", "ResNet"))
    assert all(len(line) <= 80 and "…" not in line for line in methods.output.splitlines())
    one = CliRunner().invoke(app, ["methods", "--family", "allocation"])
    assert {line.split()[0] for line in one.output.splitlines() if line[:1].isalpha()} == {
        *("allocation", "name", "uniform", "erk", "global", "normalized")
    }
    wrong = CliRunner().invoke(app, ["methods", "--family", "scores"])
    assert wrong.exit_code == 2 and "Did you mean 'score'" in wrong.output


def test_shrink_writes_its_files_and_prints_json_alone(shrunk: subprocess.CompletedProcess[str], place: Path) -> None:
    assert shrunk.returncode == 0, shrunk.stderr
    summary = json.loads(shrunk.stdout)
    assert summary == json.loads((place / "found" / "summary.json").read_text())
    for name in ("model.onnx", "model.lil", "model.safetensors", "recipe.toml", "report.html"):
        assert (place / "found" / name).stat().st_size > 0
    assert summary["met"] and summary["chosen"]["onnx_bytes"] == (place / "found" / "model.onnx").stat().st_size
    assert summary["chosen"]["packed_bytes"] == (place / "found" / "model.lil").stat().st_size
    assert summary["command"].startswith("lilliput shrink toy_targets.py:good")
    needed = {
        "task",
        "seed",
        "floor",
        "objective",
        "budget_s",
        "wall_s",
        "machine",
        "versions",
        "commit",
        "dense",
        "drop_val",
        "drop_corrected",
        "drop_corrected_interval",
        "drop_test",
        "steps_per_s",
        "shares",
    }
    assert needed <= set(summary)
    assert shrunk.stderr == ""


def test_what_was_written_can_be_loaded_and_predicts_the_same(
    shrunk: subprocess.CompletedProcess[str], place: Path
) -> None:
    import torch

    import lilliput as package
    from lilliput.export.onnx import Session

    x = torch.randn(5, 8)
    packed, exported = package.load(place / "found")(x), Session(place / "found" / "model.onnx").outputs(x)
    np.testing.assert_allclose(packed.numpy(), exported, atol=1e-5)


def test_a_search_is_not_overwritten(shrunk: subprocess.CompletedProcess[str], place: Path) -> None:
    before = (place / "found" / "summary.json").read_bytes()
    done = CliRunner().invoke(app, ["shrink", f"{place}/toy_targets.py:good", "--out", str(place / "found")])
    assert done.exit_code == 2 and "--resume" in done.stderr
    assert (place / "found" / "summary.json").read_bytes() == before


def test_run_applies_a_recipe_and_report_rebuilds_the_page(
    shrunk: subprocess.CompletedProcess[str], place: Path
) -> None:
    recipe = place / "int8.toml"
    recipe.write_text('[[stages]]\nstage = "Quantize"\nbits = 8\n')
    done = CliRunner().invoke(app, ["run", str(recipe), f"{place}/toy_targets.py:good", "--out", str(place / "once")])
    assert done.exit_code == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["packed_bytes"] == (place / "once" / "model.lil").stat().st_size
    assert summary["val"] >= 0.9 and summary["beside_dense"]["changed"] <= 0.1
    page = place / "found" / "report.html"
    page.unlink()
    done = CliRunner().invoke(app, ["report", str(place / "found")])
    assert done.exit_code == 0 and page.exists()


def test_measure_compares_files_in_one_run(
    shrunk: subprocess.CompletedProcess[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)  # a long path would be broken in the table
    file = "found/model.onnx"
    done = CliRunner().invoke(app, ["measure", file, file, "--seconds", "0.1", "--batch", "4"], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "times faster" in done.output
    assert done.output.count("model.onnx") == 2
    broken = place / "broken.onnx"
    broken.write_bytes(b"no model")
    for wrong in (
        ["measure", str(broken)],
        ["measure", "nowhere.onnx"],
        ["measure", file, "--shape", "y=1x2"],
        ["measure", file, "--shape", "x=axb"],
    ):
        done = CliRunner().invoke(app, wrong)
        assert done.exit_code == 2 and " must " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["digit"], "Did you mean 'digits'?"),
        (["nowhere.py:make"], "the file must exist"),
        (["no.such.module:make"], "must be importable"),
        (["{targets}:god"], "Did you mean 'good'"),
        (["{targets}:not_a_function"], "must have a function"),
        (["{targets}:no_task"], "must return (model, task)"),
        (["{targets}:raises"], "AttributeError"),
        (["{targets}:two_outputs"], "metric and loss must take outputs of shape"),
        (["{targets}:wrong_shape"], "an example has the shape (1, 5)"),
        (["{targets}:wrong_targets"], "Check the task's targets"),
        (["{targets}:empty_loader"], "got an empty loader"),
        (["{targets}:lengths"], "got lengths [5, 160]"),
        (["{targets}:nan_metric"], "must be a finite number, got nan"),
        (["{targets}:nan_outputs"], "outputs must be finite"),
        (["{targets}:good", "--floor", "150%"], "below 100%, got 150%"),
        (["{targets}:good", "--floor", "1..5%"], "got 1..5%"),
        (["{targets}:good", "--floor", "-1%"], "at least 0"),
        (["{targets}:good", "--budget", "soon"], "such as 90s, 5m or 1h, got 'soon'"),
        (["{targets}:good", "--budget", "1.2.3m"], "got '1.2.3m'"),
        (["{targets}:good", "--for", "speed"], "must be one of size, latency, macs"),
        (["{targets}:good", "--max-bytes", "big"], "such as 900KB or 2MB, got 'big'"),
        (["{targets}:good", "--max-latency-ms", "0"], "above 0, got 0"),
        (["{targets}:good", "--trials", "0"], "at least 1, got 0"),
        (["{targets}:good", "--device", "cuda:99"], "device must be one that this machine has"),
        (["{targets}:good", "--device", "toaster"], "got 'toaster'"),
        (["{targets}:good", "--shape", "x=1x8"], "must come with model.onnx"),
        (["nowhere.onnx"], "the file must exist"),
    ],
)
def test_bad_input_ends_with_status_2_and_nothing_written(
    arguments: list[str], said: str, place: Path, tmp_path: Path
) -> None:
    arguments = [text.format(targets=place / "toy_targets.py") for text in arguments]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["shrink", "--out", str(out), *arguments])
    assert done.exit_code == 2, (done.output, done.exception)
    assert said in done.stderr and done.stderr.startswith("error ") and "Traceback" not in done.stderr
    assert not out.exists()


def test_a_wrong_target_in_a_real_process(place: Path) -> None:
    done = lilliput("shrink", "toy_targets.py:wrong_shape", "--out", "nothing", cwd=place)
    assert done.returncode == 2 and "must run on the task's inputs" in done.stderr and done.stdout == ""
    assert not (place / "nothing").exists()


def test_a_model_that_cannot_be_exported_leaves_nothing(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["shrink", f"{place}/toy_targets.py:cannot_export", "--out", str(out)])
    assert done.exit_code == 2 and "could not export Moody" in done.stderr and not out.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must hold a list of stages"),
        ("[[stages]]\nbits = 3\n", "must name its stage"),
        ('[[stages]]\nstage = "Quantise"\n', "Did you mean 'Quantize'"),
        ('[[stages]]\nstage = "Quantize"\nbit = 3\n', "got ['bit']"),
        ('[[stages]]\nstage = "Quantize"\nbits = 99\n', "bits must be from 2 to 16, got 99"),
        ('[[stages]]\nstage = "Quantize"\nwhere = "nowhere.*"\n', "must match"),
        ("stages = [", "must be TOML"),
    ],
)
def test_a_wrong_recipe_ends_with_status_2_and_nothing_written(
    text: str, said: str, place: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(text)
    done = CliRunner().invoke(app, ["run", str(recipe), f"{place}/toy_targets.py:good", "--out", str(out)])
    assert done.exit_code == 2 and said in done.stderr and not out.exists(), (done.output, done.exception)


def test_a_dry_run_says_what_would_be_tried_and_writes_nothing(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["shrink", f"{place}/toy_targets.py:good", "--out", str(out), "--dry-run", "--trials", "2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and "fraction of the channels" in done.output and "they are the output" in done.output
    plan = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert "2 structures" in plan["time"] and plan["left_alone"] and not out.exists()


def test_an_unreadable_report_folder_is_named(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "summary.json" in done.stderr
    (tmp_path / "summary.json").write_text("{")
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 2


def test_brackets_in_an_error_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from lilliput.cli import fail

    with pytest.raises(typer.Exit):
        fail("shape [red](1, 8)[/red] in a[b]")
    assert "error shape [red](1, 8)[/red] in a[b]" in capsys.readouterr().err
