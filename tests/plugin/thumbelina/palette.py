"""A code: 16 values for the whole tensor, and a kind of storing them that is written into both files."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from lilliput.code.base import Code
from lilliput.proposal import Refusal
from lilliput.stored.base import Head, HeadReader, Mask, Plan, Section, Source, Storage, Stored
from lilliput.stored.operators import Operators

ENTRIES, BITS = 16, 4
HALF = np.dtype(np.float16)


@dataclass(frozen=True, eq=False)
class Swatches(Stored):
    """value = colours[places]: 16 float16 values, and 4 bits for each number of the tensor."""

    places: np.ndarray[Any, Any]
    colours: np.ndarray[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.places.shape)

    @property
    def bits(self) -> float:
        return BITS

    @property
    def values(self) -> int:
        return int(self.places.size)

    def decode(self) -> np.ndarray[Any, Any]:
        return np.asarray(self.colours.astype(np.float32)[self.places])

    def storage(self) -> Storage:
        return Storage((("colours", ENTRIES, 16), ("places", self.values, BITS)))

    def write(self, head: Head, section: Section) -> None:
        section.floats(self.colours)
        section.numbers(self.places.ravel(), BITS)

    @classmethod
    def read(cls, head: HeadReader, axes: int) -> Plan:
        def plan(source: Source, shape: tuple[int, ...], mask: Mask | None) -> "Swatches":
            colours = source.floats(ENTRIES, HALF)
            return cls(source.numbers(source.claim(shape), BITS).astype(np.uint8).reshape(shape), colours)

        return plan

    def onnx(self, writer: Operators, name: str) -> None:
        """Places in 4 bits -> Cast -> Gather from the colours."""
        places = writer.node("Cast", [writer.integers(self.places)], to=TensorProto.INT32)
        writer.node("Gather", [writer.floats(self.colours.astype(np.float32)), places], name)


class Palette(Code):
    """W = c[i], i in {0, ..., 15}: k-means over the tensor's values, started at their quantiles.

    theta is c, so training moves the 16 values while every weight keeps its place.

    Args:
        rounds: of Lloyd's algorithm.
    """

    places: Tensor

    def __init__(self, rounds: int = 20) -> None:
        super().__init__()
        self.rounds = rounds
        self.register_buffer("places", torch.zeros(0, dtype=torch.uint8))

    @classmethod
    def proposals(cls, tensor: Tensor, statistics: Mapping[str, Tensor]) -> list[Code] | Refusal:
        """Offer itself where 16 colours do not outweigh the tensor."""
        return [cls()] if tensor.numel() >= 8 * ENTRIES else Refusal("16 values of its own outweigh the tensor")

    def label(self) -> str:
        return "palette"

    def encode(self, weight: Tensor) -> Tensor:
        values = weight.detach().float().flatten()
        different = values.unique()
        if len(different) > ENTRIES:
            different = torch.quantile(values[:: 1 + len(values) // 2**20], (torch.arange(ENTRIES) + 0.5) / ENTRIES)
        colours = different[torch.arange(ENTRIES).clamp_max(len(different) - 1)]
        for _ in range(self.rounds):
            nearest = _nearest(values, colours)
            counts = torch.bincount(nearest, minlength=ENTRIES)
            means = torch.zeros(ENTRIES).index_add_(0, nearest, values) / counts.clamp_min(1)
            colours = torch.where(counts > 0, means, colours).sort().values
        self.places = _nearest(values, colours).view(weight.shape).to(torch.uint8)
        return colours.to(weight.dtype)

    def decode(self, *theta: Tensor) -> Tensor:
        (colours,) = theta
        rounded = colours.half().to(colours.dtype)
        return (colours + (rounded - colours).detach())[self.places.long()]

    def pack(self, *theta: Stored) -> Stored:
        return Swatches(self.places.cpu().numpy(), theta[0].decode().astype(np.float16))


def _nearest(values: Tensor, colours: Tensor) -> Tensor:
    edges = (colours[1:] + colours[:-1]) / 2
    return torch.bucketize(values, edges)
