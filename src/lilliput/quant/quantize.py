"""Quantize: store weights as integers of few bits, calibrated now, trained through from now on."""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lilliput.code.base import attach, codes, copy_model, reason
from lilliput.code.masked import Masked
from lilliput.code.names import find as chosen
from lilliput.code.names import parameter_names, theta
from lilliput.errors import NotSupported, near
from lilliput.quant.half import Half
from lilliput.quant.roundings import Rounding
from lilliput.quant.uniform import Uniform
from lilliput.registry import find, lookup
from lilliput.stage import Reference, Stage
from lilliput.statistics.calibrate import needs, statistics, taken_from
from lilliput.task import Task

HELD_BYTES = 2**30  # of statistics at once; beyond, the examples are passed through the model again


@dataclass(frozen=True)
class Quantize(Stage):
    """Put weights on a uniform grid, W = s (q - z), q integers of `bits` bits; training goes on through the rounding.

    Args:
        bits: 2 to 16, for every weight that `allocation` does not name.
        where: which tensors; tied ones are left alone (see `skipped`).
        per: "channel" (first axis), "tensor" or a group size; where a group does not divide a tensor's rows it gets a
            step per channel.
        symmetric: whether z = 0.
        range: how s is fitted, such as "mse", "minmax" or "percentile" (`lilliput.quant.ranges`); under a mask, on
            the kept values.
        allocation: pairs (tensor, bits).
        biases: "float16" or "float32", how tensors of one dimension are stored.
        grid: which levels there are, "uniform" or "reduced" (`lilliput.quant.grids`).
        rounding: the level that each weight gets, such as "nearest", "stochastic" or "gptq"
            (`lilliput.quant.roundings`). With another one than "nearest" a training that follows starts from the
            rounded weights.
        examples: how many calibration inputs a rounding that needs data is given.
        seed: of a rounding that draws.

    Raises:
        KeyError: for an unknown grid, range or rounding.
        ValueError: for settings out of range, when nothing is left to quantize, and for a rounding that needs data
            without a task, or whose statistics no tensor has.
        NotSupported: for a tensor that is quantized already.

    Example:
        >>> net = Quantize(4)(nn.Linear(8, 2), None, None)
        >>> bool(net.weight[0].unique().numel() <= 15)
        True

    Source:
        Jacob et al., Quantization and training of neural networks for efficient integer-arithmetic-only inference, CVPR
        2018, arXiv:1712.05877, equation 1.
    """

    bits: int = 8
    where: str = "*"
    per: str | int = "channel"
    symmetric: bool = True
    range: str = "mse"
    allocation: tuple[tuple[str, int], ...] = field(default=())
    biases: str = "float16"
    grid: str = "uniform"
    rounding: str = "nearest"
    examples: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for family, name in (("grid", self.grid), ("range", self.range), ("rounding", self.rounding)):
            find(family, name, "Quantize")
        for bits in (self.bits, *(bits for _, bits in self.allocation)):
            self._code(bits)
        if self.examples < 1:
            raise ValueError(f"Quantize: examples must be at least 1, got {self.examples}.")
        if self.biases not in ("float16", "float32"):
            raise ValueError(f"Quantize: biases must be 'float16' or 'float32', got {self.biases!r}.")

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """The tensors that `where` takes in but that are left alone, each with the reason."""
        return {name: why for name in chosen(model, self.where, who="Quantize") if (why := reason(model, name))}

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        given, model = model, copy_model(model)
        tensors, before = parameter_names(model), codes(model)
        bits = self._bits(model, tensors)
        for name, chain in before.items():
            if name in bits and any(isinstance(code, Uniform | Half) for code in chain):
                raise NotSupported(
                    f"Quantize: {name} must not be quantized yet, but is stored by "
                    f"{type(chain[-1]).__name__}. Leave it out with where=, or realize the model first."
                )
        attached: dict[str, Uniform] = {}
        for name in bits:
            if name in before and isinstance(before[name][0], Masked):
                _clear(model, name)
            attached[name] = self._code(bits[name], tensors[name])
            attach(model, name, attached[name])
        if self.rounding != "nearest":
            # Of a tensor in factors no statistic is known, nor would it say anything of one factor.
            whole = [name for name in bits if all(isinstance(code, Masked) for code in before.get(name, ()))]
            self._round(model, given, task, {name: attached[name] for name in whole})
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

    def _code(self, bits: int, tensor: Tensor | None = None) -> Uniform:
        """The code of a tensor of that many bits."""
        values = 0 if tensor is None else tensor.numel() // max(1, len(tensor))
        fits = not isinstance(self.per, int) or values % self.per == 0
        return Uniform(bits, self.per if fits else "channel", self.symmetric, self.range, self.grid)

    def _bits(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, int]:
        """The bits of every tensor that is quantized."""
        skipped = self.skipped(model)
        names = [name for name in chosen(model, self.where, who="Quantize") if name not in skipped]
        for name, _ in self.allocation:
            if name not in tensors:
                raise ValueError(
                    f"Quantize: allocation must name tensors of the model, got {name!r}. {near(name, tensors)}"
                )
        names += [name for name, _ in self.allocation if name not in names and name not in skipped]
        if not names:
            raise ValueError(
                f"Quantize: some tensor must be left to quantize, got none: {next(iter(skipped.values()))}."
            )
        return dict.fromkeys(names, self.bits) | {name: bits for name, bits in self.allocation if name not in skipped}

    @torch.no_grad()
    def _round(self, model: nn.Module, given: nn.Module, task: Task | None, attached: dict[str, Uniform]) -> None:
        """Put every weight on the level that the rounding gives it, in place; `given` is the model before."""
        rounding: Rounding = lookup("rounding", self.rounding, "Quantize")
        wanted = needs(rounding)
        if task is None and any(taken_from(need) != "none" for need in wanted):
            raise ValueError(f"Quantize: a task must be given for rounding {self.rounding!r}, got None. Pass task=.")
        reached = False
        for names in _parts({name: theta(model, name) for name in attached}):
            known = statistics(given, task, names, wanted, examples=self.examples, seed=self.seed)
            for name in names:
                if set(wanted) <= set(known[name]):
                    weight = theta(model, name)
                    weight.copy_(attached[name].rounded(weight, rounding, **known[name]))
                    reached = True
        if attached and not reached:
            raise ValueError(
                f"Quantize: rounding {self.rounding!r} must have {', '.join(wanted)} of some tensor, got none for "
                f"{list(attached)[:3]}: no module shows their inputs. Use rounding='nearest'."
            )


def _parts(weights: dict[str, Tensor]) -> list[list[str]]:
    """Names of tensors whose statistics are held at once: by turns, since one may be a matrix for each layer."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, weight in weights.items():
        size = 8 * (weight.numel() + (weight[0].numel() if weight.dim() > 1 else 1) ** 2)
        if parts[-1] and held + size > HELD_BYTES:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts


@torch.no_grad()
def _clear(model: nn.Module, name: str) -> None:
    """Zero what a mask drops, so that the range is fitted on what it keeps."""
    path, _, attribute = name.rpartition(".")
    holder = cast(Any, model.get_submodule(path)).parametrizations[attribute]
    holder.original.mul_(holder[0].mask)
