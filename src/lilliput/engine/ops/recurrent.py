"""Lower recurrent layers: one matrix product for the inputs of all steps, then the operator Recurrence.

A Recurrence has as inputs what each step gets from the input (steps, batch, directions * gates * hidden) with every
bias that can be added before; the recurrent weights R (directions, gates * hidden, hidden); the bias (directions,
hidden) that a GRU with linear_before_reset adds inside; the states before (h, c); the lengths of the sequences; and the
peepholes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lilliput.engine.expr import Expr, arg, where
from lilliput.engine.graph import Node, Value
from lilliput.engine.lower import Build, lower
from lilliput.errors import NotSupported

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
DEFAULTS = {"RNN": ["Tanh"], "GRU": ["Sigmoid", "Tanh"], "LSTM": ["Sigmoid", "Tanh", "Tanh"]}
# What takes alpha and beta, with their defaults.
NUMBERS = {
    "affine": (1.0, 0.0),
    "leakyrelu": (0.01,),
    "thresholdedrelu": (1.0,),
    "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5),
    "elu": (1.0,),
}
ACTIVATIONS: dict[str, Callable[..., Expr]] = {
    "relu": lambda x: x.max(0),
    "tanh": lambda x: x.of("tanh"),
    "sigmoid": lambda x: x.of("sigmoid"),
    "affine": lambda x, a, b: x * a + b,
    "leakyrelu": lambda x, a: where(x < 0, x * a, x),
    "thresholdedrelu": lambda x, a: where(x > a, x, x * 0),
    "scaledtanh": lambda x, a, b: (x * b).of("tanh") * a,
    "hardsigmoid": lambda x, a, b: (x * a + b).max(0).min(1),
    "elu": lambda x, a: where(x < 0, x.of("exp") * a - a, x),
    "softsign": lambda x: x / (x.of("abs") + 1),
    "softplus": lambda x: x.of("softplus"),
}


@lower(*GATES)
def recurrent(node: Node, build: Build) -> None:
    """RNN, GRU and LSTM in one or both directions."""
    gates = GATES[node.op]
    w, r = node.known(1), node.known(2)
    if w is None or r is None or w.ndim != 3 or r.ndim != 3 or node.x.rank != 3:
        raise ValueError(f"{node.op} {node.name}: its input and constant weights must have 3 dimensions. The file is "
                         "damaged.")  # fmt: skip
    directions, hidden = int(r.shape[0]), int(r.shape[2])
    wanted = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    reverse = wanted.get(node.attrs.get("direction", "forward"))
    if (
        reverse is None
        or len(reverse) != directions
        or not (w.shape[:2] == r.shape[:2] == (directions, gates * hidden) and int(node.x.shape[2]) == w.shape[2])
    ):
        raise ValueError(
            f"{node.op} {node.name}: weights must fit its direction, got {w.shape} and {r.shape}. The file is damaged."
        )
    batch_first = bool(node.attrs.get("layout", 0))
    x = build.transpose(node.x, (1, 0, 2)) if batch_first else node.x
    inside = node.op == "GRU" and bool(node.attrs.get("linear_before_reset", 0))
    bias, kept = _biases(node, directions, gates, hidden, inside)
    steps, batch = x.shape[:2]
    weight = build.const(np.ascontiguousarray(w.reshape(-1, w.shape[2]).T, np.float32))
    narrow = node.input(1).narrow
    weight.narrow = None if narrow is None else narrow.moved(lambda a: a.reshape(-1, a.shape[2]).T)
    weight.name = node.input(1).name
    shape = (steps, batch, directions * gates * hidden)
    each = build.value(np.float32, shape)
    build.add("MatMul", [x, weight], [each])
    if bias is not None:
        each = build.map([each, build.const(bias.reshape(-1))], lambda a, b: a + b)

    def state(i: int) -> Value | None:
        value = node.maybe(i)
        if value is None or (value.data is not None and not value.data.any()):
            return None
        return build.transpose(value, (1, 0, 2)) if batch_first else value

    peepholes = node.known(7) if node.op == "LSTM" else None
    held = build.const(np.ascontiguousarray(r, np.float32))
    held.narrow, held.name = node.input(2).narrow, node.input(2).name
    inputs = [
        each,
        held,
        None if kept is None else build.const(kept),
        state(5),
        state(6) if node.op == "LSTM" else None,
        node.maybe(4),
        None if peepholes is None else build.const(np.asarray(peepholes, np.float32)),
    ]
    wanted_state = (int(batch), directions, hidden) if batch_first else (directions, int(batch), hidden)
    for i in (5, 6) if node.op == "LSTM" else (5,):
        given = node.maybe(i)
        if given is not None and tuple(map(int, given.shape)) != wanted_state:
            raise ValueError(f"{node.op} {node.name}: {given.name} must have shape {wanted_state}, got "
                             f"{tuple(map(int, given.shape))}. The file is damaged.")  # fmt: skip
    shapes = [(steps, directions, batch, hidden), (directions, batch, hidden), (directions, batch, hidden)]
    perms = [(2, 0, 1, 3), (1, 0, 2), (1, 0, 2)]
    written = [(i, value) for i, value in enumerate(node.outputs[:3]) if value is not None]
    for i, value in written:
        made_shape = tuple(shapes[i][p] for p in perms[i]) if batch_first else shapes[i]
        if tuple(map(int, value.shape)) != tuple(map(int, made_shape)):
            raise ValueError(f"{node.op} {node.name}: {value.name} must have shape {tuple(map(int, made_shape))}, got "
                             f"{tuple(map(int, value.shape))}. The file is damaged.")  # fmt: skip
    made = [build.value(np.float32, shapes[i]) if batch_first else value for i, value in written]
    build.add(
        "Recurrence",
        inputs,
        made,
        kind=node.op,
        reverse=reverse,
        hidden=hidden,
        inside=inside,
        roles=tuple("hnc"[i] for i, _ in written),
        acts=_activations(node, directions),
        clip=float(node.attrs["clip"]) if "clip" in node.attrs else None,
        input_forget=bool(node.attrs.get("input_forget", 0)),
    )
    if batch_first:
        for (i, value), inner in zip(written, made, strict=True):
            build.transpose(inner, perms[i], out=value)


def _biases(
    node: Node, directions: int, gates: int, hidden: int, inside: bool
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """(directions, gates * hidden) that is added to the inputs' products, and (directions, hidden) that cannot be."""
    b = node.known(3)
    if b is None:
        return None, None
    both = np.asarray(b, np.float32).reshape(directions, 2, gates * hidden)
    outside = both.sum(1)
    if not inside:
        return outside, None
    outside[:, 2 * hidden :] = both[:, 0, 2 * hidden :]
    return outside, np.ascontiguousarray(both[:, 1, 2 * hidden :])


def _activations(node: Node, directions: int) -> tuple[tuple[Expr, ...], ...]:
    names = [str(n) for n in node.attrs.get("activations") or DEFAULTS[node.op] * directions]
    if len(names) != len(DEFAULTS[node.op]) * directions:
        raise ValueError(
            f"{node.op} {node.name}: it must have {len(DEFAULTS[node.op])} activations a direction, got "
            f"{len(names)}. The file is damaged."
        )
    alphas, betas = (list(node.attrs.get(f"activation_{which}", [])) for which in ("alpha", "beta"))
    functions = []
    for name in names:
        key = name.lower()
        if key not in ACTIVATIONS:
            raise NotSupported(
                f"{node.op} {node.name}: its activations must be among {', '.join(ACTIVATIONS)}, got {name}."
            )
        numbers = [
            float(given.pop(0)) if given else default
            for default, given in zip(NUMBERS.get(key, ()), (alphas, betas), strict=False)
        ]
        functions.append(ACTIVATIONS[key](arg(0, np.float32), *numbers))
    each = len(names) // directions
    return tuple(tuple(functions[d * each : (d + 1) * each]) for d in range(directions))
