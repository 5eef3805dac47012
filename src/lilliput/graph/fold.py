"""Batch norm folding: compute a batch norm within the layer before it, with fewer values and one operation less."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lilliput.graph.trace import agree, calls, copied, evaluating, replace_, run, tensors, tied
from lilliput.task import call

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Reading only what a tensor looks like does not read its values.
_LOOKS = {"__get__", "size", "dim", "ndimension", "numel", "stride", "is_floating_point", "is_contiguous", "__len__"}


def fold_batchnorm(model: nn.Module, example: Any) -> nn.Module:
    """Copy a model with every batch norm that alone reads a Conv, ConvTranspose or Linear folded into it.

    With gamma and beta the norm's weight and bias, m and v its running mean and variance, each output channel becomes

        W' = W * gamma / sqrt(v + eps)        b' = (b - m) * gamma / sqrt(v + eps) + beta

    and the norm an `nn.Identity`, so names stay. A norm that follows something else, or a layer that is called twice,
    tied, or read elsewhere too, stays as it is. The copy computes what the model computes in eval mode; a pair whose
    folding changes the output beyond rounding is undone. One run with the example finds the pairs.

    Args:
        model: A model without codes.
        example: One example of inputs.

    Returns:
        The copy.

    Raises:
        NotSupported: When the model holds codes (realize it first).

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)).eval()
        >>> x = torch.rand(1, 1, 8, 8)
        >>> folded = fold_batchnorm(net, x)
        >>> type(folded[1]).__name__, bool(torch.allclose(folded(x), net(x), atol=1e-5))
        ('Identity', True)

    Source:
        Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR
        2018, arXiv:1712.05877, section 3.2.
    """
    folded = copied(model, "fold_batchnorm")
    pairs = _pairs(folded, example)
    before = run(folded, example)
    for layer, norm in pairs:
        _fold_(folded, layer, norm)
    if agree(before, run(folded, example), 1e-4):
        return folded
    return _fold_one_by_one(model, example, before, len(pairs))


def _fold_one_by_one(model: nn.Module, example: Any, before: list[Tensor], count: int) -> nn.Module:
    folded = copied(model, "fold_batchnorm")
    undone = 0
    for _ in range(count):
        trial = copied(folded, "fold_batchnorm")
        _fold_(trial, *_pairs(trial, example)[undone])
        if agree(before, run(trial, example), 1e-4):
            folded = trial
        else:
            undone += 1
    return folded


class _Readers(TorchFunctionMode):
    """Counts how often a function reads the values of each watched tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}
        self.reads: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        self.watched[id(tensor)] = tensor  # kept alive, so that the id stays its own
        self.reads[id(tensor)] = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in _LOOKS:
            for t in tensors([args, kwargs or {}]):
                if id(t) in self.reads:
                    self.reads[id(t)] += 1
        return func(*args, **(kwargs or {}))


def _pairs(model: nn.Module, example: Any) -> list[tuple[nn.Module, nn.Module]]:
    """(layer, norm) where the norm reads the layer's output and nothing else does."""
    counts = {name: c.count for name, c in calls(model, example).items()}
    shared = tied(model)
    once = {
        module
        for name, module in model.named_modules()
        if counts.get(name) == 1 and name not in shared and "weight" in module._parameters
    }
    readers, makers = _Readers(), dict[int, nn.Module]()
    pairs: list[tuple[nn.Module, nn.Module, int]] = []

    def made(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in once and isinstance(output, Tensor) and not (isinstance(module, nn.Linear) and output.ndim != 2):
            makers[id(output)] = module
            readers.watch(output)

    def normed(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and id(args[0]) in makers and module in norms:
            pairs.append((makers[id(args[0])], module, id(args[0])))

    layers = [m for m in once if isinstance(m, (*_CONVS, *_TRANSPOSED, nn.Linear))]
    norms = {
        m
        for name, m in model.named_modules()
        if isinstance(m, _NORMS) and counts.get(name) == 1 and name not in shared and m.running_mean is not None
    }
    handles = [m.register_forward_hook(made) for m in layers]
    handles += [m.register_forward_pre_hook(normed) for m in norms]
    try:
        with evaluating(model), torch.no_grad(), readers:
            returned = {id(t) for t in tensors(call(model, example))}
    finally:
        for handle in handles:
            handle.remove()
    return [(layer, norm) for layer, norm, key in pairs if readers.reads[key] == 1 and key not in returned]


def _fold_(model: nn.Module, layer: Any, norm: Any) -> None:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    bias = layer.bias.detach().double() if layer.bias is not None else torch.zeros_like(scale)
    bias = (bias - norm.running_mean.double()) * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    weight = layer.weight.detach().double()
    if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...), the groups one after the other along `in`
        groups = layer.groups
        w = weight.unflatten(0, (groups, -1)) * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))
        weight = w.flatten(0, 1)
    else:
        weight = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    trains = layer.weight.requires_grad
    layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=trains)
    layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=trains)
    identity = nn.Identity()
    identity.training = norm.training
    replace_(model, norm, identity)
