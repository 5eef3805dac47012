"""OpenVINO as a runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx import ModelProto

from lilliput.extras import extra
from lilliput.onnx.session import Inputs, arrays
from lilliput.registry import register


@register("runtime", name="openvino")
class OpenVinoSession:
    """Run a network in OpenVINO on the CPU, one thread, latency mode, float32.

    Args:
        model: A file, its bytes or a ModelProto.
        shapes: The sizes of inputs with free ones.

    Raises:
        ModuleNotFoundError: Where OpenVINO is not installed.

    Example:
        >>> OpenVinoSession("model.onnx")  # doctest: +SKIP
    """

    threads = 1

    def __init__(
        self, model: str | Path | bytes | ModelProto, shapes: Mapping[str, Sequence[int]] | None = None
    ) -> None:
        with extra("openvino", "bench: the runtime openvino"):
            import openvino
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
        outputs = self._request.infer(feed, share_inputs=True, share_outputs=True)
        return [outputs[i] for i in range(len(outputs))]
