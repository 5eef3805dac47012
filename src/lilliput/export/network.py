"""Network: a packed file as a torch module that computes in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from lilliput.files import write
from lilliput.onnx.clean import copied
from lilliput.onnx.names import signed
from lilliput.onnx.narrow import narrow
from lilliput.onnx.session import Session
from lilliput.stored.base import Stored
from lilliput.stored.bits import Array
from lilliput.task.nested import structured


class Network(nn.Module):
    """A network read from `model.lil`: call it with tensors; it computes in ONNX Runtime.

    It has no parameters to train (read `model.safetensors` and `recipe.toml` for that).
    """

    def __init__(self, proto: ModelProto, stored: dict[str, Stored], threads: int = 1) -> None:
        super().__init__()
        self._proto, self._stored = proto, stored
        self.session = Session(proto, threads=threads)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The output; where the model returned several, all of them in its structure."""
        given = named or (inputs[0] if len(inputs) == 1 else inputs)
        flat = [torch.from_numpy(np.array(output)) for output in self.session.all(given)]
        return structured(self.session.output_names, flat)

    def proto(self) -> ModelProto:
        """The float32 ONNX model."""
        return copied(self._proto)

    def stored(self) -> dict[str, Stored]:
        """How each tensor is stored, by the name it has in `proto()`."""
        return dict(self._stored)

    def tensors(self) -> dict[str, Array]:
        """Every tensor's values, decoded."""
        return {t.name: np.array(numpy_helper.to_array(t)) for t in self._proto.graph.initializer}

    def save_onnx(self, path: str | Path) -> None:
        """Write it as an ONNX file with narrow tensors.

        Raises:
            StoreError: if the file cannot be written.
        """
        data = signed(narrow(self._proto, self._stored)).SerializeToString(deterministic=True)
        write(Path(path), lambda file: file.write(data))
