"""Set-up: the two commands say what is missing, what they install is pinned, what is generated is up to date."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    ours = ("MAKE", "MFLAGS", "ARGS", "VENV", "TORCH", "PYTHON")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=kept | environment, capture_output=True, text=True)


def python_that(tmp_path: Path, *lines: str) -> str:
    """A Python that is like this one but for what the shell lines say."""
    path = tmp_path / "python"
    path.write_text("\n".join(["#!/bin/sh", *lines, f'exec "{sys.executable}" "$@"\n']))
    path.chmod(0o755)
    return str(path)


def test_missing_python_is_named_with_its_install_line(tmp_path: Path) -> None:
    result = make("demo", f"VENV={tmp_path}/venv", "PYTHON=/nonexistent")
    assert result.returncode != 0 and not (tmp_path / "venv").exists()
    for part in ("/nonexistent", "3.11", "3.14", "apt-get install python3", "brew install", "PYTHON="):
        assert part in result.stderr


def test_missing_venv_module_is_named_with_its_install_line(tmp_path: Path) -> None:
    (tmp_path / "ensurepip.py").write_text("raise ImportError('as on Debian without python3-venv')")
    python = python_that(tmp_path, f"export PYTHONPATH={tmp_path}")
    result = make("test", f"VENV={tmp_path}/venv", f"PYTHON={python}")
    assert result.returncode != 0 and not (tmp_path / "venv").exists()
    assert "apt-get install python3-venv" in result.stderr


@pytest.mark.slow
def test_own_torch_is_kept(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    result = make(f"{venv}/torch.installed", f"VENV={venv}", "TORCH=", f"PYTHON={python_that(tmp_path)}")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout and str(Path(torch.__file__).parent) in result.stdout
    assert not re.search("^torch==", (venv / "constraints.txt").read_text(), re.MULTILINE)
    later = make("--dry-run", "demo", f"VENV={venv}")
    assert "venv.sh" not in later.stdout, "the choice holds for later commands"
    other = make("--dry-run", "demo", f"VENV={venv}", "TORCH=torch==2.12.0")
    assert "venv.sh" in other.stdout and '"torch==2.12.0"' in other.stdout


def test_torch_comes_first_and_alone_then_the_pinned_rest() -> None:
    planned = make("--dry-run", "demo", "VENV=nowhere").stdout.splitlines()
    torch_line = next(i for i, line in enumerate(planned) if "venv.sh" in line)
    rest = next(i for i, line in enumerate(planned) if "pip install" in line)
    assert torch_line < rest and '"torch==2.13.0"' in planned[torch_line]
    assert "--constraint nowhere/constraints.txt" in planned[rest] and ".[demo]" in planned[rest]
    assert planned[-1].strip() == "nowhere/bin/lilliput demo"


def test_constraints_pin_everything_and_nothing_local() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in pinned)
    versions = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in pinned)}
    assert versions["torch"] == "2.13.0"
    assert not {"pip", "setuptools", "wheel", "lilliput", "triton"} & set(versions)
    assert not [name for name in versions if name.startswith(("nvidia", "cuda"))]
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(entry for extra in extras for entry in extra)]:
        requirement = Requirement(text)
        if requirement.name != "lilliput":
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{text} does not allow the pinned {version}"


def test_ranges_leave_room_for_another_torch() -> None:
    wanted = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    assert wanted["torch"].contains("2.6.0") and wanted["torch"].contains("3.0")
    assert not [name for name, specifier in wanted.items() if any(part.operator == "==" for part in specifier)]


def test_scripts_are_well_formed() -> None:
    for path, shell in (("scripts/venv.sh", "sh"), ("scripts/constraints.sh", "sh"), (".ci/run", "bash")):
        assert os.access(ROOT / path, os.X_OK), f"{path} is not executable"
        subprocess.run([shell, "-n", ROOT / path], check=True)
    assert (ROOT / ".ci" / "run").read_text().rstrip().endswith("make --silent test"), "pytest has the last word"


def test_version_is_one() -> None:
    import lilliput

    assert lilliput.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_opens_with_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^    (make \S+)", text, re.MULTILINE)
    assert commands == ["make demo", "make test"]
    assert text.index("<!-- picture") < text.index("make demo") < text.index("<!-- output")


def test_readme_says_what_its_record_says() -> None:
    record = ROOT / "results" / "demo.json"
    if not record.exists():
        pytest.skip("the demo has no record yet")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    readme = script("readme")
    parts = readme.parts(json.loads(record.read_text(encoding="utf-8"))) | readme.engine() | readme.anytime()
    assert readme.fill(text, parts) == text, "run `make readme`"


def test_results_say_what_their_records_say() -> None:
    made = script("results").render(ROOT / "results")
    assert (ROOT / "RESULTS.md").read_text(encoding="utf-8") == made, "run `make readme`"


def test_results_are_made_of_records(tmp_path: Path) -> None:
    machine = {"cpu": "a processor", "cores": 2, "load_before": 0.1, "load_after": 0.2}
    rows = [{"task": "a", "val": 0.5, "front": [1, 2]}]
    evidence = {"system": "s", "claim": "it shrinks", "baseline": "dense", "rows": rows, "machine": machine}
    (tmp_path / "s.json").write_text(json.dumps(evidence))
    (tmp_path / "s.quick.json").write_text(json.dumps({**evidence, "size": "quick", "claim": "no claim"}))
    bench = {"what": "steps", "command": "python b.py", "results": {"net": {"mask": {"ms": 2.0}, "dense": {"ms": 1.0}}}}
    (tmp_path / "b.json").write_text(json.dumps(bench))
    run = {"value": 9.5, "machine": {"cpu": "a processor", "cores": 2, "load": 0.1}, "load_after": 1.9}
    row = {"must": 12, "median": 9.5, "reached": False, "in_time": True, "runs": {"0": run}}
    anytime = {"what": "What a search reaches", "command": "python c.py", "rows": {"digits-20s": row}}
    (tmp_path / "anytime.json").write_text(json.dumps(anytime))
    text = script("results").render(tmp_path)
    assert "no claim" not in text
    assert "Claim: it shrinks. Baseline: dense." in text and "| a | 0.5000 | 1 to 2 |" in text
    assert "a processor; cores 2; load 0.1 to 0.2" in text
    assert "| digits-20s | 12 | 9.5 (missed) | 9.5 | yes | 0.1→1.9 |" in text
    assert script("readme").anytime(tmp_path / "none.json") == {"anytime": ""}
    assert "digits-20s" in script("readme").anytime(tmp_path / "anytime.json")["anytime"]
    assert "| net | mask | 2.000 |" in text and "`python b.py`" in text


def test_readme_parts_come_from_a_summary() -> None:
    readme = script("readme")
    summary = json.loads((ROOT / "tests" / "fixtures" / "summary_met.json").read_text(encoding="utf-8"))
    parts = readme.parts(summary)
    assert "10.2 times faster" in " ".join(parts["output"].split()) and "91x" in parts["output"]
    assert "| chosen |" in parts["table"] and "11,984" in parts["table"]
    text = "".join(f"<!-- {name}: made by scripts/readme.py -->\nold\n<!-- end {name} -->\n" for name in parts)
    filled = readme.fill(text, parts)
    assert "old" not in filled and readme.fill(filled, parts) == filled
    with pytest.raises(ValueError, match="picture"):
        readme.fill("no markers", parts)


def test_tests_run_on_one_thread_without_a_network() -> None:
    assert torch.get_num_threads() == 1
    with socket.socket() as mine, pytest.raises(PermissionError, match="nothing may be fetched"):
        mine.connect(("192.0.2.1", 80))
    with pytest.raises(PermissionError):
        socket.getaddrinfo("example.org", 80)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_pre_commit_runs_what_make_lint_runs() -> None:
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    lint = [" ".join(words) for words in re.findall(r"\$\(SCRIPTS\)/(\w+)(?: (format|check))?", recipe[1])]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    entries = [" ".join(words) for words in re.findall(r"entry: (\w+)(?: (format|check))?", hooks)]
    wanted = ["ruff format", "ruff check", "mypy", "deptry", "deptry"]
    assert [word.strip() for word in entries] == [word.strip() for word in lint] == wanted
    assert set(re.findall(r"repo: (\S+)", hooks)) == {"local"} and "language: system" in hooks
