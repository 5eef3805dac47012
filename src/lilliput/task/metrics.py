"""Metrics by name: functions (outputs, targets) -> outcomes (n,), whose mean is the score, or one number.

A metric that gives one number (F1, AUC, R2) is resampled by examples where an interval is asked for. `lower_is_better`
says which way it runs. One that has a keyword-only argument `meaning` is given the task's description of its outputs.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.registry import register
from lilliput.task.meaning import Meaning, matched

F_ = TypeVar("F_", bound=Callable[..., Any])


def lower_is_better(metric: F_) -> F_:
    """Say that a metric is an error: the smaller, the better."""
    metric.higher_is_better = False  # type: ignore[attr-defined]
    return metric


def reads_labels(metric: F_) -> F_:
    """Say that a metric compares with labels: without any, the dense network's predictions stand in for them."""
    metric.targets = "labels"  # type: ignore[attr-defined]
    return metric


def _per_example(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1) if values.ndim > 1 else values


@register("metric")
@reads_labels
def accuracy(outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> Tensor:
    """Compute the share of right labels of each example; padding does not count, nor an example that is nothing else.

    Args:
        outputs: with the classes on any axis, or yes-no logits.
        targets: labels (n, ...).
        meaning: the axis of the classes and the label that is padding.

    Returns:
        (n,), or fewer where examples have no label at all.

    Example:
        >>> outputs, targets = torch.eye(3)[torch.tensor([[0, 1, 2, 2]])], torch.tensor([[0, 1, 0, -100]])
        >>> accuracy(outputs, targets, meaning=Meaning("logits"))
        tensor([0.6667])
    """
    right, targets = matched(meaning.predictions(outputs), meaning.classes(targets, outputs), "accuracy")
    return _shares(right == targets, targets, meaning)


@register("metric")
@lower_is_better
def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean squared error of each example.

    Args:
        outputs: (n, ...).
        targets: of the same shape; axes of size one may be missing in either.

    Returns:
        (n,)

    Example:
        >>> mse(torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([5., 0.])
    """
    outputs, targets = matched(outputs, targets, "mse")
    return _per_example((outputs - targets).square())


@register("metric")
@lower_is_better
def mae(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean absolute error of each example.

    Args:
        outputs: (n, ...).
        targets: of the same shape; axes of size one may be missing in either.

    Returns:
        (n,)

    Example:
        >>> mae(torch.zeros(2, 2), torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([2., 0.])
    """
    outputs, targets = matched(outputs, targets, "mae")
    return _per_example((outputs - targets).abs())


@register("metric")
def psnr(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image in decibels: 10 log10(1 / mse) for values in [0, 1], at most
    100.

    Args:
        outputs: (n, ...), values between 0 and 1.
        targets: of the same shape.

    Returns:
        (n,), decibels.

    Example:
        >>> psnr(torch.full((1, 1, 2, 2), 0.6), torch.full((1, 1, 2, 2), 0.5))
        tensor([20.0000])
    """
    return -10 * mse(outputs, targets).clamp_min(1e-10).log10()


@register("metric")
def r2(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute R2 = 1 - sum of squared errors / sum of squares around the mean, averaged over outputs.

    One number over all examples: 1 is perfect, 0 is as good as the mean of the targets.

    Args:
        outputs: (n,) or (n, outputs).
        targets: of the same shape.

    Returns:
        A scalar; not a number where all targets are equal.

    Example:
        >>> r2(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor(0.5000)
    """
    outputs, targets = matched(outputs, targets, "r2")
    error = (outputs - targets).double().square().sum(0)
    spread = (targets - targets.mean(0)).double().square().sum(0)
    return (1 - error / spread).mean().float()


@register("metric")
def cosine(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the cosine similarity of each example along the last axis.

    Args:
        outputs: (n, ..., d).
        targets: of the same shape.

    Returns:
        (n,), the mean over what lies between.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 0.0]]))
        tensor([1.])
    """
    return _per_example(F.cosine_similarity(*matched(outputs, targets, "cosine"), dim=-1))


def _counted(outputs: Tensor, targets: Tensor, meaning: Meaning, who: str) -> tuple[Tensor, Tensor, Tensor]:
    """How often each class is right, predicted, and present: of each label "yes" alone, where an example has several.

    Classes that are neither present nor predicted are left out.
    """
    predicted, targets = matched(meaning.predictions(outputs), meaning.classes(targets, outputs), who)
    known = meaning.labelled(targets)
    if meaning.kind == "bits" and targets.ndim > 1 and targets[0].numel() > 1:
        said, there = (((x == 1) & known).flatten(1) for x in (predicted, targets))
        return (said & there).sum(0), said.sum(0), there.sum(0)
    classes, places = torch.cat([predicted[known], targets[known].to(predicted)]).unique(return_inverse=True)
    said, there = places.chunk(2)
    hit, said, there = (part.bincount(minlength=len(classes)) for part in (said[said == there], said, there))
    return hit, said, there


def _shares(right: Tensor, targets: Tensor, meaning: Meaning) -> Tensor:
    """The share of an example's labels that are right, for each example that has a label."""
    known = meaning.labelled(targets).reshape(len(targets), -1)
    some = known.any(1)
    return ((right.reshape(len(targets), -1) & known).sum(1) / known.sum(1).clamp_min(1))[some]


@register("metric")
@reads_labels
def f1(outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> Tensor:
    """Compute the macro-averaged F1 over the classes that are present or predicted, over all examples.

    Padding does not count. Of yes-no logits with several labels an example, (n, labels), it is the mean over labels of
    the F1 of "yes".

    Args:
        outputs: with the classes on any axis, or yes-no logits.
        targets: labels (n, ...).
        meaning: the axis of the classes and the label that is padding.

    Returns:
        A scalar.

    Example:
        >>> f1(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 1, 0]), meaning=Meaning("logits"))
        tensor(0.6667)
    """
    hit, said, there = _counted(outputs, targets, meaning, "f1")
    return (2 * hit / (said + there).clamp_min(1)).mean()


@register("metric")
@reads_labels
def iou(outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> Tensor:
    """Compute the mean intersection over union of the classes that are present or predicted, over all examples.

    Padding does not count. Of yes-no logits with several labels an example, (n, labels), it is the mean over labels of
    the intersection over union of "yes".

    Args:
        outputs: with the classes on any axis, or yes-no logits.
        targets: labels (n, ...).
        meaning: the axis of the classes and the label that is padding.

    Returns:
        A scalar.

    Example:
        >>> iou(torch.eye(2)[[0, 1, 1]], torch.tensor([0, 1, 0]), meaning=Meaning("logits"))
        tensor(0.5000)
    """
    hit, said, there = _counted(outputs, targets, meaning, "iou")
    return (hit / (said + there - hit).clamp_min(1)).mean()


@register("metric", name="top 5")
@reads_labels
def top5(outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> Tensor:
    """Compute the share of labels of each example that are among the five largest outputs; padding does not count.

    Args:
        outputs: with the classes on any axis.
        targets: labels (n, ...).
        meaning: the axis of the classes and the label that is padding.

    Returns:
        (n,), or fewer where examples have no label at all.

    Raises:
        ValueError: where the outputs have no axis of classes.

    Example:
        >>> top5(torch.arange(6.0).expand(2, 6), torch.tensor([1, 0]), meaning=Meaning("logits"))
        tensor([1., 0.])
    """
    axis = meaning.class_axis(outputs)
    if axis is None:
        raise ValueError(f"top 5: outputs must have an axis of classes, got {tuple(outputs.shape)}.")
    targets = meaning.classes(targets, outputs)
    first = outputs.topk(min(5, outputs.shape[axis]), axis).indices
    return _shares((first == targets.unsqueeze(axis)).any(axis), targets, meaning)


@register("metric")
@lower_is_better
def rmse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the root of the mean squared error over all values.

    Args:
        outputs: (n, ...).
        targets: of the same shape; axes of size one may be missing in either.

    Returns:
        A scalar.

    Example:
        >>> rmse(torch.zeros(2, 1), torch.tensor([3.0, 5.0]))
        tensor(4.1231)
    """
    outputs, targets = matched(outputs, targets, "rmse")
    return (outputs - targets).square().mean().sqrt()


@register("metric")
@reads_labels
def auc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the area under the ROC curve of a binary score, by ranks (ties shared); one number over all examples.

    Args:
        outputs: one score an example, (N) or (N, 1), or the logits of two classes (N, 2).
        targets: 0 or 1, (N) or (N, 1).

    Returns:
        A scalar; not a number where there is but one class.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
        tensor(0.7500, dtype=torch.float64)
    """
    scores = (outputs[:, 1] - outputs[:, 0]) if outputs.ndim > 1 and outputs.shape[-1] == 2 else outputs
    scores, targets = matched(scores, targets, "auc")
    scores, targets = scores.flatten(), targets.flatten()
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts.double() - 1) / 2)[inverse]
    positive = targets.bool()
    n, m = positive.sum(), (~positive).sum()
    area: Tensor = (ranks[positive].sum() - n * (n + 1) / 2) / (n * m)
    return area


@register("metric")
@lower_is_better
@reads_labels
def perplexity(outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> Tensor:
    """Compute the perplexity over all examples: exp of the mean cross entropy over labels that are not padding.

    Args:
        outputs: with the classes on any axis.
        targets: labels (n, ...).
        meaning: the axis of the classes and the label that is padding.

    Returns:
        A scalar.

    Example:
        >>> perplexity(torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), meaning=Meaning("logits", labels=(3,)))
        tensor(5.)
    """
    logs, targets = meaning.log_probabilities(outputs), meaning.classes(targets, outputs)
    logs = F.log_softmax(outputs, -1) if logs is None else logs
    ignore = -100 if meaning.ignore is None else meaning.ignore
    return F.nll_loss(logs.flatten(0, -2), targets.flatten(), ignore_index=ignore).exp()


@register("metric", name="exact match")
@reads_labels
def exact_match(outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> Tensor:
    """Tell whether a whole decoded sequence is right up to its end: 1 or 0 for each example.

    Args:
        outputs: decoded tokens, int64 (n, T).
        targets: the right tokens (n, T), padded.
        meaning: the token that is padding.

    Returns:
        (n,)

    Example:
        >>> tokens = torch.tensor([[5, 2, -100], [5, 7, 2]])
        >>> exact_match(torch.tensor([[5, 2, 9], [5, 8, 2]]), tokens, meaning=Meaning("logits"))
        tensor([1., 0.])
    """
    return ((outputs == targets) | ~meaning.labelled(targets)).all(1).float()


@register("metric", name="edit distance")
@lower_is_better
@reads_labels
def edit_distance(outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> Tensor:
    """Count insertions, deletions and replacements from a decoded sequence to the right one, by the latter's length.

    Args:
        outputs: decoded tokens, int64 (n, T), padded.
        targets: the right tokens (n, T), padded.
        meaning: the token that is padding.

    Returns:
        (n,)

    Example:
        >>> edit_distance(torch.tensor([[5, 2, 9]]), torch.tensor([[5, 9, -100]]), meaning=Meaning("logits"))
        tensor([0.5000])

    Source:
        Levenshtein, Binary codes capable of correcting deletions, insertions and reversals, 1966.
    """
    distances = []
    for given, right in zip(outputs, targets, strict=True):
        a, b = given[meaning.labelled(given)].tolist(), right[meaning.labelled(right)].tolist()
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            before, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
        distances.append(row[-1] / max(1, len(b)))
    return torch.tensor(distances)
