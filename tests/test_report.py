"""The report: its sentences, its tables, its picture, and the page in a real browser."""

import copy
import io
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lilliput import report
from lilliput.errors import StoreError
from lilliput.report import formats, tables
from lilliput.report import summary as summaries
from lilliput.report.formats import Quality
from lilliput.report.page import _bokeh
from lilliput.report.plan import every_point, plan, staircase

pytestmark = pytest.mark.slow  # a real browser

FIXTURES = Path(__file__).parent / "fixtures"
EVIL = "<script>alert(1)</script> $$x^2$$ @name &amp; \"'"


def summary(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FIXTURES / f"summary_{name}.json").read_text())
    return loaded


@pytest.fixture
def met() -> dict[str, Any]:
    return summary("met")


@pytest.fixture
def not_met() -> dict[str, Any]:
    return summary("not_met")


# --- sentences ------------------------------------------------------------------------------------------------------


def test_verdict_of_a_floor_that_was_met(met: dict[str, Any]) -> None:
    assert report.verdict(met) == (
        "digits is 10.2 times faster and 91 times smaller as model.lil (25 times as model.onnx), and loses 0.2 points "
        "of accuracy (95% interval −0.1 to 0.5) on data it was not tuned on, within the floor of 0.5 points."
    )


def test_verdict_says_where_the_loss_is_more_than_the_floor(met: dict[str, Any]) -> None:
    met["drop_test"] = 0.006
    assert "which is more than the floor of 0.5 points" in report.verdict(met)


def test_verdict_never_lends_one_numbers_interval_to_another(met: dict[str, Any]) -> None:
    del met["drop_test_interval"]
    assert "interval" not in report.verdict(met)
    met["drop_test"] = None
    assert "0.26 points of accuracy (95% interval −0.05 to 0.55) on validation data" in report.verdict(met)


def test_verdict_of_a_floor_that_was_not_met(not_met: dict[str, Any]) -> None:
    assert report.verdict(not_met).startswith("Nothing that was tried keeps mnist1d-mlp within 0.2 points")
    assert "the nearest (95% zeros, 4 bits) loses 1.92 points" in report.verdict(not_met)


@pytest.mark.parametrize(
    ("bound", "words_of_it"),
    [
        ({"max_bytes": 45_000}, "within 45.0 kB"),
        ({"max_latency_ms": 0.2}, "within 0.200 ms"),
        ({"max_bytes": 45_000, "max_latency_ms": 0.2, "file": "onnx"}, "within 45.0 kB and 0.200 ms"),
    ],
)
def test_verdict_of_the_question_turned_round(met: dict[str, Any], bound: dict[str, float], words_of_it: str) -> None:
    met |= bound
    assert report.verdict(met).startswith(f"The best digits {words_of_it} scores 98.6% on data it was not tuned on")
    assert summaries.floor(met) is None, "a bound replaces the floor"
    unmet = met | {"met": False, "chosen": None}
    assert report.verdict(unmet).startswith(f"Nothing that was tried makes digits fit {words_of_it}; the nearest (")


def test_verdict_does_not_flatter(met: dict[str, Any]) -> None:
    met["chosen"] |= {"onnx_bytes": 2_191_090, "packed_bytes": 2_000_000, "latency_ms": 2.104}
    met |= {"drop_test": -0.004, "drop_test_interval": None}
    assert report.verdict(met) == (
        "digits is 2.0 times slower and 1.8 times larger as model.lil, and gains 0.4 points of accuracy on data it was "
        "not tuned on, within the floor of 0.5 points."
    )


def test_the_verdict_speaks_of_the_file_that_was_asked_for(met: dict[str, Any]) -> None:
    met |= {"objective": "size", "file": "onnx", "runtime": None}
    assert report.verdict(met).startswith("digits is 25 times smaller as model.onnx and 10.2 times faster, and loses")
    met |= {"file": "lil"}
    assert report.verdict(met).startswith("digits is 91 times smaller as model.lil (25 times as model.onnx) and 10.2")
    met |= {"objective": "macs"}
    assert report.verdict(met).startswith(
        "digits needs "
    ) and "times less multiply-adds, is 91 times" in report.verdict(met)


def test_verdict_without_any_finished_point(not_met: dict[str, Any]) -> None:
    assert "No point of mnist1d-mlp could be finished" in report.verdict(not_met | {"front": []})


def test_a_metric_that_is_no_rate_keeps_its_unit(met: dict[str, Any]) -> None:
    met |= {"metric": "perplexity", "higher_is_better": False, "drop_test": 0.31, "drop_test_interval": [0.2, 0.42]}
    for point in [met["dense"], met["chosen"], *met["front"], *met["points"]]:
        point["val"] = None if point["val"] is None else 20 - 10 * point["val"]
    assert "raises perplexity by 0.31 (95% interval 0.20 to 0.42)" in report.verdict(met)
    drawn = plan(met)
    assert drawn is not None and drawn.low > drawn.high, "better is drawn upwards"
    assert "points" not in report.page(met).split("What it costs")[1].split("</p>")[0]


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_unknown_numbers_are_dashes(value: float | None) -> None:
    written = [formats.number(value), formats.size(value), formats.count(value), formats.milliseconds(value)]
    assert [*written, Quality("accuracy", True, True).score(value)] == ["–"] * 5


def test_intervals_are_not_rounded_into_the_floor() -> None:
    assert Quality("accuracy", True, True).interval([-0.0005, 0.0055]) == "95% interval −0.05 to 0.55"


# --- the plan of the plot -------------------------------------------------------------------------------------------


def test_every_point_is_drawn_once(met: dict[str, Any]) -> None:
    kinds = [point["kind"] for point in every_point(met)]
    assert kinds[:2] == ["dense", "chosen"] and kinds.count("front") == 5
    assert len(kinds) == 1 + len(met["points"]), "the front is among the tried points"


def test_the_staircase_rises_and_uses_finished_points_only(met: dict[str, Any]) -> None:
    drawn = plan(met)
    assert drawn is not None
    corners = staircase(drawn.points, "onnx_bytes", 1)
    assert corners == sorted(corners)
    finished = {point["onnx_bytes"] for point in met["points"] if point["status"] == "done"}
    assert {x for x, _ in corners} <= finished | {met["dense"]["onnx_bytes"]}


def test_a_ruined_point_does_not_flatten_the_plot(met: dict[str, Any]) -> None:
    met["points"].append({"name": "ruined", "val": 0.1, "onnx_bytes": 9000, "packed_bytes": 900, "latency_ms": 0.03})
    drawn = plan(met)
    assert drawn is not None and drawn.low == pytest.approx(98.9 - 12 * 0.5)
    assert "1 of the points lies below the picture" in report.page(met)


# --- the page as text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["met", "not_met"])
def test_page_is_one_small_file_that_fetches_nothing(name: str) -> None:
    html = report.page(summary(name))
    assert len(html.encode()) < 2_000_000
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.S)
    assert not re.search(r"""src\s*=|href="[^#]|url\(|@import|https?://""", own)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy and "default-src 'none'" in policy[1] and "unsafe-eval" not in policy[1]
    assert "'unsafe-inline'" not in policy[1].split("script-src")[1].split(";")[0]


def test_page_has_every_part(met: dict[str, Any]) -> None:
    html = report.page(met)
    for text in (
        "What was found", "What it costs", "How it was made", "Layer by layer", "left alone: first layer",
        "How it was measured", "AMD EPYC 7B13, 2 cores", "torch 2.13.0", "1 thread", "1,000 bootstrap draws",
        "the test split was read once", "Agreement with torch", "Where the budget went", "84.2%",
        "43,812", "the loss was not finite at step 212",
    ):  # fmt: skip
        assert text in html, text
    assert html.count("removed</span>") == 12, "the dense network's other two blocks a stage"
    assert html.count("<caption>") == html.count("<table") == 3


def test_page_of_a_floor_that_was_not_met(not_met: dict[str, Any]) -> None:
    html = report.page(not_met)
    assert 'class="unmet"' in html and "files written are those of the dense network" in html
    assert "the dense network for ONNX Runtime" in html and "chosen network" not in html


def test_text_from_a_model_is_escaped(met: dict[str, Any]) -> None:
    met |= {
        "task": EVIL,
        "command": EVIL,
        "metric": EVIL,
        "machine": {"cpu": EVIL},
        "versions": {EVIL: EVIL},
        "files": {EVIL: 1},
    }
    for point in (met["dense"], met["chosen"], *met["front"], *met["points"]):
        point["name"] = EVIL
    met["chosen"]["recipe"] = [{"stage": EVIL, EVIL: EVIL}]
    met["points"][-1]["reason"] = EVIL
    for layer in [*met["dense"]["layers"], *met["chosen"]["layers"]]:
        layer |= {"name": EVIL, "kind": EVIL, "left_alone": EVIL}
    html = report.page(met)
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html
    assert len(re.findall(r"<script\b", html)) == 3


def test_page_of_a_minimal_summary() -> None:
    html = report.page({"task": "tiny", "dense": {"val": 0.9}, "met": False})
    assert "No point of tiny could be finished" in html and 'id="plot"' not in html


def test_page_without_what_it_is_about_is_refused() -> None:
    with pytest.raises(ValueError, match="summary must have dense, got"):
        report.page({"task": "tiny"})


def test_write_takes_the_folders_files_and_leaves_no_trace(met: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(met))
    (tmp_path / "model.onnx").write_bytes(b"x" * 4321)
    path = report.write(tmp_path)
    assert path == tmp_path / "report.html" and "4,321" in path.read_text("utf-8")
    assert path.read_text("utf-8") != "" and "43,812</td>" not in path.read_text("utf-8"), "sizes are the files' own"
    assert {entry.name for entry in tmp_path.iterdir()} == {"summary.json", "model.onnx", "report.html"}
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_that_fails_leaves_no_half_page(met: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(met))
    (tmp_path / "report.html").mkdir()  # nothing can be renamed onto a folder
    with pytest.raises(StoreError, match=r"report\.html"):
        report.write(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"summary.json", "report.html"}


def test_a_folder_without_a_readable_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold summary\.json, got none"):
        report.page(tmp_path)
    (tmp_path / "summary.json").write_text('{"task": "dig')
    with pytest.raises(ValueError, match="must be JSON"):
        report.page(tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        report.page(tmp_path)


def contrast(first: str, second: str) -> float:
    """The ratio of WCAG 2.2, section 1.4.3: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_both_schemes() -> None:
    style = (Path(report.__file__).parent / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.S)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))
        for text in ("ink", "muted", "accent", "warn"):
            for ground in ("paper", "panel"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["front"], colours["paper"]) >= 3, "marks need 3 to 1"


# --- tables and the picture -----------------------------------------------------------------------------------------


def test_front_for_the_terminal(met: dict[str, Any]) -> None:
    from rich.console import Console

    met["front"][0]["name"] = "[bold]not markup[/bold]"
    console = Console(file=io.StringIO(), width=140)
    console.print(tables.front(met))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[bold]not markup[/bold]" in text and text.count("chosen: ") == 1
    line = next(line for line in text.splitlines() if "chosen: " in line)
    assert " ".join(line.split("distilled")[1].split()) == "98.7% 0.2 12.0 kB 91x 43.8 kB 25x 0.103 ms 10.2x –"


@pytest.mark.parametrize("width", [72, 80, 100, 140])
def test_a_point_takes_one_line_of_the_terminal(met: dict[str, Any], width: int) -> None:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width)
    console.print(tables.front(met, width))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2 + 1 + len(met["front"]) + (met["chosen"] not in met["front"])
    chosen = next(line for line in lines if line.startswith("chosen: "))
    assert "12.0 kB" in chosen and "91x" in chosen and "0.103 ms" in chosen


def test_results_table(met: dict[str, Any], not_met: dict[str, Any]) -> None:
    head, _rule, first, second = tables.results([met, not_met]).splitlines()
    assert head.startswith("| job | floor | dense | result | loss |")
    assert first.startswith("| digits | 0.5 points | 98.8% | 98.6% | 0.2 (−0.1 to 0.5) | 1,095,545 | 43,812 (25x) |")
    assert "| not met |" in second


def test_markdown_escapes_and_aligns() -> None:
    rows = [{"a": "x|<b>", "n": {"m": 1234}}, {"a": "two\nlines", "n": {}}]
    assert tables.markdown(rows, {"a": "a", "n": "n.m"}).splitlines()[1:] == [
        "|---|--:|", "| x\\|\\<b\\> | 1,234 |", "| two lines | – |",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="at least one column"):
        tables.markdown(rows, {})


@pytest.mark.parametrize("dark", [False, True])
def test_picture(met: dict[str, Any], tmp_path: Path, dark: bool) -> None:
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib, of the extra lilliput[pictures]")
    from lilliput.report.picture import picture

    once, again = (picture(met, tmp_path / name, dark=dark) for name in ("a.svg", "b.svg"))
    assert once.read_text() == again.read_text() and "<svg" in once.read_text()
    assert picture(met, tmp_path / "a.png", "latency_ms", dark).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="picture: packed_bytes must be known"):
        picture({"task": "t", "dense": {"val": 0.9, "onnx_bytes": 9}}, tmp_path / "c.svg", "packed_bytes")


# --- the page in a browser ------------------------------------------------------------------------------------------

WHERE = """key => {
  const view = Bokeh.index.roots ? Bokeh.index.roots[0] : Object.values(Bokeh.index)[0], plot = view.model;
  const data = plot.renderers.find((renderer) => renderer.name == "points chosen").data_source.data;
  const box = view.canvas_view.el.getBoundingClientRect(), frame = view.frame;
  return [box.x + frame.x_scale.compute(data[key][0]), box.y + frame.y_scale.compute(data.y[0])];
}"""
TIP = """() => [...document.querySelectorAll(".bk-Tooltip")]
  .filter((tip) => tip.getBoundingClientRect().width > 0)
  .flatMap((tip) => [...tip.shadowRoot.querySelectorAll(":not(style)")]).map((part) => part.textContent).join(" ")"""
COLOURS = """() => {
  const seen = new Map(), walk = (root) => {
    for (const part of root.querySelectorAll("*")) {
      if (part.tagName == "CANVAS" && part.width) {
        const bytes = part.getContext("2d").getImageData(0, 0, part.width, part.height).data;
        for (let i = 0; i < bytes.length; i += 4) if (bytes[i + 3] == 255) {
          const key = "#" + [0, 1, 2].map((k) => bytes[i + k].toString(16).padStart(2, "0")).join("");
          seen.set(key, (seen.get(key) || 0) + 1);
        }
      }
      if (part.shadowRoot) walk(part.shadowRoot);
    }
  };
  walk(document);
  return Object.fromEntries(seen);
}"""
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--no-first-run",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    paths = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")]
    executable = next(filter(None, paths), None)
    if executable is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


class Visit:
    """A page opened from a file, with what it asked for and complained about."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light", width: int = 1200, touch: bool = False) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, has_touch=touch, offline=True
        )
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console", lambda line: self.complaints.append(line.text) if line.type in ("error", "warning") else None
        )
        self.page.goto(path.as_uri())
        if self.page.locator("#plot").count():
            self.page.wait_for_selector("#plot[data-drawn]", timeout=20_000)
            self.page.wait_for_timeout(150)  # Bokeh paints in the next frame

    def hover(self, key: str = "") -> str:
        key = key or self.page.locator("input[type=radio]:checked").input_value()
        self.page.evaluate("document.querySelector('#plot').scrollIntoView({block: 'center', behavior: 'instant'})")
        self.page.wait_for_timeout(150)
        x, y = self.page.evaluate(WHERE, key)
        self.page.mouse.move(x - 60, y + 60)
        self.page.mouse.move(x, y)
        self.page.wait_for_timeout(150)
        text: str = self.page.evaluate(TIP)
        return text


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Any]:
    opened: list[Visit] = []

    def open_(data: dict[str, Any], **settings: Any) -> Visit:
        path = tmp_path / "report.html"
        path.write_text(report.page(data), encoding="utf-8", newline="\n")
        opened.append(Visit(browser, path, **settings))
        return opened[-1]

    yield open_
    for each in opened:
        assert each.complaints == []
        assert len(each.requests) == 1 and each.requests[0].startswith("file:"), each.requests
        each.context.close()


@pytest.mark.parametrize(("scheme", "chosen", "paper"), [("light", "#2450d8", "255"), ("dark", "#8fabff", "16")])
def test_browser_draws_and_hovers(visit: Any, met: dict[str, Any], scheme: str, chosen: str, paper: str) -> None:
    seen = visit(met, scheme=scheme)
    colours = seen.page.evaluate(COLOURS)
    assert colours.get(chosen, 0) > 20, "the chosen point's diamond is on the canvas"
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor").startswith(f"rgb({paper},")
    tip = seen.hover()
    for text in (met["chosen"]["name"], "accuracy 98.7%, 0.2 below dense", "model.onnx 43.8 kB", "2. Train steps 5200"):
        assert text in tip


def test_browser_switches_axis_and_scheme(visit: Any, met: dict[str, Any]) -> None:
    seen = visit(met)
    assert seen.page.get_by_role("radio").count() == 3
    for key in ("packed_bytes", "latency_ms"):
        before = seen.page.evaluate(WHERE, "onnx_bytes")
        seen.page.locator(f"input[value={key}]").check()
        seen.page.wait_for_timeout(150)
        assert seen.page.evaluate(WHERE, key) != before
        assert met["chosen"]["name"] in seen.hover(key)
    seen.page.emulate_media(color_scheme="dark")
    seen.page.wait_for_timeout(200)
    assert seen.page.evaluate(COLOURS).get("#8fabff", 0) > 20, "the canvas follows the scheme"


@pytest.mark.parametrize("name", ["met", "not_met"])
def test_browser_at_phone_width(visit: Any, name: str) -> None:
    seen = visit(summary(name), width=375, touch=True)
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 375, "the page itself never scrolls sideways"
    assert seen.page.locator("#plot").bounding_box()["width"] > 320
    assert len(seen.page.evaluate(COLOURS)) > 1


def test_browser_runs_no_script_of_a_model(visit: Any, met: dict[str, Any]) -> None:
    evil = copy.deepcopy(met)
    evil["task"] = evil["metric"] = EVIL
    for point in (evil["dense"], evil["chosen"], *evil["front"]):
        point["name"] = EVIL
        point["recipe"] = [{"stage": "<img src=x onerror=alert(1)>", "k": EVIL}]
    seen = visit(evil)
    seen.page.on("dialog", lambda dialog: pytest.fail("a script from the model ran"))
    tip = seen.hover()
    assert EVIL in tip and "<img src=x onerror=alert(1)>" in tip, "shown as text"
    assert seen.page.locator("img").count() == 0


def test_browser_copies_the_command(visit: Any, met: dict[str, Any]) -> None:
    seen = visit(met)
    seen.context.grant_permissions(["clipboard-read", "clipboard-write"])
    seen.page.get_by_role("button", name="Copy").click()
    seen.page.get_by_text("Copied").wait_for(timeout=3000)
    assert seen.page.evaluate("navigator.clipboard.readText()") == met["command"]


def test_browser_page_without_a_plot(visit: Any) -> None:
    seen = visit({"task": "tiny", "dense": {"val": 0.9}, "met": False})
    assert seen.page.get_by_role("heading", level=1).inner_text().startswith("No point of tiny")


@pytest.mark.parametrize("width", [1200, 375])
def test_browser_page_without_bokeh(
    visit: Any, met: dict[str, Any], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    _bokeh.cache_clear()
    for module in [module for module in sys.modules if module.partition(".")[0] == "bokeh"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "bokeh", None)
    seen = visit(met, width=width)
    assert seen.page.get_by_text("pip install 'lilliput[report]'").is_visible()
    assert seen.page.get_by_role("region", name="Table of points").is_visible()
    assert seen.page.locator("#plot, #axes").count() == 0 and len(seen.page.content()) < 500_000
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_dense_network_has_one_row_though_it_lies_on_the_front(met: dict[str, Any]) -> None:
    dense = met["dense"] | {"name": "dense"}
    rest = [point for point in met["front"] if point.get("name") != "dense"]
    rows = [tables.front(met | {"front": points}).row_count for points in (rest, [dense, *rest])]
    assert rows[0] == rows[1]


# --- the page of real searches, for everybody -----------------------------------------------------------------------


def tiny(metric: str = "accuracy", **groups: Any) -> tuple[Any, Any]:
    """A network, and a task that it is nearly perfect at: what it says, and noise."""
    import torch
    from torch import nn

    from lilliput import Task

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    x = torch.randn(700, 8, generator=generator)
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        y = net(x) + 0.05 * torch.randn(700, 4, generator=generator)
    parts = slice(0, 200), slice(200, 450), slice(450, 700)
    if metric == "mse":
        return net, Task("tiny-mse", *((x[part], y[part]) for part in parts), loss="mse", metric="mse")
    y = y.argmax(1)
    return net, Task("tiny", *((x[part], y[part]) for part in parts), **groups)


def tiny_onnx(folder: Path) -> tuple[Any, Any]:
    import numpy as np
    import torch

    from lilliput.search.onnx_target import load_target

    net, task = tiny()
    x, y = task.split("val")
    torch.onnx.export(net, (x[:2],), folder / "tiny.onnx", dynamic_shapes=({0: torch.export.Dim("n")},), verbose=False)
    np.savez(folder / "data.npz", input=x.numpy(), targets=y.numpy())
    return load_target(folder / "tiny.onnx", folder / "data.npz", [])


LONG = "Llanfairpwllgwyngyllgogerychwyrndrobwllllantysiliogogogoch"
SEARCHES: dict[str, dict[str, Any]] = {
    "met": {"floor": "30%", "train": False},
    "dense": {"floor": "0.05%", "train": False},
    "unmet": {"max_bytes": 60, "train": False},
    "parts": {"floor": "30%", "worst_class": "60%", "train": False},
    "mse": {"floor": "30r", "train": False},
    "onnx": {"floor": "30%"},
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder of a search by its name, made once."""
    import lilliput
    from lilliput.search import finish

    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            cities = ["Aarhus" if i % 3 else LONG for i in range(250)]
            groups = {"groups": {"val": cities, "test": cities}} if name == "parts" else {}
            model, task = tiny_onnx(place) if name == "onnx" else tiny("mse" if name == "mse" else "accuracy", **groups)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(finish, "SECONDS_EACH", 0.02)
                lilliput.shrink(model, task, trials=1, workers=1, out=place / "out", **SEARCHES[name])
            made[name] = place / "out"
        return made[name]

    return folder


OUTSIDE = """() => [...document.querySelectorAll("main *")].filter((part) => {
  if (part.closest(".scroll, svg, .hidden, #plot")) return false;
  const box = part.getBoundingClientRect();
  return box.width && (box.left < 0 || box.right > document.documentElement.clientWidth + 1);
}).map((part) => part.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("name", SEARCHES)
def test_nobody_is_shut_out(browser: Any, searched: Any, name: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    for scheme in ("light", "dark"):
        for width in (1280, 390):
            seen = Visit(browser, searched(name) / "report.html", scheme=scheme, width=width)
            page = seen.page
            page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
            found = axe.Axe().run(page)
            assert found.violations_count == 0, (scheme, width, found.generate_report())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (scheme, width)
            assert page.evaluate(OUTSIDE) == [], (scheme, width)
            levels = [
                int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => h.tagName)")
            ]
            assert levels[0] == 1 and 1 not in levels[1:], levels
            assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
            assert page.evaluate("document.documentElement.lang") == "en"
            assert seen.complaints == []
            seen.context.close()


def test_what_was_asked_and_whether_it_was_met(searched: Any) -> None:
    told = {
        name: json.loads((searched(name) / "summary.json").read_text()) for name in ("met", "dense", "unmet", "mse")
    }
    met, dense, unmet, mse = told.values()
    assert summaries.request(met) == (
        "The smallest model.lil that loses at most 30.0 points of accuracy on new data with a probability of 90%, "
        "found among 1 structures."
    )
    assert re.fullmatch(
        r"Yes\. On new data it loses at most [\d.]+ points of accuracy with a probability of 90%\.",
        summaries.answer(met),
    )
    assert summaries.answer(dense).startswith("Only by the dense network, which loses nothing")
    assert report.verdict(dense).startswith(
        "Nothing cheaper than the dense tiny could be promised to keep the floor of 0.05 points"
    )
    assert summaries.request(unmet) == "The best accuracy within 60 B of model.lil, found among 1 structures."
    assert summaries.answer(unmet) == "No. The files are those of the dense network."
    assert "that raises mse by at most" in summaries.request(mse) and "raises mse by at most" in summaries.answer(mse)
    for summary in told.values():
        html = report.page(summary)
        for text in (summaries.request(summary), summaries.answer(summary)):
            assert text in html


def test_why_not_a_smaller_one(searched: Any) -> None:
    summary = json.loads((searched("dense") / "summary.json").read_text())
    assert summary["misses"], "8 bits are near a floor of 0.05%"
    html = (searched("dense") / "report.html").read_text()
    asked = html.split('id="h-asked"')[1].split("</section>")[0]
    for miss in summary["misses"]:
        assert f"<td>{miss['option']}</td>" in asked and miss["name"] in asked
    first = summary["misses"][0]
    assert f"With a floor of {Quality.of(summary).points(first['floor'])} it would be" in report.verdict(summary), (
        "a floor that is named is large enough, so it is rounded up"
    )
    far = summary | {"misses": []}
    assert "No smaller point comes near the floor" in report.page(far)
    assert "No smaller point was measured" in report.page(far | {"near": []})


def rows(page: Any, column: int) -> list[str]:
    found: list[str] = page.evaluate(
        "i => [...document.querySelector('table.sorts').tBodies[0].rows].map(row => row.cells[i].textContent)", column
    )
    return found


def test_points_are_sorted_by_keyboard(visit: Any, met: dict[str, Any]) -> None:
    met["points"].append({"name": "not timed", "val": 0.97, "onnx_bytes": 9000, "packed_bytes": 900})
    page = visit(met).page
    table = page.locator("table.sorts").first
    heads = [head.inner_text().strip(" ▾▴") for head in table.locator("thead th").all()]
    column = heads.index("latency")
    assert table.locator("th[aria-sort]").text_content() == "latency", "the cost that was asked for"
    button = table.get_by_role("button", name="latency")
    button.focus()
    for key, order, reverse in (("Enter", "ascending", False), (" ", "descending", True)):
        page.keyboard.press(key)
        assert table.locator("th").nth(column).get_attribute("aria-sort") == order
        assert table.locator("th[aria-sort]").count() == 1
        cells = rows(page, column)
        times = [float(cell.removesuffix(" ms")) for cell in cells if cell != "–"]
        assert len(times) > 3 and times == sorted(times, reverse=reverse)
        assert "–" in cells and set(cells[len(times) :]) == {"–"}, "what was not measured stays last"
        assert button.evaluate("button => document.activeElement === button")
    assert button.evaluate("button => getComputedStyle(button).outlineStyle") == "solid", "the focus is visible"
    table.get_by_role("button", name="point").press("Enter")
    assert table.locator("th").first.get_attribute("aria-sort") == "ascending"
    assert len(rows(page, 0)) == len([point for point in every_point(met) if formats.known(point.get("val"))])


def test_the_tab_key_does_not_stop_in_the_chart(visit: Any, met: dict[str, Any]) -> None:
    page = visit(met).page
    page.set_viewport_size({"width": 700, "height": 900})
    page.wait_for_timeout(300)
    page.locator("#axes input:checked").focus()
    for _ in range(8):
        page.keyboard.press("Tab")
        assert not page.evaluate("document.getElementById('plot').contains(document.activeElement)")
    assert page.locator("#plot").get_attribute("role") == "img"
    assert report.verdict(met) in page.locator("#plot").get_attribute("aria-label")


def test_terms_are_explained_where_they_stand(visit: Any, met: dict[str, Any]) -> None:
    page = visit(met).page
    tip = page.locator("#tip")
    term = page.locator(".loss a.term").first
    term.focus()
    assert "validation split" in tip.inner_text()
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    term.hover()
    assert tip.is_visible()
    meaning = page.locator(f"#{term.get_attribute('aria-describedby')}")
    assert meaning.inner_text() == tip.inner_text(), "and at the end of the page"
    page.get_by_role("button", name="model.onnx").focus()
    assert "ONNX Runtime" in tip.inner_text()


def test_a_finger_opens_an_explanation_and_stays(visit: Any, met: dict[str, Any]) -> None:
    page = visit(met, width=390, touch=True).page
    page.locator(".loss a.term").first.tap()
    assert page.locator("#tip").is_visible() and page.evaluate("location.hash") == ""
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 390


def test_without_javascript_the_page_says_everything(browser: Any, searched: Any) -> None:
    for width in (1280, 390):
        context = browser.new_context(java_script_enabled=False, viewport={"width": width, "height": 900}, offline=True)
        page = context.new_page()
        page.goto((searched("parts") / "report.html").as_uri())
        summary = json.loads((searched("parts") / "summary.json").read_text())
        text = page.locator("main").inner_text()
        assert report.verdict(summary) in text and summaries.request(summary) in text
        assert "The chart needs JavaScript" in text and page.locator("#plot, .legend").first.is_hidden()
        for point in [summary["dense"], summary["chosen"], *summary["front"]]:
            assert f"{point['packed_bytes']:,} B" in text
        assert page.locator("th button").count() == 0 and page.locator("#copy").is_hidden()
        page.locator(".facts a.term, th a.term").first.click()
        assert "#term-" in page.url, "a term leads to its explanation"
        page.locator("summary").first.click()
        assert page.locator("details > :not(summary)").first.is_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        context.close()


def test_paper_has_all_of_it(browser: Any, searched: Any) -> None:
    seen = Visit(browser, searched("parts") / "report.html", scheme="dark", width=700)
    seen.page.emulate_media(media="print", color_scheme="dark")
    seen.page.wait_for_timeout(200)
    assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert seen.page.evaluate("getComputedStyle(document.querySelector('h1')).color") == "rgb(21, 24, 30)"
    heights = seen.page.evaluate(
        "[...document.querySelectorAll('details > :not(summary)')].map(part => part.offsetHeight)"
    )
    assert heights and min(heights) > 10, "what is folded is printed"
    cut = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollHeight > box.clientHeight + 1).length"
    assert seen.page.evaluate(cut) == 0 and seen.page.locator("button:not(.sort):visible").count() == 0
    seen.context.close()
