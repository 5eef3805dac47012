"""Shelf: the points of a search in its store, and the files of those that may still be handed over.

A point is one record with its outcomes; the best have their four files beside it, so that a search that was killed is
chosen from, tested and written without any training or export. Files of points that fell behind are removed.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from lilliput.errors import StoreError
from lilliput.export.restore import restore as read_network
from lilliput.export.save import NAMES, write_files
from lilliput.export.state import state_bytes
from lilliput.search import engine
from lilliput.search.choose import front
from lilliput.search.job import Job
from lilliput.search.points import Point, kept
from lilliput.task import Score
from lilliput.task.nested import structured

HELD = 10
"""Points whose files are kept, besides the dense network's."""
OUTCOMES = "outcomes of the metric"


def contenders(job: Job, most: int) -> list[Point]:
    """At most so many points that may be handed over: fronts of the loss and what is asked, peeled in turn.

    Args:
        job: the search.
        most: how many, the dense network not counted.
    """
    unique: dict[tuple[int, int, float], Point] = {}
    for point in filter(at_hand, job.points[1:]):
        unique.setdefault((point.packed_bytes, point.onnx_bytes, point.divergence), point)
    rest, chosen = list(unique.values()), list[Point]()
    while rest and len(chosen) < most:
        layer = [rest[i] for i in front([_axes(job, p) for p in rest])]
        chosen += sorted(layer, key=lambda p: (job.lack(p), job.lost(p)))
        rest = [point for point in rest if not any(point is other for other in layer)]
    return chosen[:most]


def _axes(job: Job, point: Point) -> tuple[float, ...]:
    """What a point must be beaten on: its loss, the asked file, and what a run costs where a run is asked for."""
    run = job.question.priced_by_runtime
    return (job.lost(point), float(point.costs[job.question.file_key]), *((engine.work(point),) if run else ()))


def put(job: Job, point: Point) -> None:
    """Keep a point's record, and its files while it is among the contenders."""
    tensors = kept(point.outputs)
    names = list(tensors)
    if point.score.outcomes is not None:
        tensors[OUTCOMES] = torch.from_numpy(np.ascontiguousarray(point.score.outcomes))
    row = {"kind": "point", "start": job.runner.start, **point.row(), "score": point.score.value}
    row |= {"modelled": point.model is not None, "outputs": names, "layers": point.layers, "about": point.about}
    job.store.put(f"point-{point.key}", row, tensors)
    held = [job.dense, *contenders(job, HELD)]
    if any(point is other for other in held):
        shelve(job, point)
    for other in job.points:
        if other.files is not None and not any(other is one for one in held):
            shutil.rmtree(other.files, ignore_errors=True)
            other.files = None


def shelve(job: Job, point: Point) -> Path:
    """The folder of a point's files, which are written where they are not yet.

    Raises:
        StoreError: where a file cannot be written, or has another size than was counted.
    """
    folder = _place(job, point.key)
    if point.files is None:
        temporary = folder.with_name(f".{folder.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        state = state_bytes(job.target.tensors(job, point), job.model if point.model is None else point.model)
        filled = point.structure.fill(point.stored)
        try:
            sizes = write_files(temporary, filled, point.stored, point.proto, state, job.target.recipe(job, point))
            if sizes["model.onnx"] != point.onnx_bytes or sizes["model.lil"] != point.packed_bytes:
                raise StoreError(
                    f"shrink: the files must have the sizes that were counted ({point.onnx_bytes} and "
                    f"{point.packed_bytes} bytes), got {sizes['model.onnx']} and {sizes['model.lil']}."
                )
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise StoreError(f"Store: {folder} could not be written: {error.strerror or error}.") from error
            raise
        point.files = folder
    return point.files


def model_of(job: Job, point: Point) -> nn.Module | None:
    """The network of a point that was handed over, with its codes; None where no torch network stands behind it."""
    if point.structure is not None or not point.about.get("modelled"):
        return point.model
    try:
        return read_network(job.folder, job.model, job.task)
    except (StoreError, KeyError, ValueError, TypeError, RuntimeError) as error:
        job.show.say(f"{job.folder}: the network could not be built again from its files: {error}")
        return None


def at_hand(point: Point) -> bool:
    """Whether a point's files are there, or can be written."""
    return point.files is not None or point.structure is not None


def restore(job: Job, dense: Point | None) -> bool:
    """Take what an earlier run of this search has left in the store.

    Args:
        job: the search, which gets its history, and its points: at once where it is only to be finished. A search that
            goes on decides as it did, without knowing what it will find, and meets them one by one.
        dense: the dense network where it was exported again, for a search that goes on.

    Returns:
        Whether there was anything to take.
    """
    found = {}
    for _, record in job.store.records():
        if record.get("kind") == "point" and record.get("start") == job.runner.start and "layers" in record:
            point = _read(job, record)
            if point is not None:
                found[point.key] = point
    stored = found.pop(job.runner.start, None)
    if stored is None or stored.files is None:
        return False
    if dense is not None:
        dense.files, dense.about = stored.files, stored.about
    job.press.dense = dense or stored
    job.points.append(dense or stored)
    job.earlier = found
    if dense is None:
        recall(job)
    history = job.store.record("history")
    if history is not None and history.get("start") == job.runner.start and history["rows"]:
        job.history, last = list(history["rows"]), history["rows"][-1]
        job.spent_s = float(last["at_s"])
        known = {point.key: point for point in (*job.points, *found.values()) if at_hand(point)}
        job.handed = known.get(last["key"])
    return True


def recall(job: Job) -> None:
    """Take the points of an earlier run that this one has not met."""
    for point in sorted(job.earlier.values(), key=lambda point: float(point.about.get("at_s", 0))):
        job.points.append(point)
        job.attempts.append({"status": "done", **point.about, **point.row(), **job.worth(point)})
    job.earlier = {}


def _read(job: Job, record: dict[str, Any]) -> Point | None:
    key = str(record["key"])
    tensors, folder = job.store.tensors(f"point-{key}"), _place(job, key)
    names = [str(name) for name in record["outputs"]]
    if tensors is None or not tensors.keys() >= set(names):
        return None
    whole = all((folder / name).is_file() for name in NAMES)
    proto = onnx.load(folder / "model.onnx") if whole else None
    outcomes = tensors.pop(OUTCOMES, None)
    if outcomes is None and proto is None:
        return None  # a metric that is no mean cannot be judged again without the file
    score = Score(float(record["score"]), None if outcomes is None else outcomes.numpy(), None)
    if outcomes is None:
        score = job.press.judge(proto)
    return Point(
        name=str(record["name"]),
        recipe=list(record["recipe"]),
        key=key,
        proto=proto,
        structure=None,
        stored={},
        score=score,
        divergence=float(record["distance"]),
        onnx_bytes=int(record["onnx_bytes"]),
        packed_bytes=int(record["packed_bytes"]),
        values=int(record["values"]),
        macs=int(record["macs"]),
        agreement=dict(record["agreement"]),
        flags=list(record["flags"]),
        outputs=structured(names, [tensors[name] for name in names]),
        layers=list(record["layers"]),
        about=dict(record["about"]) | {"modelled": record["modelled"]},
        files=folder if whole else None,
    )


def _place(job: Job, key: str) -> Path:
    return job.store.folder / "files" / key
