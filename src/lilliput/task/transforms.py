"""Random transforms as pure functions of a seed: what torchvision, albumentations and data sets do to an example.

A search compares networks on the same augmented examples and keeps the dense network's outputs for them, so that an
example under an augmentation must be the same whenever it is asked for, in every process.
"""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.task.nested import length, mapped, take
from lilliput.task.random import mixed

LIBRARIES = ("torchvision", "albumentations")
"""Whose transforms take one example, though their signatures do not say so."""
SEEDS = 2**32


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[Callable[[int], None]]:
    """torch, numpy and random drawing from a seed inside; what they would have drawn without it comes after.

    Args:
        seed: any whole number.

    Yields:
        A function that begins anew with another seed.
    """
    own, others, plain = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        begin(seed)
        yield begin
    finally:
        torch.set_rng_state(own)
        np.random.set_state(others)
        random.setstate(plain)


def begin(seed: int) -> None:
    """Let torch, numpy and random draw from a seed."""
    torch.default_generator.manual_seed(seed % SEEDS)
    np.random.seed(seed % SEEDS)
    random.seed(seed % SEEDS)


def seeds(index: Tensor, draw: int) -> Tensor:
    """A seed for each example under an augmentation, (n,), unlike those of all others.

    Args:
        index: numbers of the examples, int64 (n,).
        draw: the number of the augmentation.
    """
    return mixed(index * 65537 + draw + 1)


@dataclass(frozen=True)
class PerExample:
    """Use a random transform of one example (torchvision, albumentations, a function) as an augmentation of a task.

    A task does this by itself with transforms of these libraries and with functions of one argument.

    Args:
        transform: takes one example without its first axis and returns it changed, of the same shape for all examples.

    Example:
        >>> flipped = PerExample(lambda x: x.flip(0) if torch.rand(()) < 0.5 else x)
        >>> x, seeds = torch.arange(6).reshape(3, 2), torch.tensor([1, 2, 3])
        >>> torch.equal(flipped(x, seeds), flipped(x, seeds))
        True
    """

    transform: Callable[..., Any]

    def __call__(self, inputs: Any, seeds: Tensor) -> Any:
        """The examples changed, each by its own seed.

        Args:
            inputs: any structure of tensors (n, ...).
            seeds: int64 (n,).
        """
        parts = []
        with seeded(0) as begin:
            for place, seed in enumerate(seeds.tolist()):
                begin(seed)
                parts.append(self._one(take(inputs, place), seed))
        return mapped(lambda *leaves: torch.stack(leaves), *parts) if parts else take(inputs, slice(0, length(inputs)))

    def _one(self, example: Any, seed: int) -> Any:
        if hasattr(self.transform, "set_random_seed"):  # albumentations draws from generators of its own
            self.transform.set_random_seed(seed % SEEDS)
        if _library(self.transform) == "albumentations":  # it takes arrays with the channels last, by name
            image = example.movedim(0, -1) if example.ndim > 2 else example
            changed = torch.as_tensor(self.transform(image=image.numpy())["image"])
            return changed.movedim(-1, 0) if example.ndim > 2 else changed
        changed = self.transform(example)
        if isinstance(changed, Tensor) and isinstance(example, Tensor) and changed.ndim == example.ndim + 1:
            changed = changed.squeeze(0)  # of libraries that make a batch of one
        return mapped(torch.as_tensor, changed)


def augmentation(given: Any) -> Any:
    """What a person gives a task as `augment`, as a function (inputs, seeds) -> inputs."""
    if given is None or isinstance(given, PerExample):
        return given
    try:
        parameters = list(inspect.signature(given).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    alone = len(needed) == 1 and not any(p.kind is p.VAR_POSITIONAL or p.name == "seeds" for p in parameters)
    return PerExample(given) if alone or _library(given) in LIBRARIES else given


def _library(thing: Any) -> str:
    return type(thing).__module__.partition(".")[0]
