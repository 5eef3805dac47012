"""Allocate bits to tensors under one budget."""

from collections.abc import Hashable, Mapping


def allocate(options: Mapping[str, Mapping[Hashable, tuple[int, float]]], budget_bits: int) -> dict[str, Hashable]:
    """Choose one option for each tensor so that the summed harm is low within a budget of bits.

    Every tensor starts with its largest option; then the step down that costs the least harm a bit saved is taken,
    along the convex hull of each tensor's options (where that is the Lagrangian solution of
    min sum_i H_i(o_i) + lambda sum_i n_i(o_i)), until the budget holds; what is left of it is spent on the best steps
    up that fit.

    Args:
        options: tensor -> label -> (bits, harm).
        budget_bits: the most bits of all tensors together.

    Returns:
        The label of each tensor.

    Raises:
        ValueError: where even the smallest options exceed the budget.

    Example:
        >>> allocate({"a": {2: (20, 1.0), 8: (80, 0.0)}, "b": {2: (20, 0.1), "table": (60, 0.0)}}, 100)
        {'a': 8, 'b': 2}

    Source:
        Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, IEEE Trans. ASSP 36, 1988.
    """
    least = sum(min(bits for bits, _ in rows.values()) for rows in options.values())
    if least > budget_bits:
        raise ValueError(
            f"allocate: the budget must be at least {least} bits (the smallest options everywhere), got "
            f"{budget_bits}. Raise it, or offer fewer bits."
        )
    chosen = {name: max(rows, key=lambda label: rows[label][0]) for name, rows in options.items()}
    spent = sum(options[name][label][0] for name, label in chosen.items())

    def steps(down: bool) -> list[tuple[float, str, int, Hashable]]:
        """(harm a bit, tensor, order of the option, option) of every step down, or of every step up that pays."""
        moves = []
        for name, rows in options.items():
            bits, harm = rows[chosen[name]]
            for order, (label, (other, its)) in enumerate(rows.items()):
                pays = other < bits if down else other > bits and spent + other - bits <= budget_bits and its < harm
                if pays:
                    moves.append(((its - harm) / (bits - other), name, order, label))
        return moves

    while spent > budget_bits:
        _, name, _, label = min(steps(down=True), key=lambda step: step[:3])
        spent += options[name][label][0] - options[name][chosen[name]][0]
        chosen[name] = label
    while better := steps(down=False):
        _, name, _, label = max(better, key=lambda step: step[:3])
        spent += options[name][label][0] - options[name][chosen[name]][0]
        chosen[name] = label
    return chosen


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
    options: dict[str, dict[Hashable, tuple[int, float]]] = {
        name: {bits: (bits * sizes[name], loss) for bits, loss in losses.items()}
        for name, losses in sensitivity.items()
    }
    return {name: int(str(label)) for name, label in allocate(options, budget_bits).items()}
