"""An ONNX file, with arrays of inputs."""

from pathlib import Path
from typing import TYPE_CHECKING

from lilliput.targets import Given

if TYPE_CHECKING:
    from torch import nn

    from lilliput.task import Task

ABOUT = "model.onnx"
OPTIONS = ("calib", "shape")


def reads(target: str) -> bool:
    """Files with this ending."""
    return target.endswith(".onnx")


def read(given: Given) -> "tuple[nn.Module, Task]":
    """The file as a model, and the task of saying what it says."""
    from lilliput.search.onnx_target import load_target

    return load_target(Path(given.target), None if given.calib is None else Path(given.calib), list(given.shape))
