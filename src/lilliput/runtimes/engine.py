"""lilliput's own engine as a runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto

from lilliput.engine.compile import compile
from lilliput.engine.run import Engine
from lilliput.onnx.session import Inputs, arrays
from lilliput.registry import register
from lilliput.task.nested import structured


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
        shapes: Mapping[str, Sequence[int]] | None = None,
        *,
        tune: bool = True,
        out: str | Path | None = None,
    ) -> None:
        self._hold(compile(model, out, tune=tune, shapes=shapes))

    @classmethod
    def opened(cls, folder: str | Path) -> EngineSession:
        """Open what was compiled into a folder, such as by another process.

        Raises:
            OSError: Where the folder holds no library.
        """
        session = cls.__new__(cls)
        session._hold(Engine(folder))
        return session

    def _hold(self, engine: Engine) -> None:
        self.engine = engine
        self.input_names = [value["name"] for value in engine.inputs]

    def feed(self, inputs: Inputs) -> dict[str, Any]:
        """Return the inputs by name, in the types that the network takes."""
        named = arrays(inputs, self.input_names)
        return {
            value["name"]: np.ascontiguousarray(named[value["name"]].astype(value["dtype"], copy=False))
            for value in self.engine.inputs
        }

    def run(self, feed: dict[str, Any]) -> list[Any]:
        """Compute every output for inputs that `feed` prepared: nothing else happens here, so this is what is timed."""
        outputs = self.engine(*feed.values())
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def outputs(self, inputs: Inputs) -> Any:
        """Compute the first output for any number of examples, as many at a time as were compiled for."""
        return self._batched(inputs)[0]

    def _batched(self, inputs: Inputs) -> list[Any]:
        feed = self.feed(inputs)
        batch = self._batch()
        count = len(next(iter(feed.values())))
        parts = [self.run({name: x[i : i + batch] for name, x in feed.items()}) for i in range(0, count, batch)]
        return [np.concatenate(part) if len(part) > 1 else part[0] for part in zip(*parts, strict=True)]

    def predict(self, inputs: Inputs) -> Any:
        """Compute what the model returns for any number of examples, as tensors in its structure."""
        names = [value["name"] for value in self.engine.outputs]
        return structured(names, [torch.from_numpy(np.array(part)) for part in self._batched(inputs)])

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Compute as a model does: tensors in, its outputs as tensors in its structure."""
        return self.predict(named or (inputs[0] if len(inputs) == 1 else inputs))

    def _batch(self) -> int:
        first = self.engine.inputs[0]["shape"][0]
        return int(first) if isinstance(first, int) else int(self.engine.manifest["sizes"][first])
