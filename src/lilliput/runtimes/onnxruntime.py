"""ONNX Runtime as a runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.onnx.session import Session
from lilliput.registry import register


@register("runtime")
def onnxruntime(model: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> Session:
    """Open a network in ONNX Runtime on the CPU, one thread.

    Args:
        model: A file, its bytes or a ModelProto.
        shapes: Not used: the runtime takes inputs of any size.

    Returns:
        The session.

    Example:
        >>> import torch; from lilliput.export.onnx import trace
        >>> x = torch.rand(1, 4)
        >>> session = onnxruntime(trace(torch.nn.Linear(4, 2), x).proto)
        >>> session.run(session.feed(x))[0].shape
        (1, 2)
    """
    return Session(model)
