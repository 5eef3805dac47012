"""Measure how many inputs of each product are non-zero on an example, for kernels that skip zero inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lilliput.engine.graph import Array, Graph, Value
from lilliput.engine.kernels.active_matmul import MOST_POSITIONS
from lilliput.engine.kernels.product import linear
from lilliput.engine.plan import Plan, planned
from lilliput.engine.run import Engine
from lilliput.engine.size import fixed
from lilliput.engine.target import Target
from lilliput.engine.tune import estimated

MOST_RUNS = 64


def vectors(graph: Graph) -> dict[str, Value]:
    """What goes into each product of a known matrix and a position or a few, by the name of what comes out."""
    inputs = {}
    for node in graph.nodes:
        way = linear(node) if node.op == "MatMul" else None
        if way is not None and fixed(*node.y.shape) and int(way.positions) <= MOST_POSITIONS:
            inputs[node.y.name] = node.input(way.x)
    return inputs


def shares(graph: Graph, machine: Target, given: Any, save: Callable[[Plan, Path], None]) -> dict[str, float]:
    """The fraction of inputs that are not zero on an example, for each of `vectors(graph)`.

    Raises ValueError for an example that does not fit.

    Args:
        given: An array, or arrays by input name, with any multiple of the examples that the model takes at once (at
            most MOST_RUNS runs are made).
        save: Writes a plan and its library into a folder. The graph is used up.
    """
    feeds, wanted = _feeds(graph, given), vectors(graph)
    if not wanted:
        return {}
    graph.outputs = list(dict.fromkeys(wanted.values()))
    names = {value: i for i, value in enumerate(graph.outputs)}
    graph.prune()
    with tempfile.TemporaryDirectory(prefix="lilliput-") as folder:
        save(planned(graph, estimated(machine)), Path(folder))
        engine = Engine(folder)
        counts = np.zeros(len(names))
        for feed in feeds:
            seen = engine(*feed)
            counts += [np.count_nonzero(y) / y.size for y in (seen if isinstance(seen, tuple) else (seen,))]
    return {name: float(counts[names[value]] / len(feeds)) for name, value in wanted.items()}


def _feeds(graph: Graph, given: Any) -> list[list[Array]]:
    """The inputs of each run."""
    names = [value.name for value in graph.inputs]
    named: Mapping[str, Any] = given if isinstance(given, Mapping) else dict(zip(names, [given], strict=False))
    if set(named) != set(names):
        raise ValueError(
            f"compile: the example must hold {', '.join(names)}, got {', '.join(named) or 'nothing'}. "
            "Give arrays by name where there are several inputs."
        )
    runs: list[list[Array]] = [[] for _ in range(MOST_RUNS)]
    for value in graph.inputs:
        array, shape = np.asarray(named[value.name]), tuple(int(size) for size in value.shape)
        if array.shape == shape[1:]:
            array = array[None]
        if array.shape[1:] != shape[1:] or not shape or not len(array) or len(array) % shape[0]:
            raise ValueError(
                f"compile: the example of {value.name} must have shape {shape}, or more along the first "
                f"dimension (a multiple), got {array.shape}."
            )
        if not np.can_cast(array.dtype, value.dtype, "same_kind"):
            raise ValueError(f"compile: the example of {value.name} must be {value.dtype.name}, got {array.dtype}.")
        parts = array.astype(value.dtype).reshape(-1, *shape)
        runs = [[*run, part] for run, part in zip(runs, parts, strict=False)]
    return runs
