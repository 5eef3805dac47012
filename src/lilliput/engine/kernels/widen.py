"""Multiply by weights that are stored in few bits: widen them to float32 panel by panel, just before they are used.

A panel holds some outputs' weights for some inputs, one input after the other. Levels of 4 or 2 bits share a byte with
those of the next inputs of the same output, so that widening runs along the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from lilliput.engine.graph import Array, Narrow
from lilliput.engine.kernels.narrow import HALF

BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True)
class Widen:
    """(out, in) weights as (levels - zero) * scale, scale and zero by blocks of `block` inputs: (out, ceil(in/block)).

    Args:
        bits: Of a level, which is unsigned below 8, signed at 8, a float16 at 16.
        scale: None where they do nothing.
        zero: As `scale`.
    """

    bits: int
    block: int
    levels: Array = field(repr=False)
    scale: Array | None = field(repr=False)
    zero: Array | None = field(repr=False)

    @property
    def per(self) -> int:
        """Levels in a byte."""
        return max(8 // self.bits, 1)

    def constants(self, rows: int, depth: int, pad: int = 1) -> dict[str, Array]:
        """The arrays, in panels of `rows` outputs (the last as wide as `pad` needs), `depth` inputs at a time."""
        outs, ins = self.levels.shape
        panels: dict[str, list[Array]] = {"levels": [], "scales": [], "zeros": []}
        for k in range(0, ins, depth):
            for o in range(0, outs, rows):
                part = _wide(self.levels[o : o + rows, k : k + depth], pad)
                part = np.pad(part, ((0, 0), (0, -part.shape[1] % self.per))).T
                held = part[:: self.per]
                if self.per > 1:
                    held = np.zeros(held.shape, np.uint8)
                    for i in range(self.per):
                        held |= part[i :: self.per] << (self.bits * i)
                panels["levels"].append(np.ascontiguousarray(held).reshape(-1))
                for key, array in (("scales", self.scale), ("zeros", self.zero)):
                    if array is not None:
                        first, last = k // self.block, -(-min(k + depth, ins) // self.block)
                        panels[key].append(_wide(array[o : o + rows, first:last], pad).T.reshape(-1))
        return {key: np.concatenate(parts) for key, parts in panels.items() if parts}

    def lines(self, width: int, ks: str, blocks: str, to: str) -> list[str]:
        """C lines that widen a panel (levels at `c`, scales at `s`, zeros at `z`) and move on to the next.

        Args:
            width: Its outputs and inputs.
            ks: As `width`.
            blocks: Of inputs in it.
        """
        per, sized = self.per, self.scale is not None
        shift = "" if blocks == "1" else f" + k / {self.block} * {width}"
        text = [f"for (int k = 0; k < {ks}; k += {per}) {{", f"    float *const v = {to} + k * {width};"]
        for name, pointer, held in (("f", "s", self.scale), ("m", "z", self.zero)):
            if held is not None:
                text.append(f"    const float *const {name} = {pointer}{shift};")
        text.append(f"    for (int j = 0; j < {width}; j++) {{")
        for i in range(per):
            if self.bits == 16:
                level = "half_to_float(c[j])"
            elif per == 1:
                level = "(float)c[j]"
            else:
                level = f"(float)(c[j]{f' >> {self.bits * i}' if i else ''} & {(1 << self.bits) - 1})"
            if self.zero is not None:
                level = f"({level} - m[j])"
            text.append(f"        v[{f'{i * width} + ' if i else ''}j] = {level}{' * f[j]' if sized else ''};")
        text += ["    }", f"    c += {width};", "}"]
        if sized:
            text.append(f"s += {blocks} * {width};")
        if self.zero is not None:
            text.append(f"z += {blocks} * {width};")
        return text

    def starts(self) -> list[str]:
        """C lines that declare the pointers."""
        kind = {16: "uint16_t", 8: "int8_t"}.get(self.bits, "uint8_t")
        return [
            f"const {kind} *c = levels;",
            *(["const float *s = scales;"] if self.scale is not None else []),
            *(["const float *z = zeros;"] if self.zero is not None else []),
        ]

    @property
    def helpers(self) -> tuple[str, ...]:
        """C text that the lines need."""
        return (HALF,) if self.bits == 16 else ()


def _wide(array: Array, pad: int) -> Array:
    return np.pad(array, ((0, -len(array) % pad), (0, 0)))


def widen(narrow: Narrow | None, weight: Array) -> Widen | None:
    """How (out, in) weights can be kept as narrow as the file has them, or None."""
    if narrow is None or weight.ndim != 2 or 0 in weight.shape:
        return None
    outs, ins = weight.shape
    if narrow.bits == 16:
        levels = np.asarray(narrow.levels)
        if narrow.scale is not None or levels.dtype != np.float16 or not np.isfinite(levels).all():
            return None
        return Widen(16, ins, levels, None, None)
    if narrow.scale is None:
        return None
    levels = np.asarray(narrow.levels).astype(np.int32)
    scale = np.broadcast_to(np.asarray(narrow.scale, np.float32), (outs, ins))
    zero = np.broadcast_to(np.asarray(0 if narrow.zero_point is None else narrow.zero_point, np.int32), (outs, ins))
    block = next((b for b in (ins, *BLOCKS) if _constant(scale, b) and _constant(zero, b)), 0)
    if not block:
        return None
    least, most = int(levels.min()), int(levels.max())
    bits = next((b for b in (2, 4) if most - least < 1 << b), 8)
    # Unsigned below 8 bits, signed at 8.
    shift = least if bits < 8 else 0 if most <= 127 and least >= -128 else 128
    levels, zero = levels - shift, zero - shift
    if levels.min() < (0 if bits < 8 else -128) or levels.max() > (127 if bits == 8 else (1 << bits) - 1):
        return None
    return Widen(
        bits,
        block,
        levels.astype(np.uint8 if bits < 8 else np.int8),
        np.ascontiguousarray(scale[:, ::block]),
        np.ascontiguousarray(zero[:, ::block].astype(np.float32)) if zero.any() else None,
    )


def _constant(array: Array, block: int) -> bool:
    """Whether it does not change within blocks of that many inputs."""
    first = np.repeat(array[:, ::block], block, 1)[:, : array.shape[1]]
    return bool(np.array_equal(first, array))
