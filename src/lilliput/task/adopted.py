"""Metrics of scikit-learn and torchmetrics as metrics of a task: each is given what it reads, in its own order."""

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.task.meaning import Meaning, matched

LOWER = ("error", "loss", "deviance", "rate", "perplexity")
"""Words at the end of the names of metrics that are errors."""
SCORES = ("y_score", "y_proba", "y_prob")
"""What scikit-learn calls the argument of a metric that reads probabilities or scores in place of labels."""


def adopted(metric: Any) -> Any:
    """A metric of another library as a function (outputs, targets, *, meaning) -> one number; any other as it is.

    scikit-learn's functions take the targets first, then labels or probabilities, as arrays of numpy; a scorer
    (`make_scorer`) stands for its function. Objects of torchmetrics keep what they have seen; here they start anew
    with each call. Both get classes on the axis where they look for them, and no padding.

    Args:
        metric: what a person gives a task as its metric.

    Example:
        >>> from sklearn.metrics import balanced_accuracy_score
        >>> outputs, targets = torch.eye(2)[[0, 1, 1, 1]], torch.tensor([0, 1, 1, 0])
        >>> adopted(balanced_accuracy_score)(outputs, targets, meaning=Meaning("logits"))
        0.75
    """
    function, settings, sign = _unwrapped(metric)
    library = str(getattr(function, "__module__", "") or "").partition(".")[0]
    if library == "sklearn" and callable(function) and not isinstance(function, type):
        name = str(getattr(function, "__name__", "metric"))
        higher = sign > 0 if sign else not name.endswith(LOWER)
        return _named(partial(_by_sklearn, partial(function, **settings), _reads_scores(function)), name, higher)
    if isinstance(metric, nn.Module) and any(kind.__module__.startswith("torchmetrics") for kind in type(metric).mro()):
        known: Any = getattr(metric, "higher_is_better", None)
        return _named(partial(_by_torchmetrics, metric), type(metric).__name__, known is not False)
    if library == "torchmetrics" and not isinstance(metric, type):
        name = str(getattr(function, "__name__", "metric"))
        return _named(partial(_in_form, partial(function, **settings)), name, not name.endswith(LOWER))
    return metric


def _unwrapped(metric: Any) -> tuple[Any, dict[str, Any], int]:
    """(function, settings, sign) of a partial function or a scorer; the sign is 0 where nobody says it."""
    if hasattr(metric, "_score_func"):
        return metric._score_func, dict(metric._kwargs), int(metric._sign)
    if isinstance(metric, partial) and not metric.args:
        return metric.func, dict(metric.keywords), 0
    return metric, {}, 0


def _reads_scores(function: Callable[..., Any]) -> bool:
    names = [*signature(function).parameters][:2]
    return names[-1] in SCORES or "log_loss" in function.__name__


def _named(function: Any, name: str, higher: bool) -> Any:
    function.__name__, function.higher_is_better = name, higher
    return function


def _by_sklearn(
    function: Callable[..., Any], scores: bool, outputs: Tensor, targets: Tensor, *, meaning: Meaning
) -> float:
    axis = meaning.class_axis(outputs)
    if axis is None and meaning.kind != "bits":
        given, known = matched(outputs, targets, "metric")
        return float(function(known.numpy(), given.numpy()))
    targets = meaning.classes(targets, outputs)
    if scores and axis is not None:
        logs = meaning.log_probabilities(outputs)
        assert logs is not None  # there is an axis of classes
        kept = meaning.labelled(targets).reshape(-1)
        given, targets = logs.exp().reshape(-1, logs.shape[-1])[kept].double(), targets.reshape(-1)[kept]
        given = given[:, 1] if given.shape[1] == 2 else given / given.sum(1, keepdim=True)
    else:
        given = torch.sigmoid(outputs) if scores else meaning.predictions(outputs)
        given, targets = matched(given, targets, "metric")
        if axis is not None or targets.ndim < 2:
            kept = meaning.labelled(targets)
            given, targets = given[kept], targets[kept]
    return float(function(targets.numpy(), given.numpy()))


def _by_torchmetrics(metric: Any, outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> float:
    metric.reset()
    value = _in_form(metric, outputs, targets, meaning=meaning)
    metric.reset()
    return value


def _in_form(metric: Callable[..., Any], outputs: Tensor, targets: Tensor, *, meaning: Meaning) -> float:
    """The metric of outputs with classes on axis 1, without padding."""
    axis = meaning.class_axis(outputs)
    if axis is None:
        return float(metric(*matched(outputs, targets, "metric")))
    targets = meaning.classes(targets, outputs)
    outputs = outputs.movedim(axis, 1)
    if meaning.ignore is not None:
        kept = meaning.labelled(targets)
        outputs, targets = outputs.movedim(1, -1)[kept], targets[kept]
    return float(metric(outputs, targets))
