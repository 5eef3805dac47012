"""Check a model, a task and a device before any work starts."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import ExportError, NotSupported, told
from lilliput.search import parts
from lilliput.search.onnx_target import OnnxModel
from lilliput.task import Batch, Model, Score, Task, leaves, length, outline, predict, take


def check(model: nn.Module, task: Task, most: int | None = None) -> Any:
    """The model's outputs on the task's probe of val, or on its first `most` examples, without asking for the metric.

    Raises:
        ValueError: unless the model runs on the task's inputs and its metric and loss are finite.
    """
    if not isinstance(model, OnnxModel) and not any(p.dim() > 1 and p.is_floating_point() for p in model.parameters()):
        raise ValueError(
            f"shrink: the model must have a floating-point weight of two or more dimensions, got "
            f"{type(model).__name__} with {sum(1 for _ in model.parameters())} parameters. There is "
            "nothing to make smaller."
        )
    _outputs(model, task, task.example)
    probe = task.probe("val")
    if most is None:
        outputs = measured(model, task)[1]
    else:
        probe = Batch(take(probe.inputs, slice(0, most)), take(probe.targets, slice(0, most)))
        outputs = _finite(_outputs(model, task, probe.inputs), task)
    loss = 0.0
    with _taking(outputs, probe):
        if task.labelled and probe.targets is not None:
            loss = float(task.loss(outputs, probe))
    if not math.isfinite(loss):
        raise ValueError(f"shrink: the loss of the model must be finite, got {loss} on val. Check the task's loss.")
    return outputs


def measured(model: Model, task: Task) -> tuple[Score, Any]:
    """The dense network's score on val, where the metric is asked for the first time, and its outputs on the probe.

    Args:
        model: the network, or a session of its file.
        task: what it is scored on.

    Raises:
        ValueError: unless the metric takes the outputs, and is finite.
    """
    probe = task.probe("val")
    try:
        score = _measurable(task.score(model, "val"), task)
    except (ExportError, NotSupported):  # a file's runtime refuses it
        raise
    except Exception as error:  # whatever a person's metric raises, unless the outputs are what is wrong
        with _taking(_finite(_outputs(model, task, probe.inputs), task), probe):
            raise error
    outputs = _outputs(model, task, probe.inputs) if score.outputs is None else score.outputs
    return score, _finite(outputs, task)


def _finite(outputs: Any, task: Task) -> Any:
    if not all(bool(torch.isfinite(leaf).all()) for leaf in leaves(outputs) if leaf.is_floating_point()):
        raise ValueError(
            f"shrink: the model's outputs must be finite, got NaN or infinity on the val inputs of "
            f"{task.name}. Check its weights and the inputs."
        )
    return outputs


@contextlib.contextmanager
def _taking(outputs: Any, probe: Batch) -> Iterator[None]:
    """Say of what a user's metric or loss raises inside, which outputs and targets it was given."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"shrink: metric and loss must take outputs of shape {outline(outputs)} and targets of "
            f"shape {None if probe.targets is None else outline(probe.targets)}, but raised "
            f"{told(error)}. Check the task's targets."
        ) from error


def _measurable(score: Score, task: Task) -> Score:
    """The score, of which it must be possible to say how sure it is."""
    if score.outcomes is None and score.again is None:
        raise ValueError(
            f"shrink: a score must tell how sure it is, but that of {task.name} holds neither outcomes nor again. Give "
            "the outcome of each example to Score, or a function that measures some examples again."
        )
    return score


def parted(task: Task, dense: Score) -> None:
    """Check that what each class and group loses can be told.

    Args:
        task: names the classes and groups of val.
        dense: the dense network's score on it.

    Raises:
        ValueError: without classes and groups, or where the metric gives no outcome for each example.
    """
    if not parts.rows(task, "val", dense, dense, sure=0.9):
        raise ValueError(
            "shrink: worst_class must have classes or groups, and an outcome of the metric for each example, got "
            f"{task}. F1, IoU, AUC and perplexity are one number over all examples. Choose another metric, give "
            "groups= to the task, or leave worst_class out."
        )


def _outputs(model: Model, task: Task, inputs: Any) -> Any:
    """What the model returns, which must be floating-point tensors with a row for each example."""
    try:
        outputs = predict(model, inputs)
    except Exception as error:
        raise ValueError(
            f"shrink: the model must run on the task's inputs (an example has the shape {outline(task.example)}), but "
            f"it raised {told(error)}. Check the task's arrays."
        ) from error
    tensors = leaves(outputs)
    if (
        not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tensors)
        or any(leaf.ndim == 0 for leaf in tensors)
        or {len(leaf) for leaf in tensors} != {length(inputs)}
    ):
        got = f"{outputs.dtype} of shape {outline(outputs)}" if isinstance(outputs, Tensor) else outline(outputs)
        raise ValueError(
            f"shrink: the model must return floating-point tensors with a row for each example, got {got}. Wrap it in "
            "a module that returns the tensors that matter."
        )
    return outputs


def place(device: str) -> torch.device:
    """The device of a name; raises ValueError for one that this machine lacks."""
    try:
        resolved = torch.device(device)
        torch.zeros(1, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"shrink: device must be one that this machine has ({', '.join(have)}), got {device!r}: "
            f"{reason}. Leave --device out to use the processor."
        ) from error
    if resolved.type == "meta":
        raise ValueError("shrink: device must hold values, got 'meta'. Leave --device out to use the processor.")
    return resolved
