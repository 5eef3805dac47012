"""Runtimes by name: each opens an ONNX model as a session that `latency` can time beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from lilliput.onnx.session import Inputs, Session, arrays
from lilliput.registry import lookup, register

Shapes = Mapping[str, Sequence[int]]


@register("runtime", name="engine")
class EngineSession:
    """Compile a network from ONNX by lilliput's engine for this machine, and run it.

    Args:
        model: A file, its bytes or a ModelProto.
        shapes: The largest sizes of inputs with free ones.
        tune: Whether kernels are chosen by measuring them.
        out: Where the C program is kept; a temporary folder otherwise.

    Raises:
        NotSupported: For operators that the engine does not know.
        OSError: Without a C compiler.

    Example:
        >>> import torch; from lilliput.export.onnx import trace
        >>> x = torch.rand(1, 4)
        >>> session = EngineSession(trace(torch.nn.Linear(4, 2), x).proto, tune=False)
        >>> session.run(session.feed(x))[0].shape
        (1, 2)
    """

    runtime, threads = "lilliput engine", 1

    def __init__(
        self,
        model: str | Path | bytes | ModelProto,
        shapes: Shapes | None = None,
        *,
        tune: bool = True,
        out: str | Path | None = None,
    ) -> None:
        from lilliput.engine.compile import compile

        self.engine = compile(model, out, tune=tune, shapes=shapes)
        self.input_names = [value["name"] for value in self.engine.inputs]

    def feed(self, inputs: Inputs) -> dict[str, Any]:
        """Return the inputs by name, in the types that the network takes."""
        named = arrays(inputs, self.input_names)
        return {
            value["name"]: np.ascontiguousarray(named[value["name"]].astype(value["dtype"], copy=False))
            for value in self.engine.inputs
        }

    def run(self, feed: dict[str, Any]) -> list[Any]:
        """Compute every output for inputs that `feed` prepared: nothing else happens here, so this is what is timed."""
        found = self.engine(*feed.values())
        return list(found) if isinstance(found, tuple) else [found]

    def outputs(self, inputs: Inputs) -> Any:
        """Compute the first output for any number of examples, as many at a time as were compiled for."""
        feed = self.feed(inputs)
        batch = self._batch()
        count = len(next(iter(feed.values())))
        parts = [self.run({name: x[i : i + batch] for name, x in feed.items()})[0] for i in range(0, count, batch)]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _batch(self) -> int:
        first = self.engine.inputs[0]["shape"][0]
        return int(first) if isinstance(first, int) else int(self.engine.manifest["sizes"][first])


@register("runtime", name="openvino")
class OpenVinoSession:
    """Run a network in OpenVINO on the CPU, one thread, latency mode, float32.

    Args:
        model: A file, its bytes or a ModelProto.
        shapes: The sizes of inputs with free ones.

    Raises:
        ImportError: Where OpenVINO is not installed.

    Example:
        >>> OpenVinoSession("model.onnx")  # doctest: +SKIP
    """

    threads = 1

    def __init__(self, model: str | Path | bytes | ModelProto, shapes: Shapes | None = None) -> None:
        try:
            import openvino
        except ImportError as error:
            raise ImportError("bench: the runtime openvino must be installed. Run: pip install openvino") from error
        core = openvino.Core()
        read = core.read_model(
            str(model)
            if isinstance(model, str | Path)
            else model.SerializeToString()
            if isinstance(model, ModelProto)
            else model
        )
        if shapes:
            read.reshape({name: list(shape) for name, shape in shapes.items()})
        self.runtime = f"openvino {openvino.__version__.split('-')[0]} CPU"
        self._compiled = core.compile_model(
            read, "CPU", {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        )
        self._request = self._compiled.create_infer_request()
        self.input_names = [value.get_any_name() for value in self._compiled.inputs]
        self._kinds = {value.get_any_name(): value.get_element_type().to_dtype() for value in self._compiled.inputs}

    def feed(self, inputs: Inputs) -> dict[str, Any]:
        """Return the inputs by name, in the types that the network takes."""
        return {name: x.astype(self._kinds[name], copy=False) for name, x in arrays(inputs, self.input_names).items()}

    def run(self, feed: dict[str, Any]) -> list[Any]:
        """Compute every output for inputs that `feed` prepared."""
        found = self._request.infer(feed, share_inputs=True, share_outputs=True)
        return [found[i] for i in range(len(found))]


@register("runtime")
def onnxruntime(model: Any, shapes: Shapes | None = None) -> Session:
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


def open_session(runtime: str, model: Any, shapes: Shapes | None = None) -> Any:
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
