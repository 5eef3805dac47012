"""Bits for each tensor under one budget."""

from collections.abc import Mapping


def allocate_bits(
    sensitivity: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget_bits: int
) -> dict[str, int]:
    """The bits of each tensor that keep the summed loss low within `budget_bits`.

    sensitivity: loss by tensor and bits. sizes: values by tensor. Every tensor starts with the most bits; then the step
    down that costs the least loss a bit saved is taken, along the convex hull of each tensor's losses (where that is
    the Lagrangian solution of min sum_i L_i(b_i) + lambda sum_i n_i b_i), until the budget holds; what is left of it is
    spent on the best steps up that fit.

    Raises ValueError when even the fewest bits exceed the budget.

    >>> allocate_bits({"a": {2: 1.0, 8: 0.0}, "b": {2: 0.1, 8: 0.0}}, {"a": 10, "b": 10}, 100)
    {'a': 8, 'b': 2}

    Source: Shoham and Gersho, Efficient bit allocation for an arbitrary set of quantizers, IEEE Trans. ASSP 36, 1988.
    """
    least = sum(min(sensitivity[name]) * sizes[name] for name in sensitivity)
    if least > budget_bits:
        raise ValueError(
            f"allocate_bits: the budget must be at least {least} bits (the fewest bits everywhere), got "
            f"{budget_bits}. Raise it, or offer fewer bits."
        )
    chosen = {name: max(losses) for name, losses in sensitivity.items()}
    spent = sum(chosen[name] * sizes[name] for name in chosen)

    def price(name: str, bits: int) -> float:
        """Loss a bit between the present choice and another."""
        losses, now = sensitivity[name], chosen[name]
        return (losses[bits] - losses[now]) / (sizes[name] * (now - bits))

    while spent > budget_bits:
        steps = [
            (price(name, bits), name, bits)
            for name, losses in sensitivity.items()
            for bits in losses
            if bits < chosen[name]
        ]
        _, name, bits = min(steps)
        spent -= (chosen[name] - bits) * sizes[name]
        chosen[name] = bits
    while True:
        steps = [
            (price(name, bits), name, bits)
            for name, losses in sensitivity.items()
            for bits in losses
            if bits > chosen[name]
            and spent + (bits - chosen[name]) * sizes[name] <= budget_bits
            and losses[bits] < losses[chosen[name]]
        ]
        if not steps:
            return chosen
        _, name, bits = max(steps)
        spent += (bits - chosen[name]) * sizes[name]
        chosen[name] = bits
