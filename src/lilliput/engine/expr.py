"""Elementwise expressions: what an operator computes for one element, fused over operators and printed as C."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lilliput.engine.graph import C_TYPES
from lilliput.engine.helpers import with_needed


@dataclass(frozen=True, eq=False, repr=False)
class Expr:
    """One element's value: an operator over others, an argument ("arg", value = its number) or a constant ("const").

    `key` is a digest of the whole expression, so that expressions of any depth are compared at once.

    Args:
        dtype: Numpy's name of its type. Arithmetic is C's on that type (float32 for floats, wrapping for integers).
    """

    op: str
    args: tuple[Expr, ...]
    dtype: str
    value: Any = None

    key: bytes = field(init=False)

    def __post_init__(self) -> None:
        head = f"{self.op}|{self.dtype}|{self.value!r}|{len(self.args)}|".encode()
        key = hashlib.blake2b(head + b"".join(a.key for a in self.args), digest_size=16).digest()
        object.__setattr__(self, "key", key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expr) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __repr__(self) -> str:
        return f"Expr({self.op}, {self.dtype}, {self.key.hex()})"

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
        return self.replaced({e: args[e.value] for e in self.walk() if e.op == "arg"})

    def replaced(self, known: Mapping[Expr, Expr]) -> Expr:
        """With parts replaced by others."""
        made = dict(known)
        for e in self.walk():
            if e not in made:
                args = tuple(made[a] for a in e.args)
                made[e] = e if args == e.args else Expr(e.op, args, e.dtype, e.value)
        return made[self]

    def count(self) -> int:
        """Different operators in it."""
        return len({e for e in self.walk() if e.op not in ("arg", "const")})

    def walk(self) -> list[Expr]:
        """Every part once, arguments before what uses them."""
        seen: dict[Expr, None] = {}
        open_: list[tuple[Expr, bool]] = [(self, False)]
        while open_:
            e, done = open_.pop()
            if done:
                seen[e] = None
            elif e not in seen:
                open_.append((e, True))
                open_ += [(a, False) for a in reversed(e.args) if a not in seen]
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

    Example:
        >>> literal(0.1, "float32"), literal(-3, "int8"), literal(float("inf"), "float32")
        ('0.1f', '(-3)', 'INFINITY')
    """
    if dtype.startswith("float"):
        x = float(value)
        if math.isnan(x):
            return "NAN"
        if math.isinf(x):
            return "INFINITY" if x > 0 else "(-INFINITY)"
        text = (
            np.format_float_positional(np.float32(x), unique=True, trim="0")
            if 1e-4 <= abs(x) < 1e7 or x == 0
            else (np.format_float_scientific(np.float32(x), unique=True, trim="0"))
        )
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
# operator -> names of the C helpers (see helpers.py) that its text calls, or a function of the expression that says it.
NEEDS: dict[str, Sequence[str] | Callable[[Expr], Sequence[str]]] = {}


def writes(op: str, template: str | Writer, needs: Sequence[str] | Callable[[Expr], Sequence[str]] = ()) -> None:
    """Say how an operator is written: a template over {0}, {1}, {T} (its C type), or a function."""
    NEEDS[op] = needs
    if isinstance(template, str):
        text = template
        WRITERS[op] = lambda e, a: text.format(*a, T=C_TYPES[e.dtype])
    else:
        WRITERS[op] = template


def statements(
    results: Sequence[Expr], arguments: Sequence[str], indent: str = "", prefix: str = "t"
) -> tuple[list[str], list[str]]:
    """C statements that compute the results from the arguments' C expressions, and the results' C expressions.

    Args:
        prefix: Of the names of what is in between.
    """
    names: dict[Expr, str] = {}
    lines: list[str] = []
    for result in results:
        for e in result.walk():
            if e in names:
                continue
            if e.op == "arg":
                names[e] = arguments[e.value]
            elif e.op == "const":
                names[e] = literal(e.value, e.dtype)
            else:
                names[e] = f"{prefix}{len(lines)}"
                text = WRITERS[e.op](e, [names[a] for a in e.args])
                lines.append(f"{indent}const {C_TYPES[e.dtype]} {names[e]} = {text};")
    return lines, [names[result] for result in results]


def needs(results: Sequence[Expr]) -> tuple[str, ...]:
    """The C helpers that the statements call, each behind those that it calls itself."""
    names: dict[str, None] = {}
    for e in (e for result in results for e in result.walk()):
        asked = NEEDS.get(e.op, ())
        for name in asked(e) if callable(asked) else asked:
            names.update(dict.fromkeys(with_needed(name)))
    return tuple(names)


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


def _wrap(e: Expr, text: str) -> str:
    """Integer arithmetic that wraps: on unsigned numbers, since signed overflow is undefined in C."""
    if e.dtype in ("int64", "int32"):
        u, s = ("uint64_t", "int64_t") if e.dtype == "int64" else ("uint32_t", "int32_t")
        for sign in (" + ", " - ", " * "):
            if sign in text:
                left, right = text.split(sign, 1)
                return f"({s})(({u}){left}{sign}({u}){right})"
        return f"({s})(0u - ({u}){text[1:]})"
    return text if _floats(e) else f"({C_TYPES[e.dtype]})({text})"


def _floats(e: Expr) -> bool:
    return e.dtype.startswith("float")


def _cast(e: Expr, a: list[str]) -> str:
    if e.dtype == "bool":
        return f"{a[0]} != 0"
    if not _floats(e.args[0]) or _floats(e):
        return f"({C_TYPES[e.dtype]}){a[0]}"
    return f"to_int64({a[0]})" if e.dtype == "int64" else f"({C_TYPES[e.dtype]})to_int32({a[0]})"


def _power(e: Expr, a: list[str]) -> str:
    exponent = e.args[1]
    known = float(exponent.value) if exponent.op == "const" else None
    short = {
        1.0: "{0}",
        2.0: "{0} * {0}",
        3.0: "{0} * {0} * {0}",
        0.5: "sqrtf({0})",
        -1.0: "1.0f / {0}",
        -0.5: "1.0f / sqrtf({0})",
        4.0: "({0} * {0}) * ({0} * {0})",
    }
    if _floats(e):
        return short[known].format(a[0]) if known in short else f"powf({a[0]}, {a[1]})"
    if _floats(exponent):
        kind = C_TYPES[e.dtype]
        return f"({kind})to_int{'64' if e.dtype == 'int64' else '32'}(powf((float){a[0]}, {a[1]}))"
    return f"({C_TYPES[e.dtype]})power_int64({a[0]}, {a[1]})"


def _by_type(floats: str, integers: str, unsigned: str = "") -> Writer:
    def write(e: Expr, a: list[str]) -> str:
        kind = e.args[0].dtype
        text = floats if kind.startswith("float") else unsigned if unsigned and kind in ("uint8", "bool") else integers
        return text.format(*a, T=C_TYPES[e.dtype])

    return write


def _if_integer(*names: str) -> Callable[[Expr], Sequence[str]]:
    return lambda e: () if _floats(e) else names


def _divide(e: Expr, a: list[str]) -> str:
    if not _floats(e):
        return f"div_{e.dtype}({a[0]}, {a[1]})"
    if e.args[1].op == "const" and abs(float(e.args[1].value)) > 1e-30 and np.isfinite(e.args[1].value):
        inverse = np.float32(1) / np.float32(e.args[1].value)
        if inverse * np.float32(e.args[1].value) == 1 and abs(np.frexp(inverse)[0]) == 0.5:
            return f"{a[0]} * {literal(inverse, e.dtype)}"
    return f"{a[0]} / {a[1]}"


writes("add", lambda e, a: _wrap(e, f"{a[0]} + {a[1]}"))
writes("sub", lambda e, a: _wrap(e, f"{a[0]} - {a[1]}"))
writes("mul", lambda e, a: _wrap(e, f"{a[0]} * {a[1]}"))
writes("neg", lambda e, a: _wrap(e, f"-{a[0]}"))
writes("div", _divide, _if_integer("div"))
# NaN as the first argument stays.
writes("max", "{0} < {1} ? {1} : {0}")
writes("min", "{0} > {1} ? {1} : {0}")
for _op, _sign in {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "=="}.items():
    writes(_op, f"{{0}} {_sign} {{1}}")
writes("where", "{0} ? {1} : {2}")
writes("cast", _cast, lambda e: ("to_int",) if _floats(e.args[0]) and not _floats(e) and e.dtype != "bool" else ())
writes("not", "!{0}")
for _op, _sign in {"and": "&", "or": "|", "xor": "^"}.items():
    writes(_op, f"({{T}})({{0}} {_sign} {{1}})")
writes("invert", "({T})~{0}")
writes("shift_left", "({T})((uint64_t){1} < 8 * sizeof({T}) ? (uint64_t){0} << {1} : 0)")
writes(
    "shift_right",
    _by_type(
        "",
        "({T})((uint64_t){1} < 8 * sizeof({T}) ? {0} >> {1} : {0} < 0 ? -1 : 0)",
        "({T})((uint64_t){1} < 8 * sizeof({T}) ? {0} >> {1} : 0)",
    ),
)
writes("isnan", "{0} != {0}")
writes("isinf", "fabsf({0}) > 3.4028235e38f")
writes("abs", _by_type("fabsf({0})", "({T})({0} < 0 ? 0u - (uint64_t){0} : (uint64_t){0})", "{0}"))
writes("sign", _by_type("{0} > 0 ? 1 : {0} < 0 ? -1 : {0}", "{0} > 0 ? 1 : {0} < 0 ? -1 : 0", "{0} > 0"))
writes("floor", "floorf({0})")
writes("ceil", "ceilf({0})")
writes("round", "rintf({0})")
writes("sqrt", "sqrtf({0})")
writes("pow", _power, lambda e: () if _floats(e) else ("to_int",) if _floats(e.args[1]) else ("power",))
writes("mod", _by_type("mod_float({0}, {1})", "({T})mod_int64({0}, {1})"), ["mod"])
writes("fmod", _by_type("fmodf({0}, {1})", "({T})fmod_int64({0}, {1})"), lambda e: () if _floats(e) else ("mod",))
for _op in ("exp", "log", "tanh", "sigmoid", "erf", "softplus"):
    writes(_op, f"fast_{_op}({{0}})", [_op])
for _op in ("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"):
    writes(_op, f"{_op}f({{0}})")
