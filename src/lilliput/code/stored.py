"""How one tensor is stored: the meeting point of codes, the packed file and the ONNX writer.

A stored tensor is plain numpy. `decode()` gives the float32 tensor that every artifact must reproduce bit for bit;
`storage()` predicts, from the numbers alone and by formula, how many bits its section of `model.lil` takes. Nothing
here calls a writer, and the writers (lilliput.export) never ask `storage()`: a test compares the two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lilliput.export.entropy import coded_bits

Array = NDArray[Any]
Floats = NDArray[np.float32]

PLAIN_TYPES = ("float32", "float16", "int8", "uint8", "int16", "int32", "int64", "bool")
PATTERNS = ((2, 4), (1, 4), (1, 2), (4, 8), (2, 8), (1, 8), (1, 16), (2, 16))
"""The N:M patterns whose positions have a code of their own: n kept of every m in C order."""


@dataclass(frozen=True)
class Storage:
    """What a tensor's section consists of: `parts` of `count` numbers of `bits` each.

    >>> Storage((("codes", 10, 3), ("scale", 1, 16))).size_bytes
    6
    """

    parts: tuple[tuple[str, int, int], ...]

    @property
    def bits(self) -> int:
        """All parts together, in bits."""
        return sum(count * bits for _, count, bits in self.parts)

    @property
    def size_bytes(self) -> int:
        """The section's length in the file: its bits, rounded up to a whole byte."""
        return -(-self.bits // 8)


def half(scale: Any) -> Floats:
    """Scales as a `Grid` takes them: float32, each the float16 nearest to it, none rounded down to zero.

    >>> half([0.1, 1e-12]).tolist()
    [0.0999755859375, 5.960464477539063e-08]
    """
    scale = np.asarray(scale, np.float32)
    rounded = np.clip(scale, -65504, 65504).astype(np.float16).astype(np.float32)
    return np.asarray(np.where((rounded == 0) & (scale > 0), np.float32(2**-24), rounded), np.float32)


def span(array: Array) -> tuple[int, int]:
    """The smallest number, and the bits that hold the difference to it: (0, 16 or 32) for floats.

    >>> span(np.array([5, 6, 8]))
    (5, 2)
    """
    if np.issubdtype(array.dtype, np.floating):
        return 0, 8 * array.dtype.itemsize
    if not array.size:
        return 0, 0
    low = int(array.min())
    return low, (int(array.max()) - low).bit_length()


def limits(bits: int, affine: bool) -> tuple[int, int]:
    """The smallest and the largest code of b bits: affine from 0, symmetric around 0.

    >>> limits(4, affine=False), limits(4, affine=True)
    ((-7, 7), (0, 15))
    """
    return (0, 2**bits - 1) if affine else (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


@dataclass(frozen=True, eq=False)
class Plain:
    """The numbers themselves: floats in `8 * itemsize` bits each, integers in as many as their range needs.

    Args:
        array: float32, float16, bool or an integer type; any shape.

    >>> Plain(np.zeros((2, 3), np.float16)).storage().bits
    96
    """

    array: Array

    def __post_init__(self) -> None:
        if self.array.dtype.name not in PLAIN_TYPES:
            raise TypeError(
                f"Plain: array must be one of {', '.join(PLAIN_TYPES)}, got {self.array.dtype}. Convert it first."
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """The decoded tensor's shape."""
        return self.array.shape

    def decode(self) -> Floats:
        """The values as float32 (integers beyond 2^24 are rounded: read `array` where that matters)."""
        return np.array(self.array, dtype=np.float32, order="C")

    def storage(self) -> Storage:
        """Every number in its own width."""
        return self.kept(None)

    def kept(self, mask: NDArray[np.bool_] | None) -> Storage:
        """The storage where only the numbers under `mask` are kept."""
        array = self.array if mask is None else self.array[mask]
        return Storage((("values", array.size, span(array)[1]),))


@dataclass(frozen=True, eq=False)
class Grid:
    """A uniform grid of b bits: `value = (codes - zero_point) * scale`, computed in float32.

    Symmetric (no zero_point): codes in [-(2^(b-1) - 1), 2^(b-1) - 1]. Affine: codes in [0, 2^b - 1].

    Args:
        codes: integers in the tensor's own shape.
        bits: b, from 1 to 16 (from 2 for a symmetric grid).
        scale: float, broadcastable to `codes`: () or (1, ...) for the tensor, (out, 1, ...) for each output channel;
            with `group` broadcastable to (out, n / group, group). Exact in float16 (see `half`): it takes 16 bits.
        zero_point: integers in [0, 2^b - 1], shaped as `scale`.
        group: how many values share a scale; codes are then read as (out, n / group, group), n = size / out.

    Raises:
        ValueError: where one of these does not hold.

    >>> Grid(np.array([[-1, 0, 1]]), bits=2, scale=np.array(0.5)).decode()
    array([[-0.5,  0. ,  0.5]], dtype=float32)
    """

    codes: Array
    bits: int
    scale: Array
    zero_point: Array | None = None
    group: int | None = None

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
        per_output = codes.size // max(len(codes), 1) if codes.ndim else 1
        if self.group is not None and (self.group < 1 or per_output % self.group or not codes.size):
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
    def grouped(self) -> tuple[int, ...]:
        """The shape in which codes meet their scale."""
        if self.group is None:
            return self.shape
        outputs = len(self.codes) if self.codes.ndim else 1
        return (outputs, self.codes.size // (outputs * self.group), self.group)

    @property
    def shape(self) -> tuple[int, ...]:
        """The decoded tensor's shape."""
        return self.codes.shape

    @property
    def unsigned(self) -> NDArray[np.uint16]:
        """The codes counted from the lowest one, as they lie in the file."""
        return (self.codes.astype(np.int32) - limits(self.bits, self.zero_point is not None)[0]).astype(np.uint16)

    def decode(self) -> Floats:
        """`(codes - zero_point) * scale` in float32."""
        codes = self.codes.reshape(self.grouped).astype(np.float32)
        if self.zero_point is not None:
            codes = codes - np.asarray(self.zero_point).astype(np.float32)
        return np.asarray(codes * np.asarray(self.scale).astype(np.float32), np.float32).reshape(self.shape)

    def storage(self) -> Storage:
        """16 bits a scale, b a zero point, and the codes in b bits each or entropy-coded, whichever is smaller."""
        return self.kept(None)

    def kept(self, mask: NDArray[np.bool_] | None) -> Storage:
        """The storage where only the codes under `mask` are kept."""
        codes = self.unsigned.ravel() if mask is None else self.unsigned[mask]
        scales = int(np.asarray(self.scale).size)
        zeros = () if self.zero_point is None else (("zero_point", scales, self.bits),)
        return Storage((("scale", scales, 16), *zeros, smaller("codes", codes, self.bits)))


@dataclass(frozen=True, eq=False)
class Sparse:
    """Zeros that are not stored: the positions of what is kept, and its values.

    Positions cost the least of a bitmap (1 bit each, or entropy-coded), gaps between kept ones (Golomb-Rice:
    `sum(gap >> r) + k (r + 1)` bits for the best r), and, where every m consecutive positions keep exactly n, one of
    C(m, n) choices in `ceil(log2 C(m, n))` bits.

    Args:
        mask: bool, the tensor's shape, True where kept.
        values: the kept entries in C order as one axis, or a `Plain` or `Grid` of the mask's own shape (so that it can
            have a scale per channel) whose entries outside the mask are not stored.
        block: how many entries along each axis are kept or dropped together, such as (4, 1, 1, 1).

    Raises:
        ValueError: for shapes that do not fit, or a mask that is not constant over its blocks.

    >>> mask = np.array([[True, False, False, True]])
    >>> Sparse(mask, Plain(np.array([1.0, 2.0], np.float32))).decode()
    array([[1., 0., 0., 2.]], dtype=float32)
    """

    mask: NDArray[np.bool_]
    values: Plain | Grid
    block: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        kept = int(np.count_nonzero(self.mask))
        if self.mask.dtype != np.bool_:
            raise ValueError(f"Sparse: mask must be bool, got {self.mask.dtype}. Compare it with zero first.")
        if not isinstance(self.values, Plain | Grid):
            raise ValueError(f"Sparse: values must be Plain or Grid, got {type(self.values).__name__}. Decode first.")
        if self.values.shape not in ((kept,), self.mask.shape):
            raise ValueError(
                f"Sparse: values must have shape ({kept},) or the mask's {self.mask.shape}, got {self.values.shape}. "
                "Give the kept entries in C order."
            )
        if self.block is not None:
            fits = len(self.block) == self.mask.ndim and all(
                b > 0 and n % b == 0 for b, n in zip(self.block, self.mask.shape, strict=True)
            )
            if not fits or not (spread(self.positions, self.block) == self.mask).all():
                raise ValueError(
                    f"Sparse: mask must be constant over blocks of {self.block} that divide {self.mask.shape}, got "
                    "another. Leave block out, or make the mask from blocks."
                )

    @property
    def shape(self) -> tuple[int, ...]:
        """The decoded tensor's shape."""
        return self.mask.shape

    @property
    def positions(self) -> NDArray[np.bool_]:
        """The mask with one entry a block."""
        return self.mask if self.block is None else self.mask[tuple(slice(None, None, b) for b in self.block)]

    def decode(self) -> Floats:
        """The values where kept, zero elsewhere."""
        values = self.values.decode()
        whole = np.zeros(self.shape, np.float32)
        whole[self.mask] = values[self.mask] if values.shape == self.shape else values
        return whole

    def storage(self) -> Storage:
        """The values kept and the cheapest way to say where."""
        inner = self.values.kept(self.mask if self.values.shape == self.shape else None)
        return Storage((*inner.parts, ("positions", 1, position_bits(self.positions)[1])))


@dataclass(frozen=True, eq=False)
class Product:
    """A product of factors: `value = reshape(factors[0] @ factors[1] @ ..., shape)`, computed in float32.

    Args:
        factors: stored matrices (or stacks of them) that `@` joins from the left.
        shape: the tensor's shape.

    Raises:
        ValueError: if the factors do not chain to `shape`.

    >>> u, v = Plain(np.ones((4, 1), np.float32)), Plain(np.ones((1, 6), np.float32))
    >>> Product((u, v), (4, 3, 2)).storage().bits
    320
    """

    factors: tuple[Stored, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.factors:
            raise ValueError("Product: needs at least one factor, got none. Give the matrices whose product it is.")
        try:
            size = _product([np.zeros(factor.shape, np.float32) for factor in self.factors]).size
        except ValueError:
            size = -1
        if size != math.prod(self.shape):
            raise ValueError(
                f"Product: factors must multiply to {self.shape}, got {[factor.shape for factor in self.factors]}. "
                "Check their order and inner sizes."
            )

    def decode(self) -> Floats:
        """The product of the decoded factors."""
        return self._decoded

    @cached_property
    def _decoded(self) -> Floats:
        return _product([factor.decode() for factor in self.factors]).reshape(self.shape)

    def storage(self) -> Storage:
        """What the factors take."""
        named = ((f"{i}.{name}", n, b) for i, f in enumerate(self.factors) for name, n, b in f.storage().parts)
        return Storage(tuple(named))


Stored = Plain | Grid | Sparse | Product


def _product(matrices: list[Floats]) -> Floats:
    # BLAS rounds differently from one machine to the next: sums in float64 make the float32 result the same everywhere.
    whole = matrices[0].astype(np.float64)
    for matrix in matrices[1:]:
        whole = whole @ matrix.astype(np.float64)
    return whole.astype(np.float32)


def smaller(name: str, codes: NDArray[np.uint16], bits: int) -> tuple[str, int, int]:
    """The part for `codes`: b bits each, or all together what the entropy coder takes."""
    coded = coded_bits(codes, bits)
    return (name, codes.size, bits) if codes.size * bits <= coded else (name, 1, coded)


def spread(positions: NDArray[np.bool_], block: tuple[int, ...] | None) -> NDArray[np.bool_]:
    """The full mask of block positions: each entry repeated over its block."""
    for axis, b in enumerate(block or ()):
        positions = np.repeat(positions, b, axis=axis)
    return positions


def position_bits(positions: NDArray[np.bool_]) -> tuple[str, int]:
    """The cheapest way to write which positions are kept, and its bits.

    Returns "bitmap", "coded", "gaps r" (Golomb-Rice with r low bits) or "n:m".

    >>> position_bits(np.arange(64) % 16 == 0)
    ('1:16', 16)
    """
    flat = positions.ravel()
    ways = {"bitmap": flat.size, "coded": coded_bits(flat.astype(np.uint16), 1)}
    skipped = gaps(flat)
    for r in range(16):
        ways[f"gaps {r}"] = int((skipped >> r).sum()) + skipped.size * (r + 1)
    for n, m in PATTERNS:
        if flat.size and flat.size % m == 0 and (flat.reshape(-1, m).sum(1) == n).all():
            ways[f"{n}:{m}"] = flat.size // m * (math.comb(m, n) - 1).bit_length()
    return min(ways.items(), key=lambda way: way[1])


def gaps(flat: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How many zeros precede each kept position."""
    return np.diff(np.flatnonzero(flat), prepend=-1).astype(np.int64) - 1
