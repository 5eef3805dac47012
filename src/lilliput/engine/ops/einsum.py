"""Lower Einsum: combine operands two by two, each pair by one matrix product or one multiplication."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from lilliput.engine.graph import Node, Value
from lilliput.engine.lower import Build, lower
from lilliput.engine.size import fixed, product

Term = tuple[Value, str]  # a value and the label of each of its dimensions


@lower("Einsum")
def einsum(node: Node, build: Build) -> None:
    """Sums of products over named dimensions."""
    inputs = [node.input(i) for i in range(len(node.inputs))]
    labels, wanted = parsed(str(node.attrs.get("equation", "")), [v.rank for v in inputs], node)
    terms = [_diagonal(build, value, names) for value, names in zip(inputs, labels, strict=True)]
    terms = [_without_ones(build, term, terms, wanted) for term in terms]
    first = _summed(build, terms[0], wanted + "".join(n for _, n in terms[1:]))
    for i, term in enumerate(terms[1:], 1):
        later = wanted + "".join(n for _, n in terms[i + 1 :])
        first = _pair(build, _summed(build, first, later + term[1]), _summed(build, term, later + first[1]), later)
    value, names = _summed(build, first, wanted)
    if value.dtype != node.y.dtype:
        raise ValueError(f"Einsum {node.name}: its operands must be of one type.")
    value = _turned(build, value, [names.index(n) for n in wanted if n in names])
    build.reshape(value, node.y.shape, out=node.y)


def parsed(equation: str, ranks: Sequence[int], node: Node) -> tuple[list[str], str]:
    """The labels of every operand and of the output, an ellipsis written out in capitals that the equation has not.

    Example:
        >>> parsed("...ij,jk", [3, 2], Node("Einsum", [], []))
        (['Aij', 'jk'], 'Aik')
    """
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    parts = left.split(",")
    free = [c for c in string.ascii_uppercase + string.ascii_lowercase if c not in equation]
    bad = ValueError(
        f"Einsum {node.name}: the equation must fit {len(ranks)} operands of ranks {list(ranks)}, got "
        f"{equation!r}. The file is damaged."
    )
    if len(parts) != len(ranks):
        raise bad
    most = max(
        (rank - len(part.replace("...", "")) for part, rank in zip(parts, ranks, strict=True) if "..." in part),
        default=0,
    )
    if most < 0 or most > len(free):
        raise bad
    dots = "".join(free[:most])
    written = []
    for part, rank in zip(parts, ranks, strict=True):
        count = rank - len(part.replace("...", ""))
        if count < 0 or (count and "..." not in part):
            raise bad
        written.append(part.replace("...", dots[len(dots) - count :] if count else ""))
    if not arrow:
        every = "".join(written)
        right = "..." + "".join(sorted(c for c in set(every) - set(dots) if every.count(c) == 1))
    wanted = right.replace("...", dots)
    if (
        any(not c.isalpha() for c in "".join(written) + wanted)
        or len(set(wanted)) < len(wanted)
        or not (set(wanted) <= set("".join(written)))
    ):
        raise bad
    return written, wanted


def _diagonal(build: Build, value: Value, names: str) -> Term:
    """Labels that stand twice at one operand: only elements where both are the same count."""
    for name in dict.fromkeys(names):
        while names.count(name) > 1:
            i = names.index(name)
            j = names.index(name, i + 1)
            rest = [d for d in range(len(names)) if d not in (i, j)]
            size = int(value.shape[i])
            value = _turned(build, value, [*rest, i, j])
            lead = list(value.shape[:-2])
            value = build.reshape(value, [*lead, size * size])
            value = build.slice(value, [0] * value.rank, [*lead, size], [*[1] * len(lead), size + 1])
            names = "".join(names[d] for d in rest) + name
    return value, names


def _without_ones(build: Build, term: Term, terms: Sequence[Term], wanted: str) -> Term:
    """Dimensions of size 1 that another operand has larger are dropped: they broadcast."""
    value, names = term
    for name in names:
        d = names.index(name)
        if value.shape[d] != 1 or not fixed(value.shape[d]):
            continue
        if any(name in other and v.shape[other.index(name)] != 1 for v, other in terms):
            value = _shaped(build, value, [*value.shape[:d], *value.shape[d + 1 :]])
            names = names[:d] + names[d + 1 :]
    return value, names


def _summed(build: Build, term: Term, kept: str) -> Term:
    """Summed over the labels that nothing needs any more."""
    value, names = term
    axes = tuple(d for d, name in enumerate(names) if name not in kept)
    if not axes:
        return term
    out = build.value(value.dtype, [size for d, size in enumerate(value.shape) if d not in axes])
    build.add("Reduce", [value], [out], axes=axes, kind="sum", keep=False, pre=None, post=None)
    return out, "".join(name for name in names if name in kept)


def _pair(build: Build, a: Term, b: Term, later: str) -> Term:
    """The product of two operands, summed over what they share and nothing needs."""
    (x, names_x), (y, names_y) = a, b
    sizes = {n: s for names, v in ((names_y, y), (names_x, x)) for n, s in zip(names, v.shape, strict=True)}
    both = [n for n in names_x if n in names_y]
    stack, inner = [n for n in both if n in later], [n for n in both if n not in later]
    rows, columns = [n for n in names_x if n not in both], [n for n in names_y if n not in both]
    order = stack + rows + columns
    shape = [sizes[n] for n in order]

    def arranged(value: Value, names: str, wanted: list[str], shape: list[int]) -> Value:
        return _shaped(build, _turned(build, value, [names.index(n) for n in wanted]), shape)

    def sized(names: list[str]) -> int:
        return product([sizes[n] for n in names])

    if not inner:
        left = arranged(x, names_x, stack + rows, [*(sizes[n] for n in stack + rows), *[1] * len(columns)])
        right = arranged(
            y, names_y, stack + columns, [*(sizes[n] for n in stack), *[1] * len(rows), *(sizes[n] for n in columns)]
        )
        return build.map([left, right], lambda p, q: p * q), "".join(order)
    lead = [sizes[n] for n in stack]
    left = arranged(x, names_x, stack + rows + inner, [*lead, sized(rows), sized(inner)])
    right = arranged(y, names_y, stack + inner + columns, [*lead, sized(inner), sized(columns)])
    made = build.value(x.dtype, [*lead, sized(rows), sized(columns)])
    build.add("MatMul", [left, right], [made])
    return _shaped(build, made, shape), "".join(order)


def _turned(build: Build, value: Value, perm: Sequence[int]) -> Value:
    if list(perm) == list(range(value.rank)):
        return value
    if value.data is not None:
        made = build.const(np.ascontiguousarray(value.data.transpose(perm)))
        made.narrow = None if value.narrow is None else value.narrow.moved(lambda a: a.transpose(perm))
        return made
    return build.transpose(value, perm)


def _shaped(build: Build, value: Value, shape: Sequence[int]) -> Value:
    if tuple(value.shape) == tuple(shape):
        return value
    if value.data is not None:
        made = build.const(value.data.reshape([int(s) for s in shape]))
        made.narrow = None if value.narrow is None else value.narrow.moved(lambda a: a.reshape(made.shape))
        return made
    return build.reshape(value, shape)
