"""The documentation: its code runs, its links lead somewhere, the site is built and searched without a network."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

import lilliput
from lilliput import registry
from lilliput.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md")])
RUN = [*sorted((ROOT / "docs" / "nouns").glob("*.md")),
       *(ROOT / "docs" / f"{name}.md" for name in ("own-loop", "file-format", "which-method")),
       *(ROOT / "docs" / name / "index.md" for name in ("quant", "distill"))]  # fmt: skip
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"`[^`\n]+`", "", FENCED.sub("", page.read_text(encoding="utf-8")))


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
        if not re.match(r"https?:|mailto:", target):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{name(page)}: {target} does not exist"
            assert not anchor or anchor in anchors(file), f"{name(page)}: {target} is no heading"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_can_be_given(page: Path) -> None:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^    (lilliput [a-z].*?)(?:  .*)?$", text, re.MULTILINE)
    lines += re.findall(r"`(lilliput [a-z]+ [^-`\n][^`\n]*)`", text)
    for line in lines:
        if "[" not in line:  # the grammar of a command, no command
            give(line)


def give(line: str) -> None:
    """Read a command as a shell and lilliput do, without running it."""
    import typer

    from lilliput.cli import app

    _, command, *rest = shlex.split(line)
    typer.main.get_command(app).commands[command].make_context(command, rest)  # type: ignore[attr-defined]


WHICH = ROOT / "docs" / "which-method.md"


def test_which_method_names_what_is_registered() -> None:
    known, text = {entry.name for entry in registry.methods()}, WHICH.read_text(encoding="utf-8")
    for options in re.findall(r"`(--[^`]+)` \|$", text, re.MULTILINE):
        give(f"lilliput shrink mine.py:network {options}")
    named = set(re.findall(r"`([A-Z]\w+)[`(]", text))
    assert len(named) > 20 and named <= known, f"not registered: {named - known}"
    (recipe,) = blocks(WHICH, "toml")
    assert [type(stage).__name__ for stage in Recipe.parse(tomllib.loads(recipe)["stages"]).stages] == [
        "Narrow", "Train", "Quantize"
    ]  # fmt: skip


def test_every_refusal_is_explained_and_exists() -> None:
    page = (ROOT / "docs" / "refused.md").read_text(encoding="utf-8").partition("## The result")[0]
    explained = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    rooms = {"search": ("check", "ask", "question", "onnx_target", "lock"), ".": ("shrinking",),
             "targets": [file.stem for file in (ROOT / "src" / "lilliput" / "targets").glob("*.py")],
             "code": ("adopt",), "export": ("guard",), "onnx": ("trace", "packed", "session", "compare"),
             "task": [file.stem for file in (ROOT / "src" / "lilliput" / "task").glob("*.py")]}  # fmt: skip
    said = [text for room, files in rooms.items() for file in files for text in messages(room, file)]
    assert not [text for text in said if not any(part in text for part in explained)], "messages without a row"
    assert not [part for part in explained if not any(part in text for text in said)], "rows without a message"


def messages(room: str, file: str) -> list[str]:
    """What a file of lilliput says in its errors, "{}" where a value comes in."""
    source = (ROOT / "src" / "lilliput" / room / f"{file}.py").read_text(encoding="utf-8")
    raised = [node.exc for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    texts = [written(call.args[0]) for call in raised if isinstance(call, ast.Call) and call.args]
    return [text for text in texts if text != "{}"]


def written(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(written(part) for part in node.values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # a text that is stripped
        return written(node.func.value)
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


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
    made = subprocess.run([sys.executable, ROOT / "scripts" / "methods.py"], capture_output=True, text=True, check=True)
    every = (entry for family in registry.FAMILIES for entry in registry.entries(family))
    listed = [entry for entry in every if entry.package == "lilliput"]
    for entry in listed:  # not what the pages themselves have registered
        assert f"| `{entry.name}` |" in made.stdout
    assert "`attached`, and add its `loss`" in next(x for x in made.stdout.splitlines() if x.startswith("| `Distill`"))


def test_figures_can_be_read_on_light_and_on_dark_pages() -> None:
    for picture in [*(ROOT / "docs" / "images").glob("prune-*.svg"), *(ROOT / "docs" / "images").glob("bonsai-*.svg")]:
        opaque = [tag for tag in re.findall(r"<[a-z]+\b[^>]*>", picture.read_text()) if "opacity" not in tag]
        drawn = {colour for tag in opaque for colour in re.findall(r"(?:stroke|fill)[=:] ?\"?(#[0-9a-f]{6})", tag)}
        drawn -= {"#ffffff", "#f4f4f8", "#ddeedd"}  # what black text stands on
        for colour in drawn:
            light = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
            assert contrast(light, [255, 255, 255]) >= 4.5, f"{picture.name}: {colour}"
            assert contrast(inverted(light), [0x1E, 0x21, 0x29]) >= 4.5, f"{picture.name}: {colour} on a dark page"


def contrast(one: list[float], other: list[float]) -> float:
    """The contrast of two colours, from 1 to 21 (WCAG 2)."""
    linear = [[x / 3294 if x <= 10 else ((x / 255 + 0.055) / 1.055) ** 2.4 for x in colour] for colour in (one, other)]
    low, high = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (high + 0.05) / (low + 0.05)


def inverted(colour: list[int]) -> list[float]:
    """What docs/assets/extra.css makes of a colour on the dark page: invert(1) hue-rotate(180deg)."""
    r, g, b = (255 - x for x in colour)
    turned = 0.426 * r + 1.43 * g + 0.144 * b  # twice the lightness, from which each channel is taken
    return [min(255.0, max(0.0, turned - x)) for x in (r, g, b)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_searched_in_a_folder(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        view = opened.new_context(offline=True).new_page()
        asked: list[str] = []
        view.on("request", lambda request: asked.append(request.url))
        view.goto((site / "prune" / "index.html").as_uri())
        view.locator(".md-search__input").click()
        view.locator(".md-search__input").press_sequentially("calibration")
        found = view.locator("a.md-search-result__link")
        found.first.wait_for()
        assert any("glossary.html" in (link.get_attribute("href") or "") for link in found.all())
        found.first.click()
        view.wait_for_url(lambda url: "prune/index.html" not in url)
        assert not [url for url in asked if not url.startswith(("file:", "data:", "about:"))]
        opened.close()


@pytest.mark.slow
def test_site_is_built_and_fetches_nothing(site: Path) -> None:
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8"))
        fetched = [tag for tag in tags if re.search(r'(?:src|href)="?(?:https?:)?//', tag) and "canonical" not in tag]
        assert not fetched, f"{page.name}: {fetched}"
    methods = (site / "methods.html").read_text(encoding="utf-8")
    assert "<code>Prune</code>" in methods
    check_reference(site)


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
