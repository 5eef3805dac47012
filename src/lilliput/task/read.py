"""Read the data that people have (arrays, tables, data sets, loaders, streams) into inputs and targets in memory."""

import contextlib
import inspect
import tokenize
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from lilliput.task.nested import children, leaves, mapped, rebuilt
from lilliput.task.transforms import seeded, seeds

TARGETS = ("labels", "label", "targets", "target")
"""Names under which dictionaries hold the targets, where nobody says another."""
MASK = "mask"
"""In the name of an input that says which places count: what is padded then holds anything."""


def source(part: Any) -> str:
    """The source text of a function or class, or its name where there is none to read."""
    try:
        return inspect.getsource(part)
    except (TypeError, OSError, SyntaxError, tokenize.TokenError):  # it was made from a text that is no file
        return getattr(part, "__qualname__", repr(type(part)))


@dataclass(frozen=True)
class Reading:
    """How data is told apart into inputs and targets.

    Args:
        who: the task, for messages.
        target: the name of the targets in dictionaries and tables; one of TARGETS without it.
        padding: what shorter examples are filled up with along their first axis; None where they must be of one length.
        ignore: what shorter labels are filled up with.
    """

    who: str = "Task"
    target: str | None = None
    padding: float | None = None
    ignore: int = -100

    def read(self, split: str, data: Any) -> tuple[Any, Any]:
        """(inputs, targets or None) of a split as tensors, examples along the first axis.

        Args:
            split: the split's name, for messages.
            data: one of

                - (inputs, targets) or (input, another, ..., targets), each an array or any nesting of arrays;
                - inputs alone: an array, a dictionary of them, or a table (pandas), whose column `target` is taken out;
                - examples: a data set (of torch, of Hugging Face, or anything with a length and places), a stream
                  (IterableDataset), or a list of (input, label) with one number as label;
                - batches: a loader or a list of them, of any length.

                An example and a batch are told apart like the first two.

        Raises:
            ValueError: for an empty split, lengths that differ, text, and lists that may be read in two ways.
            TypeError: for data of another kind.
        """
        who = f"{self.who}: {split}"
        with seeded(0):  # a loader shuffles and a transform draws the same way whenever the task is made
            inputs, targets = self._whole(who, data)
        counts = {len(leaf) for leaf in [*leaves(inputs), *leaves(targets)]}
        if len(counts) != 1 or 0 in counts:
            raise ValueError(
                f"{who} must hold inputs and targets of one length above zero, got lengths {sorted(counts)}."
            )
        return inputs, targets

    def _whole(self, who: str, data: Any) -> tuple[Any, Any]:
        if isinstance(data, str | bytes) or (not isinstance(data, Iterable) and not _has_places(data)):
            raise TypeError(
                f"{who} must be (inputs, targets), inputs, a Dataset or a loader, got {type(data).__name__}."
            )
        if isinstance(data, tuple | Mapping) or _is_array(data):
            return self._tensors(who, self._divided(data))
        if isinstance(data, list) and len(data) > 1 and all(map(_is_array, data)):
            raise ValueError(
                f"{who} must be a tuple, since a list is read as batches, got a list of {len(data)} arrays. Write "
                "(inputs, targets) in round brackets."
            )
        if _has_places(data):
            return self.examples(data, torch.arange(len(data)), 0, who)
        items = [self._divided(item) for item in data]
        if not items:
            raise ValueError(f"{who} must hold at least one batch, got an empty loader. Check its filter or sampler.")
        if isinstance(data, IterableDataset) or all(_is_number(targets) for _, targets in items):
            return self._stacked(who, items)
        parts = [self._tensors(who, item) for item in items]
        labelled = [targets for _, targets in parts if targets is not None]
        inputs = self._joined(who, [inputs for inputs, _ in parts], self._filling(parts[0][0]), torch.cat)
        return inputs, self._joined(who, labelled, self.ignore, torch.cat) if labelled else None

    def varies(self, split: str, data: Any) -> bool:
        """Whether a split is a set of examples that change at random whenever they are read."""
        if not _has_places(data) or not len(data):
            return False
        with seeded(0) as begin:
            read = []
            for seed in range(3):
                begin(seed)
                read.append(leaves(self._tensors(f"{self.who}: {split}", self._divided(data[0]))[0]))
        return any(
            a.shape != b.shape or not torch.equal(a, b)
            for other in read[1:]
            for a, b in zip(read[0], other, strict=True)
        )

    def examples(self, data: Any, index: Tensor, draw: int, who: str) -> tuple[Any, Any]:
        """(inputs, targets or None) of some examples of a data set, whose transforms draw from a seed of each.

        Args:
            data: the data set.
            index: int64 (n,).
            draw: the number of the augmentation.
            who: whose data it is, for messages.
        """
        with seeded(0) as begin:
            items = []
            for place, seed in zip(index.tolist(), seeds(index, draw).tolist(), strict=True):
                begin(seed)
                items.append(self._divided(data[place]))
        return self._stacked(who, items)

    def _divided(self, item: Any) -> tuple[Any, Any]:
        """Inputs and targets of a whole split, an example or a batch; targets are None where there are none."""
        if _is_table(item) and self.target is not None:
            return item[[name for name in item.columns if name != self.target]], item[self.target]
        if isinstance(item, Mapping):
            names = TARGETS if self.target is None else (self.target,)
            name = next((name for name in names if name in item), None)
            if name is None and self.target is not None:
                raise ValueError(f"{self.who}: target must be one of {', '.join(map(str, item))}, got {self.target!r}.")
            return {key: part for key, part in item.items() if key != name}, None if name is None else item[name]
        if isinstance(item, tuple | list):
            parts = tuple(item)
            if len(parts) == 1:
                return parts[0], None
            return (parts[0] if len(parts) == 2 else parts[:-1]), parts[-1]
        return item, None

    def _tensors(self, who: str, item: tuple[Any, Any]) -> tuple[Any, Any]:
        inputs, targets = (None if part is None else tensors(part, who) for part in item)
        return inputs, targets

    def _stacked(self, who: str, examples: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
        """Examples as one structure of tensors with a new first axis."""
        if not examples:
            raise ValueError(f"{who} must hold inputs and targets of one length above zero, got lengths [0].")
        parts = [self._tensors(who, example) for example in examples]
        labelled = [targets for _, targets in parts if targets is not None]
        inputs = self._joined(who, [inputs for inputs, _ in parts], self._filling(parts[0][0]), torch.stack)
        return inputs, self._joined(who, labelled, self.ignore, torch.stack) if labelled else None

    def _filling(self, inputs: Any) -> float | None:
        if self.padding is None and isinstance(inputs, Mapping) and any(MASK in str(name) for name in inputs):
            return 0.0
        return self.padding

    def _joined(self, who: str, parts: list[Any], filling: float | None, how: Any) -> Any:
        """Structures of the same form as one, those that are shorter filled up behind."""
        axis = 1 if how is torch.cat else 0

        def join(*each: Tensor) -> Tensor:
            lengths = {tensor.shape[axis] for tensor in each if tensor.dim() > axis}
            if len(lengths) > 1:
                if filling is None:
                    raise ValueError(
                        f"{who} must hold examples of one length, got lengths {min(lengths)} to {max(lengths)}. Say "
                        "what shorter ones are filled up with: Task(..., padding=0)."
                    )
                each = tuple(_filled(tensor, axis, max(lengths), filling) for tensor in each)
            whole: Tensor = how(each)
            return whole

        return mapped(join, *parts)


def tensors(value: Any, who: str = "Task") -> Any:
    """A nested structure of arrays, tables, lists of numbers and numbers as tensors; floats of any width as float32.

    Args:
        value: the structure; a list of numbers (of numbers ...) is one array.
        who: whose data it is, for messages.

    Raises:
        ValueError: for text and for lists whose parts differ in length.
    """
    parts = None if isinstance(value, list) or _is_array(value) else children(value)
    if parts is None:
        return _tensor(value, who)
    named = {key: f"{who}, {key}" if isinstance(key, str) else who for key in parts}
    return rebuilt(value, {key: tensors(part, named[key]) for key, part in parts.items()})


def _tensor(value: Any, who: str) -> Tensor:
    if not isinstance(value, Tensor):
        array = value.to_numpy() if hasattr(value, "to_numpy") else value
        try:
            array = np.asarray(array)
        except ValueError as error:
            raise ValueError(f"{who} must hold lists of one length, got {error}.") from error
        if array.dtype == object:  # a table with columns of several types
            with contextlib.suppress(TypeError, ValueError):
                array = array.astype(np.float64)
        if array.dtype.kind not in "biuf":
            raise ValueError(
                f"{who} must hold numbers, got {array.dtype}. Leave this column out, or turn it into numbers (a "
                "tokenizer, category codes)."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what is mapped from a file is not written to
            wide = array.dtype.kind == "f" and array.itemsize > 4
            value = torch.as_tensor(array.astype(np.float32) if wide else array)
    tensor: Tensor = value.float() if value.is_floating_point() else value
    return tensor


def _filled(tensor: Tensor, axis: int, length: int, filling: float) -> Tensor:
    missing = length - tensor.shape[axis]
    behind = [0, 0] * (tensor.dim() - axis - 1)
    return F.pad(tensor, (*behind, 0, missing), value=filling) if missing else tensor


def _has_places(data: Any) -> bool:
    """Whether data is examples by their place: a data set, no list of batches and no loader."""
    known = isinstance(data, str | bytes | list | tuple | Mapping | DataLoader) or _is_array(data)
    return not known and hasattr(data, "__getitem__") and hasattr(data, "__len__")


def _is_array(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray) or hasattr(value, "to_numpy")


def _is_table(value: Any) -> bool:
    return hasattr(value, "to_numpy") and hasattr(value, "columns")


def _is_number(value: Any) -> bool:
    return value is not None and not isinstance(value, str) and not isinstance(value, Mapping) and np.ndim(value) == 0
