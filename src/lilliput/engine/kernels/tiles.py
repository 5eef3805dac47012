"""Register tiles of dense products: how many outputs x positions a machine holds, and what their work costs."""

from __future__ import annotations

import math

from lilliput.engine.kernels.product import Tail, pick, vector_types
from lilliput.engine.kernels.widen import Widen
from lilliput.engine.target import Target

FEW = 8  # positions: below, widening narrow weights takes as long as the product


def registers(target: Target) -> int:
    """How many vectors the machine holds."""
    many = target.vector_bytes == 64 or "AVX512VL" in target.features or bool({"aarch64", "arm64"} & target.features)
    return 32 if many else 16


def tiles(target: Target, lanes: int, outs: int, most: int, flip: bool = False) -> list[tuple[int, int]]:
    """(outputs broadcast, vectors) of blocks that fill the registers, at most `most` vectors wide."""
    full = [(12, 2), (6, 4), (24, 1)] if registers(target) == 32 else [(6, 2), (4, 3), (12, 1)]
    if lanes == 1:
        full = [(4, 2), (2, 4)]
    sizes: dict[tuple[int, int], None] = {}
    for high, wide in full:
        if wide > most:
            continue
        if outs:
            high = min(high, outs)
            even = [d for d in range(high, high * 2 // 3, -1) if outs % d == 0]
            high = even[0] if even else high
        sizes[(wide, high) if flip else (high, wide)] = None
    return list(sizes) or [(1, min(outs, 8) or 8) if flip else (min(outs, 8) or 8, 1)]


def macs_ns(target: Target, macs: float) -> float:
    """Nanoseconds that multiply-adds take at the peak of a machine at 3 GHz."""
    return macs / (6.0 * min(target.lanes, 8))


def bits_of(narrow: Widen | None) -> str:
    """What a kernel's name says of its weights."""
    return "" if narrow is None else f", {narrow.bits}-bit weights"


def tail_helpers(tail: Tail, lanes: int) -> tuple[str, ...]:
    """C text that vectors and what follows the sum need."""
    helpers = [vector_types(lanes)] if lanes > 1 else []
    if lanes > 1 and tail.clamp is not None and not (tail.clamp[0] == 0 and math.isinf(tail.clamp[1])):
        helpers.append(pick(lanes))
    return (*helpers, *tail.helpers)
