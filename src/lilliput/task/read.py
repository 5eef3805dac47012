"""Read arrays, data sets and loaders into inputs and targets in memory."""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lilliput.task.nested import joined, leaves, mapped


def source(part: Any) -> str:
    """The source text of a function or class, or its name where there is none to read."""
    try:
        return inspect.getsource(part)
    except (TypeError, OSError):
        return getattr(part, "__qualname__", repr(type(part)))


def tensors(value: Any) -> Any:
    """A nested structure of arrays as tensors, float64 as float32; a list of plain numbers is one array."""
    if isinstance(value, dict | tuple):
        return mapped(_tensor, _arrays(value))
    return _tensor(value)


def _arrays(value: Any) -> Any:
    """Lists of numbers inside dictionaries and tuples as arrays, so that they are leaves."""
    if isinstance(value, dict):
        return {name: _arrays(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_arrays, value))
    return np.asarray(value) if isinstance(value, list | int | float) else value


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def read(task: str, split: str, data: Any) -> tuple[Any, Any]:
    """(inputs, targets or None) of a split as tensors.

    Args:
        task: the task's name, for messages.
        split: the split's name, for messages.
        data: (inputs, targets), inputs alone, a Dataset, or a loader of any length.

    Raises:
        ValueError: for an empty split or lengths that differ.
        TypeError: for data of another kind.
    """
    who = f"Task {task}: {split}"
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        data = [default_collate([data[i] for i in range(len(data))])] if len(data) else []  # type: ignore[arg-type]
    if isinstance(data, tuple) and len(data) == 2:
        inputs, targets = tensors(data[0]), None if data[1] is None else tensors(data[1])
    elif isinstance(data, np.ndarray | Tensor | dict):
        inputs, targets = tensors(data), None
    elif hasattr(data, "__iter__") and not isinstance(data, str | bytes):
        parts = [read(task, split, tuple(part) if isinstance(part, list) else part) for part in data]
        if not parts:
            raise ValueError(f"{who} must hold at least one batch, got an empty loader. Check its filter or sampler.")
        inputs = joined([part for part, _ in parts])
        known = [target for _, target in parts if target is not None]
        targets = joined(known) if known else None
    else:
        raise TypeError(f"{who} must be (inputs, targets), inputs, a Dataset or a loader, got {type(data).__name__}.")
    counts = {len(leaf) for leaf in [*leaves(inputs), *leaves(targets)]}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"{who} must hold inputs and targets of one length above zero, got lengths {sorted(counts)}.")
    return inputs, targets
