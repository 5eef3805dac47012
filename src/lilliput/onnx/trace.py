"""trace: export a model once, with its weights as initialisers of their own name."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, numpy_helper
from torch import nn

from lilliput.errors import ExportError, told
from lilliput.onnx.clean import clean, renamed
from lilliput.onnx.exporter import remembered
from lilliput.onnx.packed import padded
from lilliput.onnx.session import Inputs, arrays, quiet
from lilliput.onnx.structure import Structure
from lilliput.stored.operators import CONSTANT
from lilliput.task.nested import leaves, mapped, output_names, take


def trace(model: nn.Module, example: Inputs) -> Structure:
    """Export `model` once, with a free batch axis.

    Weights stay initialisers of their own under their state_dict key: what the exporter does to them (a transpose, the
    gate order of a GRU) stays in the graph as nodes on constants, which the runtime folds when it loads the file.

    Args:
        model: plain tensors only (codes realized), batch norm folded; evaluated in eval mode and left as it was.
        example: one batch of inputs: a tensor, a tuple of them, or a dict by argument name.

    Raises:
        ExportError: if torch cannot export it, with torch's reason.

    Example:
        >>> structure = trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.zeros(1, 4))
        >>> sorted(structure.weights)
        ['0.bias', '0.weight']
    """
    import onnx_ir

    modes = [(module, module.training) for module in model.modules()]
    named = example if isinstance(example, dict) else {}
    ordered = () if named else example if isinstance(example, tuple) else (example,)
    two = [mapped(lambda leaf: torch.cat([leaf[:1], leaf[:1]]), x) for x in (*ordered, *named.values())]
    batch = torch.export.Dim("batch")
    free = [mapped(lambda leaf: {0: batch}, x) for x in two]
    shapes: Any = dict(zip(named, free, strict=True)) if named else tuple(free)
    # A dictionary in the last place would be taken for the named ones.
    last: Any = ({},) if not named and isinstance(two[-1], dict) else ()
    try:
        with (
            quiet(),
            remembered(),
            torch.no_grad(),
            _lengths(model),
            _looked_up(model),
            _masks(),
            padded(model),
            _flat(model) as outputs,
        ):
            model.eval()
            program = torch.onnx.export(
                model,
                () if named else (*two, *last),
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
        cause: BaseException = error
        while cause.__cause__ is not None:  # torch wraps what was raised in advice about its exporter
            cause = cause.__cause__
        raise ExportError(f"trace: torch could not export {type(model).__name__}: {told(cause)}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    for value in proto.graph.input:
        if value.type.tensor_type.shape.dim and not value.type.tensor_type.shape.dim[0].dim_param:
            raise ExportError(
                f"trace: the batch size must stay free, but {type(model).__name__} fixes it. In its "
                "forward, and in the functions that it calls, count examples by x.shape[0]: len(x) and a number are "
                "constants in the file."
            )
    keys = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
    proto, aliases = _name(proto, held, keys, outputs)
    proto = clean(proto)
    kept = {tensor.name for tensor in proto.graph.initializer}
    unused = frozenset(name for name in keys if aliases.get(name, name) not in kept)
    inputs = arrays(take(tuple(two), slice(0, 1)), [value.name for value in proto.graph.input])
    return Structure(proto, {a: b for a, b in aliases.items() if b in kept}, unused, inputs)


@contextlib.contextmanager
def _flat(model: nn.Module) -> Iterator[list[str]]:
    """The model returning a flat tuple inside, as files do; the list holds the names of its outputs once it has run."""
    names: list[str] = []
    whole, own = model.forward, vars(model).get("forward")

    @functools.wraps(whole)
    def forward(*inputs: Any, **named: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():  # torch tries again what has failed, in a way that loses the names
            raise NotImplementedError
        outputs = whole(*inputs, **named)
        names[:] = output_names(outputs)
        return outputs if isinstance(outputs, torch.Tensor) else tuple(leaves(outputs))

    model.forward = forward
    try:
        yield names
    finally:
        del model.forward
        if own is not None:
            model.forward = own


@contextlib.contextmanager
def _lengths(model: nn.Module) -> Iterator[None]:
    """`len(x)` of a tensor as `x.shape[0]` in the files of the model's classes: Python's own fixes the batch size."""

    def free(x: Any) -> Any:
        return x.shape[0] if isinstance(x, torch.Tensor) and x.dim() else len(x)

    spaces = []
    for kind in {type(module) for module in model.modules()}:
        space = getattr(kind.forward, "__globals__", None)
        if space is not None and not kind.__module__.startswith("torch.") and "len" not in space:
            spaces.append(space)
            space["len"] = free
    try:
        yield
    finally:
        for space in spaces:
            space.pop("len", None)


@contextlib.contextmanager
def _masks() -> Iterator[None]:
    """Masks of torch's transformers as they are inside: torch looks into their values, for a faster causal kernel."""
    module: Any = nn.modules.transformer
    own = vars(module).get("_detect_is_causal_mask")

    def said(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return bool(is_causal)

    if own is not None:
        module._detect_is_causal_mask = said
    try:
        yield
    finally:
        if own is not None:
            module._detect_is_causal_mask = own


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
        summed = rows.sum(1) if weights is None else (weights.unsqueeze(1) @ rows).squeeze(1)
        if bag.mode == "sum":
            return summed
        return summed / (ids.shape[1] if bag.padding_idx is None else kept.sum(1, keepdim=True).clamp_min(1))

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


def _name(
    proto: ModelProto, held: Iterable[str], keys: dict[str, torch.Tensor], called: list[str]
) -> tuple[ModelProto, dict[str, str]]:
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
    taken = {value.name for value in graph.input} | set(keys)
    rename.update((old, new) for old, new in zip(outputs, called, strict=True) if new not in taken and old not in taken)
    return renamed(proto, rename), aliases
