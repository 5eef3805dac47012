"""Einsum: a tensor as a sum of products of factors, which is what every multilinear factorization is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto

from lilliput.stored.base import Floats, Head, HeadReader, Mask, Plan, Section, Source, Storage, Stored
from lilliput.stored.operators import Operators

LABELS = "abcdefghijklmnopqrstuvwxyz"
EQUATION = re.compile(r"[a-zA-Z]*(,[a-zA-Z]*)*->[a-zA-Z]*")


@dataclass(frozen=True, eq=False)
class Einsum(Stored):
    """Store a tensor as factors: `value = reshape(einsum(equation, *factors), shape)`, summed in float64, rounded to
    float32.

    A low-rank matrix is "ab,bc->ac"; a Tucker decomposition, a tensor train, a tensor ring and Kronecker products are
    other equations. Factors are multiplied from the left, each pair as one product.

    Args:
        factors: stored tensors, each of the axes that the equation gives it.
        equation: a letter for each axis, as in numpy.einsum, with "->".
        shape: the tensor's shape, of as many values as the equation gives.

    Raises:
        ValueError: if the factors do not fit the equation, or the equation not the shape.

    Example:
        >>> from lilliput.stored.plain import Plain
        >>> u, v = Plain(np.ones((4, 1), np.float32)), Plain(np.ones((1, 6), np.float32))
        >>> Einsum((u, v), "or,ri->oi", (4, 3, 2)).storage().bits
        320
    """

    factors: tuple[Stored, ...]
    equation: str
    shape: tuple[int, ...]

    tag: ClassVar[int | str] = 3

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("Einsum: needs at least one factor, got none. Give the tensors whose product it is.")
        if not EQUATION.fullmatch(self.equation):
            raise ValueError(f'Einsum: equation must be letters as in "ab,bc->ac", got {self.equation!r}. Rewrite it.')
        sizes = self._sizes([factor.shape for factor in self.factors])
        output = self.equation.partition("->")[2]
        if sizes is None or math.prod(sizes.get(letter, 0) for letter in output) != math.prod(self.shape):
            raise ValueError(
                f"Einsum: factors must multiply to {self.shape}, got {[factor.shape for factor in self.factors]} in "
                f"{self.equation!r}. Check their order and inner sizes."
            )

    def _sizes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int] | None:
        """The size of each letter, or None where the factors contradict the equation."""
        sizes: dict[str, int] = {}
        terms, output = self.equation.partition("->")[0].split(","), self.equation.partition("->")[2]
        if len(terms) != len(shapes) or len(set(output)) != len(output):
            return None
        for term, shape in zip(terms, shapes, strict=True):
            if len(term) != len(shape) or any(sizes.setdefault(i, n) != n for i, n in zip(term, shape, strict=True)):
                return None
        return sizes

    @cached_property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """The products from the left: each the equation of what was multiplied so far with the next factor."""
        terms, output = self.equation.partition("->")[0].split(","), self.equation.partition("->")[2]
        if len(terms) == 1:
            return ((f"{terms[0]}->{output}", output),)
        done, steps = terms[0], []
        for i, term in enumerate(terms[1:], 1):
            later = set("".join(terms[i + 1 :]) + output)
            kept = "".join(letter for letter in dict.fromkeys(done + term) if letter in later)
            kept = output if i == len(terms) - 1 else kept
            steps.append((f"{done},{term}->{kept}", kept))
            done = kept
        return tuple(steps)

    @property
    def _same(self) -> bool:
        """Whether it is its one factor under another shape."""
        source, _, output = self.equation.partition("->")
        return source == output

    @property
    def most(self) -> int:
        """The most values of a product on the way."""
        sizes = self._sizes([factor.shape for factor in self.factors]) or {}
        return max(math.prod(sizes[letter] for letter in kept) for _, kept in self.steps)

    @property
    def values(self) -> int:
        return sum(factor.values for factor in self.factors)

    @property
    def bits(self) -> float:
        return float(np.mean([factor.bits for factor in self.factors]))

    def decode(self) -> Floats:
        """The product of the decoded factors."""
        return self._decoded

    @cached_property
    def _decoded(self) -> Floats:
        # BLAS rounds differently from one machine to the next: sums in float64 make the float32 result the same.
        whole = self.factors[0].decode().astype(np.float64)
        if len(self.factors) == 1:
            whole = np.einsum(self.equation, whole)
        for (equation, _), factor in zip(self.steps, self.factors[1:], strict=False):
            whole = np.einsum(equation, whole, factor.decode().astype(np.float64), optimize=True)
        return whole.astype(np.float32).reshape(self.shape)

    def storage(self) -> Storage:
        """What the factors take."""
        named = ((f"{i}.{name}", n, b) for i, f in enumerate(self.factors) for name, n, b in f.storage().parts)
        return Storage(tuple(named))

    def facts(self) -> dict[str, Any]:
        if self._same:
            return self.factors[0].facts()
        if self.equation != chain(len(self.factors)):
            return super().facts()
        return super().facts() | {"kind": "product", "rank": self.factors[0].shape[-1]}

    def write(self, head: Head, section: Section) -> None:
        """The factors, and the equation where it is not that of a chain of matrices."""
        other = self.equation != chain(len(self.factors))
        head.number(len(self.factors) << 1 | other)
        for factor in self.factors:
            head.tensor(factor, section)
        if other:
            head.text(self.equation)

    @classmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        number = head.count() << 1 if head.version == 1 else head.number()
        if number >> 1 > len(head.data):
            raise ValueError(f"a product has {number >> 1} factors")
        plans = [head.tensor()[0] for _ in range(number >> 1)]
        equation = head.text() if number & 1 else None

        def plan(source: Source, shape: tuple[int, ...], mask: Mask | None) -> Einsum:
            source.claim(shape)
            factors = tuple(factor(source) for factor in plans)
            made = product(factors, shape) if equation is None else cls(factors, equation, shape)
            if made.most > source.most:
                raise ValueError(f"a product of factors has {made.most} values on the way to its result")
            return made

        return plan

    def onnx(self, writer: Operators, name: str) -> None:
        """MatMul where a step is a product of two matrices, else Einsum, in float64 as decoded; then Cast, Reshape."""
        if self._same:
            whole = writer.fresh()
            self.factors[0].onnx(writer, whole)
            writer.reshaped(whole, self.shape, name)
            return
        wide = []
        for factor in self.factors:
            narrow = writer.fresh()
            factor.onnx(writer, narrow)
            wide.append(writer.node("Cast", [narrow], to=TensorProto.DOUBLE))
        value = wide[0]
        if len(wide) == 1:
            value = writer.node("Einsum", [value], equation=self.equation)
        for (equation, _), operand in zip(self.steps, wide[1:], strict=False):
            if re.fullmatch(r"(\w)(\w),\2(\w)->\1\3", equation):
                value = writer.node("MatMul", [value, operand])
            else:
                value = writer.node("Einsum", [value, operand], equation=equation)
        flat = len(self.shape) == len(self.steps[-1][1])
        if flat:
            writer.node("Cast", [value], name, to=TensorProto.FLOAT)
        else:
            writer.reshaped(writer.node("Cast", [value], to=TensorProto.FLOAT), self.shape, name)


def chain(factors: int) -> str:
    """The equation of a product of matrices.

    Example:
        >>> chain(3)
        'ab,bc,cd->ad'
    """
    terms = ",".join(LABELS[i : i + 2] for i in range(factors))
    return f"{terms}->{LABELS[0]}{LABELS[factors]}"


def product(factors: Sequence[Stored], shape: tuple[int, ...]) -> Einsum:
    """The product of a chain of matrices: `value = reshape(factors[0] @ factors[1] @ ..., shape)`.

    Args:
        factors: stored matrices; stacks of matrices are joined one by one, all of the same leading axes.
        shape: the tensor's shape.

    Raises:
        ValueError: if the factors do not chain to `shape`.
    """
    if not factors or len(factors) >= len(LABELS):
        raise ValueError(f"Product: needs 1 to {len(LABELS) - 1} factors, got {len(factors)}. Multiply some first.")
    deepest = max(len(factor.shape) for factor in factors)
    if deepest <= 2:
        return Einsum(tuple(factors), chain(len(factors)), shape)
    stack = LABELS.upper()[: deepest - 2]
    terms = [(stack if len(factor.shape) > 2 else "") + LABELS[i : i + 2] for i, factor in enumerate(factors)]
    return Einsum(tuple(factors), f"{','.join(terms)}->{stack}{LABELS[0]}{LABELS[len(factors)]}", shape)
