"""Shared: refer to another tensor of the file that holds the same numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lilliput.stored.base import Floats, Head, HeadReader, Mask, Plan, Section, Source, Storage, Stored
from lilliput.stored.bits import Array
from lilliput.stored.operators import Operators


@dataclass(frozen=True, eq=False)
class Shared(Stored):
    """Refer to the tensor `name`: tied weights, or a layer that is repeated. It takes no bits of its own.

    Args:
        name: the tensor that holds the numbers.
        of: how that one is stored.

    Example:
        >>> import numpy as np
        >>> from lilliput.stored.plain import Plain
        >>> Shared("embed.weight", Plain(np.ones((4, 2), np.float32))).storage().bits
        0
    """

    name: str
    of: Stored

    tag: ClassVar[int | str] = 5

    @property
    def refers(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    @property
    def values(self) -> int:
        return 0

    @property
    def bits(self) -> float:
        return self.of.bits

    def alone(self) -> Stored:
        return self.of

    def decode(self) -> Floats:
        """What the other tensor decodes to."""
        return self.of.decode()

    def native(self) -> Array:
        return self.of.native()

    def storage(self) -> Storage:
        """Nothing."""
        return Storage(())

    def facts(self) -> dict[str, Any]:
        return self.of.facts()

    def write(self, head: Head, section: Section) -> None:
        head.number(head.names.index(self.name))

    @classmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        index = head.number()

        def plan(source: Source, shape: tuple[int, ...], mask: Mask | None) -> Shared:
            if index >= len(source.done):
                raise ValueError(f"a tensor is the same as tensor {index}, which is not there before it")
            name, of = source.done[index]
            if of.shape != shape:
                raise ValueError(f"a tensor of the shape {shape} is the same as one of {of.shape}")
            source.claim(shape)
            return cls(name, of)

        return plan

    def onnx(self, writer: Operators, name: str) -> None:
        """Another name for the same value."""
        writer.node("Identity", [self.name], name)
