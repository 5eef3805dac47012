"""Loop nests that reduce: at each kept position accumulate over the reduced elements, then finish.

The same steps are written in two ways. *inside*: the reduced elements lie side by side, so that several partial
accumulators run along them and are folded at the end. *across*: kept positions lie side by side, so that a block of
them is done at once, each with an accumulator of its own. Accumulators are small arrays with literal sizes, which
compilers keep in vector registers; nothing needs floating point sums to be reordered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lilliput.engine import loops
from lilliput.engine.expr import WRITERS, Expr, arg, literal
from lilliput.engine.graph import C_TYPES
from lilliput.engine.size import c, fixed
from lilliput.engine.target import Target

COMBINE: dict[str, Callable[[Expr, Expr], Expr]] = {
    "sum": lambda a, b: a + b,
    "prod": lambda a, b: a * b,
    "max": lambda a, b: a.max(b),
    "min": lambda a, b: a.min(b),
}
LEAST = {"float32": float("-inf"), "int8": -128, "uint8": 0, "int32": -(2**31), "int64": -(2**63), "bool": 0}
MOST = {"float32": float("inf"), "int8": 127, "uint8": 255, "int32": 2**31 - 1, "int64": 2**63 - 1, "bool": 1}
NEUTRAL: dict[str, Callable[[str], float]] = {
    "sum": lambda kind: 0,
    "prod": lambda kind: 1,
    "max": LEAST.__getitem__,
    "min": MOST.__getitem__,
}


@dataclass(frozen=True)
class Each:
    """A pass over the reduced elements: C statements that may use at(operand) and position values.

    Args:
        results: (name, how to combine, expression in C) accumulated over the elements.
        dtype: Of the accumulators.
    """

    lines: Callable[[Walk], Sequence[str]] = lambda walk: ()
    results: tuple[tuple[str, str, Callable[[Walk], str]], ...] = ()
    dtype: str = "float32"


@dataclass(frozen=True)
class Once:
    """What is done at each kept position: values by name (C expressions), then statements."""

    values: tuple[tuple[str, Callable[[Walk], str]], ...] = ()
    lines: Callable[[Walk], Sequence[str]] = lambda walk: ()
    dtype: str = "float32"


Raw = Callable[["Walk", Callable[..., str], str], Sequence[str]]


@dataclass
class Walk:
    """The loops over a shape of which some dimensions (axes) are reduced.

    Args:
        operands: The strides over the shape of each pointer ("x0", "y0", ...), 0 where it is broadcast or reduced
            away; the first decides which way is taken.
    """

    shape: Sequence[int]
    axes: Sequence[int]
    operands: Mapping[str, Sequence[int]]
    target: Target
    across: bool = False
    width: int = 1
    _place: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = list(self.operands)
        parts = []
        for dims in ([d for d in range(len(self.shape)) if d not in self.axes], list(self.axes)):
            sizes, strides = loops.collapsed(
                [self.shape[d] for d in dims], [tuple(self.operands[n][d] for d in dims) for n in names]
            )
            parts.append((sizes, dict(zip(names, strides, strict=True))))
        (self.kept, self.kept_strides), (self.inner, self.inner_strides) = parts
        first = names[0]
        inside = self.inner_strides[first][-1] if self.inner else None
        across = self.kept_strides[first][-1] if self.kept else None
        if across is not None and inside != 1:
            others = [n for n in names if self.kept_strides[n][-1] == 1]
            self.across = across == 1 or inside is None or (len(others) > 0 and across != 0)
        run = self.kept[-1] if self.across else self.inner[-1] if self.inner else 1
        widest = 4 * self.target.lanes if self.target.lanes > 1 else 16 if self.across else 4
        self.width = max(min(int(run), widest), 1) if fixed(run) else widest
        if not self.across:  # so that folding halves it evenly
            self.width = 1 << (self.width.bit_length() - 1)

    # what steps ask for ------------------------------------------------------------------------------------------

    def at(self, name: str) -> str:
        """The element of an operand at the place where the loops are: x0[...]."""
        return f"{name}[{self._place[name]}]"

    def value(self, name: str) -> str:
        """The value of a kept position that was made under this name."""
        return f"{name}[j]" if self.across else name

    # text --------------------------------------------------------------------------------------------------------

    def text(self, *steps: Each | Once | Raw) -> str:
        """The C statements.

        A step that is a function gets the walk, a function that gives the place of an operand at inner counters, and
        how many positions j there are, and returns statements.
        """
        if not self.across:
            return loops.nest(self.kept, lambda names: self._steps(steps, names, "", "1"))

        def outer(names: list[str]) -> list[str]:
            lines = []
            for head, start, count in pieces(self.kept[-1], self.width, "b"):
                lines += [head, *_indent(self._steps(steps, names, start, count)), "}"]
            return lines

        return loops.nest(self.kept[:-1], outer)

    def _steps(self, steps: Sequence[Each | Once | Raw], names: list[str], start: str, count: str) -> list[str]:
        lines: list[str] = []
        for step in steps:
            if isinstance(step, Each):
                lines += self._each(step, names, start, count)
            elif isinstance(step, Once):
                lines += self._once(step, names, start, count)
            else:

                def place(operand: str, *inner: str) -> str:
                    self._locate(names, start, inner)
                    return self.at(operand)

                lines += step(self, place, count)
        return lines

    def _locate(self, names: Sequence[str], start: str, inner: Sequence[str]) -> None:
        outer = [*names, *([f"({start} + j)" if start != "0" else "j"] if self.across else [])]
        self._place = {
            n: loops.index([*outer, *inner], [*self.kept_strides[n], *(self.inner_strides[n] if inner else [])])
            for n in self.operands
        }

    def _once(self, step: Once, names: list[str], start: str, count: str) -> list[str]:
        self._locate(names, start, [])
        kind = C_TYPES[step.dtype]
        lines = []
        for name, make in step.values:
            if self.across:
                lines += [
                    f"{kind} {name}[{self.width}];",
                    f"for (int j = 0; j < {count}; j++) {name}[j] = {make(self)};",
                ]
            else:
                lines.append(f"const {kind} {name} = {make(self)};")
        done = list(step.lines(self))
        if done:
            lines += [f"for (int j = 0; j < {count}; j++) {{", *_indent(done), "}"] if self.across else done
        return lines

    def _each(self, step: Each, names: list[str], start: str, count: str) -> list[str]:
        kind = C_TYPES[step.dtype]
        lines = []
        inside = not self.across and bool(self.inner)
        suffix = "" if self.across else "_part"
        for name, how, _ in step.results:
            first = literal(NEUTRAL[how](step.dtype), step.dtype)
            lines += [
                f"{kind} {name}{suffix}[{self.width}];",
                f"for (int j = 0; j < {self.width if inside else count}; j++) {name}{suffix}[j] = {first};",
            ]
        counters = [f"r{k}" for k in range(len(self.inner))]

        def element() -> list[str]:
            done = list(step.lines(self))
            for name, how, make in step.results:
                here = f"{name}{suffix}[j]"
                done.append(updated(how, step.dtype, here, make(self)))
            return done

        if inside:

            def runs(outer: list[str]) -> list[str]:
                lines = []
                for head, at, many in pieces(self.inner[-1], self.width, "i"):
                    self._locate(names, start, [*outer, "j" if at == "0" else f"({at} + j)"])
                    lines += [
                        head,
                        f"    for (int j = 0; j < {many}; j++) {{",
                        *_indent(_indent(element())),
                        "    }",
                        "}",
                    ]
                return lines

            lines += loops.nest(self.inner[:-1], runs, "r").splitlines()
        elif self.across:

            def block(outer: list[str]) -> list[str]:
                self._locate(names, start, outer)
                return [f"for (int j = 0; j < {count}; j++) {{", *_indent(element()), "}"]

            lines += loops.nest(self.inner, block, "r").splitlines()
        else:
            self._locate(names, start, counters)
            lines += ["{", "    const int j = 0;", "    (void)j;", *_indent(element()), "}"]
        if not self.across:
            for name, how, _ in step.results:
                lines += fold(f"{name}{suffix}", self.width if inside else 1, how, step.dtype)
                lines.append(f"const {kind} {name} = {name}{suffix}[0];")
        return lines


def pieces(size: int, width: int, counter: str) -> list[tuple[str, str, str]]:
    """(head of a loop or block, where it starts, how many elements) that cover a size in pieces of a width."""
    if not fixed(size):
        whole = f"{c(size)} / {width} * {width}"
        return [
            (
                f"for (int64_t {counter} = 0; {counter} + {width} <= {c(size)}; {counter} += {width}) {{",
                counter,
                str(width),
            ),
            (
                f"for (int64_t {counter} = {whole}; {counter} < {c(size)}; {counter} += {width}) {{",
                counter,
                f"({c(size)} - {counter})",
            ),
        ]
    full = int(size) // width * width
    kind = "int" if size < 2**31 else "int64_t"
    parts = []
    if full == width:
        parts.append(("{", "0", str(width)))
    elif full:
        parts.append((f"for ({kind} {counter} = 0; {counter} < {full}; {counter} += {width}) {{", counter, str(width)))
    if size - full:
        parts.append(("{", str(full), str(size - full)))
    return parts


def updated(how: str, dtype: str, a: str, b: str) -> str:
    """The C statement that combines an expression into a place."""
    if dtype == "float32" and how in ("sum", "prod"):
        return f"{a} {'+' if how == 'sum' else '*'}= {b};"
    whole = COMBINE[how](arg(0, dtype), arg(1, dtype))
    return f"{a} = {WRITERS[whole.op](whole, [a, b if re.fullmatch(r'[^ ]+|.*[]]', b) else f'({b})'])};"


def fold(name: str, width: int, how: str, dtype: str) -> list[str]:
    """C statements that combine an array's elements into its first."""
    lines = []
    while width > 1:
        half = (width + 1) // 2
        lines.append(
            f"for (int j = 0; j < {width - half}; j++) {updated(how, dtype, f'{name}[j]', f'{name}[j + {half}]')}"
        )
        width = half
    return lines


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
