"""What was lost on a split that nothing was chosen on, and how exactly that is known."""

from typing import Any

import numpy as np

from lilliput import Task

DRAWS = 400


def drop(task: Task, dense: Any, small: Any, floor: float, split: str = "test") -> dict[str, Any] | None:
    """The drop of the metric between two networks on the same examples, its standard error, and whether the floor held.

    A floor counts as held where the drop is at most the floor plus the standard error. The error is that of paired
    examples: of their mean difference, or for a metric that is no mean over bootstrap draws.

    Args:
        task: with the split.
        dense: a network, a session or a function.
        small: another one.
        floor: in units of the metric.
        split: its name.

    Returns:
        The numbers, or None where the task has no such split.
    """
    if not task.has(split):
        return None
    before, after = task.score(dense, split), task.score(small, split)
    lost = task.loss_of(before.value, after.value)
    if before.outcomes is not None and after.outcomes is not None:
        apart = after.outcomes - before.outcomes
        error = float(apart.std(ddof=1) / np.sqrt(len(apart)))
    else:
        generator, losses = np.random.default_rng(0), []
        for _ in range(DRAWS):
            index = generator.integers(0, before.units, before.units)
            losses.append(task.loss_of(before.resampled(index), after.resampled(index)))
        error = float(np.nanstd(losses))
    return {
        "dense": round(before.value, 6),
        "score": round(after.value, 6),
        "drop": round(lost, 6),
        "standard_error": round(error, 6),
        "held": lost <= floor + error,
        "examples": before.units,
    }
