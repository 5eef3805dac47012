"""Sub-problems: the task of telling some classes apart, and the full network as its answer."""

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.task import Arrays, Task, take


def subproblem(task: Task, classes: tuple[int, ...], rest: bool = False) -> Task:
    """Make the task of telling some of a task's classes apart: their examples, relabelled 0, 1, ... in the order given.

    Args:
        task: A classification.
        classes: The labels to keep.
        rest: Whether the others are one more class, the last, with as many examples as each of these has on average,
            evenly from all others (of each split).

    Returns:
        The task of the sub-problem.

    Raises:
        ValueError: For classes that are repeated, not in the task, or fewer than two labels.
        TypeError: For a task without class labels.

    Example:
        >>> x, y = torch.arange(12.0)[:, None], torch.arange(12) % 4
        >>> subproblem(Task("four", (x, y), (x, y)), (3, 1)).split("train")[1]
        tensor([1, 0, 1, 0, 1, 0])
    """
    check_classes(classes, rest, "subproblem")
    if not isinstance(task, Arrays) or task.loss_name != "cross_entropy":
        raise TypeError(
            "subproblem: the task must have class labels and the loss 'cross_entropy', got "
            f"{task.loss_name!r}. Make the Task of the sub-problem by hand."
        )
    parts = {}
    for name in filter(task.has, ("train", "val", "test")):
        inputs, targets = task.split(name)
        if targets is None or targets.dim() != 1:
            raise TypeError(f"subproblem: {name} must have one class label an example. Give the task labelled data.")
        known = targets.unique().tolist()
        for label in classes:
            if label not in known:
                raise ValueError(
                    f"subproblem: classes must be labels of the task, got {label}, which no {name} "
                    f"example has. Choose from {known}."
                )
        index = torch.cat([(targets == label).nonzero().flatten() for label in classes])
        if rest:
            if len(known) == len(set(classes)):
                raise ValueError(
                    f"subproblem: rest=True needs other classes, got all of {known}. Name fewer, or leave rest out."
                )
            index = torch.cat([index, _evenly(targets, set(known) - set(classes), round(len(index) / len(classes)))])
        index = index.sort().values
        labels = torch.full((max(known) + 1,), len(classes))
        labels[torch.tensor(classes)] = torch.arange(len(classes))
        parts[name] = (take(inputs, index), labels[targets[index]])
    about = " ".join(map(str, classes)) + (" or another" if rest else "")
    return Arrays(
        f"{task.name}: {about}",
        parts["train"],
        parts["val"],
        parts.get("test"),
        "cross_entropy",
        task.metric,
        higher_is_better=task.higher_is_better,
        augment=task.augment,
        draws=task.draws,
        batch_size=task.batch_size,
    )


def _evenly(targets: Tensor, others: Collection[int], count: int) -> Tensor:
    """`count` positions, as many of each of the other classes as can be."""
    ranked = [(targets == label).nonzero().flatten() for label in sorted(others)]
    rounds = [own[i : i + 1] for i in range(max(map(len, ranked))) for own in ranked]
    return torch.cat(rounds)[:count]


def restricted(model: nn.Module, classes: tuple[int, ...], rest: bool = False) -> Callable[..., Tensor]:
    """Make the full network answer the sub-problem: its outputs for these classes, and the largest other one."""

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        outputs = model(*args, **kwargs)
        others = [i for i in range(outputs.shape[-1]) if i not in classes]
        chosen: Tensor = outputs[:, list(classes)]
        return torch.cat([chosen, outputs[:, others].amax(1, keepdim=True)], 1) if rest else chosen

    return answer


def check_classes(classes: tuple[int, ...], rest: bool, who: str) -> None:
    """Raise ValueError unless these classes make a sub-problem."""
    if not all(isinstance(label, int) and not isinstance(label, bool) and label >= 0 for label in classes):
        raise ValueError(f"{who}: classes must be whole numbers from 0 up, the labels to keep, got {classes!r}.")
    if len(set(classes)) < len(classes):
        raise ValueError(f"{who}: classes must differ, got {classes!r}. Name each once.")
    if len(classes) + rest < 2:
        raise ValueError(
            f"{who}: there must be two labels to tell apart, got classes={classes!r}. Name another class, "
            "or tell one class from all others with rest=True."
        )
