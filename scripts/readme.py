"""README.md's generated parts, from the record of a demo: its pictures, what it printed, what it made.

python scripts/readme.py [SUMMARY]    SUMMARY, the summary.json of a `make demo`, is kept as results/demo.json first
"""

import io
import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from lilliput.report import formats
from lilliput.report import page as report
from lilliput.report import summary as summaries
from lilliput.report.tables import front, markdown, reached

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "demo.json"
IMAGES = ROOT / "docs" / "images"
PICTURES = {False: IMAGES / "demo.svg", True: IMAGES / "demo-dark.svg"}
REPORTS = {False: IMAGES / "report.png", True: IMAGES / "report-dark.png"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def parts(summary: dict[str, Any]) -> dict[str, str]:
    """The text of each generated part."""
    verdict = summaries.verdict(summary)
    top = "The top of report.html: the result in a sentence, bytes, latency and accuracy before and after, the front."
    return {
        "picture": f"{shown(PICTURES, verdict)}\n\n{verdict}",
        "report": shown(REPORTS, top),
        "output": f"```text\n{printed(summary)}\n```",
        "table": table(summary),
    }


def shown(pictures: dict[bool, Path], alternative: str) -> str:
    """A picture as HTML, its dark version on dark pages."""
    light, dark = (pictures[mode].relative_to(ROOT).as_posix() for mode in (False, True))
    return f"""<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{dark}">
  <img alt="{alternative.replace('"', "'")}" src="{light}" width="800">
</picture>"""


def photograph(summary: dict[str, Any]) -> None:
    """Take pictures of the top of the report as a browser shows it; where there is no browser they stay as they are."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ModuleNotFoundError:
        browser = None
    if browser is None:
        print("readme: docs/images/report*.png stay as they are: playwright and a browser must be installed.")
        return
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        path = Path(folder, "report.html")
        path.write_text(report(summary), encoding="utf-8")
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        for dark, picture in REPORTS.items():
            view = opened.new_page(viewport={"width": 1000, "height": 940}, color_scheme="dark" if dark else "light")
            view.goto(path.as_uri())
            view.wait_for_selector("#plot[data-drawn]")
            view.wait_for_timeout(300)  # the plot is painted in the next frame
            view.screenshot(path=picture)
        opened.close()


def printed(summary: dict[str, Any]) -> str:
    """What the command prints at its end."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=118, force_terminal=False)
    console.print(front(summary, console.width))
    console.print(summaries.verdict(summary), highlight=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def table(summary: dict[str, Any]) -> str:
    """The dense network and the chosen one, and where they were measured."""
    quality, chosen = formats.Quality.of(summary), summaries.shown(summary) or {}
    rows = [
        {"network": name, **point, "score": quality.score(point.get("test", point.get("val")))}
        for name, point in (("dense", summary["dense"]), ("chosen", chosen))
    ]
    where, machine = "test" if "test" in chosen else "validation", summary["machine"]
    made = markdown(rows, {
        "": "network",
        f"{quality.metric} on {where}": "score",
        "values": "values",
        "multiply-adds": "macs",
        "model.onnx, bytes": "onnx_bytes",
        "model.lil, bytes": "packed_bytes",
        "latency": lambda point: formats.milliseconds(point.get("latency_ms")),
    })  # fmt: skip
    return (
        f"{made}\n\nONNX Runtime, one thread, batch 1, on {machine['cpu']}; the search took "
        f"{summary['wall_s']:.0f} s on {machine['cores']} cores. The record is [results/demo.json](results/demo.json)."
    )


NETWORKS = {
    "resnet20": "ResNet-20, 3x32x32",
    "effnet": "EfficientNet-Lite0, 3x224x224, 1x1 convolutions pruned",
    "minilm": "MiniLM-L6, 128 tokens, linear layers pruned",
    "gru": "GRU, hidden 128, 40 steps",
}


def speed(record: dict[str, Any]) -> str:
    """How many times faster the engine is than ONNX Runtime in float32 on the same file, by the share of zeros."""
    networks: dict[str, dict[str, str]] = {}
    columns: dict[str, None] = {}
    for row in record["rows"]:
        kind, zeros = row["network"].rsplit("-", 1)
        if kind in NETWORKS:
            column = "no zeros" if zeros == "dense" else f"{zeros}% zeros"
            columns[column] = None
            cell = f"{row['ratio']:.1f}x ({formats.milliseconds(row['engine_ms'])})"
            networks.setdefault(NETWORKS[kind], {})[column] = cell
    order = sorted(columns, key=lambda column: (column != "no zeros", column))
    lines = ["| network | " + " | ".join(order) + " |", "|---|" + "--:|" * len(order)]
    lines += [
        f"| {name} | " + " | ".join(cells.get(column, "") for column in order) + " |"
        for name, cells in networks.items()
    ]
    rivals = next((row for row in record["rows"] if row["network"] == "resnet20-90"), {})
    beside = " and ".join(
        f"{rivals[key]:.1f} times as fast as {name}"
        for key, name in (
            ("times_int8", "ONNX Runtime's static int8"),
            ("times_deepsparse", f"DeepSparse {record.get('deepsparse')}"),
        )
        if formats.known(rivals.get(key))
    )
    return "\n".join(lines) + (
        "\n\nTimes faster than ONNX Runtime in float32 on the same file, and the milliseconds: batch 1, one thread, "
        f"medians of one interleaved run on {record['machine']['cpu']}. The zeros are at random places: that is enough "
        "for speed, not for accuracy."
        + (f" At 90% ResNet-20 is {beside}." if beside else "")
        + " The record is `results/engine/speed.json`."
    )


def pruned(record: dict[str, Any], accuracy: dict[str, Any]) -> str:
    """A really pruned network: what it scores and how fast it is."""
    times = {row["network"]: row for row in record["rows"]}
    rows = []
    for row in accuracy["rows"]:
        known = times.get(Path(row["file"]).stem)
        if known:
            rows.append({**row, **known, "name": row["network"], "score": f"{100 * row['val']:.1f}%"})
    if not rows:
        return ""
    base = rows[0]["onnxruntime_ms"]
    made = markdown(rows, {
        "ResNet-20 on digits": "name", "accuracy on validation": "score", "non-zeros": "nonzero",
        "ONNX Runtime": lambda row: formats.milliseconds(row["onnxruntime_ms"]),
        "engine": lambda row: formats.milliseconds(row["engine_ms"]),
        "times faster than dense in ONNX Runtime": lambda row: f"{base / row['engine_ms']:.1f}",
    })  # fmt: skip
    return (
        f"{made}\n\nGlobal gradual magnitude pruning with distillation, {accuracy['epochs']} epochs, one seed. "
        "Records: [accuracy](results/engine/pruned-digits.json), [time](results/engine/speed.json)."
    )


def engine() -> dict[str, str]:
    """The parts on the engine, from its records."""
    record, accuracy = (
        json.loads((ROOT / "results" / "engine" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("speed", "pruned-digits")
    )
    return {"speed": speed(record), "pruned": pruned(record, accuracy)}


def anytime(path: Path = ROOT / "results" / "anytime.json") -> dict[str, str]:
    """The part on what a search reaches in which time, from its record; empty before there is one."""
    if not path.exists():
        return {"anytime": ""}
    record = json.loads(path.read_text(encoding="utf-8"))
    run = next(run for row in record["rows"].values() for run in row["runs"].values())
    where = f"{run['machine']['cores']} cores of {run['machine']['cpu']}"
    return {
        "anytime": f"{record['what']}, on {where}, times smaller or faster than dense:\n\n{reached(record)}\n\n"
        f"Medians over seeds of `{record['command']}`. The record is [results/anytime.json](results/anytime.json)."
    }


def fill(text: str, parts: dict[str, str]) -> str:
    """`text` with each part between its markers replaced; raises ValueError for a part without markers."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- {name}: made by scripts/readme.py -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text)
        if count != 1:
            raise ValueError(f"readme: README.md must have one part {name!r} between its markers, got {count}.")
    return text


def main() -> None:
    if len(sys.argv) > 1:
        RECORD.parent.mkdir(exist_ok=True)
        shutil.copyfile(sys.argv[1], RECORD)
    if not RECORD.exists():
        raise SystemExit(f"readme: {RECORD} must exist. Run make demo, then: {sys.argv[0]} lilliput-demo/summary.json")
    summary = json.loads(RECORD.read_text(encoding="utf-8"))
    from lilliput.report.picture import picture

    for dark, path in PICTURES.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(summary, path, key="packed_bytes", dark=dark)
    photograph(summary)
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), parts(summary) | engine() | anytime()), encoding="utf-8")


if __name__ == "__main__":
    main()
