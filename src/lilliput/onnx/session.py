"""Session: a network in ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from lilliput.errors import ExportError
from lilliput.stored.bits import Array
from lilliput.task.nested import children, leaves, structured

Inputs = Any
"""A tensor, a dict of tensors by input name, or a tuple of tensors in order; arrays too."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed, logged or warned by a library inside."""
    level = logging.root.manager.disable
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(level)


def arrays(inputs: Inputs, names: Iterable[str]) -> dict[str, Array]:
    """The inputs by name, as contiguous arrays.

    Raises:
        ValueError: if their number or names are others than the network's.
    """
    names = list(names)
    if isinstance(inputs, dict) and any(children(part) is not None for part in inputs.values()):
        inputs = tuple(leaves(inputs))  # structures inside: the exporter keeps their order
    if isinstance(inputs, dict):
        missing = [name for name in names if name not in inputs]
        if missing:
            raise ValueError(f"Session: inputs must have {', '.join(names)}, got {', '.join(map(str, inputs))}.")
        inputs = tuple(inputs[name] for name in names)
    inputs = [leaf for part in inputs for leaf in leaves(part) or [part]] if isinstance(inputs, tuple) else [inputs]
    if len(inputs) != len(names):
        raise ValueError(f"Session: the network takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}.")
    plain = (x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in inputs)
    return {name: np.asarray(x, order="C") for name, x in zip(names, plain, strict=True)}


class Session:
    """A network in ONNX Runtime on the CPU: what its score and its latency are measured on.

    Args:
        model: a file, its bytes, or a ModelProto.
        threads: within an operator; operators run one after the other.
        optimised: a file for the graph as the runtime transformed it.
        profile: how the names of the runtime's profile begin; `end_profiling` gives the file.

    Raises:
        ExportError: if the runtime refuses the model.

    Example:
        >>> from lilliput.onnx.trace import trace
        >>> session = Session(trace(torch.nn.Linear(4, 2), torch.zeros(1, 4)).proto)
        >>> session.outputs(torch.zeros(3, 4)).shape, session(torch.zeros(3, 4)).shape
        ((3, 2), torch.Size([3, 2]))
    """

    def __init__(
        self, model: str | Path | bytes | ModelProto, threads: int = 1, *, optimised: str = "", profile: str = ""
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4 if optimised else 3
        if optimised:
            options.optimized_model_filepath = optimised
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        if threads > 1:
            # Threads that spin between two calls would take the machine from whatever else is timed.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.threads, self.runtime = threads, f"onnxruntime {onnxruntime.__version__} CPU"
        source = model.SerializeToString() if isinstance(model, ModelProto) else model
        source = str(source) if isinstance(source, Path) else source
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"Session: ONNX Runtime must be able to load the model: {str(error)[:400]}") from error
        self.inputs = list(self._session.get_inputs())
        self.input_names = [value.name for value in self.inputs]
        self.input_types = [value.type for value in self.inputs]
        self.output_names = [value.name for value in self._session.get_outputs()]

    def feed(self, inputs: Inputs) -> dict[str, Array]:
        """The inputs by name, in the types that the network takes."""
        named = arrays(inputs, self.input_names)
        for name, kind in zip(self.input_names, self.input_types, strict=True):
            wanted = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}.get(kind)
            if wanted is not None and named[name].dtype != wanted:
                named[name] = named[name].astype(wanted)
        return named

    def all(self, inputs: Inputs) -> list[Array]:
        """Every output of one run."""
        return list(self._session.run(None, self.feed(inputs)))

    def run(self, feed: dict[str, Array]) -> list[Array]:
        """Every output for inputs that `feed` prepared: nothing else happens here, so this is what is timed."""
        return list(self._session.run(None, feed))

    def end_profiling(self) -> str:
        """Where the runtime wrote its profile."""
        return str(self._session.end_profiling())

    def outputs(self, inputs: Inputs, batch: int = 256) -> Array:
        """The first output for any number of examples, `batch` at a time."""
        return self.batched(inputs, batch)[0]

    def batched(self, inputs: Inputs, batch: int = 256) -> list[Array]:
        """Every output for any number of examples, `batch` at a time."""
        feed = self.feed(inputs)
        count = len(next(iter(feed.values())))
        try:
            parts = [
                self._session.run(None, {name: x[i : i + batch] for name, x in feed.items()})
                for i in range(0, max(count, 1), batch)
            ]
        except Exception as error:  # the runtime's own exceptions have no base but this one
            raise ExportError(
                f"Session: the file must run on these inputs, but ONNX Runtime raised: {error}"
            ) from error
        return [np.concatenate(part) if len(part) > 1 else np.asarray(part[0]) for part in zip(*parts, strict=True)]

    def predict(self, inputs: Inputs, batch: int = 256) -> Any:
        """What the model returns for any number of examples: tensors in its structure.

        Args:
            inputs: the examples along the first axis.
            batch: examples at a time.
        """
        flat = [torch.from_numpy(np.array(part)) for part in self.batched(inputs, batch)]
        return structured(self.output_names, flat)

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """As a model: tensors in, its outputs as tensors in the model's structure."""
        return self.predict(named or (inputs[0] if len(inputs) == 1 else inputs))
