"""Scores: how much each weight matters. One plain function a paper, from a weight to a score >= 0 of its shape.

Keyword-only arguments name the statistics that a score needs; `lilliput.calibrate.statistics` supplies them, each
broadcastable to the weight.
"""

import inspect
from collections.abc import Callable

from torch import Tensor

from lilliput.errors import near

Score = Callable[..., Tensor]


def magnitude(weight: Tensor) -> Tensor:
    """|w|.

    Source: Han, Pool, Tran and Dally, Learning both weights and connections for efficient neural networks, NIPS 2015,
    arXiv:1506.02626, section 3.1.
    """
    return weight.abs()


def random(weight: Tensor, *, noise: Tensor) -> Tensor:
    """Uniform noise: the baseline that every other score has to beat."""
    return noise.expand_as(weight)


def taylor(weight: Tensor, *, gradient: Tensor) -> Tensor:
    """|g w|: the change of the loss, to first order, when w becomes zero; g is its root mean square over batches.

    Source: Molchanov, Mallya, Tyree, Frosio and Kautz, Importance estimation for neural network pruning, CVPR 2019,
    arXiv:1906.10771, equation 8 (its square root).
    """
    return (gradient * weight).abs()


def wanda(weight: Tensor, *, input_norm: Tensor) -> Tensor:
    """|w| ||x||_2, with ||x||_2 the norm of the input feature that w multiplies. The paper compares within each output:
    pattern="even".

    Source: Sun, Liu, Bair and Kolter, A simple and effective pruning approach for large language models, ICLR 2024,
    arXiv:2306.11695, equation 1.
    """
    return weight.abs() * input_norm


SCORES: dict[str, Score] = {score.__name__: score for score in (magnitude, random, taylor, wanda)}


def lookup(name: str) -> Score:
    """The score of that name; raises ValueError with near misses."""
    if name not in SCORES:
        raise ValueError(f"Prune: score must be a known score, got {name!r}. {near(name, SCORES)}")
    return SCORES[name]


def needs(score: Score) -> tuple[str, ...]:
    """The statistics that a score asks for.

    >>> needs(wanda)
    ('input_norm',)
    """
    kinds = inspect.signature(score).parameters.items()
    return tuple(name for name, parameter in kinds if parameter.kind is parameter.KEYWORD_ONLY)
