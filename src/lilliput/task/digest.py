"""Digest: what a task's fingerprint reads of tensors and functions."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.task.read import source


def digest_tensor(digest: Any, tensor: Tensor) -> None:
    """A tensor by its shape, type and values."""
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def digest_function(digest: Any, part: Any) -> None:
    """A function by its source, a partial one with its settings, a module with its tensors."""
    if isinstance(part, partial):
        digest_function(digest, part.func)
        digest.update(f"{part.args} {sorted(part.keywords.items())}".encode())
    elif isinstance(part, nn.Module):
        plain = {key: value for key, value in vars(part).items() if isinstance(value, str | int | float)}
        digest.update(f"{source(type(part))} {plain}".encode())
        for tensor in part.state_dict().values():
            digest_tensor(digest, tensor)
    else:
        digest.update(source(part).encode())
