"""Write the table of public methods and the stub of `import lilliput`, from the registry: `python scripts/names.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import lilliput
from lilliput import registry

PUBLIC = ("stage", "rule", "code", "finding", "task", "schedule")
PACKAGE = Path(__file__).resolve().parents[1] / "src" / "lilliput"


def methods() -> dict[str, str]:
    """The module of each method of lilliput itself, by name.

    Raises:
        ValueError: where two of them, or one and a name of lilliput.__init__, are called the same.
    """
    modules: dict[str, str] = {}
    for family in PUBLIC:
        for entry in registry.entries(family):
            if entry.package != "lilliput":
                continue
            if modules.setdefault(entry.name, entry.module) != entry.module or entry.name in lilliput._CORE:
                other = {**lilliput._CORE, **modules}[entry.name]
                raise ValueError(f"names: {entry.name} must be one object, but is in {entry.module} and in {other}.")
    return modules


def table(modules: dict[str, str]) -> str:
    """The text of src/lilliput/_names.py."""
    rows = "".join(f'    "{name}": "{module}",\n' for name, module in modules.items())
    return (
        '"""The methods that `import lilliput` offers. Written by scripts/names.py; do not edit."""\n\n'
        f"METHODS = {{\n{rows}}}\n"
    )


def stub(modules: dict[str, str]) -> str:
    """The text of src/lilliput/__init__.pyi."""
    names = {**lilliput._CORE, **modules}
    rows = "".join(f"from {module} import {name} as {name}\n" for name, module in sorted(names.items(), key=_place))
    return f"# Written by scripts/names.py; do not edit.\n{rows}\n__version__: str\n"


def _place(item: tuple[str, str]) -> tuple[str, int, str]:
    """Where `ruff check --select I` wants an import: by module, then constants, classes, functions."""
    name, module = item
    return module, 0 if name.isupper() else 1 if name[0].isupper() else 2, name


def files() -> dict[Path, str]:
    """Each generated file with its text."""
    modules = methods()
    return {PACKAGE / "_names.py": table(modules), PACKAGE / "__init__.pyi": stub(modules)}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text, encoding="utf-8")
