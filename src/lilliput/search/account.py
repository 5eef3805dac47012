"""Account: what a search did with its time, as plain data: what each axis brought, what was refused, what came near."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lilliput.search.choose import Choice
from lilliput.search.question import Costs, Question

Plain = dict[str, Any]
SHOWN = 3
MOST = 10.0
"""Times the floor: what would need more is not near."""


def by_axis(attempts: Iterable[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> list[Plain]:
    """What each axis took and brought, the one that brought most first.

    The gain of a better point is the logarithm of how many times its price fell, shared by the axes that it varies;
    an attempt that names none counts for its kind.

    Args:
        attempts: rows with `kind`, `axes`, `status` and `seconds`.
        history: what was handed over, in order, with `price`, `kind` and `axes`.

    Returns:
        Rows with `axis`, `tried`, `done`, `seconds`, `times` (how many times smaller what it brought made the price)
        and `log_gain_per_minute`, None where it took no time.

    Example:
        >>> tried = [{"kind": "round", "axes": ["width"], "status": "done", "seconds": 30.0}]
        >>> by_axis(tried, [{"price": 100.0}, {"price": 25.0, "axes": ["width"]}])[0]["times"]
        4.0
    """
    rows: dict[str, Plain] = defaultdict(lambda: {"tried": 0, "done": 0, "seconds": 0.0, "gain": 0.0})
    for attempt in attempts:
        if attempt.get("seconds") is None:  # the artifact of an attempt that has a row of its own
            continue
        names = _axes(attempt)
        for name in names:
            row = rows[name]
            row["tried"] += 1
            row["done"] += attempt.get("status") == "done"
            row["seconds"] += float(attempt["seconds"]) / len(names)
    for before, after in pairwise(history):
        first, then = before.get("price"), after.get("price")
        if first and then and first > then:
            names = _axes(after)
            for name in names:
                rows[name]["gain"] += math.log(first / then) / len(names)
    told = [
        {
            "axis": name,
            "tried": row["tried"],
            "done": row["done"],
            "seconds": round(row["seconds"], 1),
            "times": round(math.exp(row["gain"]), 3),
            "log_gain_per_minute": round(60 * row["gain"] / row["seconds"], 4) if row["seconds"] > 0 else None,
        }
        for name, row in rows.items()
    ]
    return sorted(told, key=lambda row: (-row["times"], -row["tried"], row["axis"]))


def _axes(row: Mapping[str, Any]) -> list[str]:
    return [str(axis) for axis in row.get("axes") or ()] or [str(row.get("kind") or "point")]


def misses(question: Question, dense: Costs, costs: Sequence[Costs], choice: Choice, score: float) -> list[Plain]:
    """The nearest cheaper points that cannot be promised, each with the floor that would allow it.

    Args:
        question: what was asked; without a floor there are none.
        dense: what the dense network costs.
        costs: what the rivals cost.
        choice: what was chosen among them.
        score: of the dense network.

    Returns:
        At most three rows, the nearest first, each cheaper than the one before: `place` among the rivals, `floor` in
        points, `option` as it is typed, `price`, and `times` less than dense.
    """
    rows: dict[str, Plain] = {}  # of two that are typed alike the cheaper one, which comes later
    for i in choice.near if question.floor is not None else ():
        needed, price = float(choice.bound[i]), question.price(costs[i])
        floor, option = question.floor.option(needed, score) if question.floor is not None else (needed, "")
        if option and 0 < price < math.inf and needed <= MOST * max(question.points(score), 1e-9):
            times = round(question.before(dense) / price, 2)
            rows[option] = {"place": i, "floor": floor, "option": option, "price": price, "times": times}
    return list(rows.values())[:SHOWN]


def unfinished(attempts: Iterable[Mapping[str, Any]], wall_s: float, budget_s: float | None) -> Plain | None:
    """What ran out of time, and the budget that would do; None where nothing did.

    Args:
        attempts: rows; those with the status "out of time" may say in `seconds` what they need.
        wall_s: what the search took.
        budget_s: what it was given.
    """
    late = [attempt for attempt in attempts if attempt.get("status") == "out of time"]
    if not late or budget_s is None:
        return None
    done = [float(a["seconds"]) for a in attempts if a.get("status") == "done" and a.get("seconds")]
    usual = sum(done) / len(done) if done else wall_s / 4
    needed = wall_s + sum(float(attempt.get("seconds") or usual) for attempt in late)
    return {"count": len(late), "budget_s": _round_up(max(needed, budget_s)), "names": [str(a["name"]) for a in late]}


def _round_up(seconds: float) -> int:
    """A time that a person would type: tens of seconds below five minutes, minutes above."""
    step = 10 if seconds < 300 else 60
    return int(math.ceil(seconds / step) * step)
