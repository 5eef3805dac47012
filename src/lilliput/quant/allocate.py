"""Allocate codes to tensors under one budget."""

from collections.abc import Hashable, Mapping, Sequence
from itertools import pairwise

Options = Mapping[str, Mapping[Hashable, tuple[float, float]]]


def hull(rows: Mapping[Hashable, tuple[float, float]]) -> list[Hashable]:
    """The labels on the lower convex hull of (cost, harm), the cheapest first: what some price of a bit chooses.

    Args:
        rows: label -> (cost, harm).

    Example:
        >>> hull({"a": (1, 9.0), "above": (2, 8.0), "b": (3, 1.0), "dearer": (4, 2.0), "c": (9, 0.0)})
        ['a', 'b', 'c']
    """
    kept: list[Hashable] = []
    for label in sorted(rows, key=lambda label: rows[label]):
        harm = rows[label][1]
        if kept and harm >= rows[kept[-1]][1]:
            continue
        while len(kept) > 1 and _slope(rows, kept[-2], kept[-1]) <= _slope(rows, kept[-2], label):
            kept.pop()
        kept.append(label)
    return kept


def _slope(rows: Mapping[Hashable, tuple[float, float]], first: Hashable, second: Hashable) -> float:
    """The harm that a unit of cost saves between two labels."""
    return (rows[first][1] - rows[second][1]) / max(rows[second][0] - rows[first][0], 1e-300)


def allocate(options: Options, budget: float) -> dict[str, Hashable]:
    """Choose one option for each tensor so that the summed harm is low within a budget.

    min sum_i H_i(o_i) + lambda sum_i c_i(o_i) chooses along the lower convex hull of each tensor's options. The hulls'
    edges, those that save the most harm a unit of cost first, are the whole path from large to small lambda: it is
    followed by bisection to the last point within the budget. What is left is spent on single better options that fit.

    Args:
        options: tensor -> label -> (cost, harm).
        budget: the most that all tensors together may cost.

    Returns:
        The label of each tensor.

    Raises:
        ValueError: where even the cheapest options exceed the budget.

    Example:
        >>> allocate({"a": {2: (20, 1.0), 8: (80, 0.0)}, "b": {2: (20, 0.1), "table": (60, 0.0)}}, 100)
        {'a': 8, 'b': 2}

    Source:
        Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, IEEE Trans. ASSP 36, 1988.
    """
    hulls = {name: hull(rows) for name, rows in options.items()}
    least = sum(options[name][labels[0]][0] for name, labels in hulls.items())
    if least > budget:
        raise ValueError(
            f"allocate: the budget must be at least {least:g} (the cheapest options everywhere), got {budget:g}. Raise "
            "it, or offer cheaper codes."
        )

    def chosen(price: float) -> dict[str, Hashable]:
        """What a price of cost chooses: every edge of a hull that saves more than it."""
        return {name: labels[_steps(options[name], labels, price)] for name, labels in hulls.items()}

    def spent(picked: Mapping[str, Hashable]) -> float:
        return sum(options[name][label][0] for name, label in picked.items())

    edges = sorted(
        {_slope(options[name], first, second) for name, labels in hulls.items() for first, second in pairwise(labels)},
        reverse=True,
    )
    low, high = 0, len(edges)  # how many of the steepest edges are followed
    while low < high:
        middle = (low + high + 1) // 2
        if spent(chosen(edges[middle - 1])) <= budget:
            low = middle
        else:
            high = middle - 1
    return _spend(options, chosen(edges[low - 1] if low else float("inf")), budget)


def _steps(rows: Mapping[Hashable, tuple[float, float]], labels: Sequence[Hashable], price: float) -> int:
    """How many edges of a hull save at least `price` of harm a unit of cost."""
    count = 0
    while count + 1 < len(labels) and _slope(rows, labels[count], labels[count + 1]) >= price:
        count += 1
    return count


def _spend(options: Options, picked: dict[str, Hashable], budget: float) -> dict[str, Hashable]:
    """Take single better options, those that save the most a unit of cost first, while any fits."""
    left = budget - sum(options[name][label][0] for name, label in picked.items())
    while True:
        best: tuple[float, str, Hashable] | None = None
        for name, rows in options.items():
            cost, harm = rows[picked[name]]
            for label, (other, its) in rows.items():
                if its < harm and other - cost <= left:
                    gain = (harm - its) / max(other - cost, 1e-300)
                    if best is None or gain > best[0]:
                        best = gain, name, label
        if best is None:
            return picked
        _, name, label = best
        left -= options[name][label][0] - options[name][picked[name]][0]
        picked[name] = label


def allocate_bits(
    sensitivity: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget_bits: int
) -> dict[str, int]:
    """Choose the bits of each tensor so that the summed loss is low within a budget.

    Args:
        sensitivity: tensor -> bits -> loss.
        sizes: values of each tensor.
        budget_bits: the most bits of all tensors together.

    Returns:
        The bits of each tensor.

    Raises:
        ValueError: where even the fewest bits exceed the budget.

    Example:
        >>> allocate_bits({"a": {2: 1.0, 8: 0.0}, "b": {2: 0.1, 8: 0.0}}, {"a": 10, "b": 10}, 100)
        {'a': 8, 'b': 2}
    """
    options: dict[str, dict[Hashable, tuple[float, float]]] = {
        name: {bits: (bits * sizes[name], loss) for bits, loss in losses.items()}
        for name, losses in sensitivity.items()
    }
    return {name: int(str(label)) for name, label in allocate(options, budget_bits).items()}
