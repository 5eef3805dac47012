"""Arrays: the task of examples that are held in memory, with labels or without."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lilliput.errors import near
from lilliput.registry import entries, lookup
from lilliput.task.adopted import adopted
from lilliput.task.digest import digest_function, digest_tensor
from lilliput.task.meaning import Kind, Meaning, bound, of_loss
from lilliput.task.nested import Inputs, Model, joined, leaves, length, mapped, predict, take
from lilliput.task.protocol import Batch, Indices, Score, Task
from lilliput.task.read import Reading, tensors
from lilliput.task.transforms import augmentation, seeds

KEPT_BYTES = 2**30
MOST_PARTS = 1000
"""Classes that are told apart in what is reported."""
Function = Callable[..., Any]


class Arrays(Task, default=True):
    """Hold examples in memory, in up to three splits, with a loss and a metric by name or by function.

    A split is `(inputs, targets)` of arrays or tensors, `(input, another, targets)`, `inputs` alone, a dictionary or a
    table with a column of targets, a data set (of torch, of Hugging Face), or a loader of any length. Inputs, targets
    and outputs may each be a tensor or tensors in tuples and dictionaries, examples along the first axis: a tuple of
    inputs is given to the model in order, a dictionary by name. Everything is read once; arrays that are mapped from a
    file stay there.

    Without targets the dense network's outputs are the targets: of a metric that reads labels its predictions, of a
    loss on logits their softmax, otherwise the outputs as they are. `shrink` and `run` say which network that is;
    where a task is scored by hand, `task.against(dense)` does.

    Args:
        name: what the task is called in files and reports.
        train: what is trained on.
        val: what decisions read.
        test: what is read once, at the end; it may be left out.
        loss: a registered name (`lilliput methods` lists them) or a function (output, target) -> mean over the batch.
        metric: a registered name or a function (outputs, targets) -> outcomes (n,) whose mean is the score, or one
            number (F1, AUC), which is then resampled over examples; also a metric of scikit-learn or torchmetrics.
        higher_is_better: which way a metric of your own runs; known for registered ones.
        augment: (inputs, seeds) -> inputs, a pure function of int64 seeds (n,); or a random transform of one example:
            of torchvision, of albumentations, or a function of one argument (`lilliput.PerExample`). A data set that
            transforms its examples at random needs none: each is read again for each augmentation, from a seed.
        draws: how many augmentations of each example are used in turn, so that the dense outputs can be kept for each.
        batch_size: examples in a training batch.
        unlabelled: more inputs, which training imitates the dense network on.
        outputs: what the outputs are: "logits", "probabilities", "bits", "directions" or "values"; read off the loss
            without it.
        class_axis: the axis of the outputs that holds the classes, where shapes leave it open.
        ignore_index: the label that means "no label here": it counts in neither loss nor metric.
        target: the name of the targets in dictionaries and tables; "labels", "label", "targets" or "target" without it.
        groups: for splits, such as "val" and "test", the group of each example: names or numbers (n,). What each group
            loses is reported, as it is of each class, and `--worst-class` holds for them too.
        padding: what shorter examples are filled up with along their first axis, their labels with `ignore_index`;
            without it examples must be of one length, unless one of the inputs is a mask.

    Raises:
        ValueError: for an empty split, lengths that differ, or an unknown name.
        TypeError: for data of another kind.

    Example:
        >>> words, tags = torch.randint(9, (8, 5)), torch.randint(3, (8, 5))
        >>> tags[:, 3:] = -100  # padding
        >>> Arrays("tags", train=(words, tags), val=(words, tags)).score(lambda x: torch.eye(3)[x % 3]).outcomes.shape
        (8,)
    """

    def __init__(
        self,
        name: str,
        train: Any,
        val: Any,
        test: Any = None,
        loss: str | Function = "cross_entropy",
        metric: str | Function = "accuracy",
        *,
        higher_is_better: bool | None = None,
        augment: Callable[[Any, Tensor], Any] | None = None,
        draws: int = 8,
        batch_size: int = 64,
        unlabelled: Any = None,
        outputs: Kind | None = None,
        class_axis: int | None = None,
        ignore_index: int = -100,
        target: str | None = None,
        padding: float | None = None,
        groups: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.augment, self.batch_size = name, augmentation(augment), batch_size
        self._augmented: dict[int, Any] = {}
        self._dense: Model | None = None
        self._said: dict[str, Any] = {}
        self._reading = reading = Reading(f"Task {name}", target, padding, ignore_index)
        self._changing = train if augment is None and reading.varies("train", train) else None
        self.draws = 1 if augment is None and self._changing is None else draws
        self._splits = {"train": reading.read("train", train), "val": reading.read("val", val)}
        if test is not None:
            self._splits["test"] = reading.read("test", test)
        # A tuple is taken as inputs alone: without labels there is nothing else that it could hold.
        self._unlabelled = (
            tensors(unlabelled)
            if isinstance(unlabelled, tuple)
            else (None if unlabelled is None else reading.read("unlabelled", unlabelled)[0])
        )
        self.labelled = self._splits["train"][1] is not None
        self.loss_name, self._loss = _named(name, "loss", loss)
        self.metric_name, self._metric = _named(name, "metric", adopted(metric))
        if higher_is_better is None:
            higher_is_better = getattr(self._metric, "higher_is_better", True)
        self.higher_is_better = higher_is_better
        self.meaning = self._described(outputs, class_axis, ignore_index)
        self._groups = {split: self._grouped(split, given) for split, given in (groups or {}).items()}
        self.criterion, self.metric = bound(self._loss, self.meaning), bound(self._metric, self.meaning)

    def _grouped(self, split: str, given: Any) -> NDArray[np.str_]:
        """The group of each example of a split, as text."""
        groups = np.asarray(given).astype(str)
        if split not in self._splits or groups.shape != (self.size(split),):
            wanted = self.size(split) if split in self._splits else f"one of the splits {sorted(self._splits)}"
            raise ValueError(f"Task {self.name}: groups of {split} must be {wanted} names, got shape {groups.shape}.")
        return groups

    def parts(self, split: str) -> dict[str, NDArray[np.bool_]]:
        targets, found = self.split(split)[1], {}
        if isinstance(targets, Tensor) and self.meaning.kind in ("logits", "probabilities", "bits"):
            if self.meaning.kind != "bits" and targets.ndim == 2 and targets.shape[1] > 1:
                targets = targets.argmax(1)  # one-hot rows
            classes = targets.reshape(len(targets), -1)
            names = classes[:, 0].unique().tolist() if classes.shape[1] == 1 else []
            if len(names) <= MOST_PARTS:
                found = {
                    f"class {name:g}": (classes[:, 0] == name).numpy() for name in names if name != self.meaning.ignore
                }
        groups = self._groups.get(split)
        if groups is not None:
            found |= {str(name): groups == name for name in np.unique(groups)}
        return found

    def _described(self, outputs: Kind | None, axis: int | None, ignore: int) -> Meaning:
        kind = outputs or of_loss(self._loss)
        if kind == "values" and outputs is None and axis is not None:
            kind = "logits"
        known = [targets for _, targets in self._splits.values() if isinstance(targets, Tensor)]
        classes = [targets for targets in known if not targets.is_floating_point() or kind == "bits"]
        # Looked for once: a step of training has no time for it.
        padded = any(bool((targets == ignore).any()) for targets in classes)
        labels = tuple(classes[0].shape[1:]) if classes else None
        return Meaning(kind, axis, ignore if padded else None, labels)

    def with_draws(self, draws: int) -> "Arrays":
        other = copy.copy(self)
        other.draws = max(1, min(self.draws, draws))
        other.__dict__.pop("fingerprint", None)
        return other

    def against(self, dense: Model) -> "Arrays":
        if self._dense is not None or all(targets is not None for _, targets in self._splits.values()):
            return self
        other = copy.copy(self)
        # What is trained or pruned later must not move the targets.
        other._dense, other._said = copy.deepcopy(dense) if isinstance(dense, nn.Module) else dense, {}
        other.__dict__.pop("fingerprint", None)
        return other

    def imitated(self, outputs: Any) -> Any:
        kind = of_loss(self._loss)
        meaning = replace(self.meaning, kind=kind)

        def one(leaf: Tensor) -> Tensor:
            axis = meaning.class_axis(leaf)
            if kind == "logits" and axis is None:
                raise ValueError(
                    f"Task {self.name}: class_axis must be given where there are no labels to find it by, got outputs "
                    f"of shape {tuple(leaf.shape)}."
                )
            if kind == "logits" and axis is not None:
                return leaf if self.meaning.kind == "probabilities" else leaf.softmax(axis)
            return torch.sigmoid(leaf) if kind == "bits" else leaf

        return mapped(one, outputs)

    def _targets(self, split: str) -> Any:
        """What the metric compares with: the labels of a split, or what the dense network says of its inputs.

        Raises:
            ValueError: where there are no labels and no dense network is known.
        """
        inputs, targets = self.split(split)
        if targets is not None:
            return targets
        if self._dense is None:
            raise ValueError(
                f"Task {self.name}: a score must have targets to compare with, but {split} has none. Say which network "
                "is to be preserved: task.against(dense).score(model)."
            )
        if split not in self._said:
            outputs = mapped(_plain, predict(self._dense, inputs))
            reads = getattr(self._metric, "targets", "")
            self._said[split] = mapped(self.meaning.predictions, outputs) if reads == "labels" else outputs
        return self._said[split]

    def split(self, split: str) -> tuple[Any, Any]:
        """(inputs, targets or None) of a split.

        Raises:
            KeyError: where the task has none of that name.
        """
        if split not in self._splits:
            raise KeyError(f"Task {self.name}: split must be one of {sorted(self._splits)}, got {split!r}.")
        return self._splits[split]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self._splits)

    def probe(self, split: str) -> Batch:
        return Batch(*self.split(split))

    @cached_property
    def example(self) -> Inputs:
        return take(self._splits["train"][0], slice(0, 1))

    @cached_property
    def _pool(self) -> Any:
        inputs = self._splits["train"][0]
        return inputs if self._unlabelled is None else joined([inputs, self._unlabelled])

    @property
    def examples(self) -> int:
        """How many examples training draws from, unlabelled ones included."""
        return length(self._pool)

    def inputs(self, index: Tensor, draw: int) -> Any:
        """Training inputs under an augmentation: the same tensors whenever they are asked for.

        Args:
            index: int64 (n,) training examples, unlabelled ones behind the labelled.
            draw: the number of the augmentation.
        """
        draw = draw % self.draws
        table = self._augmented.get(draw)
        if table is not None:
            return take(table, index)
        if self._changing is not None:
            return self._read_again(index, draw)
        inputs = take(self._pool, index)
        return inputs if self.augment is None else self.augment(inputs, seeds(index, draw))

    def _read_again(self, index: Tensor, draw: int) -> Any:
        """Examples of a data set that transforms them itself; unlabelled ones, which come behind, are as they are."""
        known = index < length(self._splits["train"][0])
        parts = [] if known.all() else [take(self._pool, index[~known])]
        if known.any():
            parts.insert(0, self._reading.examples(self._changing, index[known], draw, self._reading.who)[0])
        return joined(parts)

    def prepare(self, draw: int) -> None:
        """Augment every training example once and keep the result, where memory allows it."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves(self._pool))
        if self.draws > 1 and draw % self.draws not in self._augmented and size * self.draws <= KEPT_BYTES:
            parts = [self.inputs(index, draw) for index in torch.arange(self.examples).split(1024)]
            self._augmented[draw % self.draws] = joined(parts)

    def batch(self, index: Tensor, draw: int) -> Batch:
        """The batch of some training examples under an augmentation; labelled examples come first in it.

        Args:
            index: as in `inputs`.
            draw: as in `inputs`.
        """
        targets = self._splits["train"][1]
        if targets is not None and self._unlabelled is not None:
            count = length(targets)
            known = index[index < count]
            index = torch.cat([known, index[index >= count]])
            targets = take(targets, known)
        elif targets is not None:
            targets = take(targets, index)
        return Batch(self.inputs(index, draw), targets, index, draw % self.draws)

    def batches(self, steps: int, seed: int, batch_size: int | None = None, first: int = 0) -> Iterator[Batch]:
        size = min(batch_size or self.batch_size, self.examples)
        per_epoch = self.examples // size
        order, shown = torch.empty(0), -1
        for step in range(first, steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != shown:
                generator = torch.Generator().manual_seed(seed * 1000003 + epoch)
                order, shown = torch.randperm(self.examples, generator=generator), epoch
                if steps - step >= per_epoch:  # all of them will be asked for, and again when the draw comes back
                    self.prepare(epoch)
            yield self.batch(order[place * size : (place + 1) * size], epoch)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        count = 0 if batch.targets is None else length(batch.targets)
        if not count:
            return torch.stack([leaf.sum() for leaf in leaves(output)]).sum() * 0
        output = output if length(output) == count else take(output, slice(0, count))
        loss: Tensor = self.criterion(output, batch.targets)
        return loss

    def score(self, model: Model, split: str = "val") -> Score:
        return self.rate(predict(model, self.split(split)[0]), split)

    def rate(self, outputs: Any, split: str) -> Score:
        """The metric of outputs that were computed before.

        Args:
            outputs: what a network returned for the inputs of the split.
            split: its name.
        """
        return self._measured(mapped(_plain, outputs), self._targets(split), split)

    def _measured(self, outputs: Any, targets: Any, split: str, kept: bool = True) -> Score:
        """The metric of outputs; kept: whether they are what a network gives on the probe of the split."""
        value = _tensor(self.metric(outputs, targets))
        number = float(value.double().mean())
        if not np.isfinite(number):
            raise ValueError(
                f"Task {self.name}: metric {self.metric_name!r} must be a finite number, got {number} on {split}. "
                "Check the metric on the dense model's outputs, and the outputs for NaN."
            )
        outcomes = value.double().numpy() if value.ndim == 1 else None

        def again(index: Indices) -> float:
            chosen = torch.from_numpy(index)
            try:
                value = _tensor(self.metric(take(outputs, chosen), take(targets, chosen)))
            except (ValueError, RuntimeError, ArithmeticError, IndexError):
                return float("nan")  # it is defined on all examples, but not on these
            return float(value.double().mean())

        return Score(
            number, outcomes, outputs if kept else None, None if outcomes is not None else again, length(outputs)
        )

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for split, (inputs, targets) in sorted(self._splits.items()):
            digest.update(split.encode())
            for tensor in [*leaves(inputs), *leaves(targets)]:
                digest_tensor(digest, tensor)
        for tensor in leaves(self._unlabelled):
            digest_tensor(digest, tensor)
        for part in (self._loss, self._metric, self.augment, *([] if self._dense is None else [self._dense])):
            digest_function(digest, part)
        for split, groups in sorted(self._groups.items()):
            digest.update(f"{split} {groups.tolist()}".encode())
        digest.update(f"{self.draws} {self.batch_size} {self.higher_is_better} {self.meaning}".encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{self.size(split)} {split}" for split in self.splits)
        how = ", ".join(filter(None, (self.loss_name, self.metric_name)))
        return f"{type(self).__name__}({self.name!r}: {sizes}; {how})"


def _plain(leaf: Tensor) -> Tensor:
    return leaf.detach().float().cpu() if leaf.is_floating_point() else leaf.detach().cpu()


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.as_tensor(value)


def _named(task: str, family: str, given: Any) -> tuple[str, Any]:
    if isinstance(given, str):
        try:
            return given, lookup(family, given)
        except KeyError as error:
            known = [entry.name for entry in entries(family)]
            raise ValueError(
                f"Task {task}: {family} must be a function or a known name, got {given!r}. {near(given, known)}"
            ) from error
    if not callable(given):
        raise TypeError(f"Task {task}: {family} must be a name or a function, got {type(given).__name__}.")
    return getattr(given, "__name__", family), given
