"""`model.lil`: a network in one small file whose length is known before it is written.

    "lil" version | CRC-32 of all that follows | length of the head | head | a section for each tensor

The head holds the graph (lilliput.export.graph) and how each tensor is stored (lilliput.stored): values by distance,
tensors by index, no names but those of inputs and outputs; deflated or LZMA-coded if that is shorter. A section holds
one tensor's bits and is filled up to a whole byte, so

    bytes = header + head + sum(ceil(bits / 8)),

where a tensor's bits are `Stored.storage().bits`. Nothing in the file is executed or unpickled, every size is checked
before memory is taken for it, and a file is loaded whole or not at all. Files of format 1 are read too.
"""

from __future__ import annotations

import lzma
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from lilliput import files
from lilliput.errors import ExportError, StoreError
from lilliput.export.graph import read_nodes, read_values, write_nodes, write_values
from lilliput.export.network import Network
from lilliput.onnx.structure import Structure
from lilliput.stored.base import Head, HeadReader, Section, Source, Stored, most_values
from lilliput.stored.bits import ByteReader, varint
from lilliput.stored.kinds import find
from lilliput.stored.plain import Plain

MAGIC = b"lil"
VERSION = 2
READABLE = (1, 2)
MOST_HEAD = 1 << 24
LZMA = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 16, "lc": 1, "lp": 0, "pb": 0}]


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

    Args:
        proto: as for `write`.
        stored: as for `write`.

    Raises:
        ExportError: as `write`.

    Example:
        >>> structure = Structure(onnx.helper.make_model(onnx.helper.make_graph(
        ...     [onnx.helper.make_node("Add", ["x", "w"], ["y"])], "g",
        ...     [onnx.helper.make_tensor_value_info("x", 1, ["batch", 4])],
        ...     [onnx.helper.make_tensor_value_info("y", 1, ["batch", 4])],
        ...     [numpy_helper.from_array(np.ones(4, np.float32), "w")])))
        >>> size(structure, {"w": Plain(np.ones(4, np.float16))}).tensors
        {'w': 8}
    """
    proto, stored = _prepared(proto, stored)
    head, sections = _written(proto, stored, counted=True)
    return Size(len(_header(head)), len(head[1]), {name: stored[name].storage().size_bytes for name in sections})


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
    head, sections = _written(proto, stored)
    body = b"".join([varint(len(head[1]) << 2 | head[0]), head[1], *sections.values()])
    data = MAGIC + bytes([VERSION]) + struct.pack("<I", zlib.crc32(body)) + body
    values = 2 * sum(math.prod(value.shape) for value in stored.values())
    if values > most_values(len(data)):
        raise ExportError(f"write: {values} values cannot come from {len(data)} bytes: a reader would refuse the file.")
    files.write(Path(path), lambda file: file.write(data))
    return Size(len(_header(head)), len(head[1]), {name: len(bits) for name, bits in sections.items()})


def _prepared(proto: ModelProto | Structure, stored: dict[str, Stored]) -> tuple[ModelProto, dict[str, Stored]]:
    """The model and one stored tensor for each initialiser."""
    if isinstance(proto, Structure):
        proto, stored = proto.fill(stored), proto.named(stored)
    whole: dict[str, Stored] = {}
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        value = stored.get(tensor.name)
        if value is None or array.dtype.name not in ("float32", "float16"):
            value = Plain(array)
        if tuple(value.shape) != tuple(tensor.dims):
            raise ExportError(
                f"pack: {tensor.name} must have the shape {tuple(tensor.dims)} of the graph, got {value.shape}. "
                "Fill the structure with the same tensors first."
            )
        whole[tensor.name] = value
    return proto, whole


def _header(head: tuple[int, bytes]) -> bytes:
    return MAGIC + bytes([VERSION]) + bytes(4) + varint(len(head[1]) << 2 | head[0])


def _ordered(proto: ModelProto, stored: dict[str, Stored]) -> list[str]:
    """The tensors in the order of their sections: that of their first use, those that others refer to before them."""
    graph = proto.graph
    used = [name for node in graph.node for name in node.input] + [value.name for value in graph.output]
    ordered: dict[str, None] = {}

    def enter(name: str, path: tuple[str, ...] = ()) -> None:
        if name in path or name not in stored:
            raise ExportError(f"pack: {path[0]} refers to {name}, which must be another tensor of the graph.")
        for other in stored[name].refers:
            enter(other, (*path, name))
        ordered.setdefault(name)

    for name in used:
        if name in stored:
            enter(name)
    return list(ordered)


def _written(
    proto: ModelProto, stored: dict[str, Stored], counted: bool = False
) -> tuple[tuple[int, bytes], dict[str, bytes]]:
    """The coded head as (coding, bytes), and each tensor's section in order; empty ones where only counted."""
    graph = proto.graph
    if proto.functions or graph.sparse_initializer:
        raise ExportError("pack: the graph must not have functions or sparse initialisers. Inline them first.")
    ordered, head = _ordered(proto, stored), Head()
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    for number in (proto.ir_version, opsets.pop("", opsets.pop("ai.onnx", 1)), len(opsets)):
        head.number(number)
    for domain, version in sorted(opsets.items()):
        head.text(domain)
        head.number(version)
    inputs = [value for value in graph.input if value.name not in stored]
    write_values(inputs, head)
    write_values(list(graph.output), head)
    head.number(len(ordered))
    floats = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    sections = {}
    for name in ordered:
        section = Section(counted)
        head.tensor(stored[name], section, native=name not in floats)
        head.names.append(name)
        sections[name] = section.data() if not counted else b""
    write_nodes(graph, inputs, ordered, head)
    raw = bytes(head.data)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    ways = [raw, deflate.compress(raw) + deflate.flush(), lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA)]
    best = min(range(3), key=lambda way: len(ways[way]))
    return (best, ways[best]), sections


# ------------------------------------------------------------------------------------------------------------ reading


def load(path: str | Path) -> Network:
    """Load the network of a folder that `lilliput shrink` or `lilliput.save` wrote (its `model.lil`), or of a packed
    file.

    Args:
        path: the folder or the file.

    Returns:
        A module that computes in ONNX Runtime.

    Raises:
        FileNotFoundError: if there is none.
        StoreError: if it is damaged, or stored in a kind that is not installed.

    Example:
        >>> import lilliput, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sizes = lilliput.save(torch.nn.Linear(4, 2), torch.zeros(1, 4), folder)
        ...     load(folder)(torch.zeros(3, 4)).shape
        torch.Size([3, 2])
    """
    path = Path(path)
    files.recover(path)
    return read(path / "model.lil" if path.is_dir() else path)


def read(path: str | Path, threads: int = 1) -> Network:
    """The network in a packed file.

    Raises:
        FileNotFoundError: if there is none.
        StoreError: if it is damaged, cut short, of another version, no such file, or stored in a kind that is not
            installed; nothing of it is kept.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:3] != MAGIC:
        raise StoreError(f"read: {path.name} must begin with 'lil', got {data[:3]!r}. It is no packed network.")
    if len(data) < 9:
        raise StoreError(f"read: {path.name} is cut short ({len(data)} bytes). Copy it again.")
    if data[3] not in READABLE:
        raise StoreError(f"read: {path.name} must be of version 1 or 2, got {data[3]}. Use the one that wrote it.")
    if struct.unpack("<I", data[4:8])[0] != zlib.crc32(data[8:]):
        raise StoreError(f"read: {path.name} is damaged or cut short: its checksum does not fit. Copy it again.")
    try:
        proto, stored = _parsed(data)
        return Network(proto, stored, threads)
    except StoreError as error:
        raise StoreError(f"read: {path.name}: {error}") from error
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


def _parsed(data: bytes) -> tuple[ModelProto, dict[str, Stored]]:
    start = ByteReader(data)
    start.at = 8
    number = start.number()
    raw = _expanded(start.raw(number >> 2), number & 3)
    head, source = HeadReader(raw, data[3], find), Source(data, start.at)
    ir_version, opset = head.number(), head.number()
    opsets = [onnx.helper.make_opsetid("", opset)]
    opsets += [onnx.helper.make_opsetid(head.text(), head.number()) for _ in range(head.count())]
    inputs, outputs = read_values(head, head.shape), read_values(head, head.shape)
    plans = [head.tensor() for _ in range(head.count())]
    taken = {value.name for value in (*inputs, *outputs)}
    if len(taken) != len(inputs) + len(outputs) or not outputs:
        raise ValueError("inputs and outputs must have names of their own")
    names = [name if name not in taken else f".{name}" for name in (f"t{i}" for i in range(len(plans)))]
    nodes = read_nodes(head, inputs, outputs, names)
    if head.at != len(raw):
        raise ValueError("the head is longer than its graph")
    tensors = []
    for name, (plan, native) in zip(names, plans, strict=True):
        value = plan(source)
        source.align()
        source.done.append((name, value))
        typed = value.native() if native else value.decode()
        tensors.append(numpy_helper.from_array(np.array(typed, order="C"), name))
    if source.at != source.end:
        raise ValueError("it is longer than its sections")
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), dict(source.done)


def _expanded(raw: bytes, coding: int) -> bytes:
    if coding == 0:
        return raw
    out, done = b"", False
    expander: Any
    if coding == 1:
        expander = zlib.decompressobj(-15)
        out, done = expander.decompress(raw, MOST_HEAD), expander.eof and not expander.unused_data
    elif coding == 2:
        expander = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA)
        out, done = expander.decompress(raw, MOST_HEAD), expander.eof and not expander.unused_data
    if not done:
        raise ValueError("its head cannot be expanded")
    return out
