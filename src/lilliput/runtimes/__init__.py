"""Runtimes by name: each opens an ONNX model as a session that `latency` can time beside the others."""

from collections.abc import Mapping, Sequence
from typing import Any

from lilliput.registry import lookup


def open_session(runtime: str, model: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> Any:
    """Open a session of a runtime by its name.

    Args:
        runtime: A name of the family "runtime": a function or class (model, shapes) -> session, which has `runtime`,
            `threads`, `input_names`, `feed(inputs)` and `run(feed)`.
        model: A file, its bytes or a ModelProto.
        shapes: The sizes of inputs with free ones.

    Returns:
        The session.

    Raises:
        KeyError: For an unknown runtime.
    """
    return lookup("runtime", runtime, "bench")(model, shapes)
