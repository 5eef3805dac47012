"""Quantize: store weights as integers of few bits, calibrated now, trained through from now on."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn

from lilliput.code.base import attach, codes, copy_model, find, parameter_names, reason
from lilliput.code.masked import Masked
from lilliput.errors import NotSupported, near
from lilliput.quant.half import Half
from lilliput.quant.ranges import RANGES
from lilliput.quant.uniform import Uniform
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class Quantize(Stage):
    """Weights on a uniform grid: W = s (q - z), q integers of `bits` bits; training goes on through the rounding.

    bits: 2 to 16, for every weight that `allocation`, pairs (tensor, bits), does not name. where: which tensors; tied
    ones are left alone (see `left`). per: "channel" (first axis), "tensor" or a group size; where a group does not
    divide a tensor's rows it gets a step per channel. symmetric: z = 0. range: "mse", "minmax" or "percentile"; under a
    mask it is fitted on the kept values. biases: "float16" or "float32", how tensors of one dimension are stored.

    Raises ValueError for settings out of range, or when nothing is left to quantize; NotSupported for a tensor that is
    quantized already.

    >>> net = Quantize(4)(nn.Linear(8, 2), None, None)
    >>> bool(net.weight[0].unique().numel() <= 15)
    True

    Source: Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference,
    CVPR 2018, arXiv:1712.05877, equation 1.
    """

    bits: int = 8
    where: str = "*"
    per: str | int = "channel"
    symmetric: bool = True
    range: str = "mse"
    allocation: tuple[tuple[str, int], ...] = field(default=())
    biases: str = "float16"

    def __post_init__(self) -> None:
        for bits in (self.bits, *(bits for _, bits in self.allocation)):
            Uniform(bits, self.per, self.symmetric, self.range)
        if self.range not in RANGES:
            raise ValueError(f"Quantize: range must be a known rule, got {self.range!r}. {near(self.range, RANGES)}")
        if self.biases not in ("float16", "float32"):
            raise ValueError(f"Quantize: biases must be 'float16' or 'float32', got {self.biases!r}.")

    def left(self, model: nn.Module) -> dict[str, str]:
        """The tensors that `where` takes in but that are left alone, each with the reason."""
        return {name: why for name in find(model, self.where, who="Quantize") if (why := reason(model, name))}

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        model = copy_model(model)
        tensors, left = parameter_names(model), self.left(model)
        names = [name for name in find(model, self.where, who="Quantize") if name not in left]
        for name, _ in self.allocation:
            if name not in tensors:
                raise ValueError(
                    f"Quantize: allocation must name tensors of the model, got {name!r}. {near(name, tensors)}"
                )
        names += [name for name, _ in self.allocation if name not in names and name not in left]
        if not names:
            raise ValueError(f"Quantize: some tensor must be left to quantize, got none: {next(iter(left.values()))}.")
        bits = dict.fromkeys(names, self.bits) | {name: bits for name, bits in self.allocation if name not in left}
        before = codes(model)
        for name, chain in before.items():
            if name in bits and any(isinstance(code, Uniform | Half) for code in chain):
                raise NotSupported(
                    f"Quantize: {name} must not be quantized yet, but is stored by "
                    f"{type(chain[-1]).__name__}. Leave it out with where=, or realize the model first."
                )
        for name in names:
            if name in before and isinstance(before[name][0], Masked):
                _clear(model, name)
            values = tensors[name].numel() // max(1, len(tensors[name]))
            fits = not isinstance(self.per, int) or values % self.per == 0
            attach(model, name, Uniform(bits[name], self.per if fits else "channel", self.symmetric, self.range))
        if self.biases == "float16":
            for name, tensor in tensors.items():
                if (
                    tensor.dim() < 2
                    and name not in bits
                    and name not in before
                    and tensor.is_floating_point()
                    and not reason(model, name)
                ):
                    attach(model, name, Half())
        return model


@torch.no_grad()
def _clear(model: nn.Module, name: str) -> None:
    """Zero what a mask drops, so that the range is fitted on what it keeps."""
    path, _, attribute = name.rpartition(".")
    holder = cast(Any, model.get_submodule(path)).parametrizations[attribute]
    holder.original.mul_(holder[0].mask)
