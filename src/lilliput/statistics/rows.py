"""Rows: a sample of what each layer is given, a row being the values that one output is a weighted sum of."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.task import call, leaves, length, take

MOST = 4096  # rows of a layer
HELD_BYTES = 2**29  # of all layers' rows together


@dataclass
class Rows:
    """What layers are given at chosen places of chosen examples.

    Args:
        given: (groups, n, d) of each weight.
        most: how many rows of a layer are taken at most.
        seed: of the choice of places.
        calls: how often each layer is called, in the order of the calls; its rows are those of the first call.
    """

    most: int = MOST
    seed: int = 0
    given: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def keep(self, name: str) -> Callable[..., None]:
        """A hook that takes the rows of a weight's layer."""

        def keep(module: nn.Module, given: tuple[Any, ...]) -> None:
            self.calls[name] = self.calls.get(name, 0) + 1
            if name not in self.given:
                self.given[name] = self.of(name, module, given)

        return keep

    def of(self, name: str, module: nn.Module, given: Any) -> Tensor:
        """The rows of one call of a weight's layer, at the same places in every run."""
        seed = self.seed * 1000003 + zlib.crc32(name.encode())
        return gathered(module, leaves(given)[0].detach().float(), self.most, seed)

    def moment(self, name: str) -> Tensor:
        """The second moment of a layer's inputs, (groups, d, d)."""
        rows = self.given[name]
        return rows.transpose(1, 2) @ rows / rows.shape[1]


@torch.no_grad()
def sampled(plain: nn.Module, inputs: Any, names: list[str], seed: int = 0, most: int = MOST) -> Rows:
    """Run a model and keep up to `most` rows of what each of the named weights' layers is given.

    Args:
        plain: without codes, in eval mode.
        inputs: of all examples, which go through together.
        names: weights of linear or convolutional layers.
        seed: of the choice of places.
        most: rows of a layer; fewer where all of them would take more than HELD_BYTES.
    """
    widths = [plain.get_parameter(name)[0].numel() * getattr(layer(plain, name), "groups", 1) for name in names]
    rows = Rows(min(most, max(256, HELD_BYTES // (4 * max(1, sum(widths))))), seed)
    hooks = [layer(plain, name).register_forward_pre_hook(rows.keep(name)) for name in names]
    call(plain, inputs)
    for hook in hooks:
        hook.remove()
    return rows


@torch.no_grad()
def together(plain: nn.Module, inputs: Any) -> Any:
    """As many of the examples as may go through a model together, evenly spread."""
    largest = [0]

    def measure(module: nn.Module, given: Any, output: Any) -> None:
        sizes = [leaf.numel() * leaf.element_size() for leaf in leaves(output) if isinstance(leaf, Tensor)]
        largest[0] = max([largest[0], *sizes])

    hooks = [module.register_forward_hook(measure) for module in plain.modules()]
    call(plain, take(inputs, slice(0, 1)))
    for hook in hooks:
        hook.remove()
    count = min(length(inputs), max(8, HELD_BYTES // (4 * max(1, largest[0]))))
    return take(inputs, torch.linspace(0, length(inputs) - 1, count).long())


def gathered(module: nn.Module, x: Tensor, most: int, seed: int) -> Tensor:
    """Up to `most` rows of a layer's input, (groups, n, d), at places that depend on the seed and the shape alone."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(seed)
    if weight.dim() == 2:
        flat = x.reshape(-1, x.shape[-1])
        return flat[_places(len(flat), most, generator)][None]
    conv: Any = module
    x = x if x.dim() == weight.dim() else x[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    for i, (size, step, apart) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, apart * (size - 1) + 1, step)[..., ::apart]
    axes = len(conv.kernel_size)
    grid = (len(x), *x.shape[2 : 2 + axes])
    at = torch.unravel_index(_places(math.prod(grid), most, generator), grid)
    picked = x.movedim(1, 1 + axes)[at]  # (n, in, kernel)
    return picked.reshape(len(picked), conv.groups, -1).transpose(0, 1)


def _places(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.arange(count) if count <= most else torch.randperm(count, generator=generator)[:most].sort().values


def layer(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])
