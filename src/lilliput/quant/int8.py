"""Int8 arithmetic of a product: levels that cannot saturate, equalisation, steps of rows, and the noise of each."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lilliput.quant.grids import Levels
from lilliput.quant.products import Floats, Group, Observed
from lilliput.quant.ranges import Range, minmax, pairs
from lilliput.quant.roundings import nearest

Arithmetic = Literal["tensor", "row", "narrow", "float"]
"""tensor: int8, one step for the whole input. row: int8, a step for each row. narrow: float32 arithmetic, the weights
stored in 8 bits and widened once when the runtime loads the file. float: left alone."""
ARITHMETICS: tuple[Arithmetic, ...] = ("tensor", "row", "narrow", "float")
INT8 = Levels(-127, 127, symmetric=True, step=torch.float32)


def pair_levels(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """8-bit levels C and steps t with weight ~ C * t that no u8 x s8 product saturates, however it is computed.

    The largest sum of two neighbouring weights of one sign fits 128 = floor(32767 / 255): t_j is the smallest step with
    max(C_2k,j, 0) + max(C_2k+1,j, 0) <= 128 for all k, likewise for negative levels, and |C| <= 127.

    Args:
        weight: (in, out).

    Returns:
        levels int8 (in, out) and steps float32 (out,).

    Example:
        >>> levels, step = pair_levels(np.array([[1.0, 1.0], [-0.5, 1.0]], np.float32))
        >>> levels.tolist()
        [[127, 64], [-64, 64]]
    """
    return _levels(weight, pairs)


def channel_levels(weight: Floats, axis: int = 0) -> tuple[NDArray[np.int8], Floats]:
    """8-bit levels with steps max|weight| / 127 over `axis`: the storage of a table or of a product in float32."""
    if axis == 0:
        return _levels(weight, minmax)
    levels, step = _levels(weight.T, minmax)
    return levels.T, step


def _levels(weight: Floats, rule: Range) -> tuple[NDArray[np.int8], Floats]:
    """The levels (in, out) of weights (in, out) and the steps (out,) of their columns."""
    rows = torch.from_numpy(np.array(weight)).T
    scale, zero = rule(rows, INT8)
    scale = torch.where(rows.any(1, True), scale, 1.0)  # nothing is multiplied by a step that no value has made
    levels: NDArray[np.int8] = nearest(rows, scale, zero, INT8).to(torch.int8).T.numpy()
    return levels, scale[:, 0].numpy()


def equaliser(group: Group, seen: Observed) -> Floats:
    """The e (in,) that predicts the least noise in int8 arithmetic with one step: SmoothQuant's, equation 4, for the
    best strength a of 0, 1/4, 1/2, 3/4 and 1. All ones where the group has no normalisation of its own."""
    ones: Floats = np.ones(len(group.weights[0]), np.float32)
    if not group.norm:
        return ones
    x = np.maximum(np.abs(seen.sample).max(0), 1e-6)
    w = np.maximum(np.abs(np.concatenate(group.weights, axis=1)).max(1), 1e-6)
    tried = [ones]
    for a in (0.25, 0.5, 0.75, 1.0):
        e = np.asarray(x**a / w ** (1 - a), np.float32)
        tried.append(e / np.exp(np.log(e).mean()))
    return min(tried, key=lambda e: predicted(group, seen, e)["tensor"])


def predicted(group: Group, seen: Observed, e: Floats) -> dict[Arithmetic, float]:
    """Noise power that each arithmetic adds to the group's outputs, summed over them, for one row.

    A step s adds s^2 / 12 to every value that is rounded: s_x^2 / 12 * sum W^2 from the input, and
    t_j^2 / 12 * mean |x|^2 from the weights of output j.
    """
    x, weight = seen.sample / e, np.concatenate(group.weights, axis=1) * e[:, None]
    power, gain = float(np.square(x).sum(1).mean()) / 12, float(np.square(weight).sum()) / 12
    stored = power * float(pairs(torch.from_numpy(weight).T, INT8)[0].square().sum())
    c = row_balance(x)
    row = np.maximum(x.max(1), -c * x.min(1)) * (1 + 1 / c) / 255
    return {
        "tensor": stored + gain * float(np.square(seen.range(e) / 255).mean()),
        "row": stored + gain * float(np.square(row).mean()),
        "narrow": power * float(np.square(np.abs(weight).max(0) / 127).sum()),
        "float": 0.0,
    }


def row_balance(x: Floats) -> float:
    """The c for which ranges max(max x, -c min x) of rows, quantized together, have the smallest mean squared step.

    Rows divided by that range lie in [-1 / c, 1], so a c above one spends fewer levels on negative numbers: about 15
    for the outputs of a GELU, 1 for values that are as often negative.
    """
    high, low = x.max(1), -x.min(1)
    tried = [float(c) for c in np.geomspace(1 / 32, 32, 21)]
    return min(tried, key=lambda c: float(np.square(np.maximum(high, c * low)).mean()) * (1 + 1 / c) ** 2)
