"""Finding: what an analysis learnt. A frozen dataclass of plain values, never a model."""


class Finding:
    """What an analysis learnt about a model: plain values that print, compare and store.

    An analysis is a function (model, task) -> Finding that leaves the model as it was. What follows from it is a
    stage's business, which takes the finding's numbers as settings.
    """
