"""Finding: what an analysis learnt, as a frozen dataclass of plain values, never a model."""


class Finding:
    """Hold what an analysis learnt about a model: plain values that print, compare and store.

    An analysis is a function (model, task) -> Finding that leaves the model as it was. A stage takes the finding's
    numbers as settings and does what follows from them.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Depth(Finding):
        ...     layers: int
        >>> Depth(3)
        Depth(layers=3)
    """
