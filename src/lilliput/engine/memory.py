"""memory: the bytes that a compiled network needs, from its plan, without a compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.engine import tune
from lilliput.engine.fuse import fused
from lilliput.engine.kernels.stripes import striped
from lilliput.engine.lower import lowered, supported
from lilliput.engine.plan import planned
from lilliput.engine.read import read
from lilliput.engine.target import target
from lilliput.engine.write import written


def peak_bytes(model: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> int:
    """Plan a network for this machine: the bytes of its weights and of the arena that all its values live in.

    Kernels are chosen by the cost model; those that a compilation chooses by measuring may need a little more or less.

    Args:
        model: A path, its bytes or a ModelProto.
        shapes: The largest size of each input that has free ones.

    Returns:
        The bytes that one call needs; inputs and outputs are the caller's.

    Raises:
        ValueError: For a file that is damaged.
        NotSupported: Naming every node that cannot be compiled.

    Example:
        >>> import torch; from lilliput.onnx.trace import trace
        >>> peak_bytes(trace(torch.nn.Linear(64, 8), torch.rand(1, 64)).proto) >= 4 * 64 * 8
        True
    """
    plan = planned(striped(fused(lowered(read(model, shapes, None, supported)))), tune.estimated(target()))
    return plan.arena_bytes + written(plan).constant_bytes
