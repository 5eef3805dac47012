"""The documentation: its code runs, its links lead somewhere, the site is built without a network."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import lilliput

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
RUN = [*sorted((ROOT / "docs" / "nouns").glob("*.md")),
       *(ROOT / "docs" / f"{name}.md" for name in ("own-loop", "file-format")),
       *(ROOT / "docs" / name / "index.md" for name in ("quant", "distill"))]  # fmt: skip


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_compiles_and_names_what_exists(page: Path) -> None:
    for block in blocks(page):
        compile(block, str(page), "exec")
        for used in re.findall(r"\blilliput\.([A-Za-z]\w*)", block):
            known = used in lilliput.__all__ or any((ROOT / "src" / "lilliput").glob(f"{used}*"))
            assert known, f"{name(page)}: lilliput.{used} does not exist"


@pytest.mark.parametrize("page", RUN, ids=name)
def test_code_runs(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    assert blocks(page), "a page that is run has code"
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)) + re.findall(r'(?:src|srcset)="([^"]+)"', prose(page)):
        if not re.match(r"https?:|mailto:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{name(page)}: {target} does not exist"


def test_command_line_page_has_every_command_and_option() -> None:
    import typer

    from lilliput.cli import app

    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for command in commands:
        assert f"lilliput {command}" in page
    for option in commands["shrink"].params:
        if option.param_type_name == "option":
            assert option.opts[0] in page, f"{option.opts[0]} is missing"


def test_method_table_has_every_method() -> None:
    from lilliput.registry import FAMILIES, entries

    made = subprocess.run([sys.executable, ROOT / "scripts" / "methods.py"], capture_output=True, text=True, check=True)
    listed = [entry for family in FAMILIES for entry in entries(family) if entry.package == "lilliput"]
    for entry in listed:  # not what the pages themselves have registered
        assert f"| `{entry.name}` |" in made.stdout
    assert "`attached`, and add its `loss`" in next(x for x in made.stdout.splitlines() if x.startswith("| `Distill`"))


@pytest.mark.slow
def test_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for page in tmp_path.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        fetched = [tag for tag in tags if re.search(r'(?:src|href)="?(?:https?:)?//', tag) and "canonical" not in tag]
        assert not fetched, f"{page.name}: {fetched}"
    methods = (tmp_path / "methods.html").read_text(encoding="utf-8")
    assert "<code>Prune</code>" in methods
    check_reference(tmp_path)


def check_reference(site: Path) -> None:
    """Every public name, method and noun has an entry, a link to its line in the source, and is found by the search."""
    from lilliput.registry import methods

    searched = {entry["location"] for entry in json.loads((site / "search/search_index.json").read_text())["docs"]}
    named = {
        (value.__module__, name) for name in lilliput.__all__ if hasattr(value := getattr(lilliput, name), "__name__")
    }
    assert len(named) >= len(lilliput.__all__) - 1, "all but the version"
    for module, entry in named | {(method.module, method.name) for method in methods()}:
        page = site / "reference" / f"{module.removeprefix('lilliput.').replace('.', '/')}.html"
        heading = re.search(
            rf'<h\d id="{module}.{entry}" class="doc.*?</h\d>', page.read_text(encoding="utf-8"), re.DOTALL
        )
        assert heading, f"{module}.{entry} has no entry"
        source, line = re.search(r'href="([^"]+)#(line-\d+)"', heading[0]).groups()  # type: ignore[union-attr]
        assert f'id="{line}"' in (page.parent / source).read_text(encoding="utf-8")
        assert f"{page.relative_to(site).as_posix()}#{module}.{entry}" in searched
