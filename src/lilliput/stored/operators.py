"""Operators: the initialisers and nodes with which an ONNX file computes its weights from narrower numbers.

They read constants only: a runtime folds them when it loads the file, so the file is small and the network runs as fast
as in float32.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, numpy_helper

from lilliput.stored.bits import Array

CAST_BYTES = 30
"""What a Cast adds to a file."""
CONSTANT = "."
"""What the names of graph constants begin with; no state_dict key does."""


class Operators:
    """Initialisers and the nodes that widen them, as they come; equal helper initialisers are written once.

    Args:
        tiny: whether the file may hold 4-bit integers (opset 21).

    Attributes:
        tiny_used: whether it does.
        tensors: the initialisers.
        nodes: the nodes, each after those that it reads.
        decoded: the tensors that were written as decoded float32, because their kind has no operators.
    """

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.tiny_used = tiny, False
        self.tensors: dict[Any, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self.decoded: list[str] = []
        self._count = 0

    def fresh(self) -> str:
        """A name that nothing has."""
        self._count += 1
        return f"{CONSTANT}{CONSTANT}{self._count}"

    def node(self, op_type: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """A node with one output; its name."""
        output = output or self.fresh()
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def plain(self, name: str, array: Array) -> str:
        """An initialiser of its own name."""
        self.tensors[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def shared(self, array: Array, kind: int = 0) -> str:
        """A helper's initialiser: the one that is there already if it is equal. kind: a TensorProto type."""
        kind = kind or onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        key = (kind, array.shape, array.tobytes())
        if key not in self.tensors:
            self.tensors[key] = _integers(self.fresh(), array, kind)
        return str(self.tensors[key].name)

    def floats(self, array: Array, output: str = "") -> str:
        """A float32 value from float16 where that is exact and shorter than the Cast it takes, else from float32."""
        with np.errstate(over="ignore"):
            half = array.astype(np.float16)
        if array.size >= 20 and (half.astype(np.float32) == array).all():
            return self.node("Cast", [self.shared(half)], output, to=TensorProto.FLOAT)
        return self.plain(output, array) if output else self.shared(array)

    def integers(self, codes: Array) -> str:
        """Integers in the narrowest type that holds them, 4 bits where that is allowed."""
        return self.shared(codes, self._narrowest(codes, self.tiny))

    def whole(self, name: str, array: Array) -> str:
        """An int64 value from the narrowest type that holds it, where that is shorter than the Cast it takes."""
        kind = self._narrowest(array, False)
        width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).itemsize
        if (array.itemsize - width) * array.size <= CAST_BYTES:
            return self.plain(name, array)
        return self.node("Cast", [self.shared(array, kind)], name, to=TensorProto.INT64)

    def reshaped(self, value: str, shape: tuple[int, ...], output: str = "") -> str:
        """A value in another shape."""
        return self.node("Reshape", [value, self.shared(np.asarray(shape, np.int64))], output)

    def flags(self, mask: Array) -> str:
        """A mask as ones and zeros in float32, of its shape, from one bit an entry.

        Written as byte >> (0, 1, ..., 7) mod 2: these operators mean the same in every opset since 11.
        """
        packed = np.packbits(mask.ravel(), bitorder="little")
        eight = self.node("BitShift", [self.shared(packed[:, None]), self.shared(np.arange(8, dtype=np.uint8))],
                          direction="RIGHT")  # fmt: skip
        bits = self.node("Mod", [eight, self.shared(np.array(2, np.uint8))])
        value = self.node("Cast", [bits], to=TensorProto.FLOAT)
        if mask.size % 8:
            flat = self.reshaped(value, (-1,))
            ends = [self.shared(np.array([n], np.int64)) for n in (0, mask.size)]
            value = self.node("Slice", [flat, *ends])
        return self.reshaped(value, mask.shape)

    def size_bytes(self, *outputs: str) -> int:
        """The bytes that all of it adds to a file whose values have names of one or two letters."""
        graph = GraphProto(node=self.nodes, initializer=self.tensors.values())
        names = dict(zip(dict.fromkeys([*outputs, *uses(graph)]), letters(), strict=False))
        rename(graph, names)
        return int(graph.ByteSize())

    def _narrowest(self, codes: Array, tiny: bool) -> int:
        low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
        if tiny and ((low >= -8 and high <= 7) or (low >= 0 and high <= 15)):
            self.tiny_used = True
            return int(TensorProto.INT4 if high <= 7 else TensorProto.UINT4)
        if low >= -128 and high <= 127:
            return int(TensorProto.INT8)
        if low >= 0 and high < 2**16:
            return int(TensorProto.UINT8 if high <= 255 else TensorProto.UINT16)
        return int(TensorProto.INT16 if low >= -(2**15) and high < 2**15 else TensorProto.INT64)


def _integers(name: str, array: Array, kind: int) -> TensorProto:
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        flat = np.append(array.ravel() & 15, [0] * (array.size % 2)).astype(np.uint8)
        packed = (flat[::2] | flat[1::2] << 4).astype(np.uint8)
        return TensorProto(name=name, dims=array.shape, data_type=kind, raw_data=packed.tobytes())
    typed = np.array(array, onnx.helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(typed, name)


def uses(graph: Any) -> Iterator[str]:
    """The names of values in the order in which a graph writes them, each as often as it does."""
    yield from (name for node in graph.node for name in (*node.input, *node.output) if name)
    yield from (tensor.name for tensor in graph.initializer)


def rename(graph: Any, names: dict[str, str]) -> None:
    """Rename the values of a graph in place, subgraphs included."""
    for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                rename(attribute.g, names)


def letters() -> Iterator[str]:
    """Names of one letter, then of two, and so on."""
    alphabet, length = string.ascii_letters + string.digits, 1
    while True:
        for number in range(len(alphabet) ** length):
            yield "".join(alphabet[number // len(alphabet) ** i % len(alphabet)] for i in range(length))
        length += 1
