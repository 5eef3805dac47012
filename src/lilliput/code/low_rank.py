"""LowRank: a matrix as the product of two thin ones."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.code.base import Code
from lilliput.errors import NotSupported
from lilliput.stored.base import Stored
from lilliput.stored.einsum import product


class LowRank(Code):
    """W = A B, with A (out, r) and B (r, n / out), for a tensor of n values read as (out, n / out).

    Encoding is the truncated singular value decomposition, the nearest matrix of that rank in the Frobenius norm
    (Eckart and Young, 1936), the root of each singular value on both sides. `build` makes two layers: for a k x k
    convolution one of k x k into r channels, then one of 1 x 1.

    Sources: Denton et al., Exploiting linear structure within convolutional networks, NIPS 2014, arXiv:1404.0736;
    Jaderberg, Vedaldi and Zisserman, Speeding up convolutional neural networks with low rank expansions, BMVC 2014,
    arXiv:1405.3866.

    Raises ValueError for a rank below 1.

    >>> code = LowRank(1); weight = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    >>> bool(torch.allclose(code.decode(*code.encode(weight)), weight))
    True
    """

    inner = (0, 1)

    def __init__(self, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LowRank: rank must be at least 1, got {rank}.")
        self.rank = rank
        self._shape: tuple[int, ...] = ()

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        self._shape = tuple(weight.shape)
        u, s, v = torch.linalg.svd(weight.reshape(len(weight), -1).float(), full_matrices=False)
        root = s[: self.rank].sqrt()
        return (u[:, : self.rank] * root).to(weight.dtype), (root[:, None] * v[: self.rank]).to(weight.dtype)

    def decode(self, *theta: Tensor) -> Tensor:
        a, b = theta
        return (a @ b).reshape(self._shape or (len(a), b.shape[1]))

    def pack(self, *theta: Stored) -> Stored:
        shape = self._shape or (theta[0].shape[0], theta[1].shape[1])
        return product(theta, shape)

    def build(self, module: nn.Module) -> nn.Module:
        """Two layers that compute what `module` (a linear or ungrouped convolutional layer) does, from A and B.

        Raises NotSupported for another type of layer.
        """
        holder = cast(Any, module).parametrizations["weight"]
        a, b = holder.original0.detach(), holder.original1.detach()
        bias = cast("Tensor | None", getattr(module, "bias", None))
        first, second = layers(module, len(b), bias is not None)
        with torch.no_grad():
            first.weight.copy_(b.reshape(first.weight.shape))
            second.weight.copy_(a.reshape(second.weight.shape))
            if bias is not None:
                second.bias.copy_(bias)
        trains = any(theta.requires_grad for theta in (holder.original0, holder.original1))
        first.weight.requires_grad_(trains)
        second.weight.requires_grad_(trains)
        return nn.Sequential(first, second).to(a.device, a.dtype).train(module.training)


CONVOLUTIONS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.Conv1d, nn.Conv1d),
    (nn.Conv2d, nn.Conv2d),
    (nn.Conv3d, nn.Conv3d),
)


def layers(module: nn.Module, rank: int, bias: bool) -> tuple[nn.Linear, nn.Linear]:
    """A layer into `rank` features and one out of them, in the place of `module`.

    Raises NotSupported for another type of layer.
    """
    if reason := refusal(module):
        raise NotSupported(f"LowRank: a layer must be linear or an ungrouped convolution, but {reason}.")
    if isinstance(module, nn.Linear):
        return nn.Linear(module.in_features, rank, bias=False), nn.Linear(rank, module.out_features, bias=bias)
    assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    kind = next(made for known, made in CONVOLUTIONS if isinstance(module, known))
    first = kind(
        module.in_channels,
        rank,
        module.kernel_size,
        module.stride,
        module.padding,
        module.dilation,
        bias=False,
        padding_mode=module.padding_mode,
    )
    second = kind(rank, module.out_channels, 1, bias=bias)
    return cast(tuple[nn.Linear, nn.Linear], (first, second))


def refusal(module: nn.Module) -> str | None:
    """Why a layer cannot become two layers, or None where it can."""
    base = type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)
    if base not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"{base.__name__} is neither linear nor a convolution"
    groups = getattr(module, "groups", 1)
    return f"its convolution has {groups} groups" if groups != 1 else None
