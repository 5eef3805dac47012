"""What a model, a task and a device must be before anything is tried or written."""

import math

import torch
from torch import Tensor, nn

from lilliput.search.onnx_target import OnnxModel
from lilliput.task import Task, call, leaves, length, predict, take


def check(model: nn.Module, task: Task, most: int | None = None) -> Tensor:
    """The model's outputs on val, or on its first `most` examples, whose metric is then not asked for.

    Raises ValueError unless the model runs on the task's inputs and its metric and loss are finite.
    """
    if not isinstance(model, OnnxModel) and not any(p.dim() > 1 and p.is_floating_point() for p in model.parameters()):
        raise ValueError(
            f"shrink: the model must have a floating-point weight of two or more dimensions, got "
            f"{type(model).__name__} with {sum(1 for _ in model.parameters())} parameters. There is "
            "nothing to make smaller."
        )
    inputs, targets = task.split("val")
    if most is not None:
        inputs, targets = take(inputs, slice(0, most)), None if targets is None else targets[:most]
    try:
        with torch.no_grad():
            outputs = call(model, task.example)
        if isinstance(outputs, torch.Tensor):
            outputs = predict(model, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves(task.example))
        raise ValueError(
            f"shrink: the model must run on the task's inputs (an example has the shape {shapes}), but it "
            f"raised {type(error).__name__}: {error}. Check the task's arrays."
        ) from error
    if not isinstance(outputs, torch.Tensor) or not outputs.is_floating_point() or len(outputs) != length(inputs):
        got = (
            f"{outputs.dtype} of shape {tuple(outputs.shape)}"
            if isinstance(outputs, torch.Tensor)
            else (type(outputs).__name__)
        )
        raise ValueError(
            f"shrink: the model must return one floating-point tensor with a row for each example, got "
            f"{got}. Wrap it in a module that returns the tensor that matters."
        )
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError(
            f"shrink: the model's outputs must be finite, got NaN or infinity on the val inputs of "
            f"{task.name}. Check its weights and the inputs."
        )
    try:
        if most is None:
            task.rate(outputs, "val")
        taught = targets is not None and task.split("train")[1] is not None
        loss = float(task.loss(outputs, targets)) if taught else 0.0
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"shrink: metric and loss must take outputs of shape {tuple(outputs.shape)} and targets of "
            f"shape {None if targets is None else tuple(targets.shape)}, but raised "
            f"{type(error).__name__}: {error}. Check the task's targets."
        ) from error
    if not math.isfinite(loss):
        raise ValueError(f"shrink: the loss of the model must be finite, got {loss} on val. Check the task's loss.")
    return outputs


def place(device: str) -> torch.device:
    """The device of a name; raises ValueError for one that this machine lacks."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"shrink: device must be one that this machine has ({', '.join(have)}), got {device!r}: "
            f"{reason}. Leave --device out to use the processor."
        ) from error
    if found.type == "meta":
        raise ValueError("shrink: device must hold values, got 'meta'. Leave --device out to use the processor.")
    return found
