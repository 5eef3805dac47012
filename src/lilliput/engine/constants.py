"""Store the constants of a compiled model, each array once, as C initializers or as the bytes of a file of weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.arena import ALIGN
from lilliput.engine.c_names import identifier
from lilliput.engine.expr import literal
from lilliput.engine.graph import C_TYPES, Array


@dataclass
class Constants:
    """The arrays that kernels keep, each once, in C or in a file of weights."""

    inside: bool = True
    taken: set[str] = field(default_factory=set)
    known: dict[bytes, tuple[str, int, Array]] = field(default_factory=dict)
    end: int = 0

    def add(self, data: Array, name: str) -> str:
        """Keep an array; the C expression of a pointer to it."""
        data = np.ascontiguousarray(data)
        key = data.dtype.str.encode() + data.tobytes()
        if key not in self.known:
            self.end = -(-self.end // ALIGN) * ALIGN
            self.known[key] = (identifier(name, self.taken), self.end, data)
            self.end += max(data.nbytes, 1)
        symbol, at, _ = self.known[key]
        return symbol if self.inside else f"(const {C_TYPES[data.dtype.name]} *)(weights + {at})"

    def text(self) -> str:
        """The arrays as C."""
        return (
            "\n".join(
                f"static const {C_TYPES[data.dtype.name]} {name}[{max(data.size, 1)}] = {{\n{numbers(data)}}};"
                for name, _, data in self.known.values()
            )
            if self.inside
            else ""
        )

    def data(self) -> bytes:
        """The arrays as the bytes of a file."""
        if self.inside:
            return b""
        whole = bytearray(-(-self.end // ALIGN) * ALIGN)
        for _, at, data in self.known.values():
            whole[at : at + data.nbytes] = data.tobytes()
        return bytes(whole)


def numbers(data: Array) -> str:
    """An array's numbers as C, some lines of them."""
    flat = data.reshape(-1)
    if data.dtype == np.float32:
        words = [literal(x, "float32").strip("()") for x in flat]
    elif data.dtype == np.float16:
        words = [str(x) for x in flat.view(np.uint16)]
    elif data.dtype == np.int64:
        words = [literal(x, "int64") for x in flat]
    elif data.dtype == np.bool_:
        words = [str(int(x)) for x in flat]
    else:
        words = [literal(x, data.dtype.name) if int(x) == -(2**31) else str(int(x)) for x in flat]
    lines, line = [], "   "
    for word in words or ["0"]:
        if len(line) + len(word) > 116:
            lines.append(line)
            line = "   "
        line += f" {word},"
    return "\n".join([*lines, line]) + "\n"
