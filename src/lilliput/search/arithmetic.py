"""Dynamic 8-bit arithmetic: the large matrix products of a network in integers, without a training step."""

from typing import Any

import numpy as np

from lilliput.errors import ExportError, NotSupported
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.quant.dynamic import dynamic
from lilliput.search.job import Job
from lilliput.search.points import Point
from lilliput.stage import calibration
from lilliput.task import length, take

TOLERANCES = (0.002, 0.004, 0.01)
WORTH = 100_000
"""Values below which a product is over before its input is quantized."""
READERS = ("MatMul", "Gemm", "Transpose")  # an exporter may leave the transpose of a weight in the graph
REFUSALS = (ExportError, NotSupported, ValueError, KeyError)
NO_RECIPE = "# Made from the exported file: there are no stages that could be applied or trained again.\n"


def points(job: Job) -> list[Point]:
    """Matrix products in int8 with codes found anew in every run: fast where products are large (transformers)."""
    proto = job.dense.structure.fill(job.dense.stored)
    products = sum(
        int(np.prod(t.dims))
        for t in proto.graph.initializer
        if len(t.dims) == 2 and any(t.name in node.input for node in proto.graph.node if node.op_type in READERS)
    )
    if products < WORTH:
        job.known.skip("8-bit arithmetic", f"the matrix products hold {products} values, too few to gain from it")
        return []
    session, inputs = Session(proto), calibration(job.task, 48)
    runs: list[Any] = [session.feed(take(inputs, slice(i, i + 1))) for i in range(length(inputs))]
    points: list[Point] = []
    for tolerance in TOLERANCES:
        name = f"same structure, 8-bit arithmetic within {tolerance:g}"
        if job.clock.remaining(0.9) < 1:
            break
        try:
            with job.clock.on("calibrate"):
                small = dynamic(proto, runs, tolerance=tolerance)
            if any(small == point.proto for point in points):
                continue
            recipe = [{"stage": "dynamic int8", "tolerance": tolerance}]
            points.append(
                job.press.finished(
                    small, Structure(small), {}, None, name, recipe, f"{job.runner.start}-dynamic-{tolerance}", None
                )
            )
        except REFUSALS as error:
            job.failed(name, error)
    return points
