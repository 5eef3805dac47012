"""OnnxFile: a network that is only an ONNX file as the target: its stored weights in fewer bits."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from onnx import numpy_helper
from torch import nn

from lilliput.errors import ExportError
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.quant.moments import moments
from lilliput.recipe import Recipe
from lilliput.search import arithmetic, onnx_codes
from lilliput.search.job import Job, Pieces, Target
from lilliput.search.onnx_codes import MEASURED, Options, channels
from lilliput.search.onnx_target import OnnxModel
from lilliput.search.points import Point
from lilliput.search.pool import Pool
from lilliput.stage import calibration
from lilliput.stored.base import Stored
from lilliput.stored.bits import Array
from lilliput.stored.plain import Plain
from lilliput.task import Task, call, length, take

NEAR = 1.04  # two totals of bits between which nothing is worth a trial
MOST = 16  # totals that are tried
UNLIMITED_S = 60.0  # of looking, where no budget says how long
LOOKING = 0.35  # of the budget, for errors made up for and harms measured
TRYING = 0.85  # of the budget, until which totals are tried


class OnnxFile(Target):
    """An ONNX file. Its stored weights get fewer bits and its products narrower arithmetic; nothing is trained.

    Args:
        model: the file as a module.
    """

    def __init__(self, model: OnnxModel) -> None:
        self.model = model

    def begin(self, job: Job, pool: Pool) -> None:
        return None

    def dense(self, job: Job) -> Point:
        structure = self.model.structure
        stored: dict[str, Stored] = {name: Plain(array) for name, array in structure.weights.items()}
        proto = structure.write(stored)
        return job.press.finished(proto, structure, stored, self.model, "dense", [], job.runner.start, None)

    def look(self, job: Job) -> None:
        job.known.skip("training", "an ONNX file has no parameters that could be trained or removed")

    def first(self, job: Job) -> list[Point]:
        weights, axes = self._weights()
        if not weights:
            job.known.skip("weights", "the file holds no float32 tensor of two and more axes")
            return self._half(job)
        return self._eight(job, weights, axes)

    def untrained(self, job: Job, alone: bool) -> Pieces:
        weights, axes = self._weights()
        if weights:
            yield from self._half(job)
        yield from arithmetic.points(job)
        if weights:
            yield from self._mixed(job, weights, axes)

    def _weights(self) -> tuple[dict[str, Array], dict[str, int]]:
        """The tensors that may have fewer bits, and the axis of each one's output channels."""
        axes = channels(self.model.structure.proto)
        return {name: array for name, array in self.model.structure.weights.items() if name in axes}, axes

    def trained(self, job: Job, pool: Pool, beside: Iterator[float]) -> None:
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
                "bits": "float16, 8, then mixed from 12 to 2 by what each tensor harms, for "
                f"{', '.join(weights) or 'no tensor'}",
                "8-bit arithmetic": "where time is asked for and measuring says that it pays",
            },
            "left_alone": [{"name": "training", "reason": "an ONNX file has no parameters to train"}],
        }

    def _half(self, job: Job) -> list[Point]:
        """All weights as float16: half the bytes, and next to nothing lost."""
        return self._point(job, "float16", {name: halved(a) for name, a in self.model.structure.weights.items()})

    def _eight(self, job: Job, weights: Mapping[str, Array], axes: Mapping[str, int]) -> list[Point]:
        return self._point(job, "8 bits", {name: onnx_codes.grid(weights[name], axes[name], 8) for name in weights})

    def _mixed(self, job: Job, weights: Mapping[str, Array], axes: Mapping[str, int]) -> Iterator[Point]:
        """Totals of bits between the fewest and the most, halved towards the fewest that can be promised.

        Each tensor gets the code that the allocation gives it. Where even the most bits cannot be promised, the trials
        end there.
        """
        end = job.clock.now + (UNLIMITED_S if job.clock.budget_s is None else LOOKING * job.clock.budget_s)
        with job.clock.on("calibrate"):
            known, harm = self._known(job, weights, axes, end)
        job.known.harm = {name: {k: v for k, v in row.items() if k.endswith("bits")} for name, row in harm.items()}
        floor = job.question.points(job.dense.score.value)
        low, high = onnx_codes.limits(known)
        for _ in range(MOST):
            if high <= low * NEAR or job.clock.remaining(TRYING) < 0:
                break
            middle = round(math.sqrt(low * high))
            labels = onnx_codes.allocated(known, harm, middle)
            mean = middle / sum(array.size for array in weights.values())
            name = f"{mean:.2f} bits on average"
            made = self._point(job, name, {key: known[key][label].stored for key, label in labels.items()})
            yield from made
            if made and job.bound(made[0]) <= floor:
                high = middle
            else:
                low = middle

    def _known(
        self, job: Job, weights: Mapping[str, Array], axes: Mapping[str, int], end: float
    ) -> tuple[Options, dict[str, dict[str, float]]]:
        """Every tensor's options, and what each is predicted to harm."""
        structure = self.model.structure
        inputs = calibration(job.task, 64)
        session = Session(structure.proto)
        known_moments: dict[str, torch.Tensor] = {}
        try:
            runs: list[Any] = [session.feed(take(inputs, slice(i, i + 8))) for i in range(0, length(inputs), 8)]
            known_moments = moments(structure.proto, runs)
        except arithmetic.REFUSALS as error:
            job.known.skip("second moments", str(error))
        half = (job.clock.now + end) / 2
        cost = onnx_codes.cost_in(job.question.file, structure.proto)
        known = onnx_codes.options(weights, axes, known_moments, cost, lambda: job.clock.now > half)
        measured = job.remember(
            f"sensitivity-{job.runner.start}",
            "sensitivity",
            lambda: {"table": self._sensitivity(job, known, inputs, end)},
        )["table"]
        return known, onnx_codes.harms(known, measured)

    def _sensitivity(self, job: Job, known: Options, inputs: Any, end: float) -> dict[str, float]:
        """The mean divergence from the file's own outputs when one tensor alone has few bits, largest first."""
        table: dict[str, float] = {}
        before = call(self.model, inputs)
        for name, rows in known.items():
            if table and job.clock.now > end:
                break
            held: dict[str, Stored] = {name: Plain(rows[f"{MEASURED} bits"].stored.decode())}
            outputs = torch.from_numpy(np.array(Session(self.model.structure.fill(held)).outputs(inputs)))
            table[name] = float(job.task.divergence(outputs, before).mean().clamp_min(0))
        return table

    def _point(self, job: Job, name: str, stored: dict[str, Stored]) -> list[Point]:
        structure, title = self.model.structure, f"same structure, {name} without training"
        whole: dict[str, Stored] = {
            key: halved(array) if array.ndim < 2 else Plain(array) for key, array in structure.weights.items()
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


def halved(array: Array) -> Plain:
    """Numbers in 16 bits where they are float32 and float16 holds the largest of them."""
    fits = array.dtype == np.float32 and array.size and np.abs(array).max() < 65504
    return Plain(array.astype(np.float16) if fits else array)
