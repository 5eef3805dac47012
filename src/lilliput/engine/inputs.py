"""Read the inputs of an ONNX model: which sizes are free, their maxima, and which inputs are bound to constants."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, ValueInfoProto, helper

from lilliput.engine.facts import Facts, Known
from lilliput.engine.graph import Array
from lilliput.engine.size import Worlds
from lilliput.errors import NotSupported, near
from lilliput.onnx.file import array_of, elements

Shapes = Mapping[str, Sequence[int]]
Constants = Mapping[str, Array]


def given(proto: ModelProto) -> list[ValueInfoProto]:
    """The inputs that are no initializers."""
    held = {tensor.name for tensor in proto.graph.initializer}
    return [value for value in proto.graph.input if value.name not in held]


def opened(proto: ModelProto, shapes: Shapes, constants: Constants) -> Facts:
    """What is known of a model before its nodes are read: inputs, initializers, free sizes.

    Raises:
        ValueError: where shapes or constants do not fit the inputs, or a value has two makers.
        NotSupported: for an input that is no tensor of numbers of a known rank.
    """
    inputs = given(proto)
    _once(
        [
            *(value.name for value in inputs),
            *(tensor.name for tensor in proto.graph.initializer),
            *(output for node in proto.graph.node for output in node.output if output),
        ]
    )
    names = [value.name for value in inputs]
    for what in (*shapes, *constants):
        if what not in names:
            raise ValueError(f"compile: shapes and constants must name an input, got {what!r}. {near(what, names)}")
    sizes = _Sizes()
    for value in inputs:
        kind = value.type.tensor_type
        ranked = value.type.HasField("tensor_type") and kind.HasField("shape")
        if not ranked and value.name not in constants and value.name not in shapes:
            raise NotSupported(
                f"compile: input {value.name!r} must be a tensor whose rank is known. Name its "
                f"sizes with --shape {value.name}=1x8."
            )
        if value.name not in constants:
            sizes.read(value, shapes.get(value.name))
    facts = Facts(proto, Worlds({name: size for name, size in sizes.most.items() if size > 1}))
    for value in inputs:
        dtype = _dtype(value.type.tensor_type.elem_type, value.name)
        if value.name in constants:
            data = np.asarray(constants[value.name])
            if data.dtype != dtype:
                data = data.astype(dtype)
            facts.known[value.name] = Known(data.dtype, [data.shape], [data])
        else:
            per = [sizes.shape(value.name, world) for world in facts.worlds.choices]
            elements(per[0])
            facts.known[value.name] = Known(dtype, per if len(set(per)) > 1 else per[:1])
    for tensor in proto.graph.initializer:
        facts.constant(tensor.name, array_of(tensor))
    return facts


class _Sizes:
    """The sizes of the inputs: numbers, or the C names of free ones with their maxima."""

    def __init__(self) -> None:
        self.dims: dict[str, list[int | str]] = {}
        self.most: dict[str, int] = {}
        self.symbols: dict[str, str] = {}

    def read(self, value: ValueInfoProto, asked: Sequence[int] | None) -> None:
        """The sizes of one input. asked: the largest ones, where they are given."""
        kind = value.type.tensor_type
        declared = list(kind.shape.dim) if kind.HasField("shape") else [None] * len(asked or ())
        if asked is not None and len(asked) != len(declared):
            raise ValueError(
                f"compile: the shape of {value.name!r} must have {len(declared)} sizes, got "
                f"{'x'.join(map(str, asked))}."
            )
        sizes: list[int | str] = []
        for axis, dim in enumerate(declared):
            if dim is not None and dim.HasField("dim_value"):
                if asked is not None and asked[axis] != dim.dim_value:
                    raise ValueError(
                        f"compile: size {axis} of {value.name!r} must be {dim.dim_value}, got "
                        f"{asked[axis]}. The file fixes it."
                    )
                sizes.append(int(dim.dim_value))
            else:
                param = dim.dim_param if dim is not None else ""
                sizes.append(self._free(value, axis, param, None if asked is None else int(asked[axis])))
        self.dims[value.name] = sizes

    def _free(self, value: ValueInfoProto, axis: int, param: str, asked: int | None) -> str:
        """The C name of a free size, whose maximum is kept."""
        name = self._symbol(param, value.name, axis)
        if asked is None and axis > 0 and name not in self.most:
            dims = value.type.tensor_type.shape.dim
            written = "x".join(str(d.dim_value) if d.HasField("dim_value") else "64" for d in dims)
            raise ValueError(
                f"compile: the input {value.name!r} must get a largest size for its free ones. "
                f"Name them with --shape {value.name}={written}."
            )
        largest = self.most.get(name, 1) if asked is None else asked
        if largest < 1:
            raise ValueError(f"compile: sizes must be at least 1, got {largest} for {value.name!r}.")
        if asked is not None:
            largest = max(largest, self.most.get(name, largest))
        self.most[name] = largest
        return name

    def _symbol(self, param: str, name: str, axis: int) -> str:
        """The C name of a free size, such as n_batch: no kernel has such names."""
        key = param or f"{name} {axis}"
        if key not in self.symbols:
            symbol = short = f"n_{re.sub(r'[^A-Za-z0-9]+', '_', key).strip('_')[:40]}"
            while symbol in self.symbols.values():
                symbol = f"{short}_{len(self.symbols)}"
            self.symbols[key] = symbol
        return self.symbols[key]

    def shape(self, name: str, world: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of an input in one world."""
        return tuple(size if isinstance(size, int) else world.get(size, self.most[size]) for size in self.dims[name])


def _once(names: Sequence[str]) -> None:
    """Raise ValueError where two makers give one name: shapes and places would be taken from either."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"compile: each value must be made once, got {twice!r:.80} more often. The file is damaged.")


def _dtype(kind: int, name: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
        return dtype
    except KeyError:
        raise NotSupported(f"compile: {name!r} must hold numbers, got elements of type {kind}.") from None
