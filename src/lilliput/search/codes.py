"""Codes for tensors: collect what every registered code proposes, measure its harm, and choose under one budget."""

import copy
import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from lilliput import registry
from lilliput.code.base import Code, attach, copy_model
from lilliput.code.base import pack as packed
from lilliput.code.names import find
from lilliput.encode import Encode
from lilliput.graph.tables import tables
from lilliput.proposal import Refusal
from lilliput.quant.allocate import allocate
from lilliput.quant.quantize import Quantize
from lilliput.quant.uniform import Uniform
from lilliput.search.sensitivity import by_bits
from lilliput.stage import calibration
from lilliput.statistics.calibrate import statistics
from lilliput.task import Task, predict

LEVELS = (8, 4, 3, 2)
"""Bits whose harm is measured; what lies between follows from the nearest, an error's power falling fourfold a bit."""


@dataclass
class Offers:
    """What was measured for a model's tensors.

    Args:
        table: tensor -> label of a code -> mean divergence from the model's own outputs with that tensor alone coded.
        codes: tensor -> label -> (the code, its exact bits), for codes that are no uniform grid.
        sizes: values of each tensor.
        scales: bits of the step sizes of a uniform grid, which `mean bits` does not count; another code's bits are
            compared with a grid's by taking as much off.
    """

    table: dict[str, dict[str, float]] = field(default_factory=dict)
    codes: dict[str, dict[str, tuple[Code, int]]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    scales: dict[str, int] = field(default_factory=dict)


@cache
def proposing() -> tuple[type[Code], ...]:
    """Every registered code that proposes itself for tensors."""
    codes = [entry.load() for entry in registry.methods() if "Code" in entry.kinds]
    return tuple(code for code in codes if code.proposals.__func__ is not cast(Any, Code.proposals).__func__)


class Measured(Mapping[str, Tensor]):
    """The statistics of one tensor, each measured for all of a model's tensors when a code first asks for it.

    Args:
        model: what is measured.
        task: gives the calibration inputs.
        names: the tensors.
    """

    def __init__(self, model: nn.Module, task: Task, names: list[str]) -> None:
        self.model, self.task, self.names, self.name = model, task, names, ""
        self._known: dict[str, dict[str, dict[str, Tensor]]] = {}

    def of(self, name: str) -> "Measured":
        """The same statistics, read for the tensor `name`."""
        other = copy.copy(self)
        other.name = name
        return other

    def __getitem__(self, need: str) -> Tensor:
        if need not in {entry.name for entry in registry.entries("statistic")}:
            raise KeyError(need)
        if need not in self._known:
            self._known[need] = statistics(self.model, self.task, self.names, [need])
        return self._known[need][self.name][need]

    def __iter__(self) -> Iterator[str]:
        return iter(entry.name for entry in registry.entries("statistic"))

    def __len__(self) -> int:
        return len(registry.entries("statistic"))


def proposed(tensor: Tensor, statistics: Mapping[str, Tensor]) -> list[Code]:
    """What every code proposes for a tensor; a refusal, or an error about this tensor, proposes nothing."""
    codes: list[Code] = []
    for code in proposing():
        try:
            offered = code.proposals(tensor, statistics)
        except (ValueError, TypeError, RuntimeError, KeyError):
            continue
        codes += [] if isinstance(offered, Refusal) else list(offered)
    return codes


@torch.no_grad()
def offers(model: nn.Module, task: Task, *, examples: int = 256, seconds: float = float("inf")) -> Offers:
    """Measure each tensor with each code that is proposed for it, alone, without training.

    Args:
        model: plain tensors.
        task: whose calibration inputs and divergence are used.
        examples: how many inputs.
        seconds: stop after as long; the largest tensors come first.
    """
    inputs, listed, began = calibration(task, examples), Offers(), time.monotonic()
    work = copy_model(model).eval()
    parameters = dict(work.named_parameters())
    before = predict(work, inputs)
    names = [name for name in find(work, who="codes") if name in parameters]
    measured = Measured(model, task, names)
    for name in sorted(names, key=lambda name: -parameters[name].numel()):
        parameter = parameters[name]
        original = parameter.detach().clone()
        for code in proposed(original, measured.of(name)):
            if time.monotonic() - began > seconds:
                return listed
            if isinstance(code, Uniform) and code.bits not in LEVELS:
                continue
            theta: Any = code.encode(original)
            parameter.copy_(code.decode(*(theta if isinstance(theta, tuple) else (theta,))))
            change = task.divergence(predict(work, inputs), before)
            parameter.copy_(original)
            listed.table.setdefault(name, {})[code.label()] = float(change.mean().clamp_min(0))
            listed.sizes[name] = original.numel()
            if isinstance(code, Uniform):
                listed.scales[name] = 16 * (len(original) if code.per == "channel" else 1)
            else:
                listed.codes.setdefault(name, {})[code.label()] = code, _bits(code, original)
    return listed


def offered(model: nn.Module, task: Task) -> dict[str, str]:
    """What codes are proposed for a model's tensors, for --dry-run: the widths, and how many tensors each may store."""
    counts: dict[str, int] = {}
    parameters = dict(model.named_parameters())
    names = [name for name in find(model, who="codes") if name in parameters]
    measured = Measured(model, task, names)
    for name in names:
        for code in proposed(parameters[name].detach(), measured.of(name)):
            counts[code.label()] = counts.get(code.label(), 0) + 1
    listed = ", ".join(f"{label} ({count} tensors)" for label, count in counts.items())
    return {"codes": listed or "no tensor can be coded"}


def _bits(code: Code, tensor: Tensor) -> int:
    """The exact bits of a tensor under a code."""
    holder = nn.Module()
    holder.register_parameter("weight", nn.Parameter(tensor.clone()))
    attach(holder, "weight", code)
    return packed(holder)["weight"].storage().bits


def chosen(known: Offers, mean_bits: float) -> dict[str, int | Code]:
    """The code of each tensor: bits of a uniform grid, or another code, least harm within a mean of bits a value."""
    levels = by_bits(known.table)
    options: dict[str, dict[Hashable, tuple[int, float]]] = {}
    for name, size in known.sizes.items():
        options[name] = {bits: (bits * size, harm) for bits, harm in levels.get(name, {}).items()}
        for label, (_, cost) in known.codes.get(name, {}).items():
            options[name][label] = max(0, cost - known.scales.get(name, 0)), known.table[name][label]
    picked = allocate(options, int(mean_bits * sum(known.sizes.values())))
    return {
        name: label if isinstance(label, int) else known.codes[name][str(label)][0] for name, label in picked.items()
    }


def stages(model: nn.Module, known: Offers, mean_bits: float) -> list[Any]:
    """The stages that store a model's tensors by the chosen codes, at a mean of bits a value.

    A lookup table gets one step size: one for each of its many short rows would weigh as much as its integers.
    """
    picked = chosen(known, mean_bits) if known.sizes else {}
    width, held = max(2, min(8, round(mean_bits))), tables(model)
    others = {name: code for name, code in picked.items() if not isinstance(code, int)}
    bits = tuple(sorted((name, code) for name, code in picked.items() if isinstance(code, int)))
    result: list[Any] = [Encode(code, where=name) for name, code in sorted(others.items())]
    rest = tuple(name for name, _ in bits if name not in held)
    if held_here := tuple(name for name in held if name not in others):
        pairs = tuple(pair for pair in bits if pair[0] in held)
        result.append(Quantize(bits=width, where=",".join(held_here), per="tensor", biases="float32", allocation=pairs))
    if rest or not (held or others):
        where = ",".join(rest) if held or others else "*"
        pairs = tuple(pair for pair in bits if pair[0] not in held)
        result.append(Quantize(bits=width, where=where, allocation=pairs))
    return result
