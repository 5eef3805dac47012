"""The public names: generated from the registry, imported when used, and the same for a type checker."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import lilliput
from lilliput import registry

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("names", ROOT / "scripts" / "names.py")
assert spec is not None and spec.loader is not None
names = importlib.util.module_from_spec(spec)
spec.loader.exec_module(names)


def test_the_files_are_what_the_script_writes() -> None:
    for path, text in names.files().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is out of date. Run python scripts/names.py"


def test_every_method_is_a_public_name() -> None:
    assert {entry.name for entry in registry.methods() if entry.package == "lilliput"} <= set(lilliput.__all__)
    assert set(dir(lilliput)) >= set(lilliput.__all__) and len(set(lilliput.__all__)) == len(lilliput.__all__)


def test_the_stub_has_every_name() -> None:
    tree = ast.parse((ROOT / "src" / "lilliput" / "__init__.pyi").read_text(encoding="utf-8"))
    imported = {node.names[0].name: node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {*imported, "__version__"} == set(lilliput.__all__)
    for name, module in imported.items():
        assert getattr(lilliput, name).__module__ == module or name == "Task", name


def test_two_methods_with_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lilliput._CORE, "Prune", "lilliput.elsewhere")
    with pytest.raises(ValueError, match=r"Prune must be one object, but is in lilliput\.prune\.prune and in"):
        names.methods()


def test_import_costs_nothing() -> None:
    program = "import sys, lilliput; print(len([name for name in sys.modules if name.startswith('lilliput')]))"
    command = [sys.executable, "-c", program]
    made = subprocess.run(command, env={"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, check=True)
    assert int(made.stdout) == 2  # itself, and its table of names
