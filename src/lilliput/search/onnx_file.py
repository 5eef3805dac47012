"""OnnxFile: a network that is only an ONNX file as the target: its stored weights in fewer bits."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from torch import nn

from lilliput.errors import ExportError
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.quant.allocate import allocate_bits
from lilliput.quant.uniform import Uniform
from lilliput.recipe import Recipe
from lilliput.search import arithmetic
from lilliput.search.job import Job, Target
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.points import Point
from lilliput.search.sensitivity import Table, by_bits
from lilliput.stage import calibration
from lilliput.stored.base import Stored
from lilliput.stored.bits import Array
from lilliput.stored.grid import Grid
from lilliput.stored.plain import Plain
from lilliput.task import Task, call

LEVELS = (8, 4, 3, 2)
MEANS = (6, 5, 4, 3)


class OnnxFile(Target):
    """An ONNX file. Its stored weights get fewer bits and its products narrower arithmetic; nothing is trained.

    Args:
        model: the file as a module.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.model = model

    def dense(self, job: Job) -> Point:
        structure = self.model.structure
        stored: dict[str, Stored] = {name: Plain(array) for name, array in structure.weights.items()}
        proto = structure.write(stored)
        return job.press.finished(proto, structure, stored, self.model, "dense", [], job.runner.start, None)

    def look(self, job: Job) -> None:
        job.known.skip("training", "an ONNX file has no parameters that could be trained or removed")

    def untrained(self, job: Job) -> list[Point]:
        axes = channels(self.model.structure.proto)
        weights = {name: array for name, array in self.model.structure.weights.items() if name in axes}
        points: list[Point] = []
        if weights:
            points += self._point(job, "8 bits", quantized(weights, axes, dict.fromkeys(weights, 8)))
            points += self._by_sensitivity(job, weights, axes)
        else:
            job.known.skip("weights", "the file holds no float32 tensor of two and more axes")
        return [*points, *arithmetic.points(job)]

    def trained(self, job: Job, pool: ThreadPoolExecutor) -> None:
        return None

    def tensors(self, job: Job, point: Point) -> dict[str, torch.Tensor]:
        proto = point.structure.fill(point.stored)
        arrays = {tensor.name: np.array(numpy_helper.to_array(tensor)) for tensor in proto.graph.initializer}
        if not arrays:
            raise ExportError(f"shrink: {point.name} must hold a tensor, got none.")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def recipe(self, job: Job, point: Point) -> str:
        return Recipe().toml() if point is job.dense else arithmetic.NO_RECIPE

    def plan(self, model: nn.Module, task: Task) -> dict[str, Any]:
        weights = channels(self.model.structure.proto)
        return {
            "values": sum(array.size for array in self.model.structure.weights.values()),
            "tried": {
                "bits": f"8, then {', '.join(map(str, MEANS))} on average by sensitivity, for "
                f"{', '.join(weights) or 'no tensor'}",
                "8-bit arithmetic": "where the matrix products are large enough to gain from it",
            },
            "left_alone": [{"name": "training", "reason": "an ONNX file has no parameters to train"}],
        }

    def _by_sensitivity(self, job: Job, weights: Mapping[str, Array], axes: Mapping[str, int]) -> list[Point]:
        """Fewer bits on average, each tensor's by what it harms."""
        limit = 20.0 if job.clock.budget_s is None else 0.3 * job.clock.budget_s
        with job.clock.on("calibrate"):
            job.known.harm = job.remember(
                f"sensitivity-{job.runner.start}",
                "sensitivity",
                lambda: {"table": self._sensitivity(job, weights, axes, limit)},
            )["table"]
        sizes = {name: weights[name].size for name in job.known.harm}
        losses, points = by_bits(job.known.harm), list[Point]()
        for mean in MEANS:
            if not sizes or job.clock.remaining(0.9) < 1:
                break
            bits = dict.fromkeys(weights, mean) | allocate_bits(losses, sizes, mean * sum(sizes.values()))
            points += self._point(job, f"{mean} bits on average", quantized(weights, axes, bits))
        return points

    def _point(self, job: Job, name: str, stored: dict[str, Stored]) -> list[Point]:
        structure, title = self.model.structure, f"same structure, {name} without training"
        whole: dict[str, Stored] = {
            key: Plain(array.astype(np.float16) if array.dtype == np.float32 and array.ndim < 2 else array)
            for key, array in structure.weights.items()
        } | stored
        recipe = [{"stage": "quantize the file's tensors", "bits": name}]
        key = f"{job.runner.start}-{name.replace(' ', '-')}"
        try:
            with job.clock.on("calibrate"):
                decoded = OnnxModel(Structure(structure.fill(whole), example=structure.example))
                proto = structure.write(whole)
                return [job.press.finished(proto, structure, whole, decoded, title, recipe, key, None)]
        except arithmetic.REFUSALS as error:
            job.failed(title, error)
            return []

    def _sensitivity(self, job: Job, weights: Mapping[str, Array], axes: Mapping[str, int], seconds: float) -> Table:
        """The mean divergence from the file's own outputs when one tensor alone has fewer bits, largest first."""
        structure, table, began = self.model.structure, Table(), job.clock.now
        inputs = calibration(job.task, 64)
        before = call(self.model, inputs)
        for name in sorted(weights, key=lambda name: -weights[name].size):
            for bits in LEVELS:
                if job.clock.now - began > seconds:
                    break
                held: dict[str, Stored] = {name: Plain(_grid(weights[name], axes[name], bits).decode())}
                outputs = torch.from_numpy(np.array(Session(structure.fill(held)).outputs(inputs)))
                change = float(job.task.divergence(outputs, before).mean().clamp_min(0))
                table.setdefault(name, {})[f"{bits} bits"] = change
        return table


def channels(proto: ModelProto) -> dict[str, int]:
    """Every float32 weight of two and more axes with the axis of its output channels.

    Example:
        >>> from onnx import helper
        >>> w = numpy_helper.from_array(np.zeros((4, 3), np.float32), "w")
        >>> graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [w])
        >>> channels(helper.make_model(graph))
        {'w': 1}
    """
    axes = {t.name: 0 for t in proto.graph.initializer if len(t.dims) > 1 and t.data_type == TensorProto.FLOAT}
    for node in proto.graph.node:
        flipped = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type in ("MatMul", "Gemm", "ConvTranspose") and not flipped and node.input[1] in axes:
            axes[node.input[1]] = 1 if node.op_type != "MatMul" else len(_dims(proto, node.input[1])) - 1
    return axes


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
