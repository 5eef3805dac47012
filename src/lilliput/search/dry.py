"""--dry-run: what a search would try, how long it takes, what is left alone and why."""

from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from lilliput.graph import blocks_left, groups, left, removable
from lilliput.graph.stride import earlier_stride
from lilliput.search import units
from lilliput.search.space import Space, count_values, tables
from lilliput.task import Task


def describe(model: nn.Module, task: Task, console: Console, **settings: Any) -> None:
    """Print the plan of a search; nothing is trained, nothing written."""
    example, found = task.example, groups(model, task.example)
    space = Space(tuple(removable(model, example)), tuple(earlier_stride(model, example))[:1],
                  narrow=any(group.removable for group in found), tables=tables(model))
    budget = settings["budget"]
    console.print(f"{task!r}; {count_values(model):,} values", highlight=False)
    console.print("time: " + (f"{settings['trials']} structures, each trained for a fixed number of steps"
                              if budget is None else f"at most {units.seconds(budget):.0f} s in all"), highlight=False)
    rows = Table(title="would be tried", title_justify="left", show_header=False)
    rows.add_row("fewer blocks", ", ".join(space.blocks) or "none can go")
    rows.add_row("an earlier stride", ", ".join(space.strides) or "no layer takes one")
    rows.add_row("fewer channels", ", ".join(g.name for g in found if g.removable) or "none can go")
    rows.add_row("fewer table rows", ", ".join(space.tables) or "no table is most of the network")
    rows.add_row("bits", "8 without training; 4 and 3 on average, by sensitivity, with training")
    rows.add_row("training", "distilled from the dense network throughout")
    console.print(rows)
    kept = [(item.name, item.reason) for item in (*left(found), *blocks_left(model, example))]
    if kept:
        table = Table(title="left alone", title_justify="left")
        table.add_column("what")
        table.add_column("why")
        for name, reason in kept:
            table.add_row(name, reason)
        console.print(table)
