"""Sizes that are free until the model runs: integers (the compiled maxima) that remember how they follow from them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Term = tuple[str, ...]


class Size(int):
    """A polynomial in named sizes, such as `12*batch*seq`; as an int it is its value at the compiled maximum.

    Python code computes with it as with any integer and so plans for the maximum; C code prints it with `c`. What holds
    for the maximum alone must not be decided by it: ask `fixed` first.

    Example:
        >>> n = Size.named("seq", 128)
        >>> c(n * 12 + 1), int(n * 12 + 1)
        ('(1 + 12*seq)', 1537)
        >>> c(n - n), fixed(n)
        ('0', False)
    """

    terms: dict[Term, int]

    @staticmethod
    def named(name: str, most: int) -> int:
        """The free size `name`, at most `most`."""
        return Size._of({(name,): 1}, most)

    @staticmethod
    def _of(terms: dict[Term, int], most: int) -> int:
        kept = {term: k for term, k in terms.items() if k}
        if all(not term for term in kept):
            return most
        size = int.__new__(Size, most)
        size.terms = kept
        return size

    def __add__(self, other: Any) -> int:
        if not _whole(other):
            return NotImplemented
        terms = dict(self.terms)
        for term, k in _terms(other).items():
            terms[term] = terms.get(term, 0) + k
        return Size._of(terms, int(self) + int(other))

    def __mul__(self, other: Any) -> int:
        if not _whole(other):
            return NotImplemented
        terms: dict[Term, int] = {}
        for (a, j), (b, k) in itertools.product(self.terms.items(), _terms(other).items()):
            term = tuple(sorted(a + b))
            terms[term] = terms.get(term, 0) + j * k
        return Size._of(terms, int(self) * int(other))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> int:
        return self * -1

    def __sub__(self, other: Any) -> int:
        if not _whole(other):
            return NotImplemented
        return self.__add__(-other)

    def __rsub__(self, other: Any) -> int:
        return (-self).__add__(other)

    def __eq__(self, other: Any) -> bool:
        return _whole(other) and _terms(self) == _terms(other)

    def __ne__(self, other: Any) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(int(self))


def _whole(x: Any) -> bool:
    return isinstance(x, int | np.integer)


def _terms(x: Any) -> dict[Term, int]:
    return x.terms if isinstance(x, Size) else {(): int(x)} if x else {}


def fixed(*sizes: int) -> bool:
    """Whether none of these is free until the model runs."""
    return not any(isinstance(size, Size) for size in sizes)


def c(size: int) -> str:
    """A C expression (of type int64_t where a size is free) that is safe inside any other."""
    if not isinstance(size, Size):
        return str(int(size)) if size >= 0 else f"({int(size)})"
    parts = ["*".join([*([] if k == 1 and term else [str(k)]), *term]) for term, k in sorted(size.terms.items())]
    return parts[0] if len(parts) == 1 and size.terms[next(iter(size.terms))] == 1 else f"({' + '.join(parts)})"


def never_negative(size: int, most: Mapping[str, int]) -> bool:
    """Whether a size is at least 0 for all free sizes from 1 to their maxima (as far as its terms tell one by one)."""
    if not isinstance(size, Size):
        return int(size) >= 0
    return (
        sum(
            k * (1 if k > 0 else int(np.prod([most[name] for name in term], dtype=object)) if term else 1)
            for term, k in size.terms.items()
        )
        >= 0
    )


def product(sizes: Sequence[int]) -> int:
    """The product, which stays free where a factor is."""
    total = 1
    for size in sizes:
        total = total * size
    return total


def shown(shape: Sequence[int]) -> str:
    """A shape for people: 16x32x32."""
    return "x".join(c(size).strip("()") for size in shape) or "scalar"


class Worlds:
    """Several choices of the free sizes, the first their maxima, in which a graph is read to see what depends on them.

    A size that takes the values v1..vK in the K worlds is the polynomial of total degree up to 3 through them, checked
    in worlds that the fit does not need.
    """

    def __init__(self, most: Mapping[str, int]) -> None:
        self.most = dict(most)
        names = sorted(self.most)
        degree = 3 if len(names) < 3 else 2
        self.monomials = [term for d in range(degree + 1) for term in itertools.combinations_with_replacement(names, d)]
        draw = np.random.default_rng(0)
        self.choices = [self.most]
        if names:
            # Not so small that what is cut off at an end differs from the maxima, nor so large that folding is slow.
            high = {name: min(size, 40) for name, size in self.most.items()}
            low = {name: max(2, size // 3) for name, size in high.items()}
            spare = 3
            for _ in range(1000):
                if len(self.choices) == len(self.monomials) + spare:
                    break
                world = {name: int(draw.integers(low[name], max(high[name], low[name] + 2) + 1)) for name in names}
                if world not in self.choices:
                    self.choices.append(world)

    def __len__(self) -> int:
        return len(self.choices)

    def fit(self, values: Sequence[int]) -> int | None:
        """The size with these values in the worlds; None where it is no such polynomial."""
        if all(value == values[0] for value in values):
            return int(values[0])
        for degree in range(1, len(self.monomials[-1]) + 1):  # the simplest that holds
            used = [term for term in self.monomials if len(term) <= degree]
            rows = [
                [float(np.prod([world[name] for name in term])) if term else 1.0 for term in used]
                for world in self.choices
            ]
            # The maxima may be large, which would spoil the fit: they only check it.
            factors, *_ = np.linalg.lstsq(np.array(rows[1:]), np.array(values[1:], float), rcond=None)
            terms = {term: round(k) for term, k in zip(used, factors, strict=True)}
            if all(
                sum(k * int(np.prod([world[n] for n in term])) for term, k in terms.items()) == value
                for world, value in zip(self.choices, values, strict=True)
            ):
                return Size._of(terms, int(values[0]))
        return None
