"""One way to multiply a matrix by a vector: what it stores, the C that it calls, its estimated time."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.graph import Array

L1_BYTES, L2_BYTES_A_NS, GHZ = 28 * 1024, 110.0, 3.5


@dataclass(frozen=True)
class MatVec:
    """One way to compute y = W x.

    Args:
        ins: Floats that x (zeros behind its own) and y must have room for.
        outs: As `ins`.
        constants: Arrays by key.
        call: A C statement with {y} and {x} for the pointers, {key} for a constant's.
        helpers: C text.
        ns: Estimated.
    """

    name: str
    ins: int
    outs: int
    constants: Mapping[str, Array] = field(repr=False)
    call: str = ""
    helpers: tuple[str, ...] = field(default=(), repr=False)
    ns: float = 0.0
    nonzeros: int = 0
    values: int = 0


def made(
    name: str,
    weight: Array,
    constants: Mapping[str, Array],
    text: str,
    helpers: tuple[str, ...],
    ns: float,
    ins: int,
    outs: int,
) -> MatVec:
    """A way whose function `text` (with FUNCTION for its name) takes y, x and the constants."""
    function = f"times_{weight.shape[0]}x{weight.shape[1]}_{hashlib.sha256(text.encode()).hexdigest()[:6]}"
    call = f"{function}({{y}}, {{x}}, {', '.join(f'{{{key}}}' for key in constants)});"
    return MatVec(
        name,
        ins,
        outs,
        constants,
        call,
        (*helpers, text.replace("FUNCTION", function)),
        ns,
        int(np.count_nonzero(weight)),
        weight.size,
    )


def up(size: int, multiple: int) -> int:
    """The next multiple."""
    return -(-size // multiple) * multiple


def padded(weight: Array, outs: int, ins: int = 0) -> Array:
    """The matrix with zeros behind its rows and columns."""
    return np.pad(weight, ((0, outs - weight.shape[0]), (0, max(ins - weight.shape[1], 0))))


def read_ns(size_bytes: int) -> float:
    """How long reading takes at least, from the first or the second cache."""
    return size_bytes / (2 * L2_BYTES_A_NS if size_bytes <= L1_BYTES else L2_BYTES_A_NS)
