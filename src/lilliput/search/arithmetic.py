"""Post-training points: the network as it is, in fewer bits and narrower arithmetic, without a training step."""

from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lilliput.errors import ExportError, NotSupported
from lilliput.graph.fold import fold_batchnorm
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.quant.dynamic import dynamic
from lilliput.quant.quantize import Quantize
from lilliput.recipe import Recipe, plain
from lilliput.search.points import Point
from lilliput.stage import calibration
from lilliput.task import length, take

if TYPE_CHECKING:
    from lilliput.search.shrink import Search

TOLERANCES = (0.002, 0.004, 0.01)
WORTH = 100_000
"""Values below which a product is over before its input is quantized."""
READERS = ("MatMul", "Gemm", "Transpose")  # an exporter may leave the transpose of a weight in the graph
REFUSALS = (ExportError, NotSupported, ValueError, KeyError)


def points(search: "Search") -> list[Point]:
    """The dense network with 8-bit weights, and with its large products in 8-bit arithmetic."""
    return [*_narrow(search), *dynamic_points(search)]


def _narrow(search: "Search") -> list[Point]:
    name, stage = "same structure, 8 bits without training", Quantize(8)
    try:
        with search.clock.on("calibrate"):
            folded = fold_batchnorm(search.model, search.task.example)
            model: nn.Module = stage(folded, search.task, search.shop.reference)
        recipe = [{"stage": "FoldBatchNorm"}, plain(stage)]
        return [search.press.point(model, "dense", name, recipe, search.shop.key(Recipe.parse(recipe)))]
    except REFUSALS as error:
        search.failed(name, error)
        return []


def dynamic_points(search: "Search") -> list[Point]:
    """Matrix products in int8 with codes found anew in every run: fast where products are large (transformers)."""
    proto = search.dense.structure.fill(search.dense.stored)
    products = sum(
        int(np.prod(t.dims))
        for t in proto.graph.initializer
        if len(t.dims) == 2 and any(t.name in node.input for node in proto.graph.node if node.op_type in READERS)
    )
    if products < WORTH:
        search.left.append(("8-bit arithmetic", f"the matrix products hold {products} values, too few to gain from it"))
        return []
    session, inputs = Session(proto), calibration(search.task, 48)
    runs: list[Any] = [session.feed(take(inputs, slice(i, i + 1))) for i in range(length(inputs))]
    found: list[Point] = []
    for tolerance in TOLERANCES:
        name = f"same structure, 8-bit arithmetic within {tolerance:g}"
        if search.clock.left(0.9) < 1:
            break
        try:
            with search.clock.on("calibrate"):
                small = dynamic(proto, runs, tolerance=tolerance)
            if any(small == point.proto for point in found):
                continue
            recipe = [{"stage": "dynamic int8", "tolerance": tolerance}]
            found.append(
                search.press.finished(
                    small, Structure(small), {}, None, name, recipe, f"{search.shop.start}-dynamic-{tolerance}", None
                )
            )
        except REFUSALS as error:
            search.failed(name, error)
    return found
