"""Left: tensors that a forward pass left behind in a module, with the graphs that they came from."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn


def left(value: Any, depth: int = 4) -> Iterator[Tensor]:
    """The tensors with a graph inside what a module holds beside its parameters, buffers and modules.

    Args:
        value: the module's attributes.
        depth: how deep containers are looked into.
    """
    if isinstance(value, Tensor):
        if not value.is_leaf:
            yield value
    elif depth and isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            if not isinstance(part, nn.Module):
                yield from left(part, depth - 1)
