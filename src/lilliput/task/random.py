"""Random numbers as a pure function of a seed: what augmentations draw from."""

import torch
from torch import Tensor


def uniform(seeds: Tensor, count: int) -> Tensor:
    """`count` uniform numbers in [0, 1) for each seed, as a pure function of the seed (splitmix64 as a counter).

    Augmentations draw from this and from nothing else, so that the dense outputs can be kept for each draw.

    Args:
        seeds: int64 (n,).
        count: how many numbers each seed gives.

    Returns:
        float32 (n, count).

    Example:
        >>> bool((uniform(torch.tensor([7]), 2) == uniform(torch.tensor([7]), 2)).all())
        True

    Source:
        Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    z = seeds[:, None] * count + torch.arange(1, count + 1)
    return (mixed(z) >> 40 & 0xFFFFFF).to(torch.float32) / 2**24


def mixed(z: Tensor) -> Tensor:
    """Each int64 scrambled by splitmix64's finalizer: nearby numbers become unrelated ones."""
    z = z * -7046029254386353131
    z = (z ^ (z >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    z = (z ^ (z >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return z ^ (z >> 31 & 0x1FFFFFFFF)
