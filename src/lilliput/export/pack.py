"""`model.lil`: a network in one small file, whose length is the sum of parts that are known beforehand.

    "lil" version | CRC-32 of all that follows | length of the head | head | a section for each tensor

The head holds the graph and how each tensor is stored: operators and attributes as numbers (lilliput.export.names),
values by distance, tensors by index, no names but those of inputs and outputs; deflated or LZMA-coded if that is
shorter. A section holds one tensor's bits and is filled up to a whole byte, so

    bytes = header + head + sum(ceil(bits / 8)),

where a tensor's bits are `Stored.storage().bits`. Nothing in the file is executed or unpickled, every size is checked
before memory is taken for it, and a file is loaded whole or not at all.
"""

from __future__ import annotations

import contextlib
import itertools
import lzma
import math
import os
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, numpy_helper
from torch import Tensor, nn

from lilliput.code.stored import (
    PATTERNS,
    PLAIN_TYPES,
    Array,
    Grid,
    Plain,
    Product,
    Sparse,
    Stored,
    gaps,
    limits,
    position_bits,
    span,
    spread,
)
from lilliput.errors import ExportError, StoreError
from lilliput.export.entropy import coded_bits, decode, encode, from_bits, to_bits
from lilliput.export.names import ATTRIBUTES, OPERATORS
from lilliput.export.onnx import Session, Structure, narrow

MAGIC = b"lil"
VERSION = 1
MOST_HEAD = 1 << 24
KINDS = (Plain, Grid, Sparse, Product)
LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16, "lc": 1, "lp": 0, "pb": 0}]
Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Size:
    """The length of a packed file and what it consists of, in bytes."""

    header: int
    graph: int
    tensors: dict[str, int]

    @property
    def size_bytes(self) -> int:
        """The whole file."""
        return self.header + self.graph + sum(self.tensors.values())


def size(proto: ModelProto | Structure, stored: dict[str, Stored]) -> Size:
    """How long the file will be: the head is coded, the sections are only counted.

    >>> structure = Structure(onnx.helper.make_model(onnx.helper.make_graph(
    ...     [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g",
    ...     [onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])],
    ...     [onnx.helper.make_tensor_value_info("y", 1, ["batch", 4])],
    ...     [numpy_helper.from_array(np.ones(4, np.float32), "w")])))
    >>> size(structure, {"w": Plain(np.ones(4, np.float16))}).tensors
    {'w': 8}
    """
    proto, stored = _prepared(proto, stored)
    head, ordered = _head(proto, stored)
    return Size(len(_header(head)), len(head[1]), {name: stored[name].storage().size_bytes for name in ordered})


def write(proto: ModelProto | Structure, stored: dict[str, Stored], path: str | Path) -> Size:
    """Write `model.lil` whole or not at all, and return its size.

    Args:
        proto: the float32 structure; initialisers that `stored` does not name are kept as they are.
        stored: how each tensor is stored, by initialiser name.
        path: the file, replaced in one step.

    Raises:
        ExportError: for a graph that the format cannot hold (subgraphs, a tensor of another shape).
        StoreError: if the file cannot be written; what was there before is still there.
    """
    proto, stored = _prepared(proto, stored)
    head, ordered = _head(proto, stored)
    sections = {name: section(stored[name]) for name in ordered}
    body = b"".join([_varint(len(head[1]) << 2 | head[0]), head[1], *sections.values()])
    data = MAGIC + bytes([VERSION]) + struct.pack("<I", zlib.crc32(body)) + body
    values = 2 * sum(math.prod(value.shape) for value in stored.values())
    if values > most_values(len(data)):
        raise ExportError(f"write: {values} values cannot come from {len(data)} bytes: a reader would refuse the file.")
    save(Path(path), data)
    return Size(len(_header(head)), len(head[1]), {name: len(bits) for name, bits in sections.items()})


def save(path: Path, data: bytes) -> None:
    """Put `data` at `path` by writing beside it and renaming.

    Raises:
        StoreError: if that is not possible; nothing is left behind.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise StoreError(
            f"write: {path} cannot be written ({error.strerror or error}). Free space, or choose another folder."
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def most_values(file_bytes: int) -> int:
    """How many values a file may decode to: what bounds the memory that a hostile one can take."""
    return max(1 << 24, 512 * file_bytes)


def _prepared(proto: ModelProto | Structure, stored: dict[str, Stored]) -> tuple[ModelProto, dict[str, Stored]]:
    """The model and one stored tensor for each initialiser."""
    if isinstance(proto, Structure):
        proto, stored = proto.fill(stored), proto.named(stored)
    whole: dict[str, Stored] = {}
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        value = stored.get(tensor.name)
        if value is None or (isinstance(value, Plain) and array.dtype.name not in ("float32", "float16")):
            value = Plain(array)
        if tuple(value.shape) != tuple(tensor.dims):
            raise ExportError(
                f"pack: {tensor.name} must have the shape {tuple(tensor.dims)} of the graph, got {value.shape}. "
                "Fill the structure with the same tensors first."
            )
        whole[tensor.name] = value
    return proto, whole


# ------------------------------------------------------------------------------------------------------------ numbers


def _varint(number: int) -> bytes:
    if number < 0:
        raise ExportError(f"pack: a size must not be negative, got {number}.")
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def _zigzag(number: int) -> bytes:
    return _varint(2 * number if number >= 0 else -2 * number - 1)


def _text(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return _varint(len(raw)) + raw


class _Reader:
    """Numbers from the head, each checked against what is left."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def raw(self, count: int) -> bytes:
        if not 0 <= count <= len(self.data) - self.at:
            raise ValueError(f"the head ends {count - len(self.data) + self.at} bytes early")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self) -> int:
        number = shift = 0
        while True:
            byte = self.raw(1)[0]
            number |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return number
            if shift > 63:
                raise ValueError("a number is longer than 64 bits")

    def signed(self) -> int:
        number = self.number()
        return -(number + 1) // 2 if number & 1 else number // 2

    def text(self) -> str:
        return self.raw(self.number()).decode()

    def count(self) -> int:
        """A number of things of which each takes at least a byte."""
        number = self.number()
        if number > len(self.data) - self.at:
            raise ValueError(f"{number} entries cannot follow in {len(self.data) - self.at} bytes")
        return number


# --------------------------------------------------------------------------------------------------------------- head


def _header(head: tuple[int, bytes]) -> bytes:
    return MAGIC + bytes([VERSION]) + bytes(4) + _varint(len(head[1]) << 2 | head[0])


def _head(proto: ModelProto, stored: dict[str, Stored]) -> tuple[tuple[int, bytes], list[str]]:
    """The coded head as (coding, bytes), and the tensors in the order of their sections: that of their first use."""
    graph = proto.graph
    if proto.functions or graph.sparse_initializer:
        raise ExportError("pack: the graph must not have functions or sparse initialisers. Inline them first.")
    ordered = list(dict.fromkeys(name for node in graph.node for name in node.input if name in stored))
    ordered += [value.name for value in graph.output if value.name in stored and value.name not in ordered]
    out = bytearray()
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    out += _varint(proto.ir_version) + _varint(opsets.pop("", opsets.pop("ai.onnx", 1))) + _varint(len(opsets))
    for domain, version in sorted(opsets.items()):
        out += _text(domain) + _varint(version)
    inputs = [value for value in graph.input if value.name not in stored]
    for values in (inputs, list(graph.output)):
        out += _varint(len(values))
        for value in values:
            kind = value.type.tensor_type
            out += _text(value.name) + _varint(kind.elem_type) + _varint(len(kind.shape.dim))
            out += b"".join(
                _varint(d.dim_value) if d.WhichOneof("value") == "dim_value" else _varint(0) for d in kind.shape.dim
            )
    out += _varint(len(ordered))
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    for name in ordered:
        out += _described(stored[name], native=name not in floats)
    out += _graph(graph, inputs, ordered)
    raw = bytes(out)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    ways = [raw, deflate.compress(raw) + deflate.flush(), lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA)]
    best = min(range(3), key=lambda way: len(ways[way]))
    return (best, ways[best]), ordered


def _graph(graph: Any, inputs: list[Any], ordered: list[str]) -> bytes:
    """Nodes: operator, inputs, outputs, attributes. A value is named by how far back it was made, 1 the last one."""
    tensor_at = {name: i for i, name in enumerate(ordered)}
    made = {value.name: i for i, value in enumerate(inputs)}
    waiting = 0  # the next tensor that no node has used
    out = bytearray(_varint(len(graph.node)))

    def reference(name: str) -> bytes:
        nonlocal waiting
        if not name:
            return _varint(0)
        if name in tensor_at:
            if tensor_at[name] == waiting:
                waiting += 1
                return _varint(1)
            return _varint(2 * tensor_at[name] + 3)
        if name not in made:
            raise ExportError(f"pack: the graph reads {name!r}, which nothing before it makes. Sort its nodes.")
        return _varint(2 * (count - made[name]))

    count = len(inputs)
    for node in graph.node:
        if node.domain in ("", "ai.onnx") and node.op_type in OPERATORS:
            out += _varint(OPERATORS.index(node.op_type) + 1)
        else:
            out += _varint(0) + _text(node.domain) + _text(node.op_type)
        flags = (len(node.output) != 1 or not node.output[0]) * 2 + bool(node.attribute)
        out += _varint(len(node.input) << 2 | flags)
        for name in node.input:
            out += reference(name)
        if flags & 2:
            out += _varint(len(node.output)) + bytes(bool(name) for name in node.output)
        for name in node.output:
            if name:
                made[name] = count
                count += 1
        if flags & 1:
            out += _varint(len(node.attribute))
            for attribute in sorted(node.attribute, key=lambda a: a.name):
                out += _attribute(attribute)
    for value in graph.output:
        out += reference(value.name)
    return bytes(out)


def _attribute(attribute: AttributeProto) -> bytes:
    kind, value = attribute.type, onnx.helper.get_attribute_value(attribute)
    known = attribute.name in ATTRIBUTES
    out = _varint((ATTRIBUTES.index(attribute.name) + 1 if known else 0) << 3 | kind % 8)
    out += b"" if known else _text(attribute.name)
    if kind == AttributeProto.FLOAT:
        return out + struct.pack("<f", value)
    if kind == AttributeProto.INT:
        return out + _zigzag(value)
    if kind == AttributeProto.STRING:
        return out + _text(value)
    if kind == AttributeProto.TENSOR:
        return out + _text(value.SerializeToString())
    if kind == AttributeProto.FLOATS:
        return out + _varint(len(value)) + struct.pack(f"<{len(value)}f", *value)
    if kind == AttributeProto.INTS:
        return out + _varint(len(value)) + b"".join(map(_zigzag, value))
    if kind == AttributeProto.STRINGS:
        return out + _varint(len(value)) + b"".join(map(_text, value))
    raise ExportError(f"pack: the attribute {attribute.name!r} holds a subgraph. Use model.onnx instead.")


def _read_attribute(head: _Reader) -> AttributeProto:
    code = head.number()
    name = ATTRIBUTES[(code >> 3) - 1] if code >> 3 else head.text()
    kind = code % 8 or AttributeProto.STRINGS
    value: Any
    if kind == AttributeProto.FLOAT:
        value = struct.unpack("<f", head.raw(4))[0]
    elif kind == AttributeProto.INT:
        value = head.signed()
    elif kind == AttributeProto.STRING:
        value = head.raw(head.number())
    elif kind == AttributeProto.TENSOR:
        value = onnx.TensorProto.FromString(head.raw(head.number()))
        if value.external_data:
            raise ValueError("a tensor refers to another file")
    elif kind == AttributeProto.FLOATS:
        value = list(struct.unpack(f"<{(n := head.count())}f", head.raw(4 * n)))
    elif kind == AttributeProto.INTS:
        value = [head.signed() for _ in range(head.count())]
    elif kind == AttributeProto.STRINGS:
        value = [head.raw(head.number()) for _ in range(head.count())]
    else:
        raise ValueError(f"attribute {name!r} is of an unknown kind {kind}")
    return onnx.helper.make_attribute(name, value, attr_type=kind)


# ------------------------------------------------------------------------------------------------------------ tensors


def _described(value: Stored, native: bool = False) -> bytes:
    """How a tensor is stored, without its numbers. `native`: the graph takes it as it is, not as float32."""
    kind = next(i for i, known in enumerate(KINDS) if isinstance(value, known))
    out = _varint(kind | native << 2)
    out += _varint(len(value.shape)) + b"".join(map(_varint, value.shape))
    if isinstance(value, Plain):
        return out + _plain_described(value, value.array)
    if isinstance(value, Grid):
        return out + _grid_described(value, value.unsigned.ravel())
    if isinstance(value, Product):
        return out + _varint(len(value.factors)) + b"".join(map(_described, value.factors))
    positions = value.positions.ravel()
    way, bits = position_bits(value.positions)
    out += _varint(0 if value.block is None else 1) + b"".join(map(_varint, value.block or ()))
    if way.startswith("gaps"):
        skipped, r = gaps(positions), int(way[5:])
        out += _varint(2 + r) + _varint(skipped.size) + _varint(int((skipped >> r).sum()))
    elif ":" in way:
        n, m = map(int, way.split(":"))
        out += _varint(18 + PATTERNS.index((n, m)))
    else:
        out += _varint(0) if way == "bitmap" else _varint(1) + _varint(bits)
    inner = value.values
    whole = inner.shape == value.shape
    out += _varint(KINDS.index(type(inner)) << 1 | whole)
    if isinstance(inner, Plain):
        return out + _plain_described(inner, inner.array[value.mask] if whole else inner.array)
    return out + _grid_described(inner, inner.unsigned[value.mask] if whole else inner.unsigned)


def _plain_described(plain: Plain, array: Array) -> bytes:
    out = _varint(PLAIN_TYPES.index(plain.array.dtype.name))
    if plain.array.dtype.name in ("float32", "float16"):
        return out
    low, bits = span(array)
    return out + _zigzag(low) + _varint(bits)


def _grid_described(grid: Grid, codes: Array) -> bytes:
    coded = coded_bits(codes, grid.bits)
    smaller = coded < codes.size * grid.bits
    scale = np.asarray(grid.scale)
    axes = sum(1 << i for i, n in enumerate((1,) * (len(grid.grouped) - scale.ndim) + scale.shape) if n > 1)
    flags = (grid.zero_point is not None) + 2 * smaller + 4 * (grid.group is not None) + 8 * (grid.bits - 1)
    out = _varint(flags) + (_varint(grid.group) if grid.group is not None else b"") + _varint(axes)
    return out + (_varint(coded) if smaller else b"")


def section(value: Stored) -> bytes:
    """A tensor's bits, filled up to a whole byte."""
    parts = list(_bits(value))
    if all(isinstance(part, bytes) for part in parts):
        return b"".join(part for part in parts if isinstance(part, bytes))
    whole = [np.unpackbits(np.frombuffer(p, np.uint8), bitorder="little") if isinstance(p, bytes) else p for p in parts]
    return np.packbits(np.concatenate(whole), bitorder="little").tobytes()


def _packed(numbers: Array, bits: int) -> bytes | Bits:
    if bits in (8, 16, 32):
        return numbers.astype(f"<u{bits // 8}").tobytes()
    return to_bits(numbers, bits)


def _bits(value: Stored) -> Iterator[bytes | Bits]:
    if isinstance(value, Product):
        for factor in value.factors:
            yield from _bits(factor)
        return
    mask, inner = None, value
    if isinstance(value, Sparse):
        yield _position_stream(value)
        inner = value.values
        mask = value.mask if inner.shape == value.shape else None
    if isinstance(inner, Plain):
        array = inner.array.ravel() if mask is None else inner.array[mask]
        if np.issubdtype(array.dtype, np.floating):
            yield array.astype(array.dtype.newbyteorder("<")).tobytes()
        else:
            low, bits = span(array)
            yield to_bits(array.astype(np.int64).view(np.uint64) - np.uint64(low % 2**64), bits)
    elif isinstance(inner, Grid):
        yield np.asarray(inner.scale).astype("<f2").tobytes()
        if inner.zero_point is not None:
            yield _packed(np.asarray(inner.zero_point).ravel(), inner.bits)
        codes = inner.unsigned.ravel() if mask is None else inner.unsigned[mask]
        smaller = coded_bits(codes, inner.bits) < codes.size * inner.bits
        yield encode(codes, inner.bits) if smaller else _packed(codes, inner.bits)


def _position_stream(sparse: Sparse) -> Bits:
    way, _ = position_bits(sparse.positions)
    flat = sparse.positions.ravel()
    if way == "bitmap":
        return flat.astype(np.uint8)
    if way == "coded":
        return encode(flat.astype(np.uint16), 1)
    if way.startswith("gaps"):
        skipped, r = gaps(flat), int(way[5:])
        quotients = skipped >> r
        unary = np.zeros(int(quotients.sum()) + skipped.size, np.uint8)
        unary[np.cumsum(quotients + 1) - 1] = 1
        return np.concatenate([unary, to_bits(skipped & ((1 << r) - 1), r)])
    n, m = map(int, way.split(":"))
    weights = 1 << np.arange(m)
    number_of = {sum(1 << i for i in chosen): k for k, chosen in enumerate(itertools.combinations(range(m), n))}
    numbers = np.asarray([number_of[int(key)] for key in flat.reshape(-1, m) @ weights], np.int64)
    return to_bits(numbers, (math.comb(m, n) - 1).bit_length())


class _Source:
    """A file's sections as bits, with what may still be taken out of it."""

    def __init__(self, data: bytes, at: int) -> None:
        self.data = np.frombuffer(data, np.uint8)
        self.at, self.end = 8 * at, 8 * len(data)
        self.values_left = most_values(len(data))

    def claim(self, shape: tuple[int, ...]) -> int:
        """The size of a shape, counted against the values that the file may have."""
        count = math.prod(shape)
        self.values_left -= count
        if self.values_left < 0:
            raise ValueError("it has more values than a file of its length can hold")
        return count

    def stream(self, count: int) -> Bits:
        if not 0 <= count <= self.end - self.at:
            raise ValueError("it ends early")
        first, last = self.at // 8, -(-(self.at + count) // 8)
        bits = np.unpackbits(self.data[first:last], bitorder="little")
        start, self.at = self.at % 8, self.at + count
        return bits[start : start + count]

    def numbers(self, count: int, bits: int) -> Array:
        if count * bits > self.end - self.at:
            raise ValueError("it ends early")
        if bits == 0:
            return np.zeros(count, np.int64)
        if bits in (8, 16, 32) and self.at % 8 == 0:
            first, self.at = self.at // 8, self.at + count * bits
            return np.frombuffer(self.data.data, f"<u{bits // 8}", count, first)
        return from_bits(self.stream(count * bits), bits)

    def align(self) -> None:
        rest = -self.at % 8
        if rest and self.stream(rest).any():
            raise ValueError("the bits that fill a section up must be zero")


def _read_shape(head: _Reader) -> tuple[int, ...]:
    rank = head.count()
    if rank > 16:
        raise ValueError(f"a tensor has {rank} axes")
    return tuple(head.number() for _ in range(rank))


def _read_tensor(head: _Reader, kind: int, depth: int = 0) -> Callable[[_Source], Stored]:
    """What to do with a tensor's section, from the head alone."""
    shape = _read_shape(head)
    if kind == 0:
        return _later_plain(head, shape)
    if kind == 1:
        return _later_grid(head, shape)
    if kind == 2:
        return _later_sparse(head, shape)
    if kind == 3 and depth < 4:
        factors = [_read_tensor(head, head.number(), depth + 1) for _ in range(head.count())]

        def product(source: _Source) -> Stored:
            source.claim(shape)
            return Product(tuple(factor(source) for factor in factors), shape)

        return product
    raise ValueError(f"a tensor is of an unknown kind {kind}")


def _plain_numbers(head: _Reader) -> Callable[[_Source, int], Array]:
    dtype = np.dtype(PLAIN_TYPES[head.number()])
    if np.issubdtype(dtype, np.floating):
        return lambda source, count: (
            source.numbers(count, 8 * dtype.itemsize)
            .astype(f"<u{dtype.itemsize}")
            .view(f"<f{dtype.itemsize}")
            .astype(dtype)
        )
    low, bits = head.signed(), head.number()
    if bits > 64:
        raise ValueError(f"an integer has {bits} bits")

    def integers(source: _Source, count: int) -> Array:
        wide = source.numbers(count, bits).astype(np.uint64) + np.uint64(low % 2**64)
        return wide.view(np.int64).astype(dtype)

    return integers


def _later_plain(head: _Reader, shape: tuple[int, ...]) -> Callable[[_Source], Stored]:
    numbers = _plain_numbers(head)
    return lambda source: Plain(numbers(source, source.claim(shape)).reshape(shape))


@dataclass(frozen=True)
class _GridPlan:
    bits: int
    affine: bool
    coded: int
    group: int | None
    axes: int

    @classmethod
    def read(cls, head: _Reader) -> _GridPlan:
        flags = head.number()
        group = head.number() if flags & 4 else None
        axes = head.number()
        coded = head.number() if flags & 2 else -1
        bits = (flags >> 3) + 1
        if bits > 16 or group == 0:
            raise ValueError(f"a grid has {bits} bits and groups of {group}")
        return cls(bits, bool(flags & 1), coded, group, axes)

    def scales(self, source: _Source, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        grouped = shape
        if self.group is not None:
            outputs = shape[0] if shape else 1
            grouped = (outputs, math.prod(shape) // max(outputs * self.group, 1), self.group)
        scale_shape = tuple(n if self.axes >> i & 1 else 1 for i, n in enumerate(grouped))
        count = source.claim(scale_shape)
        scale = source.numbers(count, 16).astype("<u2").view("<f2").astype(np.float32).reshape(scale_shape)
        zero = source.numbers(count, self.bits).astype(np.int64).reshape(scale_shape) if self.affine else None
        return scale, zero

    def codes(self, source: _Source, count: int) -> Array:
        if self.coded < 0:
            codes = source.numbers(count, self.bits)
        else:
            codes = decode(source.stream(self.coded), count, self.bits)
        return codes.astype(np.int32) + limits(self.bits, self.affine)[0]


def _later_grid(head: _Reader, shape: tuple[int, ...]) -> Callable[[_Source], Stored]:
    plan = _GridPlan.read(head)

    def grid(source: _Source) -> Stored:
        count = source.claim(shape)
        scale, zero = plan.scales(source, shape)
        return Grid(plan.codes(source, count).reshape(shape), plan.bits, scale, zero, plan.group)

    return grid


def _later_sparse(head: _Reader, shape: tuple[int, ...]) -> Callable[[_Source], Stored]:
    block = tuple(head.number() for _ in shape) if head.number() else None
    if block is not None and any(b < 1 or n % b for b, n in zip(block, shape, strict=True)):
        raise ValueError(f"blocks of {block} do not divide {shape}")
    way = head.number()
    first = head.number() if way == 1 or 2 <= way < 18 else 0
    second = head.number() if 2 <= way < 18 else 0
    if way >= 18 + len(PATTERNS):
        raise ValueError(f"positions are written in an unknown way {way}")
    inner = head.number()
    plain = _plain_numbers(head) if inner >> 1 == 0 else None
    plan = _GridPlan.read(head) if inner >> 1 == 1 else None

    def sparse(source: _Source) -> Stored:
        source.claim(shape)
        at = shape if block is None else tuple(n // b for n, b in zip(shape, block, strict=True))
        mask = spread(_read_positions(source, way, first, second, math.prod(at)).reshape(at), block)
        kept = int(np.count_nonzero(mask))
        if plain is not None:
            values = plain(source, kept)
            if not inner & 1:
                return Sparse(mask, Plain(values), block)
            whole = np.zeros(shape, values.dtype)
            whole[mask] = values
            return Sparse(mask, Plain(whole), block)
        if plan is None:
            raise ValueError("sparse values are of an unknown kind")
        scale, zero = plan.scales(source, shape if inner & 1 else (kept,))
        codes = plan.codes(source, kept)
        if not inner & 1:
            return Sparse(mask, Grid(codes, plan.bits, scale, zero, plan.group), block)
        whole = np.zeros(shape, np.int32)
        whole[mask] = codes
        return Sparse(mask, Grid(whole, plan.bits, scale, zero, plan.group), block)

    return sparse


def _read_positions(source: _Source, way: int, first: int, second: int, count: int) -> NDArray[np.bool_]:
    if way == 0:
        return source.stream(count).astype(np.bool_)
    if way == 1:
        return decode(source.stream(first), count, 1).astype(np.bool_)
    if way < 18:
        r, kept, total = way - 2, first, second
        unary = source.stream(kept + total)
        ends = np.flatnonzero(unary)
        if ends.size != kept or (kept and ends[-1] != unary.size - 1):
            raise ValueError("its index gaps do not add up")
        quotients = np.diff(ends, prepend=-1) - 1
        at = np.cumsum((quotients << r | source.numbers(kept, r)) + 1) - 1
        if kept and not (at[0] >= 0 and at[-1] < count):
            raise ValueError("its index gaps lead outside of the tensor")
        flat = np.zeros(count, np.bool_)
        flat[at] = True
        return flat
    n, m = PATTERNS[way - 18]
    table = np.zeros((math.comb(m, n), m), np.bool_)
    for row, chosen in zip(table, itertools.combinations(range(m), n), strict=True):
        row[list(chosen)] = True
    if count % m:
        raise ValueError(f"{n}:{m} does not divide {count} positions")
    numbers = source.numbers(count // m, (math.comb(m, n) - 1).bit_length())
    return table[numbers].ravel()


# ------------------------------------------------------------------------------------------------------------ reading


class Network(nn.Module):
    """A network read from `model.lil`: call it with tensors; it computes in ONNX Runtime.

    It has no parameters to train (read `model.safetensors` and `recipe.toml` for that).
    """

    def __init__(self, proto: ModelProto, stored: dict[str, Stored], threads: int = 1) -> None:
        super().__init__()
        self._proto, self._stored = proto, stored
        self.session = Session(proto, threads=threads)

    def forward(self, *inputs: Any, **named: Any) -> Tensor | tuple[Tensor, ...]:
        """The output, or all of them where there are several."""
        given = named or (inputs[0] if len(inputs) == 1 else inputs)
        outputs = tuple(torch.from_numpy(np.array(output)) for output in self.session.all(given))
        return outputs[0] if len(outputs) == 1 else outputs

    def proto(self) -> ModelProto:
        """The float32 ONNX model."""
        new = ModelProto()
        new.CopyFrom(self._proto)
        return new

    def stored(self) -> dict[str, Stored]:
        """How each tensor is stored, by the name it has in `proto()`."""
        return dict(self._stored)

    def tensors(self) -> dict[str, Array]:
        """Every tensor's values, decoded."""
        return {t.name: np.array(numpy_helper.to_array(t)) for t in self._proto.graph.initializer}

    def save_onnx(self, path: str | Path) -> None:
        """Write it as an ONNX file with narrow tensors.

        Raises:
            StoreError: if the file cannot be written.
        """
        save(Path(path), narrow(self._proto, self._stored).SerializeToString(deterministic=True))


def read(path: str | Path, threads: int = 1) -> Network:
    """The network in a packed file.

    Raises:
        FileNotFoundError: if there is none.
        StoreError: if it is damaged, cut short, of another version or no such file; nothing of it is kept.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:3] != MAGIC:
        raise StoreError(f"read: {path.name} must begin with 'lil', got {data[:3]!r}. It is no packed network.")
    if len(data) < 9:
        raise StoreError(f"read: {path.name} is cut short ({len(data)} bytes). Copy it again.")
    if data[3] != VERSION:
        raise StoreError(f"read: {path.name} must be of version {VERSION}, got {data[3]}. Use the one that wrote it.")
    if struct.unpack("<I", data[4:8])[0] != zlib.crc32(data[8:]):
        raise StoreError(f"read: {path.name} is damaged or cut short: its checksum does not fit. Copy it again.")
    try:
        proto, stored = _parse(data)
        return Network(proto, stored, threads)
    except (
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        TypeError,
        MemoryError,
        struct.error,
        zlib.error,
        lzma.LZMAError,
        ExportError,
        EOFError,
    ) as error:
        raise StoreError(f"read: {path.name} is no valid packed network: {error}. Write it again.") from error
    except Exception as error:
        if type(error).__module__.startswith(("google.protobuf", "onnx")):
            raise StoreError(f"read: {path.name} is no valid packed network: {error}. Write it again.") from error
        raise


def _parse(data: bytes) -> tuple[ModelProto, dict[str, Stored]]:
    start = _Reader(data)
    start.at = 8
    number = start.number()
    raw = _expanded(start.raw(number >> 2), number & 3)
    head, source = _Reader(raw), _Source(data, start.at)
    ir_version, opset = head.number(), head.number()
    opsets = [onnx.helper.make_opsetid("", opset)]
    opsets += [onnx.helper.make_opsetid(head.text(), head.number()) for _ in range(head.count())]
    values = []
    for _ in range(2):
        found = []
        for _ in range(head.count()):
            name, kind = head.text(), head.number()
            dims = [d or ("batch" if not i else None) for i, d in enumerate(_read_shape(head))]
            found.append(onnx.helper.make_tensor_value_info(name, kind, dims))
        values.append(found)
    kinds, plans = [], []
    for _ in range(head.count()):
        kinds.append(head.number())
        plans.append(_read_tensor(head, kinds[-1] & 3))
    names = [f"t{i}" for i in range(len(plans))]
    taken = {value.name for value in (*values[0], *values[1])}
    if len(taken) != len(values[0]) + len(values[1]) or not values[1]:
        raise ValueError("inputs and outputs must have names of their own")
    names = [name if name not in taken else f".{name}" for name in names]
    nodes = _read_nodes(head, values, names)
    if head.at != len(raw):
        raise ValueError("the head is longer than its graph")
    stored: dict[str, Stored] = {}
    for name, plan in zip(names, plans, strict=True):
        stored[name] = plan(source)
        source.align()
    if source.at != source.end:
        raise ValueError("it is longer than its sections")
    tensors = []
    for kind, (name, value) in zip(kinds, stored.items(), strict=True):
        typed = value.array if kind & 4 and isinstance(value, Plain) else value.decode()
        tensors.append(numpy_helper.from_array(np.array(typed, order="C"), name))
    graph = onnx.helper.make_graph(nodes, "g", values[0], values[1], tensors)
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), stored


def _expanded(raw: bytes, coding: int) -> bytes:
    if coding == 0:
        return raw
    out, done = b"", False
    if coding == 1:
        inflate = zlib.decompressobj(-15)
        out, done = inflate.decompress(raw, MOST_HEAD), inflate.eof and not inflate.unused_data
    elif coding == 2:
        unlzma = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA)
        out, done = unlzma.decompress(raw, MOST_HEAD), unlzma.eof and not unlzma.unused_data
    if not done:
        raise ValueError("its head cannot be expanded")
    return out


def _read_nodes(head: _Reader, values: list[list[Any]], tensors: list[str]) -> list[Any]:
    made = [value.name for value in values[0]]
    waiting, free = 0, 0
    taken = {*made, *tensors, *(value.name for value in values[1])}

    def reference() -> str:
        nonlocal waiting
        number = head.number()
        if number == 0:
            return ""
        if number == 1:
            waiting += 1
            return tensors[waiting - 1]
        if number % 2:
            return tensors[(number - 3) // 2]
        if number // 2 > len(made):
            raise ValueError("a node reads a value that is not made yet")
        return str(made[-(number // 2)])

    nodes = []
    for _ in range(head.count()):
        code = head.number()
        domain = "" if code else head.text()
        op_type = OPERATORS[code - 1] if code else head.text()
        count = head.number()
        if count >> 2 > len(head.data):
            raise ValueError(f"a node has {count >> 2} inputs")
        inputs = [reference() for _ in range(count >> 2)]
        present = list(head.raw(head.count())) if count & 2 else [1]
        outputs = []
        for here in present:
            if here:
                while f"v{free}" in taken:
                    free += 1
                made.append(f"v{free}")
                free += 1
            outputs.append(made[-1] if here else "")
        node = onnx.helper.make_node(op_type, inputs, outputs, domain=domain)
        if count & 1:
            node.attribute.extend(_read_attribute(head) for _ in range(head.count()))
        nodes.append(node)
    rename: dict[str, str] = {}
    extra = []
    inputs_of_graph = {value.name for value in values[0]}
    for value in values[1]:
        source = reference()
        if source in inputs_of_graph or source in rename or source in tensors:
            extra.append(onnx.helper.make_node("Identity", [source], [value.name]))
        else:
            rename[source] = value.name
    for node in nodes:
        node.input[:] = [rename.get(name, name) for name in node.input]
        node.output[:] = [rename.get(name, name) for name in node.output]
    for node in extra:
        node.input[:] = [rename.get(name, name) for name in node.input]
    return [*nodes, *extra]


def load(path: str | Path) -> Network:
    """The network in a folder that `lilliput shrink` wrote (its `model.lil`), or in a packed file.

    Raises:
        FileNotFoundError: if there is none.
        StoreError: if it is damaged.
    """
    path = Path(path)
    return read(path / "model.lil" if path.is_dir() else path)
