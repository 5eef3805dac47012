"""Compile C to a shared library, and keep the compiler's messages."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lilliput.engine.target import WARNINGS, Target
from lilliput.errors import ExportError


def library(source: Path, out: Path, target: Target, more: Sequence[str] = (), timeout_s: float = 600) -> None:
    """Compile a C file to what goes with it on the target: a library to load, an object, a module.

    Raises:
        ExportError: With what the compiler said.
    """
    command = [*target.cc, *target.flags, *WARNINGS, *more, str(source), "-o", str(out), *target.link]
    run(command, timeout_s)


def run(command: Sequence[str], timeout_s: float = 600) -> str:
    """Run a compiler; what it printed.

    Raises:
        ExportError: Where it fails.
    """
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"compile: the compiler must finish within {timeout_s:.0f} s, and did not: {' '.join(command)[:200]}"
        ) from error
    if done.returncode:
        raise ExportError(f"compile: the compiler failed ({' '.join(command)[:300]}):\n{done.stderr[-2000:]}")
    return done.stderr


def profiling(folder: Path) -> Path:
    """The library that times its layers, made from the folder's C when it is first asked for."""
    made = folder / "libmodel.profile.so"
    if not made.is_file() or made.stat().st_mtime < (folder / "model.c").stat().st_mtime:
        facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        machine = Target(facts["target"], 0, tuple(facts["flags"]), tuple(facts["cc"]), link=tuple(facts["link"]))
        library(folder / "model.c", made, machine, ["-DMODEL_PROFILE"])
    return made
