"""How far two networks' outputs are apart, and how far they may be."""

from __future__ import annotations

import numpy as np

from lilliput.errors import ExportError
from lilliput.stored.bits import Array


def agreement(a: Array, b: Array) -> dict[str, float]:
    """How far two networks' outputs for the same inputs are apart.

    Returns `max_abs`, `mean_abs` and `changed`: the share of examples with another largest output (0 where there is
    only one).

    >>> agreement(np.array([[1.0, 2.0]]), np.array([[1.0, 0.5]]))
    {'max_abs': 1.5, 'mean_abs': 0.75, 'changed': 1.0}
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ExportError(f"agreement: outputs must have the same shape, got {a.shape} and {b.shape}.")
    apart = np.abs(a - b)
    changed = float((a.argmax(-1) != b.argmax(-1)).mean()) if a.ndim > 1 and a.shape[-1] > 1 and a.size else 0.0
    return {
        "max_abs": float(apart.max()) if a.size else 0.0,
        "mean_abs": float(apart.mean()) if a.size else 0.0,
        "changed": changed,
    }


def verify(
    artifact: Array,
    model: Array,
    *,
    exact: bool,
    margin: float = 1e-4,
    most_changed: float = 0.005,
    who: str = "verify",
) -> dict[str, float]:
    """Compare an artifact's outputs with the model's it was written from; their `agreement` if it is close enough.

    Args:
        artifact, model: (n, ...) outputs for the same examples.
        exact: a float artifact: no prediction may change whose margin (the largest output minus the second) is over
            `margin`. Otherwise a quantised one: at most the share `most_changed` of predictions may change.

    Raises:
        ExportError: where it is further away, or has values that are not finite and the model has none.
    """
    found = agreement(artifact, model)
    a, m = np.asarray(artifact, np.float64), np.asarray(model, np.float64)
    if not np.isfinite(a).all() and np.isfinite(m).all():
        raise ExportError(f"{who}: the artifact's outputs must be finite, got NaN or infinity. Do not deploy it.")
    several = a.ndim > 1 and a.shape[-1] > 1
    if exact:
        if several:
            top = np.sort(m, -1)
            clear = top[..., -1] - top[..., -2] > margin
            wrong = int((clear & (a.argmax(-1) != m.argmax(-1))).sum())
        else:
            wrong = int((np.abs(a - m) > margin * np.maximum(1, np.abs(m))).sum())
        if wrong:
            raise ExportError(
                f"{who}: a float artifact must predict what the model predicts, got {wrong} of {a.shape[0]} changed "
                f"(largest difference {found['max_abs']:.3g}). The export or the runtime computes something else."
            )
    elif several and found["changed"] > most_changed:
        raise ExportError(
            f"{who}: at most {most_changed:.1%} of predictions may change from the quantised model to its artifact, "
            f"got {found['changed']:.1%}. The runtime computes something else than the model."
        )
    return found
