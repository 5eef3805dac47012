"""Noise while training, which leaves few units of a ReLU network active at a time."""

import zlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import near
from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.stage import Reference
from lilliput.task import Task

STEP = "noise_step"


@dataclass(frozen=True)
class Noise(Rule):
    """Train on x + sigma eps, eps ~ N(0, 1), so that ReLU units come to be active for few inputs and stay so without
    noise.

    Why: to second order in sigma a hidden layer y = V relu(W x + b) is charged for each unit that is active,

        E ||y(x + sigma eps) - t||^2 = ||y(x) - t||^2 + sigma^2 ||V D(x) W||_F^2,  D(x) = diag(W x + b > 0),

    and a unit that noise would switch on and off near its threshold is cheaper with a lower bias b. Targets stay clean.
    The noise is a function of (seed, place, step) alone, so that a training that is resumed sees the same; forward
    passes between two steps of the optimizer share it. Nothing is added in eval mode.

    Args:
        std: sigma, in the units of what it is added to; a number or a schedule of the step (at most the training's
            scale; 0 adds nothing).
        where: "input" for every floating-point input of the model, else glob patterns on module names, separated by
            commas, to whose output noise is added. "*" takes each module without children; one with children must be
            named outright.
        seed: The seed of the noise.

    Raises:
        ValueError: For a std that is negative and for a `where` that matches nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)); adam = torch.optim.AdamW(net.parameters())
        >>> x = torch.rand(16, 4)
        >>> with Noise(0.5).attached(net, adam, steps=2):
        ...     for _ in range(2): (net(x) - x).square().mean().backward(); adam.step()
        >>> len(net._forward_pre_hooks), list(net.buffers())
        (0, [])

    Source:
        Bricken, Schaeffer, Olshausen and Kreiman, Emergence of sparse representations from noise, ICML 2023, PMLR
        202:3148-3191 (first: Noise transforms feed-forward networks into sparse coding networks, 2022). The expansion:
        Bishop, Training with noise is equivalent to Tikhonov regularization, Neural Computation 7, 1995.
    """

    std: float | Schedule = 0.5
    where: str = "input"
    seed: int = 0

    def __post_init__(self) -> None:
        if any(not at(self.std, step, 100) >= 0 for step in range(101)):
            raise ValueError(f"Noise: std must be at least 0, got {self.std}. It is a standard deviation.")

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        for name in self._places(model):
            module = model.get_submodule(name)
            if not any(noisy.rule == self for _, noisy in _noises(module)):
                # The forward pass must know the step; a buffer is where a checkpoint keeps it.
                module.register_buffer(STEP, torch.zeros((), dtype=torch.int64))
                if self.where == "input":
                    module.register_forward_pre_hook(_Noisy(self, name, steps), with_kwargs=True)
                else:
                    module.register_forward_hook(_Noisy(self, name, steps))
        return {}

    def _places(self, model: nn.Module) -> list[str]:
        if self.where == "input":
            return [""]
        patterns = [pattern.strip() for pattern in self.where.split(",")]
        known = {name: module for name, module in model.named_modules() if name and "parametrizations" not in name}
        chosen = [
            name
            for name, module in known.items()
            if name in patterns
            or (
                not {key for key, _ in module.named_children()} - {"parametrizations"}  # a code is no child
                and any(fnmatchcase(name, pattern) for pattern in patterns)
            )
        ]
        if not chosen:
            raise ValueError(
                f"Noise: where must be 'input' or match a module of the model, got {self.where!r}. "
                f"{near(self.where, known)}"
            )
        return chosen

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        for module in model.modules():
            if any(noisy.rule == self for _, noisy in _noises(module)):
                module.get_buffer(STEP).fill_(step + 1)
        return state

    def end(self, state: State, model: nn.Module) -> State:
        for module in model.modules():
            for key, noisy in _noises(module):
                if noisy.rule == self:
                    module._forward_hooks.pop(key, None)
                    module._forward_pre_hooks.pop(key, None)
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    if not _noises(module):
                        del module._buffers[STEP]
        return state


@dataclass(frozen=True)
class _Noisy:
    """A hook that adds the noise of the step that the module's buffer says, to inputs or to the output."""

    rule: Noise
    name: str
    steps: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], other: Any) -> Any:
        if not module.training:
            return None
        step = int(module.get_buffer(STEP))
        std = at(self.rule.std, step, self.steps)
        if std == 0:
            return None
        generator = torch.Generator().manual_seed(
            (self.rule.seed * 1000003 + zlib.crc32(self.name.encode())) * 1000003 + step
        )

        def noisy(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return x + std * torch.randn(x.shape, generator=generator).to(x)

        if self.rule.where != "input":
            return noisy(other)
        return tuple(map(noisy, args)), {key: noisy(value) for key, value in other.items()}


def _noises(module: nn.Module) -> list[tuple[int, _Noisy]]:
    hooks = [*module._forward_hooks.items(), *module._forward_pre_hooks.items()]
    return [(key, hook) for key, hook in hooks if isinstance(hook, _Noisy)]
