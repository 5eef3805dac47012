"""Every schedule: a frozen value, called with (step, steps), that a recipe holds."""

import dataclasses
import math
from typing import Any

import pytest

from lilliput import schedule
from lilliput.prune.prune import Prune
from lilliput.recipe import Recipe
from lilliput.registry import Entry, entries

every = pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries("schedule")])


def made(entry: Entry) -> Any:
    """The schedule with 0.5, 0.6, ... for the settings that have no default."""
    kind = entry.load()
    needed = [field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    return kind(**{field.name: 0.5 + i / 10 for i, field in enumerate(needed)})


@every
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_schedule_is_a_function_of_the_step(entry: Entry, steps: int) -> None:
    given = made(entry)
    values = [given(step, steps) for step in range(steps + 1)]
    assert all(isinstance(value, float) and math.isfinite(value) for value in values)
    assert values == [schedule.at(made(entry), step, steps) for step in range(steps + 1)]
    assert all(0 <= value < 1 for value in values), "between its settings"


@every
def test_a_schedule_is_a_value_that_a_recipe_holds(entry: Entry) -> None:
    given = made(entry)
    assert dataclasses.is_dataclass(given) and given == made(entry) and hash(given) == hash(made(entry))
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.first = 1.0
    recipe = Recipe((Prune(sparsity=given),))
    assert Recipe.parse(recipe.data()) == recipe
