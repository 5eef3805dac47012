"""Grid: integers of b bits on uniform grids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from lilliput.stored.base import Floats, Head, HeadReader, Mask, Plan, Section, Source, Storage, Stored, limits, smaller
from lilliput.stored.bits import Array
from lilliput.stored.operators import Operators

FEWEST = 20  # values from which the nodes that widen them cost less than float32


def half(scale: Any) -> Floats:
    """Scales as a `Grid` takes them: float32, each the float16 nearest to it, none rounded down to zero.

    Example:
        >>> half([0.1, 1e-12]).tolist()
        [0.0999755859375, 5.960464477539063e-08]
    """
    scale = np.asarray(scale, np.float32)
    rounded = np.clip(scale, -65504, 65504).astype(np.float16).astype(np.float32)
    return np.asarray(np.where((rounded == 0) & (scale > 0), np.float32(2**-24), rounded), np.float32)


@dataclass(frozen=True, eq=False)
class Grid(Stored):
    """Store integers on a uniform grid of b bits: `value = (codes - zero_point) * scale`, computed in float32.

    Symmetric (no zero_point): codes in [-(2^(b-1) - 1), 2^(b-1) - 1]. Affine: codes in [0, 2^b - 1].

    Args:
        codes: integers in the tensor's own shape.
        bits: b, from 1 to 16 (from 2 for a symmetric grid).
        scale: float, broadcastable to `codes`: () or (1, ...) for the tensor, (out, 1, ...) for each output channel;
            with `group` broadcastable to (out, n / group, group). Exact in float16 (see `half`): it takes 16 bits.
        zero_point: integers in [0, 2^b - 1], shaped as `scale`.
        group: how many values share a scale; codes are then read as (out, n / group, group), n = size / out.
        at: bool, where given: the codes are the entries under it (one axis, C order) of a tensor of its shape, to
            which scale and group belong.

    Raises:
        ValueError: where one of these does not hold.

    Example:
        >>> Grid(np.array([[-1, 0, 1]]), bits=2, scale=np.array(0.5)).decode()
        array([[-0.5,  0. ,  0.5]], dtype=float32)
    """

    codes: Array
    bits: int
    scale: Array
    zero_point: Array | None = None
    group: int | None = None
    at: Mask | None = None

    tag: ClassVar[int | str] = 1

    def __post_init__(self) -> None:
        codes, scale, affine = self.codes, np.asarray(self.scale), self.zero_point is not None
        if not 1 <= self.bits <= 16 or (self.bits == 1 and not affine):
            raise ValueError(
                f"Grid: bits must be from 1 to 16 (from 2 without a zero_point), got {self.bits}. Choose another width."
            )
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"Grid: codes must be integers, got {codes.dtype}. Round and convert them first.")
        low, high = limits(self.bits, affine)
        if codes.size and not (low <= codes.min() and codes.max() <= high):
            raise ValueError(
                f"Grid: codes of {self.bits} bits must lie in [{low}, {high}], got [{codes.min()}, {codes.max()}]. "
                "Clamp them, or use more bits."
            )
        with np.errstate(over="ignore"):
            exact = scale.astype(np.float16).astype(np.float32)
        if not (np.isfinite(exact).all() and (exact == scale).all()):
            raise ValueError("Grid: scale must be exact in float16, got other values. Round it with half() first.")
        if self.at is not None and codes.shape != (int(np.count_nonzero(self.at)),):
            raise ValueError(f"Grid: codes must be those under `at`, one axis, got {codes.shape}. Select them with it.")
        whole = self._whole_shape
        size = int(np.prod(whole))
        per_output = size // max(whole[0], 1) if whole else 1
        if self.group is not None and (self.group < 1 or per_output % self.group or not size):
            raise ValueError(
                f"Grid: group must divide the {per_output} values of each output, got {self.group}. Choose a divisor."
            )
        try:
            fits = np.broadcast_shapes(self.grouped, scale.shape) == self.grouped
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"Grid: scale must broadcast to {self.grouped}, got {scale.shape}. Give it one axis for each of those."
            )
        if self.zero_point is not None:
            zero = np.asarray(self.zero_point)
            integral = np.issubdtype(zero.dtype, np.integer)
            if zero.shape != scale.shape or not integral or (zero.size and (zero.min() < low or zero.max() > high)):
                raise ValueError(
                    f"Grid: zero_point must be integers in [{low}, {high}] of the scale's shape {scale.shape}, "
                    f"got {zero.dtype} {zero.shape}. Round and clamp it."
                )

    @property
    def _whole_shape(self) -> tuple[int, ...]:
        return self.codes.shape if self.at is None else self.at.shape

    @property
    def grouped(self) -> tuple[int, ...]:
        """The shape in which codes meet their scale."""
        return _grouped(self._whole_shape, self.group)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def values(self) -> int:
        return self.codes.size

    @property
    def unsigned(self) -> NDArray[np.uint16]:
        """The codes counted from the lowest one, as they lie in the file."""
        return (self.codes.astype(np.int32) - limits(self.bits, self.zero_point is not None)[0]).astype(np.uint16)

    def decode(self) -> Floats:
        """`(codes - zero_point) * scale` in float32."""
        if self.at is not None:
            whole = self.zeroed(self.at)
            assert whole is not None  # its scale is that of the tensor that it was cut out of
            return whole.decode()[self.at]
        codes = self.codes.reshape(self.grouped).astype(np.float32)
        if self.zero_point is not None:
            codes = codes - np.asarray(self.zero_point).astype(np.float32)
        return np.asarray(codes * np.asarray(self.scale).astype(np.float32), np.float32).reshape(self.shape)

    def storage(self) -> Storage:
        """16 bits a scale, b a zero point, and the codes in b bits each or entropy-coded, whichever is smaller."""
        scales = int(np.asarray(self.scale).size)
        zeros = () if self.zero_point is None else (("zero_point", scales, self.bits),)
        return Storage((("scale", scales, 16), *zeros, smaller("codes", self.unsigned.ravel(), self.bits)))

    def kept(self, mask: Mask) -> Grid | None:
        return replace(self, codes=self.codes[mask], at=mask) if self.at is None else None

    def zeroed(self, mask: Mask) -> Grid | None:
        flat = self.shape != mask.shape
        scale, zero = np.asarray(self.scale), self.zero_point
        if flat and self.at is None:
            if scale.size != 1:
                return None
            scale = scale.reshape((1,) * mask.ndim)
            zero = None if zero is None else np.asarray(zero).reshape((1,) * mask.ndim)
        codes = np.zeros(mask.shape, np.int64)
        if zero is not None:
            codes = (codes.reshape(_grouped(mask.shape, self.group)) + np.asarray(zero, np.int64)).reshape(mask.shape)
        codes[mask] = self.codes if flat or self.at is not None else self.codes[mask]
        return Grid(codes, self.bits, scale, zero, self.group)

    def reshaped(self, shape: tuple[int, ...]) -> Grid | None:
        scale = np.asarray(self.scale)
        if self.at is not None or (shape[:1] != self.shape[:1] and scale.size != 1):
            return None
        if self.group is not None:
            return replace(self, codes=self.codes.reshape(shape))
        rows = scale.size == 1 or (scale.ndim == self.codes.ndim and scale.size == self.shape[0] == scale.shape[0])
        if not rows:
            return None
        axes = (scale.size, *(1,) * (len(shape) - 1)) if shape else ()
        zero = None if self.zero_point is None else np.asarray(self.zero_point).reshape(axes)
        return replace(self, codes=self.codes.reshape(shape), scale=scale.reshape(axes), zero_point=zero)

    def write(self, head: Head, section: Section) -> None:
        codes, scale = self.unsigned.ravel(), np.asarray(self.scale)
        section.floats(scale.astype(np.float16).ravel())
        if self.zero_point is not None:
            section.numbers(np.asarray(self.zero_point).ravel(), self.bits)
        coded = section.codes(codes, self.bits)
        axes = sum(1 << i for i, n in enumerate((1,) * (len(self.grouped) - scale.ndim) + scale.shape) if n > 1)
        head.number(
            (self.zero_point is not None) + 2 * bool(coded) + 4 * (self.group is not None) + 8 * (self.bits - 1)
        )
        if self.group is not None:
            head.number(self.group)
        head.number(axes)
        if coded:
            head.number(coded)

    @classmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        flags = head.number()
        group = head.number() if flags & 4 else None
        axes = head.number()
        coded = head.number() if flags & 2 else 0
        bits = (flags >> 3) + 1
        if bits > 16 or group == 0:
            raise ValueError(f"a grid has {bits} bits and groups of {group}")

        def plan(source: Source, shape: tuple[int, ...], mask: Mask | None) -> Grid:
            count = source.claim(shape) if mask is None else int(np.count_nonzero(mask))
            scale_shape = tuple(n if axes >> i & 1 else 1 for i, n in enumerate(_grouped(shape, group)))
            scales = source.claim(scale_shape)
            scale = source.floats(scales, np.dtype(np.float16)).astype(np.float32).reshape(scale_shape)
            zero = source.numbers(scales, bits).astype(np.int64).reshape(scale_shape) if flags & 1 else None
            codes = source.codes(count, bits, coded).astype(np.int32) + limits(bits, bool(flags & 1))[0]
            return Grid(codes if mask is not None else codes.reshape(shape), bits, scale, zero, group, mask)

        return plan

    def onnx(self, writer: Operators, name: str) -> None:
        """Cast -> (Sub) -> Mul -> (Reshape); zero points that fit are taken off the codes beforehand."""
        if self.codes.size < FEWEST or self.at is not None:
            writer.floats(self.decode(), name)
            return
        codes = self.codes.astype(np.int32).reshape(self.grouped)
        zero = None if self.zero_point is None else np.asarray(self.zero_point, np.int32)
        if zero is not None:
            centred = codes - zero
            wide = 4 if writer.tiny and self.bits <= 4 else 8 if self.bits <= 8 else 16
            if -(2 ** (wide - 1)) <= centred.min() and centred.max() < 2 ** (wide - 1):
                codes, zero = centred, None
        value = writer.node("Cast", [writer.integers(codes)], to=TensorProto.FLOAT)
        if zero is not None:
            value = writer.node("Sub", [value, writer.shared(zero.astype(np.float32))])
        scale = np.asarray(self.scale, np.float32)
        scale = scale.reshape(scale.shape[next((i for i, n in enumerate(scale.shape) if n > 1), scale.ndim) :])
        if self.group is None:
            writer.node("Mul", [value, writer.floats(scale)], name)
        else:
            writer.reshaped(writer.node("Mul", [value, writer.floats(scale)]), self.shape, name)


def _grouped(shape: tuple[int, ...], group: int | None) -> tuple[int, ...]:
    if group is None:
        return shape
    outputs = shape[0] if shape else 1
    return (outputs, int(np.prod(shape)) // max(outputs * group, 1), group)
