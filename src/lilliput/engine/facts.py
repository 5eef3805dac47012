"""Hold what is known of the values of an ONNX model while it is read: types, shapes, constants, stored types.

Free sizes are read in several worlds, each a choice of numbers for them (`size.Worlds`): a value has one shape, and a
constant one array, for each world, or a single one where it is the same in all.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper

from lilliput.engine.graph import Array, Narrow
from lilliput.engine.size import Worlds
from lilliput.errors import NotSupported
from lilliput.onnx.file import ONNX_DOMAINS

Shape = tuple[int, ...]


class Known:
    """A value while it is read: its type and, in each world, its shape and (of a constant) its numbers."""

    def __init__(self, dtype: Any, shapes: list[Shape], data: list[Array] | None = None) -> None:
        self.dtype, self.shapes, self.data = np.dtype(dtype), shapes, data

    def at(self, world: int) -> tuple[Shape, Array | None]:
        """Its shape and its numbers in one world."""
        shape = self.shapes[world if len(self.shapes) > 1 else 0]
        return shape, None if self.data is None else self.data[world if len(self.data) > 1 else 0]

    @property
    def shared(self) -> bool:
        """Whether it is a constant that is the same in all worlds."""
        return self.data is not None and len(self.data) == 1


@dataclass
class Facts:
    """What is known so far.

    `opsets` is the version of each operator set, ONNX's own under "".

    Args:
        known: The values read, by name.
        narrow: How the file stores constants, by name.
        worlds: The choices of free sizes.
    """

    proto: ModelProto
    worlds: Worlds
    known: dict[str, Known] = field(default_factory=dict)
    narrow: dict[str, Narrow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.opsets: dict[str, int] = {
            "" if o.domain in ONNX_DOMAINS else o.domain: int(o.version) for o in self.proto.opset_import
        }
        self.imports = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]

    def opset(self, node: NodeProto) -> int:
        """The version of the operator set that a node belongs to."""
        return self.opsets.get("" if node.domain in ONNX_DOMAINS else node.domain, 1)

    def constant(self, name: str, data: Array) -> None:
        """Keep a constant.

        Raises:
            NotSupported: Where it holds no numbers.
        """
        if data.dtype.kind in "OSU":
            raise NotSupported(f"compile: the constant {name!r} must hold numbers, got {data.dtype.name}.")
        self.known[name] = Known(data.dtype, [data.shape], [data])

    def inputs(self, node: NodeProto) -> list[Known]:
        """What a node reads, absent inputs left out."""
        return [self.known[name] for name in node.input if name]
