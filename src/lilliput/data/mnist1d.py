"""Three networks on MNIST-1D: signals of forty values in ten classes."""

import random
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from lilliput.data import pretrained
from lilliput.extras import extra
from lilliput.nets.mnist1d import CNN, GRU, MLP
from lilliput.task import Task, uniform

TASKS = {
    "mnist1d-cnn": ("convolutions on MNIST-1D, 40 values", 22_130, "mnist1d"),
    "mnist1d-gru": ("a recurrent layer on MNIST-1D, 40 steps of one value", 210_000, "mnist1d"),
    "mnist1d-mlp": ("a perceptron on MNIST-1D, 40 values", 316_244, "mnist1d"),
}


def _draw(**changes: int | float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with extra("mnist1d", "lilliput.data: this task"):
        from mnist1d import data as generator
    arguments = generator.get_dataset_args()
    vars(arguments).update(changes)
    state, other = np.random.get_state(), random.getstate()
    data = generator.make_dataset(arguments)
    np.random.set_state(state)
    random.setstate(other)
    x, held = (torch.from_numpy(data[name].astype(np.float32)) for name in ("x", "x_test"))
    y, held_y = (torch.from_numpy(data[name].astype(np.int64)) for name in ("y", "y_test"))
    return x, y, held, held_y


@cache
def signals() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make MNIST-1D by its own generator with default arguments: x (4000, 40), y, and 1,000 more held out."""
    return _draw()


def fresh(count: int = 10_000, seed: int = 43) -> tuple[Tensor, Tensor]:
    """Draw `count` other signals and their labels with another seed, to judge more finely than 1,000 can."""
    x, y, _, _ = _draw(num_samples=count, seed=seed, train_split=1.0)
    return x, y


def jitter(inputs: Tensor, seeds: Tensor, shift: float = 4, stretch: float = 0) -> Tensor:
    """Shift in a circle, scale and tilt each signal, as the generator does; a function of the seeds.

    Shifts are up to `shift` places, by whole places unless signals are also stretched, by factors from exp(-stretch) to
    exp(stretch). The shifts bring nearly all of the gain: a perceptron only learns from examples that the digit may
    stand anywhere. The default suits small networks trained for a few thousand steps; those with values to spare gain
    more from shift=6, stretch=0.15.

    Args:
        inputs: (n, length).
        seeds: (n,), int64.
        shift: The largest shift, in places.
        stretch: The logarithm of the largest stretch.

    Returns:
        Signals of the same shape.
    """
    u = uniform(seeds, 4) * 2 - 1
    length = inputs.shape[1]
    place, offset = torch.arange(length), shift * u[:, 1:2]
    if stretch:
        centre = (length - 1) / 2
        moved_place = (place - centre) * (stretch * u[:, :1]).exp() + centre - offset
        left = moved_place.floor()
        part, left = moved_place - left, left.long()
        moved = inputs.gather(1, left % length) * (1 - part) + inputs.gather(1, (left + 1) % length) * part
    else:
        moved = inputs.gather(1, (place - offset.round().long()) % length)
    tilt = torch.linspace(-1, 1, length)
    return moved * (1 + 0.2 * u[:, 2:3]) + u[:, 3:4] * tilt


def _task(name: str) -> Task:
    x, y, held, held_y = signals()
    return Task(
        name,
        train=(x[:3500], y[:3500]),
        val=(x[3500:], y[3500:]),
        test=(held, held_y),
        loss="cross_entropy",
        metric="accuracy",
        augment=jitter,
        draws=32,
    )


def mnist1d_mlp() -> tuple[nn.Module, Task]:
    """Load the trained perceptron (78,858 values) and its task: 3,500 / 500 / 1,000 signals of ten classes.

    Returns:
        The model in eval mode and the task.

    Source:
        S. Greydanus, D. Kobak. Scaling Down Deep Learning with MNIST-1D. ICML 2024. arXiv:2011.14439.
    """
    return pretrained(MLP(), "mnist1d-mlp"), _task("mnist1d-mlp")


def mnist1d_cnn() -> tuple[nn.Module, Task]:
    """Load the trained convolutional network (5,210 values) and its task: 3,500 / 500 / 1,000 signals of ten classes.

    Returns:
        The model in eval mode and the task.

    Source:
        S. Greydanus, D. Kobak. Scaling Down Deep Learning with MNIST-1D. ICML 2024. arXiv:2011.14439.
    """
    return pretrained(CNN(), "mnist1d-cnn"), _task("mnist1d-cnn")


def mnist1d_gru() -> tuple[nn.Module, Task]:
    """Load the trained recurrent network (51,594 values) and its task: 3,500 / 500 / 1,000 signals of ten classes.

    Returns:
        The model in eval mode and the task.

    Source:
        S. Greydanus, D. Kobak. Scaling Down Deep Learning with MNIST-1D. ICML 2024. arXiv:2011.14439.
    """
    return pretrained(GRU(), "mnist1d-gru"), _task("mnist1d-gru")
