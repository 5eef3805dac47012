"""Structure: a network's graph, exported once, whose variants are written by rewriting initialisers."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from lilliput.errors import ExportError, near
from lilliput.onnx.clean import clean, copied
from lilliput.onnx.load import folded, free_batch, load_onnx
from lilliput.onnx.narrow import narrow
from lilliput.onnx.session import Inputs, Session, arrays
from lilliput.stored.base import Stored
from lilliput.stored.bits import Array
from lilliput.stored.operators import CONSTANT


@dataclass(frozen=True)
class Structure:
    """A network's graph with every weight an initialiser named by its state_dict key.

    Args:
        proto: the float32 model; batch is the first axis of every input and not fixed.
        aliases: for a tied or renamed tensor, the initialiser that holds it.
        unused: state_dict keys that the graph does not need.
        example: the inputs of one example by name.
    """

    proto: ModelProto
    aliases: dict[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    example: dict[str, Array] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Array]:
        """The floating-point initialisers by name, as traced."""
        known = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}
        return {name: array for name, array in known.items() if name not in self.constants}

    @property
    def constants(self) -> frozenset[str]:
        """Initialisers that belong to the graph: shapes, axes and other numbers that are no weights."""
        return frozenset(name for name in (t.name for t in self.proto.graph.initializer) if name.startswith(CONSTANT))

    def write(self, stored: dict[str, Stored], decoded: list[str] | None = None) -> ModelProto:
        """Write the ONNX model with the tensors as they are stored and the rest as traced.

        Shapes may differ from the traced ones (narrower channels) as long as the graph holds no number that depends on
        them; that is checked by running the example.

        Args:
            stored: The tensors, by their names in the state_dict.
            decoded: A list to which the tensors are added that their kind can only write in float32.

        Returns:
            The model.

        Raises:
            KeyError: For a name that is no tensor of the network.
            ExportError: If the graph cannot hold the shapes given; trace the narrower model instead.
        """
        return narrow(self.fill(stored), self.named(stored), decoded)

    def fill(self, stored: dict[str, Stored]) -> ModelProto:
        """The float32 model with the decoded values of `stored`: what the packed file is written from.

        Raises:
            KeyError, ExportError: as `write`.
        """
        named = self.named(stored)
        proto = copied(self.proto)
        reshaped = False
        for tensor in proto.graph.initializer:
            if tensor.name in named:
                new, dims = named[tensor.name], tuple(tensor.dims)
                if len(new.shape) != len(dims):
                    raise ExportError(
                        f"Structure: {tensor.name} must have {len(dims)} axes, got {new.shape}. Trace the model again."
                    )
                reshaped |= tuple(new.shape) != dims
                kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                tensor.CopyFrom(numpy_helper.from_array(np.array(new.native(), dtype=kind, order="C"), tensor.name))
        if reshaped:
            self._check(proto)
        return proto

    def named(self, stored: dict[str, Stored]) -> dict[str, Stored]:
        """`stored` by the initialiser that holds each tensor; those that the graph does not need are left out."""
        known = {tensor.name for tensor in self.proto.graph.initializer}
        named: dict[str, Stored] = {}
        for name, value in stored.items():
            target = self.aliases.get(name, name)
            if target in known and value.refers and (target in value.refers or not set(value.refers) <= known):
                named.setdefault(target, value.alone())  # the graph holds the two as one, or only this one
            elif target in known:
                named[target] = value
            elif name not in self.unused:
                raise KeyError(f"Structure: {name} is no tensor of the network. {near(name, known)}")
        return named

    def _check(self, proto: ModelProto) -> None:
        if not self.example:
            return
        inputs = {name: np.repeat(x[:1], 3, axis=0) for name, x in self.example.items()}
        wanted = [[d.dim_value for d in o.type.tensor_type.shape.dim][1:] for o in proto.graph.output]
        try:
            got = [list(o.shape) for o in Session(proto).all(inputs)]
        except Exception as error:
            raise ExportError(
                f"Structure: the traced graph cannot hold tensors of these shapes ({str(error)[:200]}). "
                "Trace the narrower model."
            ) from error
        for shape, rest in zip(got, wanted, strict=True):
            if shape[0] != 3 or any(w and w != g for w, g in zip(rest, shape[1:], strict=False)):
                raise ExportError(
                    f"Structure: with these shapes the output must be (3, {rest}), got {shape}. "
                    "Trace the narrower model."
                )

    @classmethod
    def from_onnx(cls, path: str | Path, example: Inputs | None = None) -> Structure:
        """The structure of an ONNX file: constants folded, batch norm folded into what precedes it, names kept.

        The first axis of every input becomes free, whatever the exporter wrote there.

        Raises:
            ExportError: if it is no ONNX model or keeps tensors outside of its own folder.
        """
        proto = clean(folded(free_batch(load_onnx(path))))
        names = [value.name for value in proto.graph.input]
        return cls(proto, example={} if example is None else arrays(example, names))
