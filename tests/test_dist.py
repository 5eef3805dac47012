"""What a release uploads: a wheel with the package and nothing else, and a page with links to the repository."""

import email
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HOME = PROJECT["urls"]["Homepage"]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and source distribution, as `make dist` builds them."""
    pytest.importorskip("build")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    (path,) = dist.glob("lilliput-*-py3-none-any.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def description(metadata: Message) -> str:
    text = metadata.get_payload(decode=True)
    assert isinstance(text, bytes)
    return text.decode("utf-8")


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package_and_no_other(wheel: zipfile.ZipFile) -> None:
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    wanted = {path.relative_to(source).as_posix() for path in (source / "lilliput").rglob("*")
              if path.is_file() and "__pycache__" not in path.parts}  # fmt: skip
    assert held == wanted, held ^ wanted
    assert {"lilliput/py.typed", "lilliput/__init__.pyi", "lilliput/report/page.html"} <= held
    assert any(name.endswith(".safetensors") for name in held)
    assert not [name for name in held if "test" in Path(name).name]


@pytest.mark.slow
def test_source_distribution_holds_what_its_tests_need(dist: Path) -> None:
    (path,) = dist.glob("lilliput-*.tar.gz")
    with tarfile.open(path) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "Makefile", "constraints.txt", "tests/test_dist.py", "src/lilliput/py.typed"} <= held
    assert not [name for name in held if name.startswith((".venv", "build/", "dist/", "site/", "shared/", "lilliput-"))]


@pytest.mark.slow
def test_an_index_takes_them(dist: Path) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_metadata(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("lilliput", PROJECT["version"])
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra") or ()) == set(PROJECT["optional-dependencies"])
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL") or ())
    assert urls == PROJECT["urls"] and all(url.startswith(HOME) for url in urls.values())


class Links(HTMLParser):
    """Every address that a page names."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value or "" for name, value in attrs if name in ("href", "src", "srcset")]


@pytest.mark.slow
def test_the_page_on_an_index_has_no_relative_links(metadata: Message) -> None:
    markdown = pytest.importorskip("readme_renderer.markdown")
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = description(metadata)
    page = markdown.render(text)
    assert page is not None, "an index would show it as plain text"
    links = [link for link in Links(page).found if not link.startswith("#user-content-")]  # each heading's, to itself
    assert len(links) >= 15 and not [link for link in links if not re.match("https?://", link)]
    assert not re.search(r"\]\((?!https?://)", text)
    ours = [link for link in links if link.startswith((HOME, "https://raw.githubusercontent.com"))]
    release = f"/v{PROJECT['version']}/"
    for link in ours:
        assert release in link, link
        path = link.partition(release)[2].partition("#")[0]
        assert (ROOT / path).exists(), f"{link} leads nowhere"
    assert {Path(link).suffix for link in ours} >= {".md", ".svg", ".json"}


def test_every_extra_that_a_message_names_exists() -> None:
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    named = set(re.findall(r"""\bextra\("(\w+)",""", source)) | set(re.findall(r"lilliput\[(\w+)\]", source))
    assert named - {"name", "extra"} <= set(PROJECT["optional-dependencies"]) and len(named) >= 7


def test_a_plain_install_is_small() -> None:
    """What grows here is downloaded by everybody: an extra is the place for what only a part needs."""
    needs = {Requirement(text).name for text in PROJECT["dependencies"]}
    assert {"torch", "numpy", "onnx", "onnxruntime", "safetensors"} <= needs
    extras = {Requirement(text).name for extra in ("openvino", "pictures", "ray", "report") for text in
              PROJECT["optional-dependencies"][extra]}  # fmt: skip
    assert not needs & extras


def test_the_home_of_the_project_is_one() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == HOME
    assert citation["version"] == PROJECT["version"] and citation["license"] == PROJECT["license"]
    assert set(PROJECT["keywords"]) == set(citation["keywords"])
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    owner = HOME.removeprefix("https://github.com/")
    assert set(re.findall(r"https://(?:github|raw\.githubusercontent)\.com/([\w-]+/[\w-]+)", pyproject)) == {owner}


def test_workflows_are_well_formed() -> None:
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [file.stem for file in files] == ["release", "test"]
    for file in files:
        flow = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert flow["name"] and flow[True] and flow["permissions"] == {"contents": "read"}  # `on` is true in YAML
        for job in flow["jobs"].values():
            assert job["runs-on"] and all(("uses" in step) != ("run" in step) for step in job["steps"])
    matrix = yaml.safe_load(files[1].read_text(encoding="utf-8"))["jobs"]["test"]["strategy"]["matrix"]
    lowest, *_, highest = sorted(line.rpartition(" ")[2] for line in PROJECT["classifiers"] if "Python :: 3." in line)
    assert [lowest, highest] == matrix["python"] and len(matrix["os"]) == 4
