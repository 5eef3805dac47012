"""Meaning: what the numbers of an output stand for (classes, bits, directions, values), for loss, metric and
distillation."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, update_wrapper
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["logits", "probabilities", "bits", "directions", "values"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True)
class Meaning:
    """What the numbers of an output stand for.

    Loss, metric, divergence and distillation ask this, so that they agree on which axis holds the classes, which label
    is padding and whether a softmax is still to be taken.

    Args:
        kind: "logits" (one score a class, before the softmax), "probabilities" (after it), "bits" (independent yes-no
            logits), "directions" (embeddings, whose length means nothing) or "values".
        axis: which axis of the outputs holds the classes; None: found by `class_axis`.
        ignore: a class label that means "no label here"; None: there is none.
        labels: the shape of one example's labels, () for one label, (T,) for a sequence, (H, W) for an image; None
            where there are no labels.

    Example:
        >>> Meaning("logits", labels=(5,)).class_axis(torch.zeros(2, 5, 3)), Meaning().class_axis(torch.zeros(2, 5))
        (2, None)
    """

    kind: Kind = "values"
    axis: int | None = None
    ignore: int | None = -100
    labels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Task: outputs must be one of {', '.join(KINDS)}, got {self.kind!r}.")

    def class_axis(self, outputs: Tensor) -> int | None:
        """The axis of `outputs` (n, ...) that holds the classes; None where they are no classes.

        Without `axis` it is the one axis without which outputs have the shape of the labels: 1 for (N, C), 2 for
        (N, T, C) and 1 for (N, C, T), each with labels (N, T).

        Raises:
            ValueError: where two axes fit, or `axis` is none of the outputs'.
        """
        if self.kind not in ("logits", "probabilities") or not isinstance(outputs, Tensor) or outputs.ndim < 2:
            return None
        if self.axis is not None:
            axis = self.axis % outputs.ndim if -outputs.ndim <= self.axis < outputs.ndim else 0
            if not axis:
                raise ValueError(f"Task: class_axis must be an axis of outputs {_shape(outputs)}, got {self.axis}.")
            return axis
        if outputs.ndim == 2:
            return 1
        if self.labels is None:
            return None
        shape = tuple(outputs.shape)
        fit = [axis for axis in range(1, outputs.ndim) if shape[1:axis] + shape[axis + 1 :] == self.labels]
        if not fit:  # labels may have axes of size one that outputs lack
            rest = {axis: shape[1:axis] + shape[axis + 1 :] for axis in range(1, outputs.ndim)}
            fit = [axis for axis, sizes in rest.items() if _wide(sizes) == _wide(self.labels)]
        if len(fit) > 1:
            raise ValueError(
                f"Task: class_axis must be given where outputs have the shape {shape} and labels of an example the "
                f"shape {self.labels}: the classes may lie on axis {' or '.join(map(str, fit))}."
            )
        return fit[0] if fit else None

    def log_probabilities(self, outputs: Tensor, temperature: float = 1.0) -> Tensor | None:
        """log p of each class, classes on the last axis, or None where the outputs are no classes.

        Args:
            outputs: (n, ...) with an axis of classes.
            temperature: T of softmax(z / T); with probabilities, z is their logarithm.
        """
        axis = self.class_axis(outputs)
        if axis is None:
            return None
        z = outputs if axis == outputs.ndim - 1 else outputs.movedim(axis, -1)
        z = z.clamp_min(1e-12).log() if self.kind == "probabilities" else z
        return F.log_softmax(z / temperature, -1)

    def predictions(self, outputs: Tensor) -> Tensor:
        """The class of each example (and place): the largest along the class axis, or whether a yes-no logit is above 0
        (a probability above one half)."""
        axis = self.class_axis(outputs)
        if axis is None and self.kind not in ("bits", "probabilities"):  # a metric of classes on outputs of any loss
            axis = outputs.ndim - 1 if outputs.ndim > 1 else None
        if axis is not None and outputs.shape[axis] > 1:
            return outputs.argmax(axis)
        most = (outputs > (0.5 if self.kind == "probabilities" else 0)).long()
        return most if axis is None else most.squeeze(axis)

    def classes(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Targets as class labels of the shape that predictions have: rows of one-hot numbers or probabilities by
        their largest, labels of any integer type (and yes or no) as int64.

        Args:
            targets: labels (n, ...), with or without axes of size one, or numbers of the outputs' shape.
            outputs: (n, ...) with an axis of classes, or none.
        """
        axis = self.class_axis(outputs)
        if axis is not None and targets.shape == outputs.shape and targets.shape[axis] > 1:
            return targets.argmax(axis)
        if axis is not None:
            shape = (*outputs.shape[:axis], *outputs.shape[axis + 1 :])
            if targets.shape != shape and _wide(targets.shape[1:]) == _wide(shape[1:]):
                targets = targets.reshape(shape)
        return targets if targets.is_floating_point() else targets.long()

    def labelled(self, targets: Tensor) -> Tensor:
        """Where `targets` hold a label: False at padding."""
        return torch.ones_like(targets, dtype=torch.bool) if self.ignore is None else targets != self.ignore


def of_loss(loss: Any) -> Kind:
    """The kind of outputs that a loss reads: what it says (`reads`), what torch's losses are known for, or values."""
    known = {
        nn.CrossEntropyLoss: "logits",
        nn.NLLLoss: "logits",  # log-probabilities are logits: their softmax is their exponential
        nn.BCEWithLogitsLoss: "bits",
        nn.MultiLabelSoftMarginLoss: "bits",
        nn.CosineEmbeddingLoss: "directions",
        F.cross_entropy: "logits",
        F.nll_loss: "logits",
        F.binary_cross_entropy_with_logits: "bits",
    }
    outputs: Any = getattr(loss, "outputs", None) or next(
        (kind for key, kind in known.items() if loss is key or (isinstance(key, type) and isinstance(loss, key))), None
    )
    return outputs if outputs in KINDS else "values"


def bound(function: Any, meaning: Meaning) -> Any:
    """`function` with the task's meaning, where it has a keyword-only argument of that name; else as it is."""
    try:
        wanted = signature(function).parameters.get("meaning")
    except (TypeError, ValueError):
        return function
    if wanted is None or wanted.kind is not wanted.KEYWORD_ONLY:
        return function
    return update_wrapper(partial(function, meaning=meaning), function)


def matched(outputs: Tensor, targets: Tensor, who: str) -> tuple[Tensor, Tensor]:
    """Outputs and targets of one shape: axes of size one may be missing in either, nothing else may differ.

    torch would stretch (N, 1) and (N,) to (N, N) and average over the wrong pairs.

    Raises:
        ValueError: for shapes that differ otherwise.

    Example:
        >>> [x.shape for x in matched(torch.zeros(3, 1), torch.zeros(3), "mse")]
        [torch.Size([3]), torch.Size([3])]
    """
    if outputs.shape == targets.shape:
        return outputs, targets
    inner = (_wide(x.shape[1:]) for x in (outputs, targets))
    if outputs.shape[:1] != targets.shape[:1] or next(inner) != next(inner):
        raise ValueError(
            f"{who}: outputs and targets must have one shape, got {_shape(outputs)} and {_shape(targets)}."
        )
    return outputs.reshape(targets.shape), targets


def _wide(shape: Sequence[int]) -> list[int]:
    """A shape without its axes of size one."""
    return [size for size in shape if size != 1]


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
