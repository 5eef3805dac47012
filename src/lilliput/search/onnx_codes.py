"""Codes for the tensors of an ONNX file: exact costs in the asked file, harm predicted from one measured run each."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor

from lilliput.onnx.narrow import tiny
from lilliput.quant.allocate import allocate
from lilliput.quant.gptq import gptq
from lilliput.quant.grids import uniform
from lilliput.quant.ranges import fit
from lilliput.quant.roundings import nearest
from lilliput.stored.base import Stored
from lilliput.stored.bits import Array
from lilliput.stored.grid import Grid
from lilliput.stored.operators import Operators
from lilliput.stored.plain import Plain

BITS = (12, 10, 9, 8, 7, 6, 5, 4, 3, 2)
REPAIRED = 8  # bits up to which errors are made up for; beyond, there are next to none
MANY = 4096  # rows, whose steps would weigh as much as their integers
FITTED = 1024  # values of a row from which its step is fitted
MEASURED = 4  # bits: enough of an error to be seen in the outputs of few examples, little enough to be its square


@dataclass(frozen=True)
class Option:
    """One way to store a tensor.

    Args:
        stored: the tensor, stored so.
        cost: its bits in the asked file.
        error: the power of its error, as its operator's outputs see it.
    """

    stored: Stored
    cost: int
    error: float


Options = dict[str, dict[str, Option]]


def options(
    weights: Mapping[str, Array],
    axes: Mapping[str, int],
    moments: Mapping[str, Tensor],
    cost: Callable[[Stored], int],
    until: Callable[[], bool] = lambda: False,
) -> Options:
    """Every way to store each tensor: float16, and grids of fewer bits with a step for each output channel.

    Args:
        weights: float32, by name.
        axes: which axis of each holds the output channels.
        moments: of what each multiplies (`lilliput.quant.moments`); where it is known, rounding one value makes up for
            the error of those before it.
        cost: the bits of a stored tensor.
        until: says that there is no time left to make up for errors: what is left is rounded to nearest.
    """
    found: Options = {}
    for name in sorted(weights, key=lambda name: -weights[name].size):
        weight, axis = weights[name], axes[name]
        moment = None if until() else _moment(moments.get(name), weight, axis)
        ways = {"float16": Plain(weight.astype(np.float16))} if np.abs(weight).max() < 65504 else {}
        stored: dict[str, Stored] = {**ways}
        for bits in BITS:
            stored[f"{bits} bits"] = grid(weight, axis, bits, moment if bits <= REPAIRED else None)
        found[name] = {
            label: Option(value, cost(value), _error(value.decode() - weight, axis, moment))
            for label, value in stored.items()
        }
    return found


def harms(known: Options, measured: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """The predicted harm of every option: what was measured at four bits, times the ratio of the errors' powers.

    Args:
        known: the options.
        measured: tensor -> mean divergence with that tensor alone in four bits. Where a tensor was not measured, its
            error counts as those of the others do on average.
    """
    at = {name: max(rows[f"{MEASURED} bits"].error, 1e-30) for name, rows in known.items()}
    rates = [measured[name] / at[name] for name in known if name in measured]
    usual = float(np.median(rates)) if rates else 1.0
    rate = {name: measured[name] / at[name] if name in measured else usual for name in known}
    return {name: {label: rate[name] * o.error for label, o in rows.items()} for name, rows in known.items()}


def allocated(known: Options, harm: Mapping[str, Mapping[str, float]], bits: int) -> dict[str, str]:
    """The option of each tensor with the least harm in all within a number of bits."""
    rows: dict[str, dict[Hashable, tuple[int, float]]] = {
        name: {label: (option.cost, harm[name][label]) for label, option in ways.items()}
        for name, ways in known.items()
    }
    return {name: str(label) for name, label in allocate(rows, bits).items()}


def limits(known: Options) -> tuple[int, int]:
    """The fewest and the most bits of all tensors together."""
    costs = [[option.cost for option in rows.values()] for rows in known.values()]
    return sum(map(min, costs)), sum(map(max, costs))


def cost_in(file: str, proto: ModelProto) -> Callable[[Stored], int]:
    """What a stored tensor costs in a file, in bits: "lil", or "onnx", where 3 bits cost 4 and 5 cost 8."""
    if file == "lil":
        return lambda stored: stored.storage().bits
    small = tiny(proto)

    def bits(stored: Stored) -> int:
        writer = Operators(small)
        stored.onnx(writer, "w")
        return 8 * writer.size_bytes("w")

    return bits


def channels(proto: ModelProto) -> dict[str, int]:
    """Every float32 weight of two and more axes with the axis of its output channels.

    Example:
        >>> from onnx import helper, numpy_helper
        >>> w = numpy_helper.from_array(np.zeros((4, 3), np.float32), "w")
        >>> graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [], [], [w])
        >>> channels(helper.make_model(graph))
        {'w': 1}
    """
    ranks = {
        t.name: len(t.dims) for t in proto.graph.initializer if len(t.dims) > 1 and t.data_type == TensorProto.FLOAT
    }
    axes = dict.fromkeys(ranks, 0)
    for node in proto.graph.node:
        flipped = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        if node.op_type in ("MatMul", "Gemm", "ConvTranspose") and not flipped and node.input[1] in axes:
            axes[node.input[1]] = 1 if node.op_type != "MatMul" else ranks[node.input[1]] - 1
    return axes


def grid(weight: Array, axis: int, bits: int, moment: Tensor | None = None) -> Grid:
    """A weight on a symmetric grid with a step for each index along an axis, one step for all where they are many."""
    first = torch.from_numpy(np.array(np.moveaxis(weight, axis, 0), order="C"))
    rows = first.reshape(1 if len(first) > MANY else len(first), -1)
    levels = uniform(bits, symmetric=True)
    scale, zero = fit(rows[:, :: max(1, rows.shape[1] // FITTED)], levels, "mse" if bits < 8 else "minmax")
    if moment is None or len(rows) < len(first):
        rounded = nearest(rows, scale, zero, levels)
    else:
        rounded = gptq(rows, scale, zero, levels, hessian=moment)
    codes = rounded.reshape(first.shape).numpy().astype(np.int16)
    steps = scale.reshape(-1, *(1,) * (first.dim() - 1)).numpy()
    return Grid(np.ascontiguousarray(np.moveaxis(codes, 0, axis)), bits, np.moveaxis(steps, 0, axis).copy())


def _moment(moment: Tensor | None, weight: Array, axis: int) -> Tensor | None:
    """The moment of a weight's inputs, if it fits the weight."""
    size = weight.size // weight.shape[axis]
    return moment if moment is not None and moment.shape[1] == size and weight.shape[axis] % len(moment) == 0 else None


def _error(change: Array, axis: int, moment: Tensor | None) -> float:
    """The power of an error of weights: of the values themselves, or of what they make of their inputs."""
    rows = torch.from_numpy(np.array(np.moveaxis(change, axis, 0), order="C", dtype=np.float32)).flatten(1)
    if moment is None:
        return float(rows.square().sum())
    grouped = rows.reshape(len(moment), -1, rows.shape[1])
    return float(((grouped @ moment) * grouped).sum())
