"""From an ONNX file to a graph in which every shape is known and everything that is constant is folded.

A file may come from a stranger: nothing outside its folder is read, and no size that it names is trusted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from lilliput.engine.graph import C_TYPES, RUNS, Array, Graph, Narrow, Node, Value
from lilliput.engine.halves import widened
from lilliput.engine.qlinear import spelled
from lilliput.engine.size import Size, Worlds
from lilliput.errors import NotSupported, near

MOST_ELEMENTS = 2**31 - 1  # of one tensor
MOST_COMPUTED = 2**28  # of one that is computed
MOST_FOLDED = 2**24  # elements of a constant that folding may make larger than what it is made of
MOST_NODES = 100_000
ONNX_DOMAINS = ("", "ai.onnx")
Shapes = Mapping[str, Sequence[int]]
Constants = Mapping[str, Array]

# Shapes of operators that ONNX has no schema for: f(node, inputs' shapes) -> (dtype, shape) of each output.
INFER: dict[str, Callable[[Node, list[tuple[int, ...]]], list[tuple[str, tuple[int, ...]]]]] = {}


def read(
    model: str | Path | bytes | ModelProto,
    shapes: Shapes | None = None,
    constants: Constants | None = None,
    supported: Callable[[str], bool] = lambda op: True,
) -> Graph:
    """The graph of an ONNX model.

    shapes: the largest sizes of an input that has free ones; a leading free size that is not named becomes 1.
    constants: inputs that are bound to these numbers now. supported: whether an operator ("Conv",
    "com.microsoft.MatMulNBits") can be compiled.

    Raises:
        ValueError: for a file that is damaged, or shapes and constants that do not fit its inputs.
        NotSupported: naming every node that cannot be compiled.
    """
    proto = load(model)
    proto = _inlined(widened(spelled(proto)), supported)
    return _Reader(proto, dict(shapes or {}), dict(constants or {}), supported).graph()


def op_name(node: NodeProto) -> str:
    """The operator's type, with its domain where that is not ONNX's own."""
    return node.op_type if node.domain in ONNX_DOMAINS else f"{node.domain}.{node.op_type}"


# --------------------------------------------------------------------------------------------------------------- file


def load(model: str | Path | bytes | ModelProto) -> ModelProto:
    """The model with its external tensors, which must be plain files in its own folder."""
    folder, name = None, "the model"
    if isinstance(model, ModelProto):
        proto = model
    else:
        if isinstance(model, str | Path):
            path = Path(model)
            if not path.is_file():
                raise ValueError(f"compile: the model must be an ONNX file that exists, got {path}.")
            folder, name, data = path.resolve().parent, path.name, path.read_bytes()
        else:
            data = bytes(model)
        proto = ModelProto()
        try:
            proto.ParseFromString(data)
        except Exception as error:
            raise ValueError(f"compile: {name} must be an ONNX model, and is damaged ({str(error)[:80]}).") from error
    if not proto.graph.node and not proto.graph.output:
        raise ValueError(f"compile: {name} must be an ONNX model with nodes, got none. Export it again.")
    _judge(proto, name)
    for tensor in _tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL:
            _bring(tensor, folder, name)
    return proto


def _judge(proto: ModelProto, name: str) -> None:
    """Raise ValueError where a name is no text, or a version none that the package onnx knows."""
    newest = onnx.defs.onnx_opset_version()
    for entry in proto.opset_import:
        if not 1 <= entry.version <= (newest if entry.domain in ONNX_DOMAINS else 2**31 - 1):
            raise ValueError(
                f"compile: {name} must be of opset 1 to {newest}, got {entry.version} of "
                f"{entry.domain!r}. A newer opset needs a newer onnx package."
            )
    texts: list[Any] = [entry.domain for entry in proto.opset_import]
    for holder in (proto.graph, *proto.functions):
        for node in holder.node:
            texts += [node.name, node.op_type, node.domain, *node.input, *node.output]
            texts += [attribute.name for attribute in node.attribute]
    for function in proto.functions:
        texts += [function.name, function.domain, *function.input, *function.output, *function.attribute]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        texts += [value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim)]
    texts += [tensor.name for tensor in _tensors(proto)]
    if wrong := next((text for text in texts if not isinstance(text, str)), None):
        raise ValueError(f"compile: the names of {name} must be UTF-8, got {wrong!r:.80}. The file is damaged.")


def _once(names: Sequence[str]) -> None:
    """Raise ValueError where two makers give one name: shapes and places would be taken from either."""
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"compile: each value must be made once, got {twice!r:.80} more often. The file is damaged.")


def _tensors(proto: ModelProto) -> list[TensorProto]:
    found = list(proto.graph.initializer)
    for holder in (proto.graph, *proto.functions):
        for node in holder.node:
            for attribute in node.attribute:
                found += [attribute.t] if attribute.HasField("t") else []
                found += list(attribute.tensors)
    return found


def _bring(tensor: TensorProto, folder: Path | None, name: str) -> None:
    """Read an external tensor into the model."""
    where = {entry.key: entry.value for entry in tensor.external_data}
    text = where.get("location", "")
    if folder is None:
        raise ValueError(
            f"compile: {name} must hold its tensors, but {tensor.name!r} is in the file {text!r}. Give "
            "the path of the model."
        )
    path = folder / text
    inside = text and not Path(text).is_absolute() and ".." not in Path(text).parts and not path.is_symlink()
    if not inside or not path.resolve().is_relative_to(folder) or not path.is_file():
        raise ValueError(
            f"compile: the tensors of {name} must lie in files beside it, got {text!r} for "
            f"{tensor.name!r}. Save the model as one file."
        )
    try:
        start, length = int(where.get("offset", 0)), where.get("length")
        wanted = _count(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        size = int(length) if length is not None else wanted
        if start < 0 or size < 0 or start + size > path.stat().st_size:
            raise ValueError(f"{size} bytes at {start} are not in {text!r}")
        with path.open("rb") as file:
            file.seek(start)
            tensor.raw_data = file.read(size)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"compile: tensor {tensor.name!r} of {name} must be whole, got {error}.") from error
    tensor.data_location = TensorProto.DEFAULT
    del tensor.external_data[:]


def _count(dims: Sequence[int]) -> int:
    count = 1
    for size in dims:
        if size < 0:
            raise ValueError(f"compile: sizes must not be negative, got {list(dims)}.")
        count *= size or 1  # a tensor without elements must not have huge sizes either
    if count > MOST_ELEMENTS:
        raise ValueError(f"compile: a tensor must have at most {MOST_ELEMENTS} elements, got {list(dims)}.")
    return 0 if 0 in dims else count


def _array(tensor: TensorProto) -> Array:
    _count(tensor.dims)
    try:
        return np.array(numpy_helper.to_array(tensor))
    except Exception as error:
        raise ValueError(f"compile: tensor {tensor.name!r} must be whole, got {str(error)[:120]}.") from error


def _inlined(proto: ModelProto, supported: Callable[[str], bool]) -> ModelProto:
    """Functions of the model, and operators that ONNX defines by others and nothing here compiles, written out."""
    from onnx import inliner

    _written_out(proto)
    for _ in range(4):
        used = {(node.domain, node.op_type) for node in proto.graph.node}
        local = {(function.domain, function.name) for function in proto.functions}
        opsets = {o.domain: o.version for o in proto.opset_import}
        wanted = []
        for domain, op_type in used:
            if (domain, op_type) in local:
                wanted.append((domain, op_type))
            elif not supported(op_type if domain in ONNX_DOMAINS else f"{domain}.{op_type}"):
                version = opsets.get(domain, opsets.get(domain or "ai.onnx", 1))
                if onnx.defs.has(op_type, domain) and version <= onnx.defs.onnx_opset_version():
                    try:
                        schema = onnx.defs.get_schema(op_type, version, domain)
                    except onnx.defs.SchemaError:  # not in this version
                        continue
                    if schema.has_function or schema.has_context_dependent_function:
                        wanted.append((domain, op_type))
        if not wanted:
            break
        new = proto
        for name in sorted(wanted):
            try:
                new = inliner.inline_selected_functions(new, [name], inline_schema_functions=True)
            except Exception as error:
                if name in local:
                    raise ValueError(
                        f"compile: the function {name[1]!r} of the model must be whole, got {str(error)[:160]}."
                    ) from error
        if new.graph.node == proto.graph.node:
            break
        proto = new
    return proto


def _written_out(proto: ModelProto) -> None:
    """Functions must not call themselves, nor become more nodes than anything needs."""
    bodies = {(f.domain, f.name): [(n.domain, n.op_type) for n in f.node] for f in proto.functions}
    nodes: dict[tuple[str, str], int] = {}
    for start in bodies:
        path: list[tuple[tuple[str, str], int]] = [(start, 0)]
        while path:
            name, at = path.pop()
            called = [call for call in bodies[name] if call in bodies]
            if at < len(called):
                path.append((name, at + 1))
                if called[at] not in nodes:
                    if any(held == called[at] for held, _ in path):
                        raise ValueError(
                            f"compile: the function {called[at][1]!r} must not call itself. The file is damaged."
                        )
                    path.append((called[at], 0))
            else:
                nodes[name] = len(bodies[name]) + sum(nodes[call] for call in called)
    total = len(proto.graph.node) + sum(nodes.get((n.domain, n.op_type), 0) for n in proto.graph.node)
    if total > MOST_NODES:
        raise ValueError(f"compile: a model must have at most {MOST_NODES} nodes, got {total} with its functions.")


# ------------------------------------------------------------------------------------------------------------- graph


class _Known:
    """A value while it is read: its type and, in each world, its shape and (of a constant) its numbers."""

    def __init__(self, dtype: Any, shapes: list[tuple[int, ...]], data: list[Array] | None = None) -> None:
        self.dtype, self.shapes, self.data = np.dtype(dtype), shapes, data

    def at(self, world: int) -> tuple[tuple[int, ...], Array | None]:
        shape = self.shapes[world if len(self.shapes) > 1 else 0]
        return shape, None if self.data is None else self.data[world if len(self.data) > 1 else 0]

    @property
    def shared(self) -> bool:
        return self.data is not None and len(self.data) == 1


class _Reader:
    def __init__(
        self,
        proto: ModelProto,
        shapes: dict[str, Sequence[int]],
        constants: dict[str, Array],
        supported: Callable[[str], bool],
    ) -> None:
        self.proto, self.supported = proto, supported
        self.opsets = {"" if o.domain in ONNX_DOMAINS else o.domain: o.version for o in proto.opset_import}
        self.imports = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        self.known: dict[str, _Known] = {}
        self.narrow: dict[str, Narrow] = {}
        self.values: dict[str, Value] = {}
        self.fitted: dict[str, tuple[int, ...] | None] = {}
        held = {tensor.name for tensor in proto.graph.initializer}
        self.given = [value for value in proto.graph.input if value.name not in held]
        _once(
            [
                *(value.name for value in self.given),
                *(tensor.name for tensor in proto.graph.initializer),
                *(output for node in proto.graph.node for output in node.output if output),
            ]
        )
        names = [value.name for value in self.given]
        for what in (*shapes, *constants):
            if what not in names:
                raise ValueError(f"compile: shapes and constants must name an input, got {what!r}. {near(what, names)}")
        self._start(shapes, constants)

    def _start(self, shapes: dict[str, Sequence[int]], constants: dict[str, Array]) -> None:
        dims: dict[str, list[int | str]] = {}
        most: dict[str, int] = {}
        self.symbols: dict[str, str] = {}
        for value in self.given:
            kind = value.type.tensor_type
            ranked = value.type.HasField("tensor_type") and kind.HasField("shape")
            if not ranked and value.name not in constants and value.name not in shapes:
                raise NotSupported(
                    f"compile: input {value.name!r} must be a tensor whose rank is known. Name its "
                    f"sizes with --shape {value.name}=1x8."
                )
            if value.name in constants:
                continue
            asked = shapes.get(value.name)
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
                    continue
                name = self._symbol(dim.dim_param if dim is not None else "", value.name, axis)
                if asked is None and axis > 0 and name not in most:
                    written = "x".join(str(d.dim_value) if d.HasField("dim_value") else "64" for d in kind.shape.dim)
                    raise ValueError(
                        f"compile: the input {value.name!r} must get a largest size for its free ones. "
                        f"Name them with --shape {value.name}={written}."
                    )
                largest = most.get(name, 1) if asked is None else int(asked[axis])
                if largest < 1:
                    raise ValueError(f"compile: sizes must be at least 1, got {largest} for {value.name!r}.")
                if most.get(name, largest) != largest and asked is not None:
                    largest = max(largest, most[name])
                most[name] = largest
                sizes.append(name)
            dims[value.name] = sizes
        free = {name: size for name, size in most.items() if size > 1}
        self.worlds = Worlds(free)
        for value in self.given:
            dtype = self._dtype(value.type.tensor_type.elem_type, value.name)
            if value.name in constants:
                data = np.asarray(constants[value.name])
                if data.dtype != dtype:
                    data = data.astype(dtype)
                self.known[value.name] = _Known(data.dtype, [data.shape], [data])
                continue
            per = [
                tuple(size if isinstance(size, int) else world.get(size, most[size]) for size in dims[value.name])
                for world in self.worlds.choices
            ]
            _count(per[0])
            self.known[value.name] = _Known(dtype, per if len(set(per)) > 1 else per[:1])
        for tensor in self.proto.graph.initializer:
            self._constant(tensor.name, _array(tensor))

    def _symbol(self, param: str, name: str, axis: int) -> str:
        """The C name of a free size, such as n_batch: no kernel has such names."""
        key = param or f"{name} {axis}"
        if key not in self.symbols:
            found = short = f"n_{re.sub(r'[^A-Za-z0-9]+', '_', key).strip('_')[:40]}"
            while found in self.symbols.values():
                found = f"{short}_{len(self.symbols)}"
            self.symbols[key] = found
        return self.symbols[key]

    def _dtype(self, kind: int, name: str) -> np.dtype[Any]:
        try:
            found: np.dtype[Any] = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
            return found
        except KeyError:
            raise NotSupported(f"compile: {name!r} must hold numbers, got elements of type {kind}.") from None

    def _constant(self, name: str, data: Array) -> None:
        if data.dtype.kind in "OSU":
            raise NotSupported(f"compile: the constant {name!r} must hold numbers, got {data.dtype.name}.")
        self.known[name] = _Known(data.dtype, [data.shape], [data])

    def graph(self) -> Graph:
        """Every node read, folded or kept."""
        steps: list[tuple[NodeProto, Node, bool]] = []  # with whether it was folded
        wrong: list[str] = []
        for number, proto in enumerate(self.proto.graph.node):
            op = op_name(proto)
            label = f"{proto.name or next(iter(proto.output), '') or number} ({op})"
            missing = [name for name in proto.input if name and name not in self.known]
            if missing and not wrong:
                raise ValueError(
                    f"compile: the input {missing[0]!r} of {label} must be made before it. The file is damaged."
                )
            if missing:
                wrong += [] if self.supported(op) else [label]  # what it reads is not known: only its type is judged
                continue
            if any(a.HasField("g") or a.graphs for a in proto.attribute):
                wrong.append(f"{label}: it has a graph of its own")
                continue
            self._checked(proto, label)
            node = self._node(proto, op)
            if self._fold(proto, node):
                steps.append((proto, node, True))
                continue
            if not self.supported(op):
                wrong.append(label)
                continue
            reason = self._infer(proto, node)
            if reason:
                wrong.append(f"{label}: {reason}")
                continue
            steps.append((proto, node, False))
        kept, more = self._needed(steps)
        wrong += more
        if wrong:
            raise NotSupported("compile: every node must be one that the engine knows, got " + "; ".join(wrong) + ".")
        outputs = []
        for value in self.proto.graph.output:
            if value.name not in self.known:
                raise ValueError(f"compile: the output {value.name!r} must be made by a node. The file is damaged.")
            outputs.append(self.value(value.name))
        inputs = [self.value(value.name) for value in self.given if self.known[value.name].data is None]
        nodes = [self._bind(proto, node) for proto, node in kept]
        odd = sorted(
            {
                f"{v.name} ({v.dtype.name})"
                for v in (*inputs, *outputs, *(v for n in nodes for v in (*n.inputs, *n.outputs)))
                if v is not None
                and v.dtype.name not in ((*C_TYPES, *CODES) if v.constant and v not in outputs else RUNS)
            }
        )
        if odd:
            raise NotSupported(f"compile: values must be one of {', '.join(RUNS)}, got {', '.join(odd[:20])}.")
        graph = Graph(inputs, outputs, nodes, dict(self.worlds.most))
        graph.prune()
        return graph

    def _needed(self, steps: Sequence[tuple[NodeProto, Node, bool]]) -> tuple[list[tuple[NodeProto, Node]], list[str]]:
        """The nodes that run: those not folded, and those folded to numbers that depend on free sizes and are read."""
        wanted = {value.name for value in self.proto.graph.output}
        kept, wrong = [], []
        for proto, node, folded in reversed(steps):
            if folded:
                if not any(name in wanted and self._varies(name) for name in proto.output):
                    continue
                if not self.supported(node.op):
                    wrong.append(f"{node.name} ({node.op}): what it makes depends on the free sizes")
                    continue
            kept.append((proto, node))
            wanted.update(name for name in proto.input if name)
        return kept[::-1], wrong[::-1]

    def _varies(self, name: str) -> bool:
        """Whether a known value depends on the free sizes in a way that `entries` cannot say."""
        known = self.known.get(name)
        return known is not None and known.data is not None and len(known.data) > 1 and self._entries(name) is None

    def value(self, name: str) -> Value:
        """The value of a name, with its sizes fitted over the worlds."""
        if name not in self.values:
            known = self.known[name]
            ranks = {len(shape) for shape in known.shapes}
            shape = (
                [self.worlds.fit([s[axis] for s in known.shapes]) for axis in range(len(known.shapes[0]))]
                if len(ranks) == 1
                else [None]
            )
            if any(size is None for size in shape):
                raise NotSupported(
                    f"compile: the shape of {name!r} must follow from the free sizes by sums and "
                    "products. Fix the sizes in the file."
                )
            value = Value(
                name, known.dtype, tuple(int(s) if not isinstance(s, Size) else s for s in shape if s is not None)
            )
            if known.data is not None and len(known.data) == 1:
                value.data, value.narrow = known.data[0], self.narrow.get(name)
            elif known.data is not None:
                value.entries = self._entries(name)
            self.values[name] = value
        return self.values[name]

    def _entries(self, name: str) -> tuple[int, ...] | None:
        """The numbers of a value that depend on the free sizes, as polynomials; None where they are not such."""
        if name not in self.fitted:
            data = self.known[name].data
            assert data is not None
            flat = [d.reshape(-1) for d in data]
            found: list[int | None] = [None]
            if all(d.shape == data[0].shape for d in data) and data[0].dtype.kind in "iu" and len(flat[0]) <= 256:
                found = [self.worlds.fit([int(d[i]) for d in flat]) for i in range(len(flat[0]))]
            self.fitted[name] = None if None in found else tuple(size for size in found if size is not None)
        return self.fitted[name]

    def _node(self, proto: NodeProto, op: str) -> Node:
        attrs = {}
        for attribute in proto.attribute:
            try:
                held = helper.get_attribute_value(attribute)
            except ValueError as error:
                raise ValueError(
                    f"compile: attribute {attribute.name!r} of {proto.name!r} must have a value. The file is damaged."
                ) from error
            if isinstance(held, TensorProto):
                held = _array(held)
            elif isinstance(held, bytes):
                held = held.decode(errors="replace")
            elif isinstance(held, list) and held and isinstance(held[0], bytes):
                held = [text.decode(errors="replace") for text in held]
            attrs[attribute.name] = held
        domain = "" if proto.domain in ONNX_DOMAINS else proto.domain
        return Node(
            op, [], [], attrs, proto.name or next((n for n in proto.output if n), op), self.opsets.get(domain, 1)
        )

    def _bind(self, proto: NodeProto, node: Node) -> Node:
        node.inputs = [self.value(name) if name else None for name in proto.input]
        node.outputs = [self.value(name) if name else None for name in proto.output]
        return node

    # one node ----------------------------------------------------------------------------------------------------

    def _checked(self, proto: NodeProto, label: str) -> None:
        """Raise ValueError for a node that ONNX does not define so: what computes its shapes is not safe from such."""
        context = onnx.checker.C.CheckerContext()
        context.ir_version = 10
        context.opset_imports = self.opsets
        if proto.domain not in ONNX_DOMAINS and not onnx.defs.has(proto.op_type, proto.domain):
            return
        try:
            onnx.checker.check_node(proto, context)
        except onnx.checker.ValidationError as error:
            raise ValueError(
                f"compile: {label} must be as ONNX defines it, got "
                f"{' '.join(str(error).split())[:160]}. The file is damaged."
            ) from error
        held = {a.name: a for a in proto.attribute}
        if len(held) < len(proto.attribute):
            raise ValueError(f"compile: {label} must have each attribute once. The file is damaged.")
        first = self.known[proto.input[0]] if proto.input and proto.input[0] else None
        if first is not None and proto.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            rank, many = len(first.shapes[0]), 0
            named = [held["axis"].i] if "axis" in held else []
            if "axes" in held:
                named, many = list(held["axes"].ints), len(held["axes"].ints)
            more = proto.op_type in ("Flatten", "OneHot", "Unsqueeze")
            low, high = -max(rank, 1) - more - many * more, max(rank, 1) + more + many * more
            if any(not low <= axis < high for axis in named):
                raise ValueError(
                    f"compile: {label} must name dimensions of its input, which has {rank}, got {named[:8]}."
                )
        if proto.op_type == "Split" and "num_outputs" in held and held["num_outputs"].i != len(proto.output):
            raise ValueError(f"compile: {label} must have {held['num_outputs'].i} outputs, got {len(proto.output)}.")
        if proto.op_type == "Einsum" and not re.fullmatch(rb"[A-Za-z.,\s]*(->[A-Za-z.\s]*)?", held["equation"].s):
            raise ValueError(f"compile: {label}: its equation must be letters, got {held['equation'].s!r:.80}.")

    def _fold(self, proto: NodeProto, node: Node) -> bool:
        """Compute a node whose inputs are known, or that only asks for a shape."""
        op = node.op
        inputs = [self.known[name] for name in proto.input if name]
        if op == "Constant":
            self._constant(proto.output[0], _constant_of(node))
            return True
        if op in ("Shape", "Size") and inputs:
            found = [self._shape_of(inputs[0].at(w)[0], op, node) for w in range(len(inputs[0].shapes))]
            self.known[proto.output[0]] = _Known(np.int64, [found[0].shape], found)
            return True
        if op in RANDOM or any(x.data is None for x in inputs):
            return False
        if op == "DequantizeLinear":
            self._dequantize(proto, node)
            return True
        worlds = 1 if all(x.shared for x in inputs) else len(self.worlds)
        results = []
        for w in range(worlds):
            feeds = {name: self.known[name].at(w)[1] for name in proto.input if name}
            if not self._small(proto, node, feeds):
                return False
            try:
                results.append(_evaluate(proto, self.imports, feeds))  # type: ignore[arg-type]
            except Exception:  # a damaged node, or one that the reference lacks: it is judged as those that run
                return False
        for i, name in enumerate(proto.output):
            if name:
                per = [np.asarray(result[i]) for result in results]
                alike = all(p.shape == per[0].shape and np.array_equal(p, per[0]) for p in per[1:])
                per = per[:1] if alike else per
                self.known[name] = _Known(per[0].dtype, [p.shape for p in per], per)
        self._keep_narrow(proto, node)
        return True

    def _shape_of(self, shape: tuple[int, ...], op: str, node: Node) -> Array:
        if op == "Size":
            return np.array(int(np.prod(shape)), np.int64)
        start, end = node.attrs.get("start", 0), node.attrs.get("end", len(shape))
        return np.array(shape[slice(start, end)], np.int64)

    def _small(self, proto: NodeProto, node: Node, feeds: Mapping[str, Array | None]) -> bool:
        """Whether folding cannot make much more than there is: a damaged file must not fill the memory."""
        held = sum(0 if x is None else x.size for x in feeds.values())
        if node.op in (
            "ConstantOfShape",
            "Range",
            "Tile",
            "Expand",
            "Resize",
            "Pad",
            "OneHot",
            "Upsample",
            "CenterCropPad",
            "EyeLike",
            "HannWindow",
            "HammingWindow",
            "BlackmanWindow",
            "MelWeightMatrix",
            "Unique",
            "Compress",
            "NonZero",
        ):
            try:
                made = _grown(node, list(feeds.values()))
            except (TypeError, ValueError, IndexError, OverflowError, ZeroDivisionError):
                return False
            return made <= max(MOST_FOLDED, 4 * held)
        return held <= MOST_ELEMENTS

    def _dequantize(self, proto: NodeProto, node: Node) -> None:
        parts = [self.known[name].at(0)[1] if name else None for name in proto.input]
        codes, scale = parts[0], parts[1]
        zero = parts[2] if len(parts) > 2 else None
        if codes is None or scale is None:
            raise ValueError(
                f"compile: {node.name} (DequantizeLinear) must have codes and a scale. The file is damaged."
            )
        axis, block = int(node.attrs.get("axis", 1)), int(node.attrs.get("block_size", 0))
        bits = CODES.get(codes.dtype.name, 32)
        whole = codes.astype(np.int32)

        def spread(x: Array) -> Array:
            if x.ndim == 0 or x.size == 1:
                return x.reshape((1,) * codes.ndim)
            if block:
                return np.repeat(x, block, axis).take(np.arange(codes.shape[axis]), axis)
            return x.reshape([-1 if i == axis % codes.ndim else 1 for i in range(codes.ndim)])

        try:
            scales = spread(scale.astype(np.float32))
            zeros = None if zero is None or not np.any(zero.astype(np.int32)) else spread(zero.astype(np.int32))
            data = ((whole - (0 if zeros is None else zeros)) * scales).astype(np.float32)
            if data.shape != codes.shape:
                raise ValueError(f"scales of shape {scale.shape} for {codes.shape}")
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise ValueError(
                f"compile: {node.name} (DequantizeLinear) must have a scale for its codes, got {error}."
            ) from error
        name = proto.output[0]
        self._constant(name, data)
        if bits <= 8:
            self.narrow[name] = Narrow(
                bits, whole.astype(np.int16 if codes.dtype.name == "uint8" else np.int8), scales, zeros
            )

    def _keep_narrow(self, proto: NodeProto, node: Node) -> None:
        """How a constant is stored, carried through what only moves, shifts or scales it."""
        source, name = proto.input[0] if proto.input else "", proto.output[0]
        data = self.known[name].data if source and name else None
        if data is None:
            return
        was = self.known[source].data
        if node.op == "Cast" and was is not None and was[0].dtype == np.float16 and data[0].dtype == np.float32:
            self.narrow[name] = Narrow(16, was[0])
        if node.op == "Cast" and was is not None and was[0].dtype.name in CODES and data[0].dtype == np.float32:
            codes = was[0].astype(np.int16 if was[0].dtype.name == "uint8" else np.int8)
            self.narrow[name] = Narrow(CODES[was[0].dtype.name], codes, np.ones((1,) * codes.ndim, np.float32))
        if node.op == "Mul" and source not in self.narrow:
            source = proto.input[1]
        held = self.narrow.get(source)
        if held is None:
            return
        if node.op == "Identity":
            self.narrow[name] = held
        elif node.op in ("Mul", "Sub") and held.scale is not None and held.codes.shape == data[0].shape:
            other = self.known[proto.input[1] if proto.input[0] == source else proto.input[0]].data
            assert other is not None
            number = other[0].reshape((1,) * (held.codes.ndim - other[0].ndim) + other[0].shape)
            if node.op == "Mul":
                self.narrow[name] = Narrow(
                    held.bits, held.codes, (held.scale * number).astype(np.float32), held.zero_point
                )
            elif held.zero_point is None and np.all(held.scale == 1) and np.array_equal(number, np.rint(number)):
                self.narrow[name] = Narrow(held.bits, held.codes, held.scale, number.astype(np.int32))
        elif node.op in ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose"):
            perm = node.attrs.get("perm")
            moved = held.moved(lambda x: np.transpose(x, perm) if node.op == "Transpose" else x.reshape(data[0].shape))
            if moved is not None:
                self.narrow[name] = moved

    def _infer(self, proto: NodeProto, node: Node) -> str:
        """The types and shapes of what a node makes, in every world; a reason where they cannot be known."""
        domain = "" if proto.domain in ONNX_DOMAINS else proto.domain
        worlds = (
            1
            if all(
                len(self.known[n].shapes) == 1 and (self.known[n].data is None or self.known[n].shared)
                for n in proto.input
                if n
            )
            else len(self.worlds)
        )
        per: list[list[tuple[Any, tuple[int, ...]]]] = []
        for w in range(worlds):
            held = {name: self.known[name].at(w) for name in proto.input if name}
            try:
                if node.op in INFER:
                    shaped = [held[name][0] if name else () for name in proto.input]
                    per.append([(np.dtype(kind), shape) for kind, shape in INFER[node.op](node, shaped)])
                else:
                    per.append(
                        _types(
                            proto,
                            domain,
                            self.opsets.get(domain, 1),
                            self.imports,
                            held,
                            {name: self.known[name].dtype for name in held},
                        )
                    )
            except NotSupported as error:
                return str(error)
            except Exception as error:
                return f"its shapes do not fit ({str(error)[:160]})"
        for i, name in enumerate(proto.output):
            if not name:
                continue
            if i >= len(per[0]):
                return f"its output {i} has no type"
            shapes = [shape for _, shape in (world[i] for world in per)]
            if _count([size or 1 for size in shapes[0]]) > MOST_COMPUTED:
                raise ValueError(
                    f"compile: {name!r} must have at most {MOST_COMPUTED} elements, got {list(shapes[0])}."
                )
            self.known[name] = _Known(per[0][i][0], shapes if len(set(shapes)) > 1 else shapes[:1])
        return ""


CODES = {"int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}  # bits by numpy's name
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
C_WORDS = frozenset(
    (
        "auto",
        "break",
        "case",
        "char",
        "const",
        "continue",
        "default",
        "do",
        "double",
        "else",
        "enum",
        "extern",
        "float",
        "for",
        "goto",
        "if",
        "inline",
        "int",
        "long",
        "register",
        "restrict",
        "return",
        "short",
        "signed",
        "sizeof",
        "static",
        "struct",
        "switch",
        "typedef",
        "union",
        "unsigned",
        "void",
        "volatile",
        "while",
        "arena",
        "weights",
        "main",
    )
)


def _constant_of(node: Node) -> Array:
    for key, held in node.attrs.items():
        if key == "value":
            return np.asarray(held)
        if key in ("value_float", "value_floats"):
            return np.asarray(held, np.float32)
        if key in ("value_int", "value_ints"):
            return np.asarray(held, np.int64)
    raise NotSupported(f"compile: {node.name} (Constant) must hold a tensor of numbers.")


def _evaluate(proto: NodeProto, imports: list[Any], feeds: Mapping[str, Array]) -> list[Array]:
    """What ONNX's own reference computes for one node."""
    graph = helper.make_graph(
        [proto],
        "fold",
        [onnx.ValueInfoProto(name=name) for name in feeds],
        [onnx.ValueInfoProto(name=name) for name in proto.output if name],
    )
    model = helper.make_model(graph, opset_imports=imports)
    with np.errstate(all="ignore"):
        found = iter(ReferenceEvaluator(model).run(None, dict(feeds)))
    return [next(found) if name else np.zeros(0) for name in proto.output]


def _grown(node: Node, feeds: list[Array | None]) -> int:
    first = feeds[0]
    assert first is not None
    rest = [np.asarray(x) for x in feeds[1:] if x is not None]
    if node.op == "ConstantOfShape":
        return _count([int(x) for x in first])
    if node.op == "Range":
        return int(np.ceil((float(rest[0]) - float(first)) / float(rest[1])))
    if node.op == "Tile":
        return int(first.size * np.prod([float(x) for x in rest[0]]))
    if node.op == "Expand":
        return int(max(first.size, 1) * np.prod([float(x) for x in rest[0]]))
    if node.op in ("Resize", "Upsample"):
        sizes = rest[-1]
        many = float(np.prod(sizes.astype(float))) if sizes.size else 1.0
        return int(many * (first.size if sizes.dtype.kind == "f" else 1))
    if node.op == "Pad":
        pads = np.asarray(node.attrs.get("pads", rest[0] if rest else []), float)
        half = len(pads) // 2
        return int(np.prod([s + pads[i] + pads[half + i] for i, s in enumerate(first.shape)])) if half else first.size
    if node.op == "OneHot":
        return int(first.size * float(rest[0].reshape(-1)[0]))
    return MOST_FOLDED + 1 if first.size > MOST_FOLDED else first.size


def _types(
    proto: NodeProto,
    domain: str,
    version: int,
    imports: list[Any],
    held: Mapping[str, tuple[tuple[int, ...], Array | None]],
    dtypes: Mapping[str, Any],
) -> list[tuple[Any, tuple[int, ...]]]:
    """The (dtype, shape) of every output of a node, by ONNX's own inference, else by running it on zeros."""
    if not onnx.defs.has(proto.op_type, domain):
        raise NotSupported("its operator is not one of ONNX's")
    schema = onnx.defs.get_schema(proto.op_type, min(version, onnx.defs.onnx_opset_version()), domain)
    types, data = {}, {}
    for name, (shape, known) in held.items():
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtypes[name]))
        types[name] = helper.make_tensor_type_proto(kind, shape)
        if known is not None and known.size <= 1024:
            data[name] = numpy_helper.from_array(known, name)
    found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
    outputs: list[tuple[Any, tuple[int, ...]] | None] = [_typed(found.get(name)) for name in proto.output]
    if any(name and known is None for name, known in zip(proto.output, outputs, strict=True)):
        if sum(int(np.prod(shape)) for shape, _ in held.values()) > MOST_FOLDED:
            raise NotSupported("its shape is not known before it runs")
        feeds = {
            name: np.zeros(shape, dtypes[name]) if known is None else known for name, (shape, known) in held.items()
        }
        if proto.op_type in ("NonZero", "Unique", "Compress", "NonMaxSuppression"):
            raise NotSupported("its shape depends on the data")
        outputs = [(x.dtype, x.shape) for x in map(np.asarray, _evaluate(proto, imports, feeds))]
    return [known or (np.dtype(np.float32), ()) for known in outputs]


def _typed(kind: TypeProto | None) -> tuple[Any, tuple[int, ...]] | None:
    if kind is None or not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
        return None
    dims = kind.tensor_type.shape.dim
    if any(not dim.HasField("dim_value") for dim in dims):
        return None
    return np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type)), tuple(dim.dim_value for dim in dims)
