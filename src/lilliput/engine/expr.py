"""Elementwise expressions: what an operator does to one element, fused over a chain of operators and printed as C."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from lilliput.engine.graph import C_TYPES


@dataclass(frozen=True)
class Expr:
    """One element's value: an operator over others, an argument ("arg", value = its number) or a constant ("const").

    dtype: numpy's name of its type. Arithmetic is C's on that type (float32 for floats, wrapping for integers).
    """

    op: str
    args: tuple[Expr, ...]
    dtype: str
    value: Any = None

    @cached_property
    def _key(self) -> int:
        return hash((self.op, self.args, self.dtype, repr(self.value)))

    def __hash__(self) -> int:
        return self._key

    def of(self, op: str, *others: Any, dtype: str | None = None) -> Expr:
        """`op` of this and others (numbers become constants of this type)."""
        parts = tuple(x if isinstance(x, Expr) else const(x, self.dtype) for x in others)
        return Expr(op, (self, *parts), dtype or self.dtype)

    def __add__(self, other: Any) -> Expr:
        return self.of("add", other)

    def __sub__(self, other: Any) -> Expr:
        return self.of("sub", other)

    def __mul__(self, other: Any) -> Expr:
        return self.of("mul", other)

    def __truediv__(self, other: Any) -> Expr:
        return self.of("div", other)

    def __radd__(self, other: Any) -> Expr:
        return const(other, self.dtype) + self

    def __rsub__(self, other: Any) -> Expr:
        return const(other, self.dtype) - self

    def __rmul__(self, other: Any) -> Expr:
        return const(other, self.dtype) * self

    def __rtruediv__(self, other: Any) -> Expr:
        return const(other, self.dtype) / self

    def __neg__(self) -> Expr:
        return self.of("neg")

    def __lt__(self, other: Any) -> Expr:
        return self.of("lt", other, dtype="bool")

    def __le__(self, other: Any) -> Expr:
        return self.of("le", other, dtype="bool")

    def __gt__(self, other: Any) -> Expr:
        return self.of("gt", other, dtype="bool")

    def __ge__(self, other: Any) -> Expr:
        return self.of("ge", other, dtype="bool")

    def max(self, other: Any) -> Expr:
        """The larger of two."""
        return self.of("max", other)

    def min(self, other: Any) -> Expr:
        """The smaller of two."""
        return self.of("min", other)

    def cast(self, dtype: str) -> Expr:
        """As another type, as numpy's astype does."""
        return self if dtype == self.dtype else Expr("cast", (self,), dtype)

    def substitute(self, args: Sequence[Expr]) -> Expr:
        """With the arguments replaced."""
        known: dict[Expr, Expr] = {}

        def walk(e: Expr) -> Expr:
            if e not in known:
                known[e] = args[e.value] if e.op == "arg" else (
                    e if not e.args else Expr(e.op, tuple(walk(a) for a in e.args), e.dtype, e.value))
            return known[e]

        return walk(self)

    def count(self) -> int:
        """Different operators in it."""
        return len({e for e in self.walk() if e.op not in ("arg", "const")})

    def walk(self) -> list[Expr]:
        """Every part once, arguments before what uses them."""
        seen: dict[Expr, None] = {}

        def visit(e: Expr) -> None:
            if e not in seen:
                for a in e.args:
                    visit(a)
                seen[e] = None

        visit(self)
        return list(seen)


def arg(i: int, dtype: Any) -> Expr:
    """Argument i."""
    return Expr("arg", (), np.dtype(dtype).name, i)


def const(value: Any, dtype: Any) -> Expr:
    """A number."""
    kind = np.dtype(dtype)
    return Expr("const", (), kind.name, np.asarray(value).astype(kind).item())


def where(condition: Expr, yes: Any, no: Any) -> Expr:
    """`yes` where the condition holds, else `no`."""
    dtype = yes.dtype if isinstance(yes, Expr) else no.dtype
    yes, no = (x if isinstance(x, Expr) else const(x, dtype) for x in (yes, no))
    return Expr("where", (condition, yes, no), dtype)


def literal(value: Any, dtype: str) -> str:
    """A number as C writes it.

    >>> literal(0.1, "float32"), literal(-3, "int8"), literal(float("inf"), "float32")
    ('0.1f', '(-3)', 'INFINITY')
    """
    if dtype.startswith("float"):
        x = float(value)
        if math.isnan(x):
            return "NAN"
        if math.isinf(x):
            return "INFINITY" if x > 0 else "(-INFINITY)"
        text = np.format_float_positional(np.float32(x), unique=True, trim="0") if 1e-4 <= abs(x) < 1e7 or x == 0 else (
            np.format_float_scientific(np.float32(x), unique=True, trim="0"))
        return f"{text}f" if x >= 0 else f"({text}f)"
    if dtype == "bool":
        return "1" if value else "0"
    if dtype == "int64":
        if int(value) == -(2**63):
            return "INT64_MIN"
        return f"INT64_C({int(value)})" if value >= 0 else f"(-INT64_C({-int(value)}))"
    if int(value) == -(2**31):
        return "INT32_MIN"
    return str(int(value)) if value >= 0 else f"({int(value)})"


Writer = Callable[[Expr, list[str]], str]
# operator -> C text of (expression, its arguments in C). ops/ adds to it with `writes`.
WRITERS: dict[str, Writer] = {}
# operator -> names of the C helpers (see helpers.py) that its text calls, by the type of its first argument.
NEEDS: dict[str, tuple[str, ...]] = {}


def writes(op: str, template: str | Writer, needs: Sequence[str] = ()) -> None:
    """Say how an operator is written: a template over {0}, {1}, {T} (its C type), or a function."""
    NEEDS[op] = tuple(needs)
    if isinstance(template, str):
        text = template
        WRITERS[op] = lambda e, a: text.format(*a, T=C_TYPES[e.dtype])
    else:
        WRITERS[op] = template


def statements(results: Sequence[Expr], arguments: Sequence[str], indent: str = "") -> tuple[list[str], list[str]]:
    """C statements that compute the results from the arguments' C expressions, and the results' C expressions."""
    names: dict[Expr, str] = {}
    lines = []
    for result in results:
        for e in result.walk():
            if e in names:
                continue
            if e.op == "arg":
                names[e] = arguments[e.value]
            elif e.op == "const":
                names[e] = literal(e.value, e.dtype)
            else:
                names[e] = f"t{len(lines)}"
                text = WRITERS[e.op](e, [names[a] for a in e.args])
                lines.append(f"{indent}const {C_TYPES[e.dtype]} {names[e]} = {text};")
    return lines, [names[result] for result in results]


def needs(results: Sequence[Expr]) -> tuple[str, ...]:
    """The C helpers that the statements call."""
    return tuple(dict.fromkeys(name for result in results for e in result.walk() for name in NEEDS.get(e.op, ())))


def clamp_of(e: Expr) -> tuple[float, float] | None:
    """(low, high) where the expression only clamps its one argument, such as Relu; None where it does more."""
    low, high = -math.inf, math.inf
    while e.op in ("max", "min") and len(e.args) == 2 and e.dtype == "float32":
        a, b = e.args
        if a.op == "const":
            a, b = b, a
        if b.op != "const":
            return None
        # Outer operators come first: an inner bound is itself clamped by them.
        if e.op == "max":
            low = max(low, min(float(b.value), high))
        else:
            high = min(high, max(float(b.value), low))
        e = a
    return (low, high) if e.op == "arg" and e.value == 0 and (low, high) != (-math.inf, math.inf) else None


writes("add", lambda e, a: _wrap(e, f"{a[0]} + {a[1]}"))
writes("sub", lambda e, a: _wrap(e, f"{a[0]} - {a[1]}"))
writes("mul", lambda e, a: _wrap(e, f"{a[0]} * {a[1]}"))
writes("neg", lambda e, a: _wrap(e, f"-{a[0]}"))
writes("max", lambda e, a: f"{a[0]} > {a[1]} ? {a[0]} : {a[1]}")
writes("min", lambda e, a: f"{a[0]} < {a[1]} ? {a[0]} : {a[1]}")
for _op, _sign in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}.items():
    writes(_op, f"{{0}} {_sign} {{1}}")
writes("where", "{0} ? {1} : {2}")
writes("cast", lambda e, a: f"{a[0]} != 0" if e.dtype == "bool" else f"({C_TYPES[e.dtype]}){a[0]}")
writes("div", lambda e, a: f"{a[0]} / {a[1]}" if e.dtype.startswith("float") else f"div_{e.dtype}({a[0]}, {a[1]})",
       ["div"])


def _wrap(e: Expr, text: str) -> str:
    """Integer arithmetic that wraps: on unsigned numbers, since signed overflow is undefined in C."""
    if e.dtype in ("int64", "int32"):
        u, s = ("uint64_t", "int64_t") if e.dtype == "int64" else ("uint32_t", "int32_t")
        for sign in (" + ", " - ", " * "):
            if sign in text:
                left, right = text.split(sign, 1)
                return f"({s})(({u}){left}{sign}({u}){right})"
        return f"({s})(0u - ({u}){text[1:]})"
    return text if e.dtype.startswith("float") else f"({C_TYPES[e.dtype]})({text})"
