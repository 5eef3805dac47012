"""model.onnx as the target: a network that is only a file, with arrays to calibrate and judge it on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lilliput.errors import near
from lilliput.onnx.session import Session
from lilliput.onnx.structure import Structure
from lilliput.search.compare import shapes
from lilliput.task import Arrays, Model, Score, Task, leaves

Columns = dict[str, NDArray[Any]]
CALIBRATION = 128  # examples: what is fitted is a range, or what one tensor harms; judging needs every other one


class OnnxModel(nn.Module):
    """An ONNX file as a module that computes in ONNX Runtime. It has no parameters to train; `file` is its bytes."""

    file: Tensor

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        data = structure.proto.SerializeToString()
        self.register_buffer("file", torch.from_numpy(np.frombuffer(data, np.uint8).copy()))
        self._session = Session(data)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """The file's first output."""
        given: Any = named or (inputs if len(inputs) > 1 else inputs[0])
        return torch.from_numpy(np.array(self._session.outputs(given)))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing in it changes, and a session cannot be copied


class _FirstOutput(Arrays):
    """A file's task: its first output is judged, where it has several."""

    def score(self, model: Model, split: str = "val") -> Score:
        return super().score(lambda *inputs, **named: leaves(model(*inputs, **named))[0], split)


def load_target(path: Path, calib: Path | None, given: Sequence[str]) -> tuple[OnnxModel, Task]:
    """(model, task) of an ONNX file and an npz with its inputs by name, and `targets` where there are labels.

    The first quarter of the examples, 128 at most, calibrates; the others judge. Integer targets are classes
    (accuracy), others are values (squared error). Without targets the task is to say what the file says: the same
    direction (cosine) where outputs are unit vectors or have three axes and more, the same class where they have two or
    more columns, the same value otherwise.

    Raises:
        ValueError: For a missing file or array, or one of another shape.
    """
    if not path.exists():
        raise ValueError(f"TARGET: the file must exist, got {path}.")
    if calib is None or not calib.exists():
        raise ValueError(f"shrink: an ONNX file needs --calib data.npz with its inputs by name, got {calib}.")
    arrays = _read(calib)
    proto = Structure.from_onnx(path).proto
    names = [value.name for value in proto.graph.input]
    if missing := set(names) - set(arrays):
        raise ValueError(
            f"shrink: --calib must hold every input of {path.name}, but misses {sorted(missing)}. It "
            f"holds {sorted(arrays)}."
        )
    inputs = _cut({name: arrays[name] for name in names}, shapes(given))
    counts = {name: len(array) for name, array in arrays.items() if name in names or name == "targets"}
    count = min(counts.values())
    if count < 4 or len(set(counts.values())) > 1:
        raise ValueError(f"shrink: --calib must hold at least 4 examples, as many of each array, got {counts}.")
    model = OnnxModel(Structure(proto, example={name: value[:1] for name, value in inputs.items()}))
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
    try:
        outputs = model(**{name: value[:3] for name, value in tensors.items()})
    except Exception as error:
        have = {name: tuple(value.shape) for name, value in inputs.items()}
        raise ValueError(
            f"shrink: {path.name} must run on several examples of --calib at once ({have}), but that "
            f"raised: {error}. Give the sizes with --shape, or export it with a free batch "
            "size."
        ) from error
    if outputs.ndim == 0 or len(outputs) != 3:
        raise ValueError(
            f"shrink: {path.name} must give a row for each example, got outputs of shape "
            f"{tuple(outputs.shape)} for 3. Export it with a free batch size."
        )
    outputs = model(**tensors)
    targets = torch.from_numpy(arrays["targets"]) if "targets" in arrays else None
    kind, targets = _question(outputs, targets)
    first = min(CALIBRATION, max(2, count // 4))
    train, val = (
        ({name: value[part] for name, value in tensors.items()}, targets[part])
        for part in (slice(0, first), slice(first, count))
    )
    loss, metric = kind
    return model, _FirstOutput(path.stem, train, val, loss=loss, metric=metric)


def _read(calib: Path) -> Columns:
    try:
        with np.load(calib, allow_pickle=False) as data:
            return {name: np.asarray(data[name]) for name in data.files}
    except (ValueError, OSError, BadZipFile, AttributeError) as error:
        raise ValueError(
            f"shrink: --calib must be an npz file of plain arrays, got {calib.name}: {error}. Write it "
            "with numpy.savez(path, input=array)."
        ) from error


def _cut(inputs: Mapping[str, NDArray[Any]], fixed: Mapping[str, tuple[int, ...]]) -> Columns:
    """The inputs cut to the sizes that are fixed; the first one is the batch and cuts nothing."""
    for name, sizes in fixed.items():
        if name not in inputs:
            raise ValueError(f"shrink: --shape must name an input, got {name!r}. {near(name, inputs)}")
        have = inputs[name].shape
        if len(sizes) != len(have) or any(size > most for size, most in zip(sizes[1:], have[1:], strict=True)):
            raise ValueError(
                f"shrink: --shape {name}={'x'.join(map(str, sizes))} must fit into the array of --calib, "
                f"which is {'x'.join(map(str, have))}."
            )
    return {
        name: array if name not in fixed else array[(slice(None), *(slice(0, size) for size in fixed[name][1:]))]
        for name, array in inputs.items()
    }


def _question(outputs: Tensor, targets: Tensor | None) -> tuple[tuple[str, str], Tensor]:
    """(loss, metric) and the targets of a file's task."""
    if targets is not None and not targets.is_floating_point():
        return ("cross_entropy", "accuracy"), targets.long()
    if targets is not None:
        if targets.shape != outputs.shape:
            raise ValueError(
                f"shrink: targets of --calib must be integers (classes) or have the outputs' shape "
                f"{tuple(outputs.shape)}, got {tuple(targets.shape)}."
            )
        return ("mse", "mse"), targets
    norms = outputs.norm(dim=-1)
    if outputs.ndim > 2 or (outputs.ndim == 2 and bool((norms - 1).abs().max() < 1e-3)):
        return ("cosine", "cosine"), outputs
    if outputs.ndim == 2 and outputs.shape[1] > 1:
        return ("cross_entropy", "accuracy"), outputs.argmax(-1)
    return ("mse", "mse"), outputs
