"""Task: what must be preserved while a network shrinks: data, loss, metric, an example input."""

import copy
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from lilliput.errors import near

Inputs = Tensor | dict[str, Tensor] | tuple[Tensor, ...]
Model = Callable[..., Any]
KEPT_BYTES = 2**30


def uniform(seeds: Tensor, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for each seed, as a pure function of the seed (splitmix64 as a counter).

    seeds: int64 of shape (n,). Returns float32 of shape (n, count). Augmentations draw from this and from nothing else.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.

    >>> bool((uniform(torch.tensor([7]), 2) == uniform(torch.tensor([7]), 2)).all())
    True
    """
    z = seeds[:, None] * count + torch.arange(1, count + 1)
    return (_mix(z) >> 40 & 0xFFFFFF).to(torch.float32) / 2**24


def _mix(z: Tensor) -> Tensor:
    z = z * -7046029254386353131
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ (z >> 31 & 0x1FFFFFFFF)


def take(inputs: Any, index: Tensor | slice) -> Any:
    """The examples `index` of a tensor, or of a dictionary or tuple of tensors."""
    if isinstance(inputs, dict):
        return {name: value[index] for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(value[index] for value in inputs)
    return inputs[index]


def length(inputs: Any) -> int:
    """How many examples `inputs` holds."""
    return len(next(iter(leaves(inputs))))


def leaves(inputs: Any) -> list[Tensor]:
    """The tensors of an input, in order."""
    if isinstance(inputs, dict):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple) else [inputs]


def call(model: Model, inputs: Any) -> Any:
    """`model` on a tensor, a tuple (positional) or a dictionary (by name)."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def predict(model: Model, inputs: Any, batch_size: int = 64) -> Tensor:
    """The outputs of `model` over all examples, without gradients, in eval mode, on the model's device."""
    training = isinstance(model, torch.nn.Module) and model.training
    if isinstance(model, torch.nn.Module):
        model.eval()
    with torch.no_grad():
        parts = [call(model, take(inputs, slice(i, i + batch_size))) for i in range(0, length(inputs), batch_size)]
    if training and isinstance(model, torch.nn.Module):
        model.train()
    return torch.cat(parts)


@dataclass(frozen=True)
class Batch:
    """Some examples: `inputs` (after augmentation), `targets` (None where there are no labels), `index` (int64, into
    the training examples, unlabelled ones behind the labelled) and `draw`, the number of the augmentation."""

    inputs: Inputs
    targets: Tensor | None
    index: Tensor
    draw: int


@dataclass(frozen=True)
class Score:
    """A metric's `value`, with the per-example `outcomes` (n,) where it is their mean, and the `outputs` behind it."""

    value: float
    outcomes: np.ndarray | None
    outputs: Tensor


def _classes(outputs: Tensor) -> Tensor:
    return outputs.argmax(-1) if outputs.ndim > 1 and outputs.shape[-1] > 1 else (outputs.flatten() > 0).long()


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the class is right, else 0, per example."""
    return (_classes(outputs) == targets).float()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error per example."""
    return (outputs - targets).square().flatten(1).mean(1) if outputs.ndim > 1 else (outputs - targets).square()


def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cosine similarity per example."""
    return F.cosine_similarity(outputs, targets, dim=-1)


def f1(outputs: Tensor, targets: Tensor) -> Tensor:
    """Macro-averaged F1 over the classes present in the targets; no mean over examples."""
    found, scores = _classes(outputs), []
    for label in targets.unique():
        hit = ((found == label) & (targets == label)).sum()
        scores.append(2 * hit / ((found == label).sum() + (targets == label).sum()))
    return torch.stack(scores).mean()


def auc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of a binary score, by ranks (ties shared); no mean over examples."""
    scores = (outputs[:, 1] - outputs[:, 0]) if outputs.ndim > 1 and outputs.shape[-1] == 2 else outputs.flatten()
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]
    positive = targets.bool()
    n, m = positive.sum(), (~positive).sum()
    area: Tensor = (ranks[positive].sum() - n * (n + 1) / 2) / (n * m)
    return area


def perplexity(outputs: Tensor, targets: Tensor) -> Tensor:
    """exp of the mean cross entropy; lower is better; no mean over examples."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten()).exp()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "bce": lambda output, target: F.binary_cross_entropy_with_logits(output.view_as(target), target.float()),
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "cosine": lambda output, target: 1 - cosine(output, target).mean(),
}
METRICS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "accuracy": (accuracy, True),
    "mse": (squared_error, False),
    "cosine": (cosine, True),
    "f1": (f1, True),
    "auc": (auc, True),
    "perplexity": (perplexity, False),
}


class Task:
    """What must be preserved: data in three splits, a loss, a metric, an example input.

    A split is `(inputs, targets)` of arrays or tensors, `inputs` alone, a Dataset, or a loader of any length; inputs
    are a tensor, a tuple, or a dictionary by argument name, with the examples along the first axis. It is read into
    memory once. Decisions read `val`; `test` is read once, at the end.

    loss: a name of `lilliput.task.LOSSES` or a function (output, target) -> mean over the batch. metric: a name of
    METRICS or a function (outputs, targets) -> outcomes (n,) whose mean is the score, or one number (F1, AUC), which
    is then bootstrapped over examples. augment: (inputs, seeds) -> inputs, a pure function of int64 seeds (n,).
    `draws` augmentations of each example are used in turn, so that the dense outputs can be computed once for each.

    Raises ValueError for an empty split, lengths that differ, or an unknown name; TypeError for data of another kind.

    >>> x, y = np.zeros((8, 2), "float32"), np.zeros(8, "int64")
    >>> Task("tiny", train=(x, y), val=(x, y), test=(x, y)).score(lambda x: torch.eye(2)[x[:, 0].long()], "val").value
    1.0
    """

    def __init__(
        self,
        name: str,
        train: Any,
        val: Any,
        test: Any = None,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "cross_entropy",
        metric: str | Callable[[Tensor, Tensor], Tensor] = "accuracy",
        *,
        higher_is_better: bool | None = None,
        augment: Callable[[Any, Tensor], Any] | None = None,
        draws: int = 8,
        batch_size: int = 64,
        unlabelled: Any = None,
    ) -> None:
        self.name, self.augment, self.batch_size = name, augment, batch_size
        self.draws = draws if augment is not None else 1
        self._augmented: dict[int, Any] = {}
        self._splits = {"train": _read(name, "train", train), "val": _read(name, "val", val)}
        if test is not None:
            self._splits["test"] = _read(name, "test", test)
        # A tuple is taken as inputs alone: without labels there is nothing else that it could hold.
        self._unlabelled = (
            _tensors(unlabelled)
            if isinstance(unlabelled, tuple)
            else (None if unlabelled is None else _read(name, "unlabelled", unlabelled)[0])
        )
        self.loss_name, self.loss = _named(name, "loss", loss, LOSSES)
        known = {key: value for key, (value, _) in METRICS.items()}
        self.metric_name, self.metric = _named(name, "metric", metric, known)
        if higher_is_better is None:
            higher_is_better = METRICS[metric][1] if isinstance(metric, str) else True
        self.higher_is_better = higher_is_better

    def with_draws(self, draws: int) -> "Task":
        """The same task with at most `draws` augmentations of each example."""
        other = copy.copy(self)
        other.draws = max(1, min(self.draws, draws))
        other.__dict__.pop("fingerprint", None)
        return other

    def split(self, split: str) -> tuple[Any, Tensor | None]:
        """(inputs, targets) of a split; raises KeyError where the task has none of that name."""
        if split not in self._splits:
            raise KeyError(f"Task {self.name}: split must be one of {sorted(self._splits)}, got {split!r}.")
        return self._splits[split]

    def has(self, split: str) -> bool:
        """Whether the task has a split of that name (test is optional)."""
        return split in self._splits

    @cached_property
    def example(self) -> Any:
        """The first training input, as a batch of one."""
        return take(self._splits["train"][0], slice(0, 1))

    @cached_property
    def _pool(self) -> Any:
        inputs = self._splits["train"][0]
        if self._unlabelled is None:
            return inputs
        if isinstance(inputs, dict):
            return {name: torch.cat([value, self._unlabelled[name]]) for name, value in inputs.items()}
        if isinstance(inputs, tuple):
            return tuple(torch.cat(pair) for pair in zip(inputs, self._unlabelled, strict=True))
        return torch.cat([inputs, self._unlabelled])

    @property
    def examples(self) -> int:
        """How many examples training draws from, unlabelled ones included."""
        return length(self._pool)

    def inputs(self, index: Tensor, draw: int) -> Any:
        """Training inputs `index` under augmentation number `draw`: the same tensors whenever they are asked for."""
        if self.augment is None:
            return take(self._pool, index)
        draw = draw % self.draws
        table = self._augmented.get(draw)
        if table is not None:
            return take(table, index)
        return self.augment(take(self._pool, index), _mix(index * 65537 + draw + 1))

    def prepare(self, draw: int) -> None:
        """Augment every training example once and keep the result, where memory allows it."""
        size = sum(leaf.numel() * leaf.element_size() for leaf in leaves(self._pool))
        if self.augment is not None and draw % self.draws not in self._augmented and size * self.draws <= KEPT_BYTES:
            parts = [self.inputs(index, draw) for index in torch.arange(self.examples).split(1024)]
            self._augmented[draw % self.draws] = _concatenate(parts)

    def batch(self, index: Tensor, draw: int) -> Batch:
        """The batch of examples `index` under augmentation `draw`."""
        targets = self._splits["train"][1]
        if targets is not None and self._unlabelled is not None:
            known = index[index < len(targets)]
            index = torch.cat([known, index[index >= len(targets)]])
            targets = targets[known]
        elif targets is not None:
            targets = targets[index]
        return Batch(self.inputs(index, draw), targets, index, draw % self.draws)

    def batches(self, steps: int, seed: int, batch_size: int | None = None, first: int = 0) -> Iterator[Batch]:
        """`steps` shuffled batches, counted from step `first`; a pure function of (seed, step)."""
        size = min(batch_size or self.batch_size, self.examples)
        per_epoch = self.examples // size
        order, shown = torch.empty(0), -1
        for step in range(first, steps):
            epoch, place = divmod(step, per_epoch)
            if epoch != shown:
                generator = torch.Generator().manual_seed(seed * 1000003 + epoch)
                order, shown = torch.randperm(self.examples, generator=generator), epoch
            yield self.batch(order[place * size : (place + 1) * size], epoch)

    def supervised(self, output: Tensor, batch: Batch) -> Tensor:
        """The task's loss over the labelled examples of a batch (zero where it has none)."""
        if batch.targets is None or len(batch.targets) == 0:
            return output.sum() * 0
        loss: Tensor = self.loss(output[: len(batch.targets)], batch.targets)
        return loss

    def score(self, model: Model, split: str = "val") -> Score:
        """The metric of a model (or of any function from inputs to outputs) on a split.

        Raises ValueError when the metric is not a finite number.
        """
        inputs, _ = self.split(split)
        return self.rate(predict(model, inputs), split)

    def rate(self, outputs: Tensor, split: str, index: np.ndarray | None = None) -> Score:
        """The metric of outputs that were computed before; `index` rates a resampled split instead."""
        targets = self._splits[split][1]
        outputs = outputs.detach().float().cpu()
        target = outputs if targets is None else targets
        chosen = outputs if index is None else outputs[torch.from_numpy(index)]
        value = self.metric(chosen, target if index is None else target[torch.from_numpy(index)])
        outcomes = value.double().numpy() if value.ndim == 1 else None
        number = float(value.double().mean())
        if not np.isfinite(number):
            raise ValueError(
                f"Task {self.name}: metric {self.metric_name!r} must be a finite number, got {number} on {split}. "
                "Check the metric on the dense model's outputs, and the outputs for NaN."
            )
        return Score(number, outcomes, outputs)

    def loss_of(self, dense: float, score: float) -> float:
        """What was lost, in points of the metric: positive is worse, whichever way the metric runs."""
        return dense - score if self.higher_is_better else score - dense

    def divergence(self, outputs: Tensor, dense: Tensor) -> Tensor:
        """How far outputs are from the dense outputs, per example: Kullback-Leibler for classes and bits, one minus
        cosine for embeddings, else squared error relative to the dense outputs' variance. Lower variance than a metric.
        """
        outputs, dense = outputs.float(), dense.float()
        if self.loss_name == "cross_entropy" and outputs.ndim == 2:
            p = F.log_softmax(dense, -1)
            return (p.exp() * (p - F.log_softmax(outputs, -1))).sum(-1)
        if self.loss_name == "bce":
            p = torch.sigmoid(dense)
            return (
                (
                    p * (F.logsigmoid(dense) - F.logsigmoid(outputs))
                    + (1 - p) * (F.logsigmoid(-dense) - F.logsigmoid(-outputs))
                )
                .flatten(1)
                .sum(-1)
            )
        if self.loss_name == "cosine":
            return 1 - cosine(outputs, dense)
        error = (outputs - dense).square().reshape(len(outputs), -1).mean(1)
        return error / dense.var().clamp_min(1e-12)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the arrays, the loss, the metric and the augmentation: part of every key in the store."""
        digest = hashlib.blake2b(digest_size=16)
        for split, (inputs, targets) in sorted(self._splits.items()):
            digest.update(split.encode())
            for tensor in [*leaves(inputs), *([] if targets is None else [targets])]:
                digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for tensor in [] if self._unlabelled is None else leaves(self._unlabelled):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        for part in (self.loss, self.metric, self.augment):
            digest.update(source(part).encode())
        digest.update(f"{self.draws} {self.batch_size} {self.higher_is_better}".encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{length(inputs)} {split}" for split, (inputs, _) in self._splits.items())
        return f"Task({self.name!r}: {sizes}; {self.loss_name}, {self.metric_name})"


def source(part: Any) -> str:
    """The source text of a function or class, or its name where there is none to read."""
    try:
        return inspect.getsource(part)
    except (TypeError, OSError):
        return getattr(part, "__qualname__", repr(type(part)))


def _named(task: str, what: str, given: Any, known: dict[str, Any]) -> tuple[str, Any]:
    if isinstance(given, str):
        if given not in known:
            raise ValueError(
                f"Task {task}: {what} must be a function or a known name, got {given!r}. {near(given, known)}"
            )
        return given, known[given]
    if not callable(given):
        raise TypeError(f"Task {task}: {what} must be a name or a function, got {type(given).__name__}.")
    return getattr(given, "__name__", what), given


def _tensor(value: Any) -> Tensor:
    tensor = torch.as_tensor(value)
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _tensors(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _tensor(part) for name, part in value.items()}
    return tuple(map(_tensor, value)) if isinstance(value, tuple) else _tensor(value)


def _read(task: str, split: str, data: Any) -> tuple[Any, Tensor | None]:
    who = f"Task {task}: {split}"
    if isinstance(data, Dataset) and not isinstance(data, DataLoader):
        data = [default_collate([data[i] for i in range(len(data))])] if len(data) else []  # type: ignore[arg-type]
    if isinstance(data, tuple) and len(data) == 2:
        inputs, targets = _tensors(data[0]), None if data[1] is None else _tensor(data[1])
    elif isinstance(data, np.ndarray | Tensor | dict):
        inputs, targets = _tensors(data), None
    elif hasattr(data, "__iter__") and not isinstance(data, str | bytes):
        parts = [_read(task, split, tuple(part) if isinstance(part, list) else part) for part in data]
        if not parts:
            raise ValueError(f"{who} must hold at least one batch, got an empty loader. Check its filter or sampler.")
        inputs = _concatenate([part for part, _ in parts])
        labelled = [target for _, target in parts if target is not None]
        targets = torch.cat(labelled) if labelled else None
    else:
        raise TypeError(f"{who} must be (inputs, targets), inputs, a Dataset or a loader, got {type(data).__name__}.")
    counts = {len(leaf) for leaf in leaves(inputs)} | (set() if targets is None else {len(targets)})
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"{who} must hold inputs and targets of one length above zero, got lengths {sorted(counts)}.")
    return inputs, targets


def _concatenate(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(group) for group in zip(*parts, strict=True))
    return torch.cat(parts)
