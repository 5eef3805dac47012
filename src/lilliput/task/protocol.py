"""Task: what must be preserved while a network shrinks, as a protocol; Batch and Score, what it hands out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lilliput.task.meaning import Meaning
from lilliput.task.nested import Inputs, Model, leaves, length, mapped, take

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Some examples.

    Args:
        inputs: any nested structure of tensors (n, ...), after augmentation.
        targets: what the loss compares with, or None where there are no labels; of the first len(targets) examples.
        index: int64 (n,), which training examples these are, so that the dense network's outputs can be kept for them;
            None where examples never come again.
        draw: the number of the augmentation.
    """

    inputs: Inputs
    targets: Any
    index: Tensor | None = None
    draw: int = 0


@dataclass(frozen=True)
class Score:
    """A metric's value on a split, and what is needed to say how sure it is.

    Args:
        value: the metric.
        outcomes: (n,) one for each example (sentence, episode) where the metric is their mean; else None.
        outputs: what the network gave on the task's probe of the split, nested tensors; None where it is not kept.
        again: the metric of some examples, given by their places, where it is no mean.
        count: how many examples `again` can choose from, where neither outcomes nor outputs tell.

    Example:
        >>> Score(0.5, np.array([0.0, 1.0]), None).resampled(np.array([1, 1]))
        1.0
    """

    value: float
    outcomes: NDArray[np.float64] | None
    outputs: Any = None
    again: Callable[[Indices], float] | None = None
    count: int | None = None

    @property
    def units(self) -> int:
        """How many examples there are to draw from."""
        if self.outcomes is not None:
            return len(self.outcomes)
        return length(self.outputs) if self.count is None else self.count

    def resampled(self, index: Indices) -> float:
        """The metric on a bootstrap draw.

        Args:
            index: int64 (k,), places of examples, each as often as it was drawn.

        Returns:
            The metric, or NaN where it is not defined on this draw (AUC without a positive example).

        Raises:
            ValueError: for a metric that is no mean and that cannot be measured again.
        """
        if self.outcomes is not None:
            return float(self.outcomes[index].mean())
        if self.again is None:
            raise ValueError(
                "Score: a metric that is no mean of outcomes must be measurable again on some examples, but `again` is "
                "missing. Give outcomes or again to Score."
            )
        return self.again(index)


class Task:
    """Define what must be preserved while a network shrinks: data in splits, a loss, a metric, an example input.

    `Task(name, train=..., val=..., ...)` makes an `Arrays`, the task of examples in memory. A task of another kind is a
    class of its own: `name`, `metric_name`, `higher_is_better` and the six methods that raise here, `splits`, `probe`,
    `batches`, `loss`, `score` and `fingerprint`; the rest follows from them. Inputs and outputs are any nested
    structure of tensors. Decisions read the split `val`; `test`, where there is one, is read once, at the end.

    Attributes:
        name: what it is called in files and reports.
        metric_name: what the score is called.
        higher_is_better: which way the metric runs.
        batch_size: examples in a training batch.
        draws: augmentations of each example; 0 where batches have no index, so that nothing can be kept for them.
        labelled: whether `loss` compares with labels; otherwise it compares with the dense network's outputs.
        meaning: what the numbers of the outputs stand for.
        loss_name: what the loss is called, "" for one that has no name.

    Raises:
        TypeError: for a class that lacks one of the six methods.

    Example:
        >>> x, y = np.zeros((8, 2), "float32"), np.zeros(8, "int64")
        >>> task = Task("tiny", train=(x, y), val=(x, y), test=(x, y))
        >>> type(task).__name__, task.splits, task.score(lambda x: torch.eye(2)[x[:, 0].long()], "val").value
        ('Arrays', ('train', 'val', 'test'), 1.0)
    """

    name: str
    metric_name: str
    higher_is_better: bool = True
    batch_size: int = 64
    draws: int = 0
    labelled: bool = True
    meaning: Meaning = Meaning()
    loss_name: str = ""

    _default: ClassVar["type[Task] | None"] = None
    _asked: ClassVar[tuple[str, ...]] = ("splits", "probe", "batches", "loss", "score", "fingerprint")

    def __init_subclass__(cls, default: bool = False, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if default:
            Task._default = cls  # what Task(...) makes, as pathlib.Path(...) makes a PosixPath

    def __new__(cls, *args: Any, **settings: Any) -> "Task":
        """An `Arrays` where Task itself is called. (Not an ABC: type checkers would refuse that call.)"""
        kind = Task._default if cls is Task and Task._default else cls
        missing = [name for name in Task._asked if getattr(kind, name) is getattr(Task, name)]
        if missing:
            raise TypeError(f"{kind.__name__}: a task must define {', '.join(missing)}. See lilliput.Task.")
        return object.__new__(kind)

    # what a task must say ------------------------------------------------------------------------------------------

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of its splits: "train", "val" and, where there is one, "test"."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """A hash of all that results depend on (data, loss, metric, settings): part of every key in the store."""
        raise NotImplementedError

    def probe(self, split: str) -> Batch:
        """The inputs of a split on which two networks can be compared, with their targets, without augmentation.

        Raises:
            KeyError: where the task has no split of that name.
        """
        raise NotImplementedError

    def batches(self, steps: int, seed: int, batch_size: int | None = None, first: int = 0) -> Iterator[Batch]:
        """Training batches, a pure function of (seed, step), so that a training that goes on sees the same ones.

        Args:
            steps: where to stop.
            seed: chooses the order.
            batch_size: examples in a batch; the task's own without one.
            first: the step to begin with.
        """
        raise NotImplementedError

    def loss(self, output: Any, batch: Batch) -> Tensor:
        """The mean loss over the examples of a batch that have labels, zero where none has.

        Args:
            output: what the network returned for `batch.inputs`.
            batch: the batch.
        """
        raise NotImplementedError

    def score(self, model: Model, split: str = "val") -> Score:
        """The metric of a model, a session or any function from inputs to outputs, on a split.

        Raises:
            KeyError: where the task has no split of that name.
            ValueError: where the metric is not a finite number, or compares with a dense network that is not known yet
                (`against`).
        """
        raise NotImplementedError

    # what follows from it ------------------------------------------------------------------------------------------

    def has(self, split: str) -> bool:
        """Whether the task has a split of that name (test is optional)."""
        return split in self.splits

    def size(self, split: str) -> int:
        """How many examples a split has."""
        return length(self.probe(split).inputs)

    @property
    def examples(self) -> int:
        """How many examples training draws from."""
        return self.size("train")

    @property
    def example(self) -> Inputs:
        """The first training input, as a batch of one."""
        return take(self.probe("train").inputs, slice(0, 1))

    def calibration(self, examples: int = 256) -> Inputs:
        """Training inputs to take statistics from: evenly spread, without augmentation.

        Args:
            examples: how many at most.
        """
        inputs = self.probe("train").inputs
        count = length(inputs)
        return take(inputs, torch.linspace(0, count - 1, min(examples, count)).long())

    def batch(self, index: Tensor, draw: int) -> Batch:
        """Training examples again: asked only of a task that has `draws`.

        Args:
            index: int64 (n,), as in a batch.
            draw: the number of the augmentation.
        """
        raise NotImplementedError

    def prepare(self, draw: int) -> None:
        """Make ready for an augmentation, where that saves time."""

    def with_draws(self, draws: int) -> "Task":
        """The same task with at most `draws` augmentations of each example."""
        return self

    def parts(self, split: str) -> dict[str, NDArray[np.bool_]]:
        """The classes and groups of a split by name, each as (n,) booleans: which outcomes of a score belong to it."""
        return {}

    def class_axis(self, outputs: Any) -> int | None:
        """The axis of `outputs` that holds the classes, as loss, metric, divergence and distillation read it.

        Args:
            outputs: one tensor (n, ...); with a nested structure there is no such axis.

        Returns:
            The axis, counted from the front, or None where the outputs are no classes: then outputs are compared by
            value.
        """
        return self.meaning.class_axis(outputs)

    def against(self, dense: Model) -> "Task":
        """The same task, judged by what a dense network says wherever there are no labels; itself where there are.

        Args:
            dense: the network that is to be preserved. A copy is kept, so that training it later moves no target.
        """
        return self

    def imitated(self, outputs: Any) -> Any:
        """What `loss` compares with where there are no labels, made of the dense network's outputs for a batch."""
        return outputs

    def loss_of(self, dense: float, score: float) -> float:
        """What was lost, in points of the metric: positive is worse, whichever way the metric runs."""
        return dense - score if self.higher_is_better else score - dense

    def divergence(self, outputs: Any, dense: Any) -> Tensor:
        """How far outputs are from the dense outputs, per example; it varies less than a metric.

        Kullback-Leibler for classes and bits, one minus cosine for directions, else the squared error relative to the
        variance of the dense outputs; summed over the tensors of a nested structure.

        Args:
            outputs: what a network returned for some inputs, (n, ...).
            dense: what the dense network returned for the same inputs.

        Returns:
            (n,)
        """
        each = mapped(lambda a, b: _apart(a.float(), b.float(), self.meaning), outputs, dense)
        parts = leaves(each)
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{self.size(split)} {split}" for split in self.splits)
        return f"{type(self).__name__}({self.name!r}: {sizes}; {self.metric_name})"


def _apart(outputs: Tensor, dense: Tensor, meaning: Meaning) -> Tensor:
    p, q = meaning.log_probabilities(dense), meaning.log_probabilities(outputs)
    if p is not None and q is not None:
        distance = (p.exp() * (p - q)).sum(-1)
        return distance.flatten(1).mean(1) if distance.ndim > 1 else distance
    if meaning.kind == "bits":
        chance = torch.sigmoid(dense)
        yes, no = F.logsigmoid(dense) - F.logsigmoid(outputs), F.logsigmoid(-dense) - F.logsigmoid(-outputs)
        return (chance * yes + (1 - chance) * no).reshape(len(outputs), -1).sum(-1)
    if meaning.kind == "directions":
        distance = 1 - F.cosine_similarity(outputs, dense, dim=-1)
        return distance.flatten(1).mean(1) if distance.ndim > 1 else distance
    error = (outputs - dense).square().reshape(len(outputs), -1).mean(1)
    return error / dense.var().clamp_min(1e-12)
