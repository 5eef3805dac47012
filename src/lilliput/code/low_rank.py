"""LowRank: a matrix as the product of two thin ones."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lilliput.code.base import Code
from lilliput.stored.base import Stored
from lilliput.stored.einsum import product


class LowRank(Code):
    """Store a tensor as a product of two thin matrices: W = A B, with A (out, r) and B (r, n / out), n the values of W.

    Encoding is the truncated singular value decomposition, the nearest matrix of that rank in the Frobenius norm
    (Eckart and Young, 1936), the root of each singular value on both sides. `build` makes two layers: for a k x k
    convolution one of k x k into r channels, then one of 1 x 1; for an embedding a table of r features and a product.

    Args:
        rank: r; the smaller side of the matrix where that is less.

    Raises:
        ValueError: for a rank below 1.

    Example:
        >>> code = LowRank(1); weight = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
        >>> bool(torch.allclose(code.decode(*code.encode(weight)), weight))
        True

    Source:
        Denton et al., Exploiting linear structure within convolutional networks, NIPS 2014, arXiv:1404.0736; Jaderberg,
        Vedaldi and Zisserman, Speeding up convolutional neural networks with low rank expansions, BMVC 2014,
        arXiv:1405.3866.
    """

    inner = (0, 1)

    def __init__(self, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"LowRank: rank must be at least 1, got {rank}.")
        self.rank = rank

    def encode(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        u, s, v = torch.linalg.svd(weight.reshape(len(weight), -1).float(), full_matrices=False)
        root = s[: self.rank].sqrt()
        return (u[:, : self.rank] * root).to(weight.dtype), (root[:, None] * v[: self.rank]).to(weight.dtype)

    def decode(self, *theta: Tensor) -> Tensor:
        a, b = theta
        return (a @ b).reshape(self._shape or (len(a), b.shape[1]))

    def pack(self, *theta: Stored) -> Stored:
        shape = self._shape or (theta[0].shape[0], theta[1].shape[1])
        return product(theta, shape)

    def refuses(self, weight: Tensor) -> str | None:
        return None if weight.dim() > 1 else f"it has {weight.dim()} axes, and a product of matrices has two and more"

    def build(self, module: nn.Module, attribute: str, theta: tuple[Tensor, ...]) -> nn.Module | None:
        """Two layers for a linear, an ungrouped convolutional or an embedding layer; None for any other."""
        a, b = theta
        if attribute != "weight" or (refusal(module) and not _embeds(module)):
            return None
        first, second = _layers(module, a, b)
        return Factored(first, second)


class Factored(nn.Sequential):
    """The two layers of a product A B. `weight` and `bias` are those of the layer in whose place they are."""

    @property
    def weight(self) -> Tensor:
        """A B, for a parent module that reads it."""
        first, second = cast(tuple[Any, Any], tuple(self))
        if isinstance(second, Times):
            return cast(Tensor, first.weight @ second.weight)
        product = second.weight.flatten(1) @ first.weight.flatten(1)
        return cast(Tensor, product.reshape(len(product), *first.weight.shape[1:]))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the second layer."""
        return cast("Tensor | None", getattr(self[1], "bias", None))


class Times(nn.Module):
    """y = x B, with B (r, n): what turns r features of an embedding into n."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def _base(module: nn.Module) -> type:
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _embeds(module: nn.Module) -> bool:
    """Whether it is an embedding that reads its rows as they are (a norm that is limited changes them)."""
    return _base(module) is nn.Embedding and cast(nn.Embedding, module).max_norm is None


def _layers(module: nn.Module, a: Tensor, b: Tensor) -> tuple[nn.Module, nn.Module]:
    """The layers of B and of A, which hold theta itself, or a view of it where a convolution needs four axes."""
    rank, where = len(b), {"device": a.device, "dtype": a.dtype}
    if isinstance(module, nn.Embedding):
        table = nn.Embedding(len(a), rank, module.padding_idx, sparse=module.sparse, _weight=a.detach())
        table.weight = _shaped(a, table.weight.shape)
        return table, Times(_shaped(b, b.shape))
    bias = cast("nn.Parameter | None", module.bias)
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, rank, bias=False, **where)
        second = nn.Linear(rank, module.out_features, bias=bias is not None, **where)
    else:
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        kind = _base(module)
        first = kind(
            module.in_channels,
            rank,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            bias=False,
            padding_mode=module.padding_mode,
            **where,
        )
        second = kind(rank, module.out_channels, 1, bias=bias is not None, **where)
    first.weight = _shaped(b, cast(Tensor, first.weight).shape)
    second.weight = _shaped(a, cast(Tensor, second.weight).shape)
    if bias is not None:
        second.bias = bias
    return first, second


def _shaped(theta: Tensor, shape: torch.Size) -> nn.Parameter:
    if theta.shape == shape and isinstance(theta, nn.Parameter):
        return theta
    return nn.Parameter(theta.detach().reshape(shape), requires_grad=theta.requires_grad)


def refusal(module: nn.Module) -> str | None:
    """Why a layer cannot become two layers, or None where it can."""
    base = _base(module)
    if base not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return f"{base.__name__} is neither linear nor a convolution"
    groups = getattr(module, "groups", 1)
    return f"its convolution has {groups} groups" if groups != 1 else None
