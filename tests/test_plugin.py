"""The plug-in test: a package from elsewhere (tests/plugin) brings a method of every sort; no file of src/ knows it.

Each test runs in new processes, which find the package as users have it: installed by pip, with its entry point.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "thumbelina"
BROUGHT = {
    ("code", "Palette"),
    ("finding", "TwinUnits"),
    ("grid", "tapered"),
    ("kind", "Swatches"),
    ("net", "Funnel"),
    ("range", "four_deviations"),
    ("rounding", "mean_keeping"),
    ("rounding", "toward_zero"),
    ("rule", "LearnedTranslation"),
    ("score", "input_energy"),
    ("stage", "BecomeFunnel"),
    ("stage", "MergeTwins"),
    ("statistic", "input_mean"),
    ("task", "MarkovStream"),
}
TARGET = """
import torch
from torch import nn
from lilliput import Task

def make():
    torch.manual_seed(0)
    x = torch.randn(160, 8)
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    return model, task(model, x)

def wide():
    torch.manual_seed(0)
    x = torch.randn(160, 16)
    model = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 3)).eval()
    return model, task(model, x)

def coloured():
    model, both = wide()
    colours = torch.cat([sign * 1.7 ** -torch.arange(8.0) for sign in (-1, 1)]).half().float()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.copy_(colours[torch.randint(0, 16, layer.weight.shape)])
    return model, task(model, torch.randn(160, 16))

def task(model, x):
    with torch.no_grad():
        y = model(x).argmax(1)
    return Task("toy", (x[:96], y[:96]), (x[96:128], y[96:128]), (x[128:], y[128:]))
"""

pytestmark = pytest.mark.slow
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip has installed the package, without a network."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT / "tests" / "plugin", source)
    site = folder / "site"
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(source)], check=True, env=environment())
    return site


def environment(*sites: Path) -> dict[str, str]:
    places = os.pathsep.join(map(str, [ROOT / "src", *sites]))
    return {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run Python in an empty folder that holds toy.py, with the package installed."""
    (tmp_path / "toy.py").write_text(TARGET)

    def python(*words: str, sites: tuple[Path, ...] = (), status: int = 0) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, *words]
        made = subprocess.run(command, cwd=tmp_path, env=environment(installed, *sites), capture_output=True, text=True)
        assert made.returncode == status, made.stdout + made.stderr
        return made

    return python


def program(text: str) -> tuple[str, str]:
    return "-c", "from toy import make\n" + textwrap.dedent(text)


def brought(run: Run) -> set[tuple[str, str]]:
    made = run(*program(f"""
        import json, sys
        from lilliput.registry import FAMILIES, entries
        found = [(e.family, e.name) for family in FAMILIES for e in entries(family) if e.package == "{PACKAGE}"]
        assert "{PACKAGE}" not in sys.modules
        print(json.dumps(found))
    """))  # fmt: skip
    return {(family, name) for family, name in json.loads(made.stdout)}


def test_everything_is_in_the_registry_and_nothing_of_it_in_src(run: Run) -> None:
    listed = brought(run)
    assert listed == BROUGHT
    words = re.compile(rf"\b({'|'.join([PACKAGE, *sorted(name for _, name in listed)])})\b")
    for file in (ROOT / "src").rglob("*.py*"):
        if file.suffix in (".py", ".pyi"):
            assert not words.search(file.read_text(encoding="utf-8")), file


def test_it_is_listed_with_the_name_of_its_package(run: Run) -> None:
    rows = [row.split()[:2] for row in run("-m", "lilliput.cli", "methods").stdout.splitlines()]
    assert {name for _, name in BROUGHT} == {row[0] for row in rows if row[1:] == [PACKAGE]}


def test_it_is_held_by_the_contracts(run: Run) -> None:
    names = " or ".join(sorted(name for family, name in BROUGHT if family not in ("finding", "kind")))
    made = run("-m", "pytest", str(ROOT / "tests" / "contracts"), "-q", "-k", names, "-p", "no:cacheprovider",
               "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))  # fmt: skip
    assert int(re.findall(r"(\d+) passed", made.stdout)[0]) >= 30


def test_a_recipe_holds_it_and_reads_back_in_another_process(run: Run, tmp_path: Path) -> None:
    run(*program("""
        import lilliput
        from lilliput.registry import lookup
        merge, become = lookup("stage", "MergeTwins"), lookup("stage", "BecomeFunnel")
        stages = (become(12), lilliput.Train(5), merge(0.5), lilliput.Prune(0.5, score="input_energy"))
        open("recipe.toml", "w").write(lilliput.Recipe(stages).toml())
    """))  # fmt: skip
    text = (tmp_path / "recipe.toml").read_text()
    assert 'stage = "MergeTwins"' in text and f"{PACKAGE}" not in text
    made = run("-m", "lilliput.cli", "run", "recipe.toml", "toy.py:make", "--out", "out")
    summary = json.loads(made.stdout)
    assert [stage["stage"] for stage in summary["recipe"]] == ["BecomeFunnel", "Train", "MergeTwins", "Prune"]
    assert summary["packed_bytes"] == (tmp_path / "out" / "model.lil").stat().st_size


def test_the_key_of_a_recipe_follows_the_source_of_a_net(run: Run, installed: Path, tmp_path: Path) -> None:
    text = """
        from lilliput.recipe import next_key
        from lilliput.registry import lookup
        print(next_key("start", lookup("stage", "BecomeFunnel")()))
    """
    first = run(*program(text)).stdout
    shutil.copytree(installed, tmp_path / "other")
    file = tmp_path / "other" / PACKAGE / "funnel.py"
    file.write_text(file.read_text().replace("nn.ReLU()", "nn.GELU()"))
    environment_of_other = environment(tmp_path / "other")
    other = subprocess.run(
        [sys.executable, *program(text)], cwd=tmp_path, env=environment_of_other, capture_output=True, text=True
    )
    assert other.stdout and other.stdout != first


def test_its_kind_is_written_to_both_files_and_read_in_another_process(run: Run) -> None:
    """A codebook of 16 float16 entries on 512 x 512: 131,104 bytes counted; ONNX computes it by Gather."""
    made = run(*program("""
        import json, numpy, onnx, torch, lilliput
        from lilliput.registry import lookup
        torch.manual_seed(0)
        net, x = torch.nn.Sequential(torch.nn.Linear(512, 512, bias=False)).eval(), torch.randn(4, 512)
        lilliput.attach(net, "0.weight", lookup("code", "Palette")())
        lilliput.save(net, x, "saved")
        numpy.savez("expected.npz", x=x.numpy(), y=net(x).detach().numpy())
        operators = [node.op_type for node in onnx.load("saved/model.onnx").graph.node]
        print(json.dumps([lilliput.storage(net)["0.weight"].size_bytes, operators]))
    """))  # fmt: skip
    counted, operators = json.loads(made.stdout)
    assert counted == 131_104 and "Gather" in operators
    made = run(*program("""
        import json, os, sys, numpy, onnxruntime, torch, lilliput
        assert not any(name.startswith("thumbelina") for name in sys.modules)
        expected = numpy.load("expected.npz")
        net = lilliput.load("saved")
        assert abs(net(torch.from_numpy(expected["x"])).detach().numpy() - expected["y"]).max() < 1e-4
        session = onnxruntime.InferenceSession("saved/model.onnx")
        y = session.run(None, {session.get_inputs()[0].name: expected["x"]})[0]
        assert abs(y - expected["y"]).max() < 1e-4
        print(json.dumps([os.path.getsize(f"saved/model.{end}") for end in ("lil", "onnx")]))
    """))  # fmt: skip
    assert all(size < 1.15 * counted for size in json.loads(made.stdout))


def test_a_recipe_holds_its_code(run: Run, tmp_path: Path) -> None:
    run(*program("""
        import lilliput
        from lilliput.registry import lookup
        stages = (lilliput.Encode(lookup("code", "Palette")(rounds=9), where="0"), lilliput.Train(5))
        open("recipe.toml", "w").write(lilliput.Recipe(stages).toml())
    """))  # fmt: skip
    assert 'code = { code = "Palette", rounds = 9 }' in (tmp_path / "recipe.toml").read_text()
    made = run("-m", "lilliput.cli", "run", "recipe.toml", "toy.py:make", "--out", "out")
    summary = json.loads(made.stdout)
    assert summary["recipe"][0] == {"stage": "Encode", "code": {"code": "Palette", "rounds": 9}, "where": "0"}
    assert summary["packed_bytes"] == (tmp_path / "out" / "model.lil").stat().st_size


def test_its_code_is_restored_in_another_process_and_saved_as_the_same_bytes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        '[[stages]]\nstage = "Encode"\ncode = { code = "Palette", rounds = 5 }\nwhere = "0,2"\n'
    )
    run("-m", "lilliput.cli", "run", "recipe.toml", "toy.py:wide", "--out", "out")
    run("-c", textwrap.dedent("""
        import lilliput, torch
        from toy import wide
        from lilliput.code.base import codes
        dense, task = wide()
        net = lilliput.restore("out", dense)
        assert [type(code).__name__ for chain in codes(net).values() for code in chain] == ["Palette", "Palette"]
        lilliput.save(net, task.example, "again", lilliput.Recipe.read("out/recipe.toml"))
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        loss = net(task.example).square().sum()
        loss.backward()
        optimizer.step()
        assert float(net(task.example).square().sum()) < float(loss)
    """))  # fmt: skip
    for name in ("model.onnx", "model.lil", "model.safetensors", "recipe.toml"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_dry_run_shows_what_it_proposes(run: Run) -> None:
    made = run("-m", "lilliput.cli", "shrink", "toy.py:make", "--dry-run", "--json")
    tried = json.loads(made.stdout)["tried"]
    assert tried["BecomeFunnel"].endswith("funnel of 32, funnel of 16, funnel of 8, funnel of 4")
    assert "25% of twins merged" in tried["MergeTwins"] and "palette (1 tensors)" in tried["codes"]


def test_a_search_trains_its_students(run: Run) -> None:
    made = run(
        "-m", "lilliput.cli", "shrink", "toy.py:wide", "--floor", "30%", "--trials", "6", "--out", "out", "--json"
    )
    summary = json.loads(made.stdout)
    rounds = [row["name"] for row in summary["points"] if row["kind"] == "round"]
    assert any("funnel of 16" in name for name in rounds) and any("of twins merged" in name for name in rounds)


def test_a_search_stores_tensors_in_its_code_where_no_grid_does_as_well(run: Run, tmp_path: Path) -> None:
    """Weights of 16 values that no grid holds: at four bits the palette alone loses nothing."""
    options = ("--max-bytes", "5KB", "--no-train", "--trials", "1", "--out", "out", "--json")
    summary = json.loads(run("-m", "lilliput.cli", "shrink", "toy.py:coloured", *options).stdout)
    stages = summary["chosen"]["recipe"]
    assert {"stage": "Encode", "code": {"code": "Palette", "rounds": 20}, "where": "2.weight"} in stages, stages
    assert (tmp_path / "out" / "model.lil").stat().st_size == summary["chosen"]["packed_bytes"] <= 5000
    again = run(*program("""
        import json, lilliput
        recipe = lilliput.Recipe.read("out/recipe.toml")
        print(json.dumps(recipe.data()))
    """))  # fmt: skip
    assert json.loads(again.stdout) == stages


def test_its_grid_and_rounding_quantize(run: Run) -> None:
    run(*program("""
        import torch, lilliput
        model, task = make()
        stage = lilliput.Quantize(4, grid="tapered", rounding="toward_zero")
        coded = stage(model, task, None)
        for before, after in zip(model.parameters(), lilliput.realize(coded).parameters()):
            if before.dim() > 1:
                assert after.unique().numel() > 3 and max(len(row.unique()) for row in after) <= 13
                assert bool((after.abs() <= before.abs() + 1e-6).all())
        recipe = lilliput.Recipe((stage,))
        assert recipe.data()[0] == {"stage": "Quantize", "grid": "tapered", "rounding": "toward_zero", "bits": 4}
        assert lilliput.Recipe.parse(recipe.data()) == recipe
    """))  # fmt: skip


def test_its_task_without_arrays_is_trained_and_scored(run: Run, tmp_path: Path) -> None:
    (tmp_path / "stream.py").write_text("""
import torch
from torch import nn
from lilliput.registry import lookup

def make():
    torch.manual_seed(0)
    task = lookup("task", "MarkovStream")()
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 6)), task
""")
    stages = ['stage = "Train"\nsteps = 300\nsupervised = 1.0\nlr = 0.01\n', 'stage = "Prune"\nsparsity = 0.3\n']
    (tmp_path / "recipe.toml").write_text("".join(f"[[stages]]\n{stage}" for stage in stages))
    summary = json.loads(run("-m", "lilliput.cli", "run", "recipe.toml", "stream.py:make", "--out", "out").stdout)
    assert summary["task"] == "walks of 4" and 0.4 < summary["val"] <= 1


def test_its_rounding_asks_for_its_statistic_and_keeps_the_mean_of_every_output(run: Run, tmp_path: Path) -> None:
    run(*program("""
        import torch, lilliput
        from lilliput.quant.quantize import Quantize
        net, task = make()
        net[0].bias.data += 1
        ours, plain = (Quantize(3, grid="tapered", rounding=rounding, biases="float32")(net, task, None)
                       for rounding in ("mean_keeping", "nearest"))
        x = task.calibration()
        hidden = net[:2](x)
        moved = [(found[2](hidden) - net[2](hidden)).mean(0).abs().max().item() for found in (ours, plain)]
        assert moved[0] < 0.5 * moved[1], moved
        stages = (Quantize(5, range="four_deviations", grid="tapered", rounding="mean_keeping"),)
        open("recipe.toml", "w").write(lilliput.Recipe(stages).toml())
    """))  # fmt: skip
    summary = json.loads(run("-m", "lilliput.cli", "run", "recipe.toml", "toy.py:make", "--out", "out").stdout)
    assert summary["recipe"][0]["rounding"] == "mean_keeping" and summary["recipe"][0]["grid"] == "tapered"
    assert summary["packed_bytes"] == (tmp_path / "out" / "model.lil").stat().st_size


def test_the_loss_of_its_rule_follows_the_schedule_and_its_extra_trains_and_resumes(run: Run) -> None:
    run(*program("""
        import torch, lilliput
        from lilliput.registry import lookup
        rule = lookup("rule", "LearnedTranslation")
        model, task = make()
        fading = rule(lilliput.Linear(1.0, 0.0))
        reference = lilliput.Reference(model, task)
        batch = next(iter(task.batches(1, 0)))
        student = torch.nn.Linear(8, 3)
        state = fading.begin(student, task, reference, 8)
        losses = [fading.loss(state, student, k, 8, batch, student(batch.inputs), reference) for k in range(9)]
        torch.testing.assert_close(torch.stack(losses), losses[0] * (1 - torch.arange(9) / 8))
        sgd = torch.optim.SGD(student.parameters(), 0.1)
        with fading.attached(student, sgd, steps=3, task=task, reference=reference, state=state) as driver:
            for batch in task.batches(3, 0):
                y = student(batch.inputs)
                sgd.zero_grad(); (task.loss(y, batch) + driver.loss(batch, y)).backward(); sgd.step()
        assert not torch.equal(state["translate"].weight, torch.eye(3))

        def trained(until):
            return lilliput.Recipe((lilliput.Train(20, lr=0.01, rules=(fading,), until=until),))

        straight = lilliput.run(model, task, trained(None))
        lilliput.run(model, task, trained(7), "store")
        resumed = lilliput.run(model, task, trained(None), "store")
        for a, b in zip(straight.state_dict().values(), resumed.state_dict().values()):
            assert torch.equal(a, b)
    """))  # fmt: skip


def test_its_finding_counts_what_its_stage_merges_exactly(run: Run) -> None:
    run(*program("""
        import copy, torch
        from thumbelina.twins import MergeTwins, twin_units
        model, task = make()
        with torch.no_grad():
            for i in range(12):
                model[0].weight[12 + i], model[0].bias[12 + i] = model[0].weight[i], model[0].bias[i]
        assert twin_units(model, task).twins == (24,)
        merged = MergeTwins(0.5)(model, task, None)
        assert merged[0].out_features == 12 and model[0].out_features == 24
        x = task.example
        torch.testing.assert_close(merged(x), model(x))
    """))  # fmt: skip


def copy_of(text: dict[str, str], folder: Path) -> Path:
    """Another package, as pip leaves it."""
    site = folder / "another"
    (site / "another-1.0.dist-info").mkdir(parents=True)
    (site / "another-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 1.0\n")
    entry: dict[str, Any] = {"another-1.0.dist-info/entry_points.txt": "[lilliput.methods]\nanother = another\n"}
    for name, content in {**entry, **text}.items():
        (site / name).write_text(content)
    return site


def test_a_second_package_with_one_of_its_names_is_refused(run: Run, tmp_path: Path) -> None:
    text = 'from lilliput.registry import register\n@register("score")\ndef input_energy(weight): ...\n'
    site = copy_of({"another.py": text}, tmp_path)
    made = run("-m", "lilliput.cli", "methods", sites=(site,), status=2)
    error = " ".join(made.stderr.split())
    assert "'input_energy' is in" in error and "score.py" in error and "another.py" in error and "Rename" in error
