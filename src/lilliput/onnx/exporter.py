"""torch's exporter, made ready: imported while something else computes, its table of operators read once a process.

torch reads the sources of some 500 functions for each export anew, which is half of a small network's export.
"""

import contextlib
import copy
import importlib
import threading
from collections.abc import Iterator
from typing import Any

_LOCK = threading.Lock()
_TABLES: dict[Any, Any] = {}


def ready() -> None:
    """Import the exporter. For a thread that runs while something else computes."""
    with contextlib.suppress(Exception), _LOCK:  # whatever is wrong with it is said when it is used
        for name in ("onnxscript", "torch._dynamo", "torch.onnx._internal.exporter._core"):
            importlib.import_module(name)


def begin() -> threading.Thread:
    """Start `ready` in a thread."""
    thread = threading.Thread(target=ready, name="exporter", daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Exports inside share one table of operators, where this version of torch has it in the place that is known."""
    with _LOCK:  # not while another thread imports the exporter
        try:
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            given = vars(ONNXRegistry)["from_torchlib"]
        except (ImportError, KeyError):
            given = None
    if given is None:
        yield
        return

    def table(*arguments: Any, **named: Any) -> Any:
        key = arguments, tuple(sorted(named.items()))
        if key not in _TABLES:
            _TABLES[key] = given.__get__(None, ONNXRegistry)(*arguments, **named)
        own = copy.copy(_TABLES[key])  # an export may register functions of its own
        own.functions = {target: list(found) for target, found in own.functions.items()}
        return own

    ONNXRegistry.from_torchlib = staticmethod(table)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = given  # type: ignore[method-assign]
