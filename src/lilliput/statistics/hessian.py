"""The layer-wise Hessian: the second moment of what each layer is given, as a matrix.

Changing a layer's weights from W to W' changes its outputs on inputs X, (d, samples), by ||W X - W' X||^2 = sum over
rows w of (w - w') H (w - w')^T with H = X X^T. H is all that layer-wise pruning and rounding need to know of the data.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.registry import register
from lilliput.statistics.sources import Layers, Parameters

CHUNK_BYTES = 2**27


@register("statistic")
def hessian(layers: Layers, parameters: Parameters) -> Parameters:
    """Measure H = X X^T of each linear or convolutional layer, summed over all examples and places.

    Args:
        layers: Calibration inputs, and what each layer is given.
        parameters: The weights of the layers.

    Returns:
        (groups, d, d) in float64 for each weight, d the values of one output; a linear layer has one group.

    Example:
        >>> from lilliput import Task
        >>> net, x = nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> second = hessian(Layers.of(net, Task("two", train=x, val=x), 2), {"weight": net.weight})
        >>> second["weight"].tolist()
        [[[1.0, 2.0], [2.0, 5.0]]]

    Source:
        Frantar, Singh and Alistarh, Optimal brain compression: a framework for accurate post-training quantization and
        pruning, NeurIPS 2022, arXiv:2208.11580, section 3 (half of its Hessian).
    """
    sums: Parameters = {}

    def add(name: str, module: nn.Module, x: Tensor) -> None:
        product = products(module, x)
        sums[name] = sums[name] + product if name in sums else product

    # A weight of transformers' Conv1D lies as (in, out): its outputs are no rows.
    own = {n: p for n, p in parameters.items() if "Conv1D" not in type(_layer(layers.model, n)).__name__}
    layers.watch(own, add)
    return sums


def _layer(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def products(module: nn.Module, x: Tensor) -> Tensor:
    """Compute X X^T of a layer's inputs; X is what each output of a group is a weighted sum of.

    A linear layer has one group. A convolution's inputs are unfolded: d = (in / groups) * kernel size, in C order.

    Args:
        module: A linear or convolutional layer.
        x: Its inputs.

    Returns:
        The second moment, (groups, d, d) in float64.

    Example:
        >>> products(nn.Linear(2, 1), torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[[1., 2.],
                 [2., 5.]]], dtype=torch.float64)
    """
    weight: Tensor = module.weight  # type: ignore[assignment]
    groups: int = getattr(module, "groups", 1)
    d = weight[0].numel()
    total = torch.zeros(groups, d, d, dtype=torch.float64, device=weight.device)
    if weight.dim() == 2:
        for rows in x.detach().reshape(1, -1, d).split(max(1, CHUNK_BYTES // (4 * d)), 1):
            total += rows.transpose(1, 2) @ rows
        return total
    x = x.detach() if x.dim() == weight.dim() else x.detach()[None]
    for part in x.split(max(1, CHUNK_BYTES // (4 * d * groups * max(1, x[0, 0].numel())))):
        rows = unfold(module, part)
        total += rows @ rows.transpose(1, 2)
    return total


def unfold(module: nn.Module, x: Tensor) -> Tensor:
    """Unfold the inputs of a convolution into a matrix for each group: (groups, d, samples)."""
    conv: Any = module
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    dims = len(conv.kernel_size)
    for i, (size, step, apart) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, apart * (size - 1) + 1, step)[..., ::apart]
    x = x.unflatten(1, (conv.groups, -1))  # (n, groups, in / groups, places, kernel)
    places, kernel = range(3, 3 + dims), range(3 + dims, 3 + 2 * dims)
    x = x.permute(1, 2, *kernel, 0, *places)
    return x.reshape(conv.groups, conv.weight[0].numel(), -1)


def damped(hessian: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Return H + lambda I, and which inputs are dead: (groups, d), never other than zero.

    lambda is damp times the mean of H's diagonal. A dead input's row of H is replaced by that of the unit matrix.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    shift = damp * diagonal.mean(1, keepdim=True) + dead
    return hessian + torch.diag_embed(shift), dead
