"""API reference: a hook of mkdocs that writes a page for each source file with public names, methods or nouns.

The pages are derived from the registry and from `lilliput.__all__`, so there is no list to keep up by hand. Nothing is
imported from the methods themselves: mkdocstrings reads the source.
"""

import ast
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from methods import escaped

import lilliput
from lilliput import registry

ROOT = Path(__file__).resolve().parents[1]
# Nouns and entry points that no registry lists, because they are not methods.
NOUNS = (
    "code.base",
    "stored.base",
    "cost.count",
    "cost.measure",
    "finding",
    "recipe",
    "registry",
    "rule",
    "stage",
    "store",
    "task",
)
TITLES = {"": "Nouns, recipes and training"}
# A search for a word lists the pages that explain it before the entries that mention it.
BEHIND = "---\nsearch:\n  boost: 0.2\n---\n\n"


def modules() -> list[str]:
    """The modules that get a page, by dotted name.

    Returns:
        Modules that hold a public name, a registered method or a noun, sorted.
    """
    names = {f"lilliput.{noun}" for noun in NOUNS} | set(lilliput._NAMES.values())
    entries = (entry for family in registry.FAMILIES for entry in registry.entries(family))
    return sorted(names | {entry.module for entry in entries if entry.package == "lilliput"})


def page(module: str) -> str:
    """The address of a module's page, such as `reference/prune/rigl.md`."""
    return f"reference/{module.removeprefix('lilliput.').replace('.', '/')}.md"


def source(module: str) -> str:
    """The address of the page with a module's source code, such as `source/prune/rigl.md`."""
    return page(module).replace("reference/", "source/", 1)


def file(module: str) -> Path:
    """The file of a module."""
    path = ROOT / "src" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def listing(module: str) -> str:
    """The page with a module's source code, with an anchor `line-N` at each line. The search leaves it out."""
    code = file(module).read_text(encoding="utf-8")
    form = HtmlFormatter(cssclass="highlight", linenos="inline", lineanchors="line", anchorlinenos=True, wrapcode=True)
    return (
        "---\nsearch:\n  exclude: true\nhide: [toc]\n---\n\n"
        f"# {file(module).relative_to(ROOT)}\n\n{highlight(code, PythonLexer(), form)}"
    )


def rooms() -> dict[str, list[str]]:
    """The modules of each folder, those of lilliput/ itself under the empty name."""
    by_room: dict[str, list[str]] = {}
    for module in modules():
        by_room.setdefault(module.rpartition(".")[0].removeprefix("lilliput").lstrip("."), []).append(module)
    return by_room


def index() -> str:
    """The first page: a table of the public names, each with its first sentence and a link to its entry."""
    rows = "\n".join(
        f"| [`lilliput.{name}`][{module}.{name}] | {escaped(sentence(module, name))} |"
        for name, module in lilliput._NAMES.items()
    )
    return (
        "# API reference\n\n"
        "The public names of `import lilliput`, in reading order. The menu has a page for each source file with public "
        "names, methods or nouns, and the search finds every name. Each name has a link to its source.\n\n"
        f"| name | what it is |\n|---|---|\n{rows}\n"
    )


def sentence(module: str, name: str) -> str:
    """The first sentence of the docstring of a class or function."""
    for node in ast.parse(file(module).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            return re.split(r"(?<=[.:]) (?=[A-Z])", text)[0].rstrip(":")
    return ""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Called by mkdocs first: adds the pages to the menu."""
    menu: list[Any] = [{"Public names": "reference/index.md"}]
    for room, found in sorted(rooms().items()):
        pages = [{module.rpartition(".")[2]: page(module)} for module in found]
        menu.append({TITLES.get(room, room): pages})
    assert config.nav is not None
    config.nav.append({"API reference": menu})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with the files of the site: adds the generated pages."""
    files.append(File.generated(config, "reference/index.md", content=index()))
    for module in modules():
        files.append(File.generated(config, page(module), content=f"{BEHIND}# {module}\n\n::: {module}\n"))
        hidden = File.generated(config, source(module), content=listing(module), inclusion=InclusionLevel.NOT_IN_NAV)
        files.append(hidden)
    return files


def on_page_content(html: str, page: Page, **unused: Any) -> str:
    """Called by mkdocs with a page as HTML: every documented name gets a link to its line in the source."""
    match = re.fullmatch(r"reference/(.+)\.md", page.file.src_uri)
    if not match or match[1] == "index":
        return html
    module = "lilliput." + match[1].replace("/", ".")
    at, address = lines(file(module)), get_relative_url(source(module).replace(".md", ".html"), page.url)

    def linked(heading: re.Match[str]) -> str:
        line = at.get(heading[2].removeprefix(f"{module}."))
        link = f' <a class="source-link" href="{address}#line-{line}" data-search-exclude>source</a>' if line else ""
        return heading[1] + link + heading[3]

    return re.sub(r'(<h\d id="(lilliput\.[\w.]+)" class="doc doc-heading">.*?)(</h\d>)', linked, html, flags=re.DOTALL)


def lines(path: Path) -> dict[str, int]:
    """The first line of each class, function, method and assigned name of a file, by its name within the file."""
    first: dict[str, int] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                first[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(target, ast.Name):
                        first[prefix + target.id] = node.lineno

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return first
