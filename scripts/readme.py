"""README.md's generated parts, from the record of a demo: its picture, what it printed, what it made.

python scripts/readme.py [SUMMARY]    SUMMARY, the summary.json of a `make demo`, is kept as results/demo.json first
"""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from lilliput.report import words
from lilliput.report.tables import front, markdown

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "demo.json"
PICTURES = {False: ROOT / "docs" / "images" / "demo.svg", True: ROOT / "docs" / "images" / "demo-dark.svg"}


def parts(summary: dict[str, Any]) -> dict[str, str]:
    """The text of each generated part."""
    verdict = words.verdict(summary)
    light, dark = (PICTURES[mode].relative_to(ROOT).as_posix() for mode in (False, True))
    picture = f"""<picture>
  <source media="(prefers-color-scheme: dark)" srcset="{dark}">
  <img alt="{verdict.replace('"', "'")}" src="{light}" width="800">
</picture>

{verdict}"""
    return {"picture": picture, "output": f"```text\n{printed(summary)}\n```", "table": table(summary)}


def printed(summary: dict[str, Any]) -> str:
    """What the command prints at its end."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=118, force_terminal=False)
    console.print(front(summary))
    console.print(words.verdict(summary), highlight=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().strip("\n").splitlines())


def table(summary: dict[str, Any]) -> str:
    """The dense network and the chosen one, and where they were measured."""
    quality, chosen = words.Quality.of(summary), words.shown(summary) or {}
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
        "latency": lambda point: words.milliseconds(point.get("latency_ms")),
    })  # fmt: skip
    return (
        f"{made}\n\nONNX Runtime, one thread, batch 1, on {machine['cpu']}; the search took "
        f"{summary['wall_s']:.0f} s on {machine['cores']} cores. The record is [results/demo.json](results/demo.json)."
    )


def fill(text: str, found: dict[str, str]) -> str:
    """`text` with each part between its markers replaced; raises ValueError for a part without markers."""
    for name, part in found.items():
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
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text(encoding="utf-8"), parts(summary)), encoding="utf-8")


if __name__ == "__main__":
    main()
