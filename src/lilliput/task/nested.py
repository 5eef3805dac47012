"""Nested structures: inputs and outputs of networks, tensors inside tuples, lists, dictionaries and dataclasses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Any
"""A tensor, or tensors in tuples, lists, dictionaries and dataclasses (a Hugging Face `ModelOutput` is one)."""
Model = Callable[..., Any]


class Named(dict[str, Any]):
    """A dictionary whose values are attributes too: what stands for a dataclass once it was written to a file.

    Example:
        >>> Named(logits=1).logits
        1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"Named: {name!r} must be one of {', '.join(self)}.") from None


def children(value: Any) -> dict[Any, Any] | None:
    """The parts of a container by key or place, without those that are None; None for what is no container."""
    if isinstance(value, Tensor):  # first, since it is asked several times in every step of a training
        return None
    if is_dataclass(value) and not isinstance(value, type):
        named: dict[Any, Any] = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, Mapping):
        named = dict(value)
    elif isinstance(value, tuple | list):
        named = dict(enumerate(value))
    else:
        return None
    return {key: part for key, part in named.items() if part is not None}


def rebuilt(like: Any, parts: dict[Any, Any]) -> Any:
    """A container like another, with these parts by key or place: the inverse of `children`."""
    if is_dataclass(like):
        return type(like)(**parts)  # type: ignore[misc]
    if isinstance(like, Mapping):
        return Named(parts) if isinstance(like, Named) else parts
    values = [parts.get(place) for place in range(len(like))]
    if isinstance(like, list):
        return values
    return type(like)(*values) if hasattr(like, "_fields") else tuple(values)


def leaves(value: Any) -> list[Tensor]:
    """The tensors (or arrays) of a nested structure, in order; whatever is neither is left out.

    Args:
        value: any nesting of tuples, lists, dictionaries and dataclasses.

    Example:
        >>> len(leaves({"a": torch.zeros(2), "b": (torch.zeros(3), None)}))
        2
    """
    parts = children(value)
    if parts is None:
        return [value] if hasattr(value, "shape") else []
    return [leaf for part in parts.values() for leaf in leaves(part)]


def mapped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """The structure of `first` with every leaf replaced by `function` of it and of the leaves at its place in `others`.

    Args:
        function: called with one tensor from each structure.
        first: any nested structure; what is no tensor stays as it is.
        others: structures with the same keys.

    Raises:
        ValueError: where a structure has other parts than the first.

    Example:
        >>> mapped(torch.add, (torch.ones(1), [torch.ones(1)]), (torch.ones(1), [torch.ones(1)]))
        (tensor([2.]), [tensor([2.])])
    """
    parts = children(first)
    if parts is None:
        return function(first, *others) if hasattr(first, "shape") else first
    rest = [children(other) for other in others]
    for other, given in zip(rest, others, strict=True):
        if other is None or list(other) != list(parts):
            raise ValueError(f"mapped: structures must have the same parts, got {outline(first)} and {outline(given)}.")
    return rebuilt(
        first, {key: mapped(function, part, *(other[key] for other in rest if other)) for key, part in parts.items()}
    )


def outline(value: Any) -> str:
    """A structure with shapes in place of tensors, for messages.

    Example:
        >>> outline({"ids": torch.zeros(2, 3), "rest": (torch.zeros(1), None)})
        '{ids: (2, 3), rest: ((1,))}'
    """
    parts = children(value)
    if parts is None:
        return str(tuple(value.shape)) if hasattr(value, "shape") else type(value).__name__
    inner = [outline(part) if isinstance(key, int) else f"{key}: {outline(part)}" for key, part in parts.items()]
    return ("{%s}" if isinstance(next(iter(parts), 0), str) else "(%s)") % ", ".join(inner)


def take(inputs: Any, index: Any) -> Any:
    """The examples `index` of every tensor of a structure, along the first axis.

    Args:
        inputs: any nested structure of tensors (n, ...).
        index: int64 (k,) or a slice.
    """
    return mapped(lambda leaf: leaf[index], inputs)


def length(inputs: Any) -> int:
    """How many examples a structure holds: the first axis of its first tensor."""
    return len(inputs) if isinstance(inputs, Tensor) else len(next(iter(leaves(inputs))))


def joined(parts: list[Any]) -> Any:
    """Structures of the same form, one behind the other along the first axis of every tensor."""
    return parts[0] if len(parts) == 1 else mapped(lambda *tensors: torch.cat(tensors), *parts)


def on(inputs: Any, device: torch.device) -> Any:
    """The same structure on a device."""
    return mapped(lambda leaf: leaf.to(device), inputs)


def call(model: Model, inputs: Any) -> Any:
    """`model` on inputs: a tuple is given in order, a dictionary by name, anything else as one argument.

    Data is float32; a network in half precision gets its floats as wide as its weights.
    """
    if isinstance(model, nn.Module):
        first = next((each for each in model.parameters() if each.is_floating_point()), None)
        if first is not None and first.dtype in (torch.float16, torch.bfloat16):
            inputs = mapped(lambda leaf: leaf.to(first.dtype) if leaf.is_floating_point() else leaf, inputs)
    if isinstance(inputs, Tensor):
        return model(inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def predict(model: Model, inputs: Any, batch_size: int = 64) -> Any:
    """The outputs of `model` over all examples, without gradients, in eval mode, on the model's device.

    Args:
        model: a module, a session, or any function of the inputs.
        inputs: any nested structure of tensors (n, ...).
        batch_size: examples at a time.

    Returns:
        What the model returns, its tensors (n, ...).
    """
    modes = []
    if isinstance(model, torch.nn.Module):
        modes = [module for module in model.modules() if module.training]
        model.eval()
    with torch.no_grad():
        parts = [call(model, take(inputs, slice(i, i + batch_size))) for i in range(0, length(inputs), batch_size)]
    for module in modes:
        module.training = True
    return joined(parts)


# ------------------------------------------------------------------------------------------------- through a flat file


def output_names(outputs: Any) -> list[str]:
    """A name for each leaf, which tells where it belongs: how nested outputs go through a file, whose outputs are flat.

    Example:
        >>> x = torch.zeros(1)
        >>> output_names(x), output_names((x, x)), output_names({"boxes": x, "scores": (x, x)})
        (['output'], ['output_0', 'output_1'], ['output/boxes', 'output/scores/0', 'output/scores/1'])
    """
    flat = children(outputs)
    if flat is not None and len(flat) > 1 and list(flat) == list(range(len(flat))) == _plain(flat):
        return [f"output_{place}" for place in flat]
    return _paths(outputs, "output")


def _plain(parts: dict[Any, Any]) -> list[Any]:
    return [key for key, part in parts.items() if children(part) is None and leaves(part)]


def _paths(value: Any, path: str) -> list[str]:
    parts = children(value)
    if parts is None:
        return [path] if leaves(value) else []
    return [name for key, part in parts.items() for name in _paths(part, f"{path}/{key}")]


def structured(names: Sequence[str], flat: Sequence[Any]) -> Any:
    """The outputs of a file in the structure that their names tell: the inverse of `output_names`.

    Dictionaries and dataclasses come back as `Named`, lists as tuples. Several outputs with other names are a tuple.

    Args:
        names: what the file calls its outputs.
        flat: the outputs, in the same order.

    Example:
        >>> structured(["output/boxes", "output/scores/0", "output/scores/1"], [1, 2, 3])
        {'boxes': 1, 'scores': (2, 3)}
    """
    if all(name.startswith("output/") for name in names):
        return _grown([name.split("/")[1:] for name in names], list(flat))
    return flat[0] if len(flat) == 1 else tuple(flat)


def _grown(paths: list[list[str]], flat: list[Any]) -> Any:
    if paths == [[]]:
        return flat[0]
    parts: dict[str, tuple[list[list[str]], list[Any]]] = {}
    for (key, *rest), leaf in zip(paths, flat, strict=True):
        inner = parts.setdefault(key, ([], []))
        inner[0].append(rest)
        inner[1].append(leaf)
    grown = {key: _grown(*inner) for key, inner in parts.items()}
    return tuple(grown.values()) if all(key.isdigit() for key in grown) else Named(grown)
