"""Doctor: what this machine offers to a search, and what is missing."""

import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from packaging.requirements import Requirement
from torch import nn

from lilliput.cost.measure import machine
from lilliput.data import cache_folder
from lilliput.engine.target import target
from lilliput.record import versions
from lilliput.search.cores import available_bytes, count_workers

ROOM = 1e9  # bytes that a search may need for what its workers share
OWN = ("check", "dev", "docs", "people", "tasks")  # extras for who works on lilliput itself
BUSY = 0.5  # of the cores, from which on measurements are disturbed


@dataclass(frozen=True)
class Row:
    """One thing that was looked at.

    Args:
        what: its name.
        text: what was found.
        good: whether nothing has to be done.
        do: what to do otherwise.
    """

    what: str
    text: str
    good: bool = True
    do: str = ""


def found() -> list[Row]:
    """What was found, in the order in which a person reads it.

    Example:
        >>> [row.what for row in found()][:3]
        ['versions', 'processor', 'cores']
    """
    here = machine()
    load, cores = here["load"] or 0.0, os.cpu_count() or 1
    quiet = load <= BUSY * cores
    rows = [
        Row("versions", ", ".join(f"{name} {version}" for name, version in versions().items())),
        Row("processor", f"{here['cpu']}, {here['arch']}, {here['os']}"),
        Row(
            "cores",
            f"{count_workers(nn.Identity())} workers train side by side; load {load:.1f} of {cores}",
            quiet,
            "Other work makes searches slower and their measurements wider.",
        ),
        Row("memory", f"{available_bytes() / 1e9:.1f} GB free"),
        _compiler(),
        Row("graphics card", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"),
        _room("temporary files", Path(tempfile.gettempdir()), "Name another folder by TMPDIR."),
        _room("cache", cache_folder(), "Name another folder by LILLIPUT_CACHE."),
    ]
    return rows + _extras()


def _compiler() -> Row:
    try:
        made = target("native")
    except OSError as error:
        return Row("C compiler", "none", False, str(error))
    return Row("C compiler", f"{' '.join(made.cc)}, {made.lanes} float32 values in a vector")


def _room(what: str, folder: Path, do: str) -> Row:
    place = next(part for part in (folder, *folder.parents) if part.exists())
    free, writable = shutil.disk_usage(place).free, os.access(place, os.W_OK)
    text = f"{folder}, {free / 1e9:.1f} GB free" + ("" if writable else ", not writable")
    return Row(what, text, writable and free >= ROOM, do)


def _extras() -> list[Row]:
    """The extras of the package, those that are whole and those that are not."""
    try:
        needs = [Requirement(text) for text in distribution("lilliput").requires or ()]
    except PackageNotFoundError:
        return []
    rows = []
    for extra in distribution("lilliput").metadata.get_all("Provides-Extra") or ():
        if extra in OWN:
            continue
        wanted = [need.name for need in needs if need.marker and need.marker.evaluate({"extra": extra})]
        missing = [name for name in wanted if name != "lilliput" and not _installed(name)]
        how = f"without {', '.join(missing)}: pip install 'lilliput[{extra}]' adds it"
        rows.append(Row(f"extra {extra}", how if missing else "installed"))
    return rows


def _installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return importlib.util.find_spec(name.replace("-", "_")) is not None
    return True
