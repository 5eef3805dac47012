"""Post-training points of a network that is only an ONNX file: its stored weights in fewer bits."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from onnx import ModelProto, TensorProto, numpy_helper

from lilliput.errors import ExportError
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.quant.allocate import allocate_bits
from lilliput.quant.uniform import Uniform
from lilliput.search import post
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.points import Point
from lilliput.search.sensitivity import Table, by_bits
from lilliput.stage import calibration
from lilliput.stored.base import Stored
from lilliput.stored.bits import Array
from lilliput.stored.grid import Grid
from lilliput.stored.plain import Plain

if TYPE_CHECKING:
    from lilliput.search.shrink import Search

LEVELS = (8, 4, 3, 2)
MEANS = (6, 5, 4, 3)


def dense(search: "Search", model: OnnxModel) -> Point:
    """The file as given, its constants and batch norm folded."""
    structure = model.structure
    stored: dict[str, Stored] = {name: Plain(array) for name, array in structure.weights.items()}
    proto = structure.write(stored)
    return search.press.finished(proto, structure, stored, model, "dense", [], search.shop.start, None)


def points(search: "Search", model: OnnxModel) -> list[Point]:
    """Eight bits everywhere, fewer on average by sensitivity, and the large products in 8-bit arithmetic."""
    inputs = calibration(search.task, 64)
    axes = channels(model.structure.proto)
    weights = {name: array for name, array in model.structure.weights.items() if name in axes}
    found: list[Point] = []
    if weights:
        found += _point(search, model, "8 bits", quantized(weights, axes, dict.fromkeys(weights, 8)))
        limit = 20.0 if search.clock.budget_s is None else 0.3 * search.clock.budget_s
        with search.clock.on("calibrate"):
            search.table = sensitivity(search, model, weights, axes, inputs, limit)
        sizes = {name: weights[name].size for name in search.table}
        losses = by_bits(search.table)
        for mean in MEANS:
            if not sizes or search.clock.left(0.9) < 1:
                break
            bits = dict.fromkeys(weights, mean) | allocate_bits(losses, sizes, mean * sum(sizes.values()))
            found += _point(search, model, f"{mean} bits on average", quantized(weights, axes, bits))
    else:
        search.left.append(("weights", "the file holds no float32 tensor of two and more axes"))
    return [*found, *post.dynamic_points(search)]


def _point(search: "Search", model: OnnxModel, name: str, stored: dict[str, Stored]) -> list[Point]:
    structure = model.structure
    whole: dict[str, Stored] = {
        key: Plain(array.astype(np.float16) if array.dtype == np.float32 and array.ndim < 2 else array)
        for key, array in structure.weights.items()
    } | stored
    recipe = [{"stage": "quantize the file's tensors", "bits": name}]
    try:
        with search.clock.on("calibrate"):
            decoded = OnnxModel(Structure(structure.fill(whole), example=structure.example))
            return [
                search.press.finished(
                    structure.write(whole),
                    structure,
                    whole,
                    decoded,
                    f"same structure, {name} without training",
                    recipe,
                    f"{search.shop.start}-{name.replace(' ', '-')}",
                    None,
                )
            ]
    except post.REFUSALS as error:
        search.failed(name, error)
        return []


def channels(proto: ModelProto) -> dict[str, int]:
    """Every float32 weight of two and more axes with the axis of its output channels.

    >>> from onnx import helper
    >>> w = numpy_helper.from_array(np.zeros((4, 3), np.float32), "w")
    >>> graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [w])
    >>> channels(helper.make_model(graph))
    {'w': 1}
    """
    found = {t.name: 0 for t in proto.graph.initializer if len(t.dims) > 1 and t.data_type == TensorProto.FLOAT}
    for node in proto.graph.node:
        flipped = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type in ("MatMul", "Gemm", "ConvTranspose") and not flipped and node.input[1] in found:
            found[node.input[1]] = 1 if node.op_type != "MatMul" else len(_dims(proto, node.input[1])) - 1
    return found


def _dims(proto: ModelProto, name: str) -> list[int]:
    return next(list(t.dims) for t in proto.graph.initializer if t.name == name)


def quantized(weights: Mapping[str, Array], axes: Mapping[str, int], bits: Mapping[str, int]) -> dict[str, Stored]:
    """The weights on symmetric grids with a step for each output channel."""
    return {name: _grid(weights[name], axes[name], bits[name]) for name in weights}


def _grid(weight: Array, axis: int, bits: int) -> Grid:
    first = torch.from_numpy(np.array(np.moveaxis(weight, axis, 0), order="C"))
    code = Uniform(bits)
    theta = code.encode(first)
    grid = cast(Grid, code.pack(*(Plain(part.numpy()) for part in theta)))
    codes = np.ascontiguousarray(np.moveaxis(grid.codes, 0, axis))
    return Grid(codes, bits, np.ascontiguousarray(np.moveaxis(grid.scale, 0, axis)))


def sensitivity(
    search: "Search",
    model: OnnxModel,
    weights: Mapping[str, Array],
    axes: Mapping[str, int],
    inputs: object,
    seconds: float,
) -> Table:
    """The mean divergence from the file's own outputs when one tensor alone has fewer bits, largest tensors first."""
    structure, table, began = model.structure, Table(), search.clock.now
    key = f"sensitivity-{search.shop.start}"
    kept = search.store.record(key)
    if kept:
        stored: Table = kept["table"]
        return stored
    before = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    for name in sorted(weights, key=lambda name: -weights[name].size):
        for bits in LEVELS:
            if search.clock.now - began > seconds:
                break
            held: dict[str, Stored] = {name: Plain(_grid(weights[name], axes[name], bits).decode())}
            outputs = torch.from_numpy(np.array(Session(structure.fill(held)).outputs(inputs)))
            change = float(search.task.divergence(outputs, before).mean().clamp_min(0))
            table.setdefault(name, {})[f"{bits} bits"] = change
    search.store.put(key, {"kind": "sensitivity", "table": table})
    return table


def tensors(point: Point) -> dict[str, torch.Tensor]:
    """A point's numbers as model.safetensors keeps them: every initialiser of its file, decoded."""
    proto = point.structure.fill(point.stored)
    arrays = {tensor.name: np.array(numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer}
    if not arrays:
        raise ExportError(f"shrink: {point.name} must hold a tensor, got none.")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
