"""model.onnx as the target: a network that is only a file, with arrays to calibrate and judge it on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.export.onnx import Session, Structure
from lilliput.search.compare import shapes
from lilliput.task import Task


class OnnxModel(nn.Module):
    """An ONNX file as a module that computes in ONNX Runtime; it has no parameters to train."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self._session = Session(structure.proto)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The file's first output."""
        given: Any = named or (inputs if len(inputs) > 1 else inputs[0])
        return torch.from_numpy(np.array(self._session.outputs(given)))


def load_target(path: Path, calib: Path | None, given: Sequence[str]) -> tuple[OnnxModel, Task]:
    """(model, task) of an ONNX file and an npz with its inputs by name, and `targets` where there are labels.

    Without targets the task is to say what the dense file says: the same class, or the same direction (cosine).
    The first half of the examples calibrates, the second half judges.

    Raises ValueError for a missing file or array.
    """
    if not path.exists():
        raise ValueError(f"TARGET: the file must exist, got {path}.")
    if calib is None or not calib.exists():
        raise ValueError(f"shrink: an ONNX file needs --calib data.npz with its inputs by name, got {calib}.")
    with np.load(calib, allow_pickle=False) as data:
        arrays = {name: data[name] for name in data.files}
    structure = Structure.from_onnx(path)
    names = [value.name for value in structure.proto.graph.input]
    if missing := set(names) - set(arrays):
        raise ValueError(f"shrink: --calib must hold every input of {path.name}, but misses {sorted(missing)}. It holds "
                         f"{sorted(arrays)}.")
    fixed = shapes(given)
    inputs: dict[str, Tensor] = {}
    for name in names:
        array = arrays[name]
        if name in fixed:
            array = array[(slice(None), *(slice(0, size) for size in fixed[name][1:]))]
        inputs[name] = torch.from_numpy(np.ascontiguousarray(array))
    count = len(next(iter(inputs.values())))
    if count < 4:
        raise ValueError(f"shrink: --calib must hold at least 4 examples, got {count}.")
    structure = Structure.from_onnx(path, {name: value[:1] for name, value in inputs.items()})
    model = OnnxModel(structure)
    targets = torch.from_numpy(arrays["targets"]) if "targets" in arrays else None
    with torch.no_grad():
        outputs = model(**inputs)
    classes = outputs.ndim == 2 and (targets is None or not targets.is_floating_point())
    if targets is None:
        targets = outputs.argmax(-1) if classes else outputs
    half = count // 2
    train = ({k: v[:half] for k, v in inputs.items()}, targets[:half])
    val = ({k: v[half:] for k, v in inputs.items()}, targets[half:])
    kind = ("cross_entropy", "accuracy") if classes else ("cosine", "cosine")
    return model, Task(path.stem, train, val, loss=kind[0], metric=kind[1])
