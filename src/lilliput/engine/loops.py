"""Write loop nests over strided operands as C."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lilliput.engine.graph import Value
from lilliput.engine.size import c, fixed

Strides = tuple[int, ...]


def strides_of(value: Value, shape: Sequence[int]) -> Strides:
    """The strides of a value that is broadcast to a shape (0 along what is broadcast)."""
    lead = len(shape) - value.rank
    return tuple(
        0 if i < lead or (value.shape[i - lead] == 1 and size != 1) else value.strides[i - lead]
        for i, size in enumerate(shape)
    )


def collapsed(shape: Sequence[int], operands: Sequence[Strides]) -> tuple[list[int], list[list[int]]]:
    """(sizes, strides of each operand) of the fewest loops over the same elements, the outermost first.

    Loops are in the order of the first operand's strides; neighbours that every operand walks through as one are one.
    """
    dims = [d for d, size in enumerate(shape) if size != 1]
    dims.sort(key=lambda d: [-abs(int(o[d])) for o in operands])
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in operands]
    for d in dims:
        if sizes and all(o[-1] == s[d] * shape[d] for o, s in zip(strides, operands, strict=True)):
            sizes[-1] = sizes[-1] * shape[d]
            for o, s in zip(strides, operands, strict=True):
                o[-1] = s[d]
        else:
            sizes.append(shape[d])
            for o, s in zip(strides, operands, strict=True):
                o.append(s[d])
    return sizes, strides


def index(names: Sequence[str], strides: Sequence[int]) -> str:
    """The C expression of an element's place: 32*i0 + i1."""
    parts = []
    for name, stride in zip(names, strides, strict=True):
        if stride == 0 and fixed(stride):
            continue
        parts.append(name if stride == 1 and fixed(stride) else f"{c(stride)}*{name}")
    return " + ".join(parts) or "0"


def nest(sizes: Sequence[int], body: Callable[[list[str]], Sequence[str]], prefix: str = "i") -> str:
    """C loops over sizes; body(names of the counters) gives the innermost statements."""
    names = [f"{prefix}{k}" for k in range(len(sizes))]
    lines = []
    for k, (name, size) in enumerate(zip(names, sizes, strict=True)):
        lines.append(
            f"{'    ' * k}for (int64_t {name} = 0; {name} < {c(size)}; {name}++) {{"
            if not fixed(size) or size > 2**31 - 1
            else f"{'    ' * k}for (int {name} = 0; {name} < {c(size)}; {name}++) {{"
        )
    lines += ["    " * len(sizes) + line for line in body(names)]
    lines += ["    " * k + "}" for k in reversed(range(len(sizes)))]
    return "\n".join(lines)


def zero_border(value: Value) -> str:
    """C statements that set the border of y (its first element) to zero."""
    shape, border, strides = list(value.shape), value.border, value.strides
    lines = []
    for d in range(len(shape)):
        for side, (start, size) in enumerate(((-border[d][0], border[d][0]), (shape[d], border[d][1]))):
            if not size:
                continue
            # The whole extent along the dimensions before it is already zero at their borders, or is zeroed here.
            extent = [shape[k] if k < d else size if k == d else shape[k] + sum(border[k]) for k in range(len(shape))]
            first: int = start * strides[d]
            for k in range(d + 1, len(shape)):
                first = first - border[k][0] * strides[k]
            sizes, (steps,) = collapsed(extent, [tuple(strides)])
            at = f"y[{c(first)} + {{}}] = 0;" if first != 0 else "y[{}] = 0;"
            lines.append(nest(sizes, lambda names, at=at, steps=steps: [at.format(index(names, steps))]))  # type: ignore
            del side
    return "\n".join(lines)
