"""Losses by name: functions (output, target) -> mean over the batch, registered one by one.

A loss says by `reads` what it takes the outputs for, so that distillation and divergence read them in the same way.
One that has a keyword-only argument `meaning` is given the task's description of its outputs.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.registry import register
from lilliput.task.meaning import Kind, Meaning, matched

F_ = TypeVar("F_", bound=Callable[..., Any])


def reads(outputs: Kind) -> Callable[[F_], F_]:
    """Say what a loss takes the outputs for.

    Args:
        outputs: a kind of `lilliput.task.Meaning`: "logits", "probabilities", "bits", "directions" or "values".
    """

    def keep(loss: F_) -> F_:
        loss.outputs = outputs  # type: ignore[attr-defined]
        return loss

    return keep


@register("loss")
@reads("logits")
def cross_entropy(output: Tensor, target: Tensor, *, meaning: Meaning) -> Tensor:
    """Compute the mean of -log p(label) over the labels that are not padding; zero where a batch has none.

    Args:
        output: logits (or probabilities, where the task says so) with the classes on any axis: (N, C), (N, T, C),
            (N, C, T), (N, C, H, W).
        target: labels (N), (N, T), (N, H, W), as integers of any width, or probabilities (one-hot numbers too) of the
            output's shape.
        meaning: the axis of the classes and the label that is padding.

    Returns:
        A scalar.

    Raises:
        ValueError: where it is open which axis holds the classes.

    Example:
        >>> labels = torch.tensor([[0, -100], [1, 1]])
        >>> cross_entropy(torch.zeros(2, 2, 3), labels, meaning=Meaning("logits", labels=(2,)))
        tensor(1.0986)
    """
    axis, soft = meaning.class_axis(output), target.shape == output.shape
    if axis is None and output.ndim > 2:
        raise ValueError(
            "cross_entropy: class_axis must be given where labels do not tell it, got outputs "
            f"{tuple(output.shape)} and targets {tuple(target.shape)}."
        )
    target = target.to(output.dtype) if soft else meaning.classes(target, output)
    if axis not in (None, 1):
        output, target = output.movedim(axis, 1), target.movedim(axis, 1) if soft else target
    ignore = -100 if meaning.ignore is None else meaning.ignore
    if meaning.kind == "probabilities" and soft:
        loss = -(target * output.clamp_min(1e-12).log()).sum(1).mean()
    elif meaning.kind == "probabilities":
        loss = F.nll_loss(output.clamp_min(1e-12).log(), target, ignore_index=ignore)
    else:
        loss = F.cross_entropy(output, target, ignore_index=ignore)
    if meaning.ignore is not None and not soft and not bool((target != ignore).any()):
        return output.sum() * 0  # the mean over no label is no number
    return loss


@register("loss")
@reads("bits")
def bce(output: Tensor, target: Tensor, *, meaning: Meaning) -> Tensor:
    """Compute the binary cross entropy of yes-no logits, over the labels that are not padding.

    Args:
        output: logits (N) or (N, ...).
        target: 0 or 1, as many as outputs.
        meaning: the label that is padding.

    Returns:
        A scalar.

    Example:
        >>> bce(torch.zeros(3, 1), torch.tensor([0.0, 1.0, 1.0]), meaning=Meaning("bits"))
        tensor(0.6931)
    """
    output, target = matched(output, target, "bce")
    if meaning.ignore is not None:
        known = target != meaning.ignore
        output, target = output[known], target[known]
        if not len(output):
            return output.sum() * 0
    return F.binary_cross_entropy_with_logits(output, target.float())


@register("loss")
@reads("values")
def mse(output: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared error over all values.

    Args:
        output: (n, ...).
        target: of the same shape; axes of size one may be missing in either.

    Returns:
        A scalar.

    Example:
        >>> mse(torch.zeros(2, 1), torch.tensor([1.0, 3.0]))
        tensor(5.)
    """
    return F.mse_loss(*matched(output, target, "mse"))


@register("loss")
@reads("values")
def l1(output: Tensor, target: Tensor) -> Tensor:
    """Compute the mean absolute error over all values.

    Args:
        output: (n, ...).
        target: of the same shape; axes of size one may be missing in either.

    Returns:
        A scalar.

    Example:
        >>> l1(torch.zeros(2, 1), torch.tensor([1.0, 3.0]))
        tensor(2.)
    """
    return F.l1_loss(*matched(output, target, "l1"))


@register("loss")
@reads("directions")
def cosine(output: Tensor, target: Tensor) -> Tensor:
    """Compute one minus the mean cosine similarity along the last axis.

    Args:
        output: (n, ..., d).
        target: of the same shape.

    Returns:
        A scalar.

    Example:
        >>> cosine(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.)
    """
    return 1 - torch.cosine_similarity(*matched(output, target, "cosine"), dim=-1).mean()
