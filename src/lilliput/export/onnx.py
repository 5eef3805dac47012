"""From a model to ONNX and back to numbers: export a structure once, write its variants by rewriting initialisers.

`torch.onnx.export` costs seconds, so a search exports every structure once (`trace`) and writes each variant of its
tensors in milliseconds (`Structure.write`). Narrow tensors are stored as narrow integers, widened by
`Cast -> (Sub) -> Mul`: the runtime folds these constants when it loads the file, so the file is small and the network
runs as fast as in float32.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import string
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from torch import nn

from lilliput.code.stored import Array, Grid, Plain, Sparse, Stored
from lilliput.errors import ExportError, near

Inputs = Any
"""A tensor, a dict of tensors by input name, or a tuple of tensors in order; arrays too."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing printed, logged or warned by a library inside."""
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            logging.disable(logging.CRITICAL)
            yield
    finally:
        logging.disable(level)


def arrays(inputs: Inputs, names: Iterable[str]) -> dict[str, Array]:
    """The inputs by name, as contiguous arrays.

    Raises:
        ValueError: if their number or names are others than the network's.
    """
    names = list(names)
    if isinstance(inputs, dict):
        missing = [name for name in names if name not in inputs]
        if missing:
            raise ValueError(f"Session: inputs must have {', '.join(names)}, got {', '.join(map(str, inputs))}.")
        inputs = tuple(inputs[name] for name in names)
    if not isinstance(inputs, tuple):
        inputs = (inputs,)
    if len(inputs) != len(names):
        raise ValueError(f"Session: the network takes {len(names)} inputs ({', '.join(names)}), got {len(inputs)}.")
    plain = (x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in inputs)
    return {name: np.asarray(x, order="C") for name, x in zip(names, plain, strict=True)}


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
        found = {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}
        return {name: array for name, array in found.items() if name not in self.constants}

    @property
    def constants(self) -> frozenset[str]:
        """Initialisers that belong to the graph: shapes, axes and other numbers that are no weights."""
        return frozenset(name for name in (t.name for t in self.proto.graph.initializer) if name.startswith(CONSTANT))

    def write(self, stored: dict[str, Stored]) -> ModelProto:
        """The ONNX model whose initialisers are `stored`, each in its narrowest type; the rest as traced.

        Shapes may differ from the traced ones (narrower channels) as long as the graph holds no number that depends on
        them; that is checked by running the example.

        Raises:
            KeyError: for a name that is no tensor of the network.
            ExportError: if the graph cannot hold the shapes given; trace the narrower model instead.
        """
        return narrow(self.fill(stored), self.named(stored))

    def fill(self, stored: dict[str, Stored]) -> ModelProto:
        """The float32 model with the decoded values of `stored`: what the packed file is written from.

        Raises:
            KeyError, ExportError: as `write`.
        """
        named = self.named(stored)
        proto = _copy(self.proto)
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
                value = new.array if isinstance(new, Plain) else new.decode()
                tensor.CopyFrom(numpy_helper.from_array(np.array(value, dtype=kind, order="C"), tensor.name))
        if reshaped:
            self._check(proto)
        return proto

    def named(self, stored: dict[str, Stored]) -> dict[str, Stored]:
        """`stored` by the initialiser that holds each tensor; those that the graph does not need are left out."""
        known = {tensor.name for tensor in self.proto.graph.initializer}
        named = {}
        for name, value in stored.items():
            target = self.aliases.get(name, name)
            if target in known:
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
        proto = clean(_fold_onnx(_free_batch(load_onnx(path))))
        names = [value.name for value in proto.graph.input]
        return cls(proto, example={} if example is None else arrays(example, names))


CONSTANT = "."
"""What the names of graph constants begin with; no state_dict key does."""


def trace(model: nn.Module, example: Inputs) -> Structure:
    """Export `model` once, with a free batch axis.

    Weights stay initialisers of their own under their state_dict key: what the exporter does to them (a transpose, the
    gate order of a GRU) stays in the graph as nodes on constants, which the runtime folds when it loads the file.

    Args:
        model: plain tensors only (codes realized), batch norm folded; evaluated in eval mode and left as it was.
        example: one batch of inputs: a tensor, a tuple of them, or a dict by argument name.

    Raises:
        ExportError: if torch cannot export it, with torch's reason.

    >>> structure = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4))
    >>> sorted(structure.weights)
    ['0.bias', '0.weight']
    """
    import onnx_ir

    modes = [(module, module.training) for module in model.modules()]
    named = example if isinstance(example, dict) else {}
    ordered = () if named else example if isinstance(example, tuple) else (example,)
    two = [torch.cat([x[:1], x[:1]]) for x in (*ordered, *named.values())]
    batch = torch.export.Dim("batch")
    shapes: Any = {name: {0: batch} for name in named} if named else tuple({0: batch} for _ in ordered)
    try:
        with quiet(), torch.no_grad(), _looked_up(model):
            model.eval()
            program = torch.onnx.export(
                model,
                () if named else tuple(two),
                kwargs=dict(zip(named, two, strict=True)) if named else None,
                dynamo=True,
                dynamic_shapes=shapes,
                optimize=False,
                verbose=False,
            )
            if program is None:
                raise ExportError("trace: torch returned no program.")
            held = _optimise(program.model)
            proto: ModelProto = onnx_ir.to_proto(program.model)
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise ExportError(f"trace: torch could not export {type(model).__name__}: {reason}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    for value in proto.graph.input:
        if value.type.tensor_type.shape.dim and not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(
                f"trace: the batch size must stay free, but {type(model).__name__} fixes it. In its "
                "forward write x.shape[0] in place of len(x), and no number in place of either."
            )
    keys = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    proto, aliases = _name(proto, held, keys)
    proto = clean(proto)
    kept = {tensor.name for tensor in proto.graph.initializer}
    unused = frozenset(name for name in keys if aliases.get(name, name) not in kept)
    inputs = arrays(tuple(x[:1] for x in two), [value.name for value in proto.graph.input])
    return Structure(proto, {a: b for a, b in aliases.items() if b in kept}, unused, inputs)


@contextlib.contextmanager
def _looked_up(model: nn.Module) -> Iterator[None]:
    """Bags of equal size as a lookup and a sum inside: torch would export them as a loop over the examples."""
    bags = [module for module in model.modules() if isinstance(module, nn.EmbeddingBag) and module.mode != "max"]

    def forward(bag: nn.EmbeddingBag, ids: torch.Tensor, offsets: Any = None, weights: Any = None) -> torch.Tensor:
        if offsets is not None or ids.dim() != 2:
            return nn.EmbeddingBag.forward(bag, ids, offsets, weights)
        rows = nn.functional.embedding(ids, bag.weight)
        if bag.padding_idx is not None:
            kept = (ids != bag.padding_idx).to(rows.dtype)
            weights = kept if weights is None else weights * kept
        found = rows.sum(1) if weights is None else (weights.unsqueeze(1) @ rows).squeeze(1)
        if bag.mode == "sum":
            return found
        return found / (ids.shape[1] if bag.padding_idx is None else kept.sum(1, keepdim=True).clamp_min(1))

    for bag in bags:
        bag.forward = functools.partial(forward, bag)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for bag in bags:
            del bag.forward


def _optimise(model: Any) -> dict[str, Any]:
    """Fold and simplify in place with the weights hidden as inputs, so that they survive; returns them by name."""
    from onnxscript import optimizer

    held = {}
    for name, value in list(model.graph.initializers.items()):
        held[name] = value.const_value
        value.const_value = None
        del model.graph.initializers[name]
        model.graph.inputs.append(value)
    (getattr(optimizer, "optimize_ir", None) or optimizer.optimize)(model)
    for value in list(model.graph.inputs):
        if value.name in held:
            model.graph.inputs.remove(value)
            if value.uses():
                value.const_value = held[value.name]
                model.graph.register_initializer(value)
    return held


def _name(proto: ModelProto, held: Iterable[str], keys: dict[str, torch.Tensor]) -> tuple[ModelProto, dict[str, str]]:
    """Weights under their state_dict key (by name, else by value), other initialisers as constants, ties aliased."""
    held, graph = set(held), proto.graph
    by_place: dict[tuple[int, tuple[int, ...]], str] = {}
    aliases = {}
    for name, value in keys.items():
        if value.numel():
            first = by_place.setdefault((value.data_ptr(), tuple(value.shape)), name)
            if first != name:
                aliases[name] = first
    rename: dict[str, str] = {}
    for number, tensor in enumerate(graph.initializer):
        name = tensor.name
        if name in aliases:
            rename[name] = aliases[name]
        elif name not in keys:
            values = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            alike = {k: v.cpu() for k, v in keys.items() if name in held and v.shape == values.shape}
            same = [k for k, v in alike.items() if torch.equal(v, values)]
            rename[name] = same[0] if same else f"{CONSTANT}{number}"
    outputs = [value.name for value in graph.output]
    plain = ["output"] if len(outputs) == 1 else [f"output_{i}" for i in range(len(outputs))]
    taken = {value.name for value in graph.input} | set(keys)
    rename.update((old, new) for old, new in zip(outputs, plain, strict=True) if new not in taken and old not in taken)
    return renamed(proto, rename), aliases


def renamed(proto: ModelProto, names: dict[str, str]) -> ModelProto:
    """The model with its values renamed, subgraphs included."""

    def change(graph: Any) -> None:
        for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
            value.name = names.get(value.name, value.name)
        for node in graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names.get(name, name) for name in node.output]
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    change(attribute.g)

    proto = _copy(proto)
    change(proto.graph)
    return proto


def _copy(proto: ModelProto) -> ModelProto:
    new = ModelProto()
    new.CopyFrom(proto)
    return new


# ---------------------------------------------------------------------------------------------------------- cleaning

EMPTY_BY_KIND = {"pads": 0, "strides": 1, "dilations": 1}


def clean(proto: ModelProto) -> ModelProto:
    """The same network in fewer bytes: no names of nodes, no notes, no attribute at its default, no constant twice."""
    proto = _copy(proto)
    _simplify(proto)
    graph, shapes = proto.graph, {}
    for value in graph.value_info:
        shapes[value.name] = value
    del graph.value_info[:], proto.metadata_props[:], graph.metadata_props[:], graph.quantization_annotation[:]
    for note in ("producer_name", "producer_version", "doc_string", "domain", "model_version"):
        proto.ClearField(note)
    graph.ClearField("doc_string")
    graph.name = "g"
    for value in (*graph.input, *graph.output):
        value.ClearField("doc_string")
        del value.metadata_props[:]
    opset = opset_of(proto)
    for node in _nodes(graph):
        for note in ("name", "doc_string", "metadata_props"):
            node.ClearField(note)
        _drop_defaults(node, opset)
    for tensor in graph.initializer:
        tensor.ClearField("doc_string")
        del tensor.metadata_props[:]
    used = {domain for node in _nodes(graph) for domain in [node.domain]} | {f.domain for f in proto.functions}
    for i in reversed([i for i, o in enumerate(proto.opset_import) if o.domain not in used | {""}]):
        del proto.opset_import[i]
    return _share(proto)


def opset_of(proto: ModelProto) -> int:
    """The version of the standard operators."""
    return int(next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 1))


def _nodes(graph: Any) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _drop_defaults(node: NodeProto, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return
    windowed = node.op_type in ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool")
    kept = []
    for attribute in node.attribute:
        default = schema.attributes[attribute.name].default_value if attribute.name in schema.attributes else None
        value = onnx.helper.get_attribute_value(attribute)
        same = default is not None and default.name and onnx.helper.get_attribute_value(default) == value
        if windowed and attribute.name in EMPTY_BY_KIND:
            same = set(value) <= {EMPTY_BY_KIND[attribute.name]}
        if windowed and attribute.name == "kernel_shape" and node.op_type in ("Conv", "ConvTranspose"):
            same = True  # the weight's own
        if not same:
            kept.append(attribute)
    del node.attribute[:]
    node.attribute.extend(kept)


def _simplify(proto: ModelProto) -> None:
    """Flatten for a reshape to (batch, rest), global pooling for a mean over the image: no channel numbers are left."""
    graph = proto.graph
    known = {t.name: t for t in graph.initializer if t.data_type == TensorProto.INT64}
    shapes = {v.name: v.type.tensor_type.shape.dim for v in (*graph.value_info, *graph.input, *graph.output)}
    for node in graph.node:
        if node.op_type not in ("Reshape", "ReduceMean") or len(node.input) < 2 or node.input[1] not in known:
            continue
        numbers = numpy_helper.to_array(known[node.input[1]]).ravel().tolist()
        source, target = shapes.get(node.input[0]), shapes.get(node.output[0])
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Reshape" and source and target:
            batch, first = source[0].dim_param, target[0].dim_param
            if batch and batch == first and len(target) == 2 and len(source) >= 2:
                _become(node, "Flatten")
            elif (batch and batch == first and numbers[0] in (-1, 0)) or 0 not in numbers:
                _drop_zero(node, numbers)
        elif node.op_type == "ReduceMean" and source and len(source) == 4 and attributes.get("keepdims", 1) == 1:
            spatial = sorted(n % 4 for n in numbers) == [2, 3]
            if spatial:
                _become(node, "GlobalAveragePool")


def _become(node: NodeProto, op_type: str) -> None:
    node.op_type = op_type
    del node.input[1:], node.attribute[:]


def _drop_zero(node: NodeProto, numbers: list[int]) -> None:
    if 0 not in numbers:
        del node.attribute[:]


def _share(proto: ModelProto) -> ModelProto:
    """One initialiser for each distinct constant, none that nothing reads."""
    first: dict[Any, str] = {}
    rename = {}
    outputs = {value.name for value in proto.graph.output}
    for tensor in proto.graph.initializer:
        if tensor.name.startswith(CONSTANT) and tensor.name not in outputs:
            array = numpy_helper.to_array(tensor)
            rename[tensor.name] = first.setdefault((array.dtype.str, array.shape, array.tobytes()), tensor.name)
    proto = renamed(proto, {old: new for old, new in rename.items() if old != new})
    read = {name for node in _nodes(proto.graph) for name in node.input} | outputs
    seen: set[str] = set()
    kept = []
    for tensor in proto.graph.initializer:
        if tensor.name in read and tensor.name not in seen:
            kept.append(tensor)
            seen.add(tensor.name)
    kept = [_raw(tensor) for tensor in kept]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


def _raw(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(np.array(numpy_helper.to_array(tensor)), tensor.name)


# ----------------------------------------------------------------------------------------------------------- writing

TYPE_ONLY = frozenset(
    {"Abs", "Add", "And", "ArgMax", "ArgMin", "AveragePool", "BatchNormalization", "Cast", "CastLike", "Clip",
     "Concat", "Constant", "ConstantOfShape", "Conv", "ConvTranspose", "Div", "Dropout", "Equal", "Erf", "Exp",
     "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
     "Greater", "GreaterOrEqual", "GRU", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
     "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "LogSoftmax", "LSTM", "MatMul", "Max",
     "MaxPool", "Mean", "Min", "Mul", "Neg", "Not", "OneHot", "Or", "Pad", "Pow", "PRelu", "Range", "Reciprocal",
     "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Relu", "Reshape", "RNN", "Shape", "Sigmoid", "Sign",
     "Size", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "Transpose", "Unsqueeze",
     "Where", "Xor", "Elu", "Selu", "Gelu", "Softplus", "Mish"}
)  # fmt: skip
"""Operators that mean the same in opsets 18 to 21, which only added types: a file of these may hold 4-bit integers."""


def narrow(proto: ModelProto, stored: dict[str, Stored]) -> ModelProto:
    """The float32 model `proto` with the initialisers in `stored` in their narrowest types, and short names."""
    proto = _copy(proto)
    graph = proto.graph
    tiny = opset_of(proto) >= 18 and all(n.op_type in TYPE_ONLY and n.domain == "" for n in _nodes(graph))
    writer = _Writer(tiny)
    for tensor in graph.initializer:
        value = stored.get(tensor.name)
        if value is None or tensor.data_type != TensorProto.FLOAT:
            writer.plain(tensor.name, numpy_helper.to_array(tensor))
        else:
            writer.tensor(tensor.name, value)
    nodes = [*writer.nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(writer.tensors.values())
    graph.node.extend(nodes)
    if writer.tiny_used and opset_of(proto) < 21:
        next(o for o in proto.opset_import if o.domain in ("", "ai.onnx")).version = 21
        proto.ir_version = max(proto.ir_version, 10)
    return _short(proto)


class _Writer:
    """Initialisers and the nodes that widen them, as they come; equal initialisers are written once."""

    def __init__(self, tiny: bool) -> None:
        self.tiny, self.tiny_used = tiny, False
        self.tensors: dict[Any, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self.count = 0

    def fresh(self) -> str:
        self.count += 1
        return f"{CONSTANT}{CONSTANT}{self.count}"

    def node(self, op_type: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        output = output or self.fresh()
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def plain(self, name: str, array: Array) -> str:
        """An initialiser of its own name."""
        self.tensors[name] = numpy_helper.from_array(np.array(array, order="C"), name)
        return name

    def shared(self, array: Array, kind: int = 0) -> str:
        """A helper's initialiser: the one that is there already if it is equal."""
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

    def tensor(self, name: str, value: Stored) -> None:
        """The float32 value `name` from what is stored."""
        if isinstance(value, Sparse):
            value = _filled(value)
        if isinstance(value, Grid):
            self.grid(name, value)
        elif isinstance(value, Plain) and np.issubdtype(value.array.dtype, np.integer):
            small = value.array
            self.node("Cast", [self.shared(small)], name, to=TensorProto.FLOAT)
        else:
            self.floats(value.decode(), name)

    def grid(self, name: str, grid: Grid) -> None:
        """Cast -> (Sub) -> Mul -> (Reshape); zero points that fit are taken off the codes beforehand."""
        codes = grid.codes.astype(np.int32).reshape(grid.grouped)
        zero = None if grid.zero_point is None else np.asarray(grid.zero_point, np.int32)
        if codes.size < 20:
            self.floats(grid.decode(), name)
            return
        if zero is not None:
            centred = codes - zero
            wide = 4 if self.tiny and grid.bits <= 4 else 8 if grid.bits <= 8 else 16
            if -(2 ** (wide - 1)) <= centred.min() and centred.max() < 2 ** (wide - 1):
                codes, zero = centred, None
        value = self.node("Cast", [self.shared(codes, self.kind(codes))], to=TensorProto.FLOAT)
        if zero is not None:
            value = self.node("Sub", [value, self.shared(zero.astype(np.float32))])
        scale = np.asarray(grid.scale, np.float32)
        scale = scale.reshape(scale.shape[next((i for i, n in enumerate(scale.shape) if n > 1), scale.ndim) :])
        if grid.group is None:
            self.node("Mul", [value, self.floats(scale)], name)
        else:
            value = self.node("Mul", [value, self.floats(scale)])
            self.node("Reshape", [value, self.shared(np.asarray(grid.shape, np.int64))], name)

    def kind(self, codes: Array) -> int:
        """The narrowest integer type that holds the codes."""
        low, high = int(codes.min()), int(codes.max())
        if self.tiny and ((low >= -8 and high <= 7) or (low >= 0 and high <= 15)):
            self.tiny_used = True
            return int(TensorProto.INT4 if high <= 7 else TensorProto.UINT4)
        if low >= -128 and high <= 127:
            return int(TensorProto.INT8)
        if low >= 0:
            return int(TensorProto.UINT8 if high <= 255 else TensorProto.UINT16)
        return int(TensorProto.INT16)


def _integers(name: str, array: Array, kind: int) -> TensorProto:
    if kind in (TensorProto.INT4, TensorProto.UINT4):
        flat = np.append(array.ravel() & 15, [0] * (array.size % 2)).astype(np.uint8)
        packed = (flat[::2] | flat[1::2] << 4).astype(np.uint8)
        return TensorProto(name=name, dims=array.shape, data_type=kind, raw_data=packed.tobytes())
    typed = np.array(array, onnx.helper.tensor_dtype_to_np_dtype(kind))
    return numpy_helper.from_array(typed, name)


def _filled(sparse: Sparse) -> Stored:
    """A sparse tensor as a dense one that holds its zeros, on the same grid."""
    values = sparse.values
    whole = (values.shape == sparse.shape and sparse.mask.ndim > 1) or bool(sparse.mask.all())
    if isinstance(values, Plain):
        return Plain(sparse.decode())
    scale = np.asarray(values.scale)
    if not whole and scale.size != 1:
        return Plain(sparse.decode())
    fill = np.zeros((), np.int64) if values.zero_point is None else np.asarray(values.zero_point, np.int64)
    codes = np.zeros(sparse.shape, np.int64)
    if not whole:
        codes += fill.reshape(())
        codes[sparse.mask] = values.codes
        zero = None if values.zero_point is None else fill.reshape((1,) * sparse.mask.ndim)
        return Grid(codes, values.bits, scale.reshape((1,) * sparse.mask.ndim), zero)
    codes = (codes.reshape(values.grouped) + fill).reshape(sparse.shape)
    codes[sparse.mask] = values.codes.reshape(sparse.shape)[sparse.mask]
    return replace(values, codes=codes)


def _short(proto: ModelProto) -> ModelProto:
    """Names of one or two letters for everything but inputs and outputs; the shortest for the most frequent."""
    graph = proto.graph
    fixed = {value.name for value in (*graph.input, *graph.output)} | {""}
    if any(a.type == onnx.AttributeProto.GRAPH for n in graph.node for a in n.attribute):
        return proto  # names in subgraphs shadow those outside
    uses = Counter(name for node in graph.node for name in (*node.input, *node.output))
    uses.update(tensor.name for tensor in graph.initializer)
    names = (name for name in _letters() if name not in fixed)
    ranked = sorted((name for name in uses if name not in fixed), key=lambda name: -uses[name])
    return renamed(proto, dict(zip(ranked, names, strict=False)))


def _letters() -> Iterator[str]:
    alphabet, length = string.ascii_letters + string.digits, 1
    while True:
        for number in range(len(alphabet) ** length):
            yield "".join(alphabet[number // len(alphabet) ** i % len(alphabet)] for i in range(length))
        length += 1


# ----------------------------------------------------------------------------------------------------------- reading


def load_onnx(path: str | Path) -> ModelProto:
    """An ONNX file with its external tensors, which must lie in its own folder.

    Raises:
        ExportError: if it is no valid ONNX model, or refers to a file outside of its folder.
        FileNotFoundError: if it is not there.
    """
    path = Path(path)
    try:
        proto = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ExportError(f"load_onnx: {path.name} must be an ONNX model, and is not ({str(error)[:120]}).") from error
    if not proto.graph.node:
        raise ExportError(f"load_onnx: {path.name} must be an ONNX model with nodes, got none. Export it again.")
    folder = path.resolve().parent
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        for entry in tensor.external_data:
            if entry.key == "location" and not (folder / entry.value).resolve().is_relative_to(folder):
                raise ExportError(
                    f"load_onnx: tensors must lie beside {path.name}, got {entry.value!r} outside of its folder. "
                    "Save the model as one file."
                )
    try:
        onnx.load_external_data_for_model(proto, str(folder))
    except Exception as error:
        raise ExportError(f"load_onnx: the tensors of {path.name} cannot be read ({str(error)[:200]}).") from error
    return proto


def _free_batch(proto: ModelProto) -> ModelProto:
    held = {tensor.name for tensor in proto.graph.initializer}
    for value in (*proto.graph.input, *proto.graph.output):
        if value.name not in held and len(value.type.tensor_type.shape.dim):
            value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del proto.graph.value_info[:]  # the shapes of another batch
    return proto


def _fold_onnx(proto: ModelProto) -> ModelProto:
    """Constants folded into initialisers; batch norm after a convolution or Gemm folded into its weight and bias."""
    import onnx_ir
    from onnxscript import optimizer

    proto = _copy(proto)
    weights = {tensor.name for tensor in proto.graph.initializer}
    inputs = [value for value in proto.graph.input if value.name not in weights]
    del proto.graph.input[:]
    proto.graph.input.extend(inputs)
    proto = _fold_batchnorm(proto)
    with quiet():
        model = onnx_ir.from_proto(proto)
        with contextlib.suppress(Exception):  # an unoptimised graph is right all the same
            (getattr(optimizer, "optimize_ir", None) or optimizer.optimize)(model)
        proto = onnx_ir.to_proto(model)
    rename = {}
    for number, tensor in enumerate(proto.graph.initializer):
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) <= 1:
            rename[tensor.name] = f"{CONSTANT}{number}"
    return renamed(proto, rename)


def _fold_batchnorm(proto: ModelProto) -> ModelProto:
    graph = proto.graph
    known = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.output[0]: node for node in graph.node if node.output}
    uses = Counter(name for node in _nodes(graph) for name in node.input)
    uses.update(value.name for value in graph.output)
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        before = made.get(norm.input[0])
        if before is None or before.op_type not in ("Conv", "Gemm") or uses[norm.input[0]] != 1:
            continue
        parts = [*norm.input[1:5], *before.input[1:]]
        if not all(name in known for name in parts) or uses[before.input[1]] != 1 or len(norm.output) > 1:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in before.attribute}
        if before.op_type == "Gemm" and (attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1):
            continue
        moments = (numpy_helper.to_array(known[name]).astype(np.float64) for name in norm.input[1:5])
        gamma, beta, mean, variance = moments
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        weight = numpy_helper.to_array(known[before.input[1]]).astype(np.float64)
        rows = before.op_type == "Conv" or attributes.get("transB", 0)
        weight = weight * (factor.reshape(-1, *[1] * (weight.ndim - 1)) if rows else factor)
        bias = numpy_helper.to_array(known[before.input[2]]) if len(before.input) > 2 and before.input[2] else 0.0
        name = before.input[1] + ".bias" if len(before.input) < 3 or not before.input[2] else before.input[2]
        if uses[name] > 1 or (name in known and len(before.input) < 3):
            continue
        known[before.input[1]].CopyFrom(numpy_helper.from_array(weight.astype(np.float32), before.input[1]))
        folded = numpy_helper.from_array((beta + (bias - mean) * factor).astype(np.float32), name)
        if name in known:
            known[name].CopyFrom(folded)
        else:
            graph.initializer.append(folded)
        before.input[:] = [before.input[0], before.input[1], name]
        before.output[0] = norm.output[0]
        graph.node.remove(norm)
    return proto


# ----------------------------------------------------------------------------------------------------------- running


class Session:
    """A network in ONNX Runtime on the CPU: what its score and its latency are measured on.

    Args:
        model: a file, its bytes, or a ModelProto.
        threads: within an operator; operators run one after the other.
        optimised: a file for the graph as the runtime transformed it.
        profile: how the names of the runtime's profile begin; `end_profiling` gives the file.

    Raises:
        ExportError: if the runtime refuses the model.

    >>> session = Session(trace(nn.Linear(4, 2), torch.zeros(1, 4)).proto)
    >>> session.outputs(torch.zeros(3, 4)).shape
    (3, 2)
    """

    def __init__(
        self, model: str | Path | bytes | ModelProto, threads: int = 1, *, optimised: str = "", profile: str = ""
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4 if optimised else 3
        if optimised:
            options.optimized_model_filepath = optimised
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        if threads > 1:
            # Threads that spin between two calls would take the machine from whatever else is timed.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.threads, self.runtime = threads, f"onnxruntime {onnxruntime.__version__} CPU"
        source = model.SerializeToString() if isinstance(model, ModelProto) else model
        source = str(source) if isinstance(source, Path) else source
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise ExportError(f"Session: ONNX Runtime must be able to load the model: {str(error)[:400]}") from error
        self.inputs = list(self._session.get_inputs())
        self.input_names = [value.name for value in self.inputs]
        self.input_types = [value.type for value in self.inputs]

    def feed(self, inputs: Inputs) -> dict[str, Array]:
        """The inputs by name, in the types that the network takes."""
        named = arrays(inputs, self.input_names)
        for name, kind in zip(self.input_names, self.input_types, strict=True):
            wanted = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(int32)": np.int32}.get(kind)
            if wanted is not None and named[name].dtype != wanted:
                named[name] = named[name].astype(wanted)
        return named

    def all(self, inputs: Inputs) -> list[Array]:
        """Every output of one run."""
        return list(self._session.run(None, self.feed(inputs)))

    def run(self, feed: dict[str, Array]) -> list[Array]:
        """Every output for inputs that `feed` prepared: nothing else happens here, so this is what is timed."""
        return list(self._session.run(None, feed))

    def end_profiling(self) -> str:
        """Where the runtime wrote its profile."""
        return str(self._session.end_profiling())

    def outputs(self, inputs: Inputs, batch: int = 256) -> Array:
        """The first output for any number of examples, `batch` at a time."""
        feed = self.feed(inputs)
        count = len(next(iter(feed.values())))
        parts = [
            self._session.run(None, {name: x[i : i + batch] for name, x in feed.items()})[0]
            for i in range(0, max(count, 1), batch)
        ]
        return np.concatenate(parts) if len(parts) > 1 else np.asarray(parts[0])

    def __call__(self, *inputs: Any, **named: Any) -> torch.Tensor:
        """As a model: tensors in, the first output as a tensor."""
        given = named or (inputs[0] if len(inputs) == 1 else inputs)
        return torch.from_numpy(np.array(self.outputs(given)))


def agreement(a: Array, b: Array) -> dict[str, float]:
    """How far two networks' outputs for the same inputs are apart.

    Returns `max_abs`, `mean_abs` and `changed`: the share of examples with another largest output (0 where there is
    only one).

    >>> agreement(np.array([[1.0, 2.0]]), np.array([[1.0, 0.5]]))
    {'max_abs': 1.5, 'mean_abs': 0.75, 'changed': 1.0}
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ExportError(f"agreement: outputs must have the same shape, got {a.shape} and {b.shape}.")
    apart = np.abs(a - b)
    changed = float((a.argmax(-1) != b.argmax(-1)).mean()) if a.ndim > 1 and a.shape[-1] > 1 and a.size else 0.0
    return {
        "max_abs": float(apart.max()) if a.size else 0.0,
        "mean_abs": float(apart.mean()) if a.size else 0.0,
        "changed": changed,
    }


def verify(
    artifact: Array,
    model: Array,
    *,
    exact: bool,
    margin: float = 1e-4,
    most_changed: float = 0.005,
    who: str = "verify",
) -> dict[str, float]:
    """Compare an artifact's outputs with the model's it was written from; their `agreement` if it is close enough.

    Args:
        artifact, model: (n, ...) outputs for the same examples.
        exact: a float artifact: no prediction may change whose margin (the largest output minus the second) is over
            `margin`. Otherwise a quantised one: at most the share `most_changed` of predictions may change.

    Raises:
        ExportError: where it is further away, or has values that are not finite and the model has none.
    """
    found = agreement(artifact, model)
    a, m = np.asarray(artifact, np.float64), np.asarray(model, np.float64)
    if not np.isfinite(a).all() and np.isfinite(m).all():
        raise ExportError(f"{who}: the artifact's outputs must be finite, got NaN or infinity. Do not deploy it.")
    several = a.ndim > 1 and a.shape[-1] > 1
    if exact:
        if several:
            top = np.sort(m, -1)
            clear = top[..., -1] - top[..., -2] > margin
            wrong = int((clear & (a.argmax(-1) != m.argmax(-1))).sum())
        else:
            wrong = int((np.abs(a - m) > margin * np.maximum(1, np.abs(m))).sum())
        if wrong:
            raise ExportError(
                f"{who}: a float artifact must predict what the model predicts, got {wrong} of {a.shape[0]} changed "
                f"(largest difference {found['max_abs']:.3g}). The export or the runtime computes something else."
            )
    elif several and found["changed"] > most_changed:
        raise ExportError(
            f"{who}: at most {most_changed:.1%} of predictions may change from the quantised model to its artifact, "
            f"got {found['changed']:.1%}. The runtime computes something else than the model."
        )
    return found
