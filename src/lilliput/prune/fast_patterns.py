"""The pattern "engine": for each tensor the pattern that the engine runs fastest, from measured times."""

import math
from dataclasses import dataclass

from torch import Tensor

from lilliput.prune.patterns import Pattern, parse
from lilliput.registry import register

FAST: dict[str, tuple[str, ...]] = {
    "recurrent": ("block 4x1", "elements"),
    "linear": ("block 8x1", "block 4x1", "elements"),
    "convolution": ("elements",),
    "pointwise": ("elements",),
}
"""By kind of layer: the finest pattern whose time in the engine is within a fifth of the fastest one's, as measured
(results/engine/patterns.json), then what is taken where it does not divide a shape. Finer patterns cost less accuracy.
"""


def kind(name: str, shape: tuple[int, ...]) -> str:
    """Tell the kind of layer that a tensor belongs to, by its name and shape: a key of `FAST`.

    Args:
        name: The tensor's name in the model.
        shape: Its shape.

    Returns:
        "recurrent", "linear", "convolution" or "pointwise".

    Example:
        >>> kind("gru.weight_hh_l0", (96, 32)), kind("fc.weight", (10, 64)), kind("conv.weight", (8, 4, 1, 1))
        ('recurrent', 'linear', 'pointwise')
    """
    if len(shape) > 2:
        return "pointwise" if math.prod(shape[2:]) == 1 else "convolution"
    return "recurrent" if name.rpartition(".")[2].startswith(("weight_ih", "weight_hh")) else "linear"


def fast(shape: tuple[int, ...], kind: str) -> str:
    """Choose the pattern that the engine runs fastest in a layer of this kind, of those that divide the shape.

    Args:
        shape: The tensor's shape.
        kind: A key of `FAST`.

    Returns:
        The pattern as text, which `parse` reads.

    Raises:
        ValueError: For an unknown kind.

    Example:
        >>> fast((6, 64), "linear")
        'elements'
    """
    if kind not in FAST:
        raise ValueError(f"fast: kind must be one of {', '.join(FAST)}, got {kind!r}.")
    for text in FAST[kind]:
        try:
            parse(text).check(shape)
        except ValueError:
            continue
        return text
    return "elements"


@register("pattern", name="engine")
@dataclass(frozen=True)
class Engine(Pattern):
    """Use the pattern that `lilliput.compile` runs fastest, for each tensor by its kind of layer and its shape: see
    `FAST`.

    Args:
        name: The tensor's name, which says the kind of its layer; `of` fills it in.

    Example:
        >>> Engine().of("fc.weight").block((8, 64))
        (8, 1)

    Source:
        No paper: measured (results/engine/patterns.json).
    """

    name: str = ""

    def of(self, name: str) -> Pattern:
        return Engine(name)

    def _chosen(self, shape: tuple[int, ...]) -> Pattern:
        return parse(fast(shape, kind(self.name, shape)))

    def block(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        return self._chosen(tuple(shape)).block(tuple(shape))

    def pooled(self, score: Tensor) -> Tensor:
        return self._chosen(tuple(score.shape)).pooled(score)

    def __call__(self, score: Tensor, sparsity: float) -> Tensor:
        return self._chosen(tuple(score.shape))(score, sparsity)
