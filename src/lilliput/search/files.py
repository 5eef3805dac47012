"""Write the output folder of a search: a set of files that belong together, replaced as one."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from lilliput.export.save import NAMES
from lilliput.files import write_set
from lilliput.search import shelf
from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.search.summary import Summary

ENGINE = ("model.c", "libmodel.so")
NEAREST = "nearest"


def write_folder(job: Job, point: Point, summary: Summary, engine: Path | None = None) -> Summary:
    """Replace the files of the folder: model.lil, model.onnx, model.safetensors, recipe.toml and summary.json.

    A kill or a power cut at any moment leaves the earlier set or this one, whole; summary.json names the files' sizes
    and hashes.

    Args:
        job: the search.
        point: whose files they are: the chosen point, or the dense network.
        summary: what summary.json says.
        engine: a folder with the point as compiled by the engine, where it was.

    Returns:
        The summary with the files' sizes and hashes.

    Raises:
        StoreError: where a file cannot be written; the earlier set is still whole.
    """
    source = shelf.shelve(job, point)
    contents: dict[str, bytes | Path | None] = {"engine": None, NEAREST: None}
    contents |= {name: source / name for name in NAMES}
    if engine is not None:
        contents |= {f"engine/{path.name}": path for path in sorted(engine.iterdir()) if path.is_file()}
    for miss in summary.misses:
        near = next((other for other in job.points if other.key == miss["key"] and other.files), None)
        if near is not None and near.files is not None:
            place = f"{NEAREST}/floor-{miss['option']}"
            contents |= {f"{place}/{name}": near.files / name for name in ("model.lil", "model.onnx", "recipe.toml")}
    told = {
        name: path
        for name, path in contents.items()
        if isinstance(path, Path) and (name in NAMES or name.rpartition("/")[2] in ENGINE)
    }
    sizes = {name: path.stat().st_size for name, path in told.items() if not name.startswith(NEAREST)}
    hashes = {name: hashlib.sha256(told[name].read_bytes()).hexdigest() for name in NAMES}
    summary = replace(summary, files=sizes, hashes=hashes)
    contents["summary.json"] = json.dumps(summary.data(), indent=1, allow_nan=False).encode()
    write_set(job.folder, contents, last="summary.json")
    return summary
