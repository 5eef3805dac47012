"""Fewer positions: stride earlier, or read a smaller input, where the rest of the network takes any size."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.errors import NotSupported
from lilliput.graph.slicing import CONVS
from lilliput.graph.trace import Call, calls, copied, named, replace_, run, shapes, sketch, tied

_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class _Pooled:
    """A convolution that reads averages of `pool` by `pool` positions: the network sees a smaller input."""

    pool: int

    def forward(self, input: Tensor) -> Tensor:
        pool = cast(Any, _POOLS[cast(Any, self).weight.ndim - 2])
        return cast(Tensor, super().forward(pool(input, self.pool)))  # type: ignore[misc]


class PooledConv1d(_Pooled, nn.Conv1d):
    """Conv1d after average pooling of its input."""


class PooledConv2d(_Pooled, nn.Conv2d):
    """Conv2d after average pooling of its input."""


_POOLED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: PooledConv1d, nn.Conv2d: PooledConv2d}


def earlier_stride(model: nn.Module, example: Any, stride: int = 2) -> list[str]:
    """List the convolutions, in the order in which they run, that may take `stride` times their stride of one.

    The output keeps its shape in networks that end in global pooling, and where a flattened map is read by one Linear
    (its columns are then resampled). Each was tried on the example; layers that are tied or called twice are left out.

    Args:
        model: A model without codes.
        example: One example of inputs.
        stride: The factor.

    Returns:
        Module paths.

    Example:
        >>> pool = nn.AdaptiveAvgPool2d(1)
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 2))
        >>> earlier_stride(net, torch.rand(1, 1, 8, 8))
        ['0']
    """
    work = copied(model, "earlier_stride")
    modules, shared, names = dict(work.named_modules()), tied(work), []
    seen, before = calls(work, example), shapes(run(work, example))
    for name, c in seen.items():
        layer = modules[name]
        if not isinstance(layer, CONVS) or c.count != 1 or name in shared or max(layer.stride) > 1:
            continue
        shape = c.shape_out
        if shape is None or min(shape[2:], default=1) < 2 * stride:  # nothing but a few positions would be left
            continue
        try:
            if shapes(_stride_(sketch(work), example, name, stride, False, seen)) == before:
                names.append(name)
        except Exception:  # whatever a stranger's forward raises: this one is no candidate
            continue
    return names


def set_stride(model: nn.Module, example: Any, name: str, stride: int = 2, *, pool: bool = False) -> nn.Module:
    """Copy a model whose convolution `name` takes `stride` times its stride, or reads a smaller input (pool).

    pool=True averages `stride` by `stride` neighbours before the convolution and keeps its stride. Where a Linear reads
    the flattened positions its columns are resampled: W' = W U, with U the linear interpolation from the fewer
    positions to the old ones, so that a map that varies slowly gives the same answer.

    Args:
        model: A model without codes.
        example: One example of inputs.
        name: The path of the convolution.
        stride: The factor, at least 2.
        pool: Whether the input is averaged instead.

    Returns:
        The copy.

    Raises:
        KeyError: For an unknown name.
        ValueError: Where the output would change its shape.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
        >>> set_stride(net, torch.rand(1, 1, 8), "0")[2]
        Linear(in_features=16, out_features=2, bias=True)
    """
    named(model, name, "set_stride")
    if stride < 2:
        raise ValueError(f"set_stride: stride must be at least 2, got {stride}.")
    work = copied(model, "set_stride")
    before = shapes(run(work, example))
    try:
        changed = copied(model, "set_stride")
        after = shapes(_stride_(changed, example, name, stride, pool, calls(work, example)))
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"set_stride: the model does not run with {name} changed ({error}).") from error
    if after != before:
        raise ValueError(f"set_stride: the output must keep its shape {before}, got {after} with {name} changed.")
    return changed


def poolable(model: nn.Module, example: Any) -> tuple[str, ...]:
    """Name the first convolution, where it can read an input averaged two by two.

    Args:
        model: a network.
        example: a batch of its inputs.

    Returns:
        Its path, or nothing.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(32, 2))
        >>> poolable(net, torch.rand(1, 1, 8))
        ('0',)
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            try:
                set_stride(model, example, name, pool=True)
            except (ValueError, RuntimeError, NotSupported):
                return ()
            return (name,)
    return ()


def _stride_(model: nn.Module, example: Any, name: str, stride: int, pool: bool, seen: dict[str, Call]) -> list[Tensor]:
    """Change the model; its outputs then."""
    layer = cast(Any, model.get_submodule(name))
    if not isinstance(layer, CONVS):
        raise ValueError(f"set_stride: {name} must be a convolution, got {type(layer).__name__}.")
    if not pool:
        layer.stride = tuple(s * stride for s in layer.stride)
    elif type(layer) in _POOLED:
        pooled = _POOLED[type(layer)].__new__(_POOLED[type(layer)])
        pooled.__dict__.update(layer.__dict__)
        cast(Any, pooled).pool = stride
        replace_(model, layer, pooled)
    else:
        raise ValueError(f"set_stride: pooling goes before a Conv1d or Conv2d, got {type(layer).__name__} for {name}.")
    return _refit_(model, example, seen)


def _refit_(model: nn.Module, example: Any, seen: dict[str, Call]) -> list[Tensor]:
    """Resample the columns of the one Linear that reads flattened positions, where the new run shows fewer of them."""
    maps: list[tuple[str, torch.Size]] = []
    reader: list[tuple[nn.Linear, int]] = []

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim > 2:
                maps.append((name, output.shape))

        return hook

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Linear) and args[0].shape[-1] != module.in_features and args[0].ndim == 2:
            reader.append((module, args[0].shape[-1]))

    handles = [m.register_forward_hook(after(n)) for n, m in model.named_modules()]
    handles += [m.register_forward_pre_hook(before) for m in model.modules() if isinstance(m, nn.Linear)]
    try:
        return run(model, example)
    except RuntimeError:
        if len(reader) != 1 or not maps:
            raise
    finally:
        for handle in handles:
            handle.remove()
    linear, features = reader[0]
    for name, shape in reversed(maps):
        old = seen[name].shape_out if name in seen else None
        alike = old is not None and len(old) == len(shape) and old[1] == shape[1]
        if old is not None and alike and (old[1:].numel(), shape[1:].numel()) == (linear.in_features, features):
            _resample_(linear, old[1], old[2:], shape[2:])
            return run(model, example)
    raise ValueError("the layer that reads the positions could not be matched with the map before it")


def _resample_(linear: nn.Linear, channels: int, old: torch.Size, new: torch.Size) -> None:
    count = math.prod(new)
    basis = torch.eye(count).view(count, 1, *new)
    up = F.interpolate(basis, size=tuple(old), mode=_MODES[len(old)], align_corners=False).view(count, -1)
    w = linear.weight.detach().view(linear.out_features, channels, -1) @ up.T.to(linear.weight.dtype)
    linear.weight = nn.Parameter(w.flatten(1).clone(), requires_grad=linear.weight.requires_grad)
    linear.in_features = channels * count
