"""Sort and pack the non-zeros of a product's weights in the order in which sparse kernels read them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.graph import Array


@dataclass(frozen=True)
class Format:
    """The non-zeros of (out, in) weights in the order they are read.

    For each tile of `depth` inputs and each group of `rows` outputs (`order` says which): `steps` rounds of `unroll` x
    rows values, each with an index in units of 8 bytes (one index for all rows where `shared`). places: which weight
    each value is, counted in C order; -1 where it is padding.
    """

    rows: int
    unroll: int
    depth: int
    shared: bool
    places: Array = field(repr=False)
    index: Array = field(repr=False)
    steps: Array = field(repr=False)
    order: Array = field(repr=False)


def formatted(weight: Array, rows: int, unroll: int, depth: int, scale: int, shared: bool) -> Format:
    """Weights (out, in) in a Format; scale: a row of the buffer in units of 8 bytes."""
    outs, ins = weight.shape
    places, index, steps, order = [], [], [], []
    for k in range(0, ins, depth):
        part = weight[:, k : k + depth]
        if shared:
            groups = [np.minimum(np.arange(o, o + rows), outs - 1) for o in range(0, outs, rows)]
            columns = [np.flatnonzero((part[g] != 0).any(0)) for g in groups]
            for place in np.argsort([-len(used) for used in columns], kind="stable"):
                used, group = columns[place], groups[place]
                count = -(-len(used) // unroll) * unroll
                held = np.full((count, rows), -1)
                held[: len(used)] = group * ins + k + used[:, None]
                where = np.zeros(count, np.uint16)
                where[: len(used)] = used * scale
                places.append(held.reshape(-1))
                index.append(where)
                steps.append(count // unroll)
                order.append(group)
            continue
        nonzeros = (part != 0).sum(1)
        ranked = np.argsort(-nonzeros, kind="stable")
        ranked = np.concatenate([ranked, np.repeat(ranked[-1:], -outs % rows)])
        for g in range(0, len(ranked), rows):
            group = ranked[g : g + rows]
            count = -(-int(nonzeros[group].max()) // unroll) * unroll
            held, where = np.full((count, rows), -1), np.zeros((count, rows), np.uint16)
            for place, o in enumerate(group):
                used = np.flatnonzero(part[o])
                held[: len(used), place] = o * ins + k + used
                where[: len(used), place] = used * scale
            places.append(held.reshape(-1))
            index.append(where.reshape(-1))
            steps.append(count // unroll)
            order.append(group)
    kind = np.uint16 if outs < 2**16 else np.uint32
    order.append(np.zeros(rows, np.int64))  # what the last group asks for beforehand
    return Format(
        rows,
        unroll,
        depth,
        shared,
        np.concatenate(places),
        np.concatenate(index),
        np.array(steps, np.uint16),
        np.concatenate(order).astype(kind),
    )


def blocked(weight: Array, rows: int) -> bool:
    """Whether blocks of `rows` outputs (nearly) share their zeros."""
    outs = weight.shape[0] // rows * rows
    if outs < weight.shape[0] or not outs:
        return False
    held = (weight.reshape(-1, rows, weight.shape[1]) != 0).any(1).sum() * rows
    return bool(held <= 1.15 * max(int(np.count_nonzero(weight)), 1))
