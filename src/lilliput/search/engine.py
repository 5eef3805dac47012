"""Use the engine in a search for speed: measure survivors in it, and propose zeros where they make it faster."""

import time
from typing import Any

import numpy as np

from lilliput.cost.measure import latency
from lilliput.cost.peak import peak_bytes
from lilliput.engine import memory
from lilliput.errors import ExportError, NotSupported
from lilliput.export.guard import compare
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.runtimes.engine import EngineSession
from lilliput.search.job import Job
from lilliput.search.points import Point, judged
from lilliput.stored.base import Stored
from lilliput.stored.plain import Plain
from lilliput.task import leaves

MOST_VALUES = 3_000_000  # of a network that is compiled while the search waits; a larger one takes minutes
INTEGERS = 0.5  # of the time of a multiply-add, against float32
REWARD = 1.15  # how much faster zeros must make a structure to be worth a training
SPARSITIES = (0.8, 0.9)
ROUND = ("QuantizeLinear", "DynamicQuantizeLinear")  # where a runtime's last bit may become a whole level
REFUSALS = (NotSupported, ExportError, OSError, ValueError)


def work(point: Point) -> float:
    """Multiply-adds of a point, those of 8-bit integers as half: what is likely to be fast before it is measured."""
    return point.macs * (INTEGERS if any(node.op_type in ROUND for node in point.proto.graph.node) else 1.0)


def sessions(job: Job, points: list[Point], seconds: float) -> dict[int, EngineSession]:
    """The points in the engine, by their place, as many as this time compiles, those within the floor first.

    Those that were compiled while the search went on take none of it.
    """
    opened: dict[int, EngineSession] = {}
    if job.forge is None:
        return opened
    deadline = time.monotonic() + seconds
    order = sorted(range(len(points)), key=lambda i: (job.lack(points[i]) > 0, work(points[i])))
    for i in order:
        job.forge.start(points[i].proto)
    for i in order:
        point = points[i]
        made = job.forge.sessions(point.proto, deadline - time.monotonic())
        if not made:
            reason = job.forge.reason(point.proto)
            job.known.skip("the engine", f"{point.name}: {reason[:200]}" if reason else f"no time for {point.name}")
            continue
        try:
            opened[i] = _faster(job, point, made)
        except REFUSALS as error:
            job.known.skip("the engine", f"{point.name}: {str(error)[:200]}")
    return opened


def _faster(job: Job, point: Point, made: list[EngineSession]) -> EngineSession:
    """The faster of a point's compilations that agrees with ONNX Runtime."""
    example, axis = job.task.example, job.task.class_axis
    exact = not any(node.op_type in ROUND for node in point.proto.graph.node)
    expected = Session(point.proto).predict(example)
    for session in made:
        compare(session.predict(example), expected, exact=exact, who=f"{point.name} in the engine", axis=axis)
    if len(made) == 1:
        return made[0]
    sessions: dict[str, Any] = {str(i): session for i, session in enumerate(made)}
    times = latency(sessions, example, seconds=0.3, clock=time.thread_time, settled=0.02)
    return made[int(max(times, key=lambda name: times[name].ratio))]


def rewarded(structure: Structure, stored: dict[str, Stored], example: Any) -> tuple[float, ...]:
    """The sparsities that make this structure faster in the engine by more than REWARD each, by random zeros."""
    draw = np.random.default_rng(0)
    try:
        opened: dict[float, Any] = {0.0: EngineSession(structure.write(stored))}
        for sparsity in SPARSITIES:
            opened[sparsity] = EngineSession(
                structure.write(
                    {
                        name: Plain(np.where(draw.random(s.shape) < sparsity, 0, s.native()).astype(s.native().dtype))
                        if len(s.shape) > 1
                        else s
                        for name, s in stored.items()
                    }
                )
            )
        times = latency(
            {f"{s:g}": session for s, session in opened.items()}, example, seconds=0.3, clock=time.thread_time
        )
    except REFUSALS:
        return ()
    rewarding, best = [], times["0"].median_ms
    for sparsity in SPARSITIES:
        if best / times[f"{sparsity:g}"].median_ms >= REWARD:
            rewarding.append(sparsity)
            best = times[f"{sparsity:g}"].median_ms
    return tuple(rewarding)


def weigh(job: Job, points: list[Point], compiled: dict[int, EngineSession]) -> None:
    """The peak memory of points: measured in ONNX Runtime, and as the engine plans it, where that runtime may be used.

    Args:
        points: whose costs are filled in.
        compiled: those of them that are compiled, by place, whose plans are known.
    """
    allowed = job.question.runtime
    for i, point in enumerate(points):
        try:
            if allowed != "engine" and point.peak_bytes is None:
                point.peak_bytes = peak_bytes(point.proto, job.task.example)
            if allowed != "ort" and i in compiled:
                manifest = compiled[i].engine.manifest
                point.engine_peak_bytes = int(manifest["arena_bytes"]) + int(manifest["constant_bytes"])
            elif allowed != "ort" and point.engine_peak_bytes is None:
                point.engine_peak_bytes = memory.peak_bytes(point.proto)
        except REFUSALS as error:
            job.known.skip("the memory of a run", f"{point.name}: {str(error)[:200]}")


def described(job: Job, point: Point, session: EngineSession) -> dict[str, Any]:
    """What the summary says of a compiled point: its score on val, and what it needs."""
    score, outputs = judged(job.task, session)
    apart = [(a - b).abs().max() for a, b in zip(leaves(outputs), leaves(point.outputs), strict=True)]
    manifest = session.engine.manifest
    return {
        "val": round(float(score.value), 6),
        "library_bytes": manifest.get("library_bytes"),
        "weight_bytes": manifest["weight_bytes"],
        "arena_bytes": manifest["arena_bytes"],
        "distance": float(max(apart)),
    }
