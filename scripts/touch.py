"""What a newcomer must touch: each example of docs/add-a-method.md added to lilliput itself, by `git diff --stat`.

    python scripts/touch.py

A copy of the checkout is made for each example; the example's file goes into the folder of its family, and
`scripts/names.py` writes the public names anew.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "add-a-method.md"
ROOMS = {
    "A score": "prune",
    "A range": "quant",
    "A statistic": "statistics",
    "A rule": "prune",
    "A code with a stored kind": "code",
    "A structural method": "graph",
    "A network and a family of students": "nets",
    "A task that is not an array": "task",
}


@dataclass(frozen=True)
class Touched:
    """What adding one example changes.

    Args:
        example: The heading of its section.
        lines: Lines of its file.
        by_hand: The files that a person writes.
        generated: The files that `scripts/names.py` writes.
        stat: The output of `git diff --stat`.
    """

    example: str
    lines: int
    by_hand: tuple[str, ...]
    generated: tuple[str, ...]
    stat: str


def examples() -> dict[str, tuple[str, str]]:
    """The examples of the page: (file name, text) by the heading of their section."""
    by_heading = {}
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading, _, body = section.partition("\n")
        if heading in ROOMS:
            title = r'^```python title="my-methods/my_methods/([^"]+)"\n(.*?)^```$'
            (by_heading[heading],) = re.findall(title, body, re.MULTILINE | re.DOTALL)
    return by_heading


def touched() -> Iterator[Touched]:
    """Add every example to a copy of the checkout.

    Yields:
        What git says of each.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        listed = _git(
            ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "src", "scripts", "pyproject.toml"
        )
        for name in filter(lambda name: (ROOT / name).is_file(), listed.splitlines()):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        _git(copy, "init", "--quiet")
        _git(copy, "add", "--all")
        _git(copy, "-c", "user.name=touch", "-c", "user.email=touch@localhost", "commit", "--quiet", "-m", "before")
        for heading, (name, text) in examples().items():
            own = f"src/lilliput/{ROOMS[heading]}/{name}"
            (copy / own).write_text(text, encoding="utf-8")
            subprocess.run([sys.executable, copy / "scripts" / "names.py"], check=True, stdout=subprocess.DEVNULL)
            _git(copy, "add", "--all")
            files = _git(copy, "diff", "--cached", "--name-only").splitlines()
            stat = _git(copy, "diff", "--cached", "--stat")
            others = tuple(file for file in files if file != own)
            yield Touched(heading, text.count("\n"), (own,), others, stat)
            _git(copy, "reset", "--quiet", "--hard")


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    done = list(touched())
    print("| to add | files by hand | lines | generated |\n|---|---|---|---|")
    for each in done:
        names = ", ".join(Path(name).name for name in each.generated) or "none"
        print(f"| {each.example.lower()} | {len(each.by_hand)} | {each.lines} | {names} |")
    for each in done:
        print(f"\n{each.example}\n{each.stat.rstrip()}")
