"""Arithmetic without a training step: products and convolutions in 8-bit integers where measuring says that it pays."""

from typing import Any

from onnx import ModelProto

from lilliput.cost.measure import latency
from lilliput.errors import ExportError, NotSupported
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.quant.dynamic import dynamic, gain_ms
from lilliput.quant.static import observe
from lilliput.search.integers import integers
from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.stage import calibration
from lilliput.task import length, take

TOLERANCES = (0.002, 0.004, 0.01)
SHARE = 0.2  # of the budget, for all of it
PAYS = 0.05  # of a run's time, which integers must save to be a point of their own
EXAMPLES = 128
CHUNK = 4  # examples of a calibration run: the outputs of all operators are in memory at once
REFUSALS = (ExportError, NotSupported, ValueError, KeyError)
NO_RECIPE = "# Made from the exported file: there are no stages that could be applied or trained again.\n"


def points(job: Job) -> list[Point]:
    """The dense network with operators in 8-bit integers: static where ranges are fixed, dynamic where found anew.

    Nothing is done where no time is asked for: what is stored in 8 bits is as small without the arithmetic.
    """
    if not job.question.for_latency:
        job.known.skip("8-bit arithmetic", "it saves time, and time is not asked for")
        return []
    proto = job.dense.structure.fill(job.dense.stored)
    end = job.clock.now + (60.0 if job.clock.budget_s is None else SHARE * job.clock.budget_s)
    points = _static(job, proto, end)
    if job.forge is not None:  # the network itself, compiled, loses nothing
        job.forge.start(job.dense.proto)
        job.forge.tune((points or [job.dense])[0].proto)
    return [*points, *_dynamic(job, proto, end)]


def _static(job: Job, proto: ModelProto, end: float) -> list[Point]:
    """Convolutions and products whose inputs have fixed ranges, by groups of operators."""
    inputs = calibration(job.task, EXAMPLES)
    title = "same structure, static 8-bit arithmetic"
    try:
        with job.clock.on("calibrate"):
            session = Session(proto)
            runs: list[Any] = [session.feed(take(inputs, slice(i, i + CHUNK))) for i in range(0, length(inputs), CHUNK)]
            seen = observe(proto, runs)
            begin = job.forge.start if job.forge is not None else None
            found = integers(seen, job.task, inputs, max(1.0, 0.6 * (end - job.clock.now)), begin)
    except REFUSALS as error:
        job.failed(title, error)
        return []
    points: list[Point] = []
    if not found.choices or found.choices[0].time > 1 - PAYS:
        best = 1 - found.choices[0].time if found.choices else 0.0
        job.known.skip("static 8-bit arithmetic", f"it saves {best:.0%} of a run's time, too little to lose a digit")
        return points
    for choice in found.choices:
        if choice.time > 1 - PAYS or (points and (job.clock.now > end or job.lost(points[-1]) <= 0)):
            break
        name = f"{title} in {len(choice.names)} of {len(seen.sites)} operators"
        recipe = [{"stage": "static int8", "range": found.rule, "operators": list(choice.names)}]
        key = f"{job.runner.start}-static-{len(choice.names)}"
        points += _point(job, found.write(choice), name, recipe, key)
    return points


def _dynamic(job: Job, proto: ModelProto, end: float) -> list[Point]:
    """Matrix products whose inputs get their levels anew in every run: fast where they are large (transformers)."""
    inputs = calibration(job.task, 48)
    session = Session(proto)
    runs: list[Any] = [session.feed(take(inputs, slice(i, i + 1))) for i in range(length(inputs))]
    points: list[Point] = []
    try:
        with job.clock.on("measure"):
            gain = gain_ms(proto, runs[:1])
            whole = latency({"dense": session}, job.task.example, seconds=0.3)["dense"].median_ms
    except REFUSALS as error:
        job.known.skip("dynamic 8-bit arithmetic", str(error))
        return points
    if gain < PAYS * whole:
        job.known.skip("dynamic 8-bit arithmetic", f"its products would save {max(0.0, gain / whole):.0%} of a run")
        return points
    for tolerance in TOLERANCES:
        if points and job.clock.now > end:
            break
        name = f"same structure, 8-bit arithmetic within {tolerance:g}"
        try:
            with job.clock.on("calibrate"):
                small = dynamic(proto, runs, tolerance=tolerance)
        except REFUSALS as error:
            job.failed(name, error)
            continue
        if all(small != point.proto for point in points):
            recipe = [{"stage": "dynamic int8", "tolerance": tolerance}]
            points += _point(job, small, name, recipe, f"{job.runner.start}-dynamic-{tolerance}")
    return points


def _point(job: Job, proto: ModelProto, name: str, recipe: list[dict[str, Any]], key: str) -> list[Point]:
    """The point of a written file, or none where it is refused."""
    try:
        with job.clock.on("measure"):
            return [job.press.finished(proto, Structure(proto), {}, None, name, recipe, key, None)]
    except REFUSALS as error:
        job.failed(name, error)
        return []
