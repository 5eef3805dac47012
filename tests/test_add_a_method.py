"""docs/add-a-method.md is true word for word: its files are written, its package is installed, its commands are run."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
FENCES = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_page_is_run(tmp_path: Path) -> None:
    site, src = tmp_path / "site", ROOT / "src"
    environment = os.environ | {
        # The package is installed into a folder of its own, from this machine alone.
        "PIP_TARGET": str(site),
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the value of build isolation
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PYTHONPATH": os.pathsep.join([str(site), str(src)]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    scripts, commands = [], []
    for language, title, text in FENCES.findall(PAGE):
        if title:
            file = tmp_path / title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        elif language == "python":
            scripts.append(text)
        else:
            assert language == "sh", f"what is a block of {language} without a title for?"
            commands.append(text)
    (tmp_path / "page.py").write_text("\n".join(scripts), encoding="utf-8")
    shown = "\n".join(run("sh", "-ec", command, folder=tmp_path, environment=environment) for command in commands)
    assert re.search(r"input_energy +my_methods +Score a weight", shown)
    assert re.search(r'"Trim": .*25% trimmed, 50% trimmed, 75% trimmed', shown)
    assert re.search(r'"codes": .*ternary', shown)
    run(sys.executable, "page.py", folder=tmp_path, environment=environment)


def run(*command: str, folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_each_example_is_one_file_in_lilliput_too() -> None:
    """What else changes is written by scripts/names.py."""
    spec = importlib.util.spec_from_file_location("touch", ROOT / "scripts" / "touch.py")
    assert spec is not None and spec.loader is not None
    touch = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(touch)
    done = list(touch.touched())
    assert [each.example for each in done] == list(touch.ROOMS)
    for each in done:
        assert len(each.by_hand) == 1
        assert set(each.generated) <= {"src/lilliput/_names.py", "src/lilliput/__init__.pyi"}, each.stat
