"""How far two networks' outputs are apart, and how far they may be."""

from __future__ import annotations

import numpy as np

from lilliput.errors import ExportError
from lilliput.stored.bits import Array


def agreement(a: Array, b: Array, axis: int | None = -1) -> dict[str, float]:
    """How far two networks' outputs for the same inputs are apart.

    Args:
        a: (n, ...) outputs.
        b: outputs of another network for the same examples.
        axis: which one holds the classes; None: they are values.

    Returns:
        `max_abs`, `mean_abs` and `changed`: the share of predictions with another largest output (0 where there is
        only one, and for values).

    Raises:
        ExportError: for outputs of different shapes.

    Example:
        >>> agreement(np.array([[1.0, 2.0]]), np.array([[1.0, 0.5]]))
        {'max_abs': 1.5, 'mean_abs': 0.75, 'changed': 1.0}
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ExportError(f"agreement: outputs must have the same shape, got {a.shape} and {b.shape}.")
    apart = np.abs(a - b)
    changed = float((a.argmax(axis) != b.argmax(axis)).mean()) if _several(a, axis) and a.size else 0.0
    return {
        "max_abs": float(apart.max()) if a.size else 0.0,
        "mean_abs": float(apart.mean()) if a.size else 0.0,
        "changed": changed,
    }


def _several(x: Array, axis: int | None) -> bool:
    return axis is not None and x.ndim > 1 and x.shape[axis] > 1


def verify(
    artifact: Array,
    model: Array,
    *,
    exact: bool,
    axis: int | None = -1,
    margin: float = 1e-4,
    most_changed: float = 0.005,
    who: str = "verify",
) -> dict[str, float]:
    """Compare an artifact's outputs with the model's it was written from; their `agreement` if it is close enough.

    Args:
        artifact: (n, ...) outputs of the file.
        model: outputs of the model for the same examples.
        exact: a float artifact: no prediction may change whose margin (the largest output minus the second) is over
            `margin`, no value by more than that beside the largest one of its example. Otherwise a quantised one: at
            most the share `most_changed` of predictions may change.
        axis: which one holds the classes; None: the outputs are values.
        margin: the largest margin at which a prediction may change.
        most_changed: the largest allowed fraction of changed predictions.
        who: whose outputs they are, for messages.

    Raises:
        ExportError: where it is further away, or has values that are not finite and the model has none.
    """
    measured = agreement(artifact, model, axis)
    a, m = np.asarray(artifact, np.float64), np.asarray(model, np.float64)
    if not np.isfinite(a).all() and np.isfinite(m).all():
        raise ExportError(f"{who}: the artifact's outputs must be finite, got NaN or infinity. Do not deploy it.")
    several = _several(a, axis)
    if exact:
        if several and axis is not None:
            top = np.moveaxis(np.sort(m, axis), axis, -1)
            clear = top[..., -1] - top[..., -2] > margin
            wrong = int((clear & (a.argmax(axis) != m.argmax(axis))).sum())
        elif a.size:  # values: each beside the largest of its example
            apart, size = (np.abs(x).reshape(len(x), -1).max(1) for x in (a - m, m))
            wrong = int((apart > margin * np.maximum(1, size)).sum())
        else:
            wrong = 0
        if wrong:
            raise ExportError(
                f"{who}: a float artifact must predict what the model predicts, got {wrong} of {a.shape[0]} changed "
                f"(largest difference {measured['max_abs']:.3g}). The export or the runtime computes something else."
            )
    elif several and measured["changed"] > most_changed:
        raise ExportError(
            f"{who}: at most {most_changed:.1%} of predictions may change from the quantised model to its artifact, "
            f"got {measured['changed']:.1%}. The runtime computes something else than the model."
        )
    return measured
