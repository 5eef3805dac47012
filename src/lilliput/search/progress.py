"""Show progress while a search runs: its phase, how far it is, and each better point."""

import logging
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

LOG = logging.getLogger("lilliput")
BAR = 16


class Silent:
    """Shows nothing, for --json and callers from Python; what would be shown is logged, at the level INFO."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def ends(self, seconds: float) -> None:
        """The work ends after so many seconds from now."""

    def phase(self, text: str, total: int) -> None:
        """A new part of the work, of `total` units."""
        LOG.info("%s", text)

    def advance(self, text: str = "") -> None:
        """One unit done."""
        LOG.debug("%s", text)

    def best(self, text: str) -> None:
        """A better point was handed over."""
        LOG.info("best so far: %s", text)

    def say(self, text: str) -> None:
        """A line that stays."""
        LOG.info("%s", text)


class Lines(Silent):
    """One line an event, for pipes, logs and notebooks: phases, better points, what is said.

    Args:
        console: where to print.
        began: when the search began, by time.monotonic().
    """

    def __init__(self, console: Console, began: float | None = None) -> None:
        self.console, self.began = console, time.monotonic() if began is None else began

    def phase(self, text: str, total: int) -> None:
        self._print(text)

    def best(self, text: str) -> None:
        self._print(f"best so far: {text}")

    def say(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        seconds = time.monotonic() - self.began
        self.console.print(f"{seconds:6.1f} s  {text}", markup=False, highlight=False, soft_wrap=True)


class Live(Lines):
    """On a terminal: a line for each better point, and below them one line for the phase that is at work."""

    def __init__(self, console: Console, began: float | None = None) -> None:
        super().__init__(console, began)
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", table_column=Column(ratio=3, no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=BAR),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            _Left(self),
            TextColumn("[dim]{task.fields[note]}", table_column=Column(ratio=2, no_wrap=True, overflow="ellipsis")),
            console=console,
            expand=True,
            transient=True,
        )
        self._task: TaskID | None = None
        self._best = ""
        self.until: float | None = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def ends(self, seconds: float) -> None:
        self.until = time.monotonic() + seconds

    def phase(self, text: str, total: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(escape(text), total=max(1, total), note="")

    def advance(self, text: str = "") -> None:
        if self._task is not None:
            self._bar.update(self._task, advance=1, note=escape(text))

    def best(self, text: str) -> None:
        if text != self._best:
            self._best = text
            self._print(text)

    def _print(self, text: str) -> None:
        seconds = time.monotonic() - self.began
        line = f"[dim]{seconds:6.1f} s[/dim]  {escape(text)}"
        self._bar.console.print(line, highlight=False, no_wrap=True, overflow="ellipsis")


class _Left(ProgressColumn):
    """How long the work may still take."""

    def __init__(self, live: Live) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.live = live

    def render(self, task: Task) -> Text:
        if self.live.until is None:
            return Text("")
        minutes, seconds = divmod(max(0, round(self.live.until - time.monotonic())), 60)
        return Text(f"{minutes}:{seconds:02} left", style="dim")


def shown_on(console: Console, quiet: bool = False, began: float | None = None) -> Silent:
    """What a command shows: nothing, one living line on a terminal, or a line an event elsewhere."""
    if quiet:
        return Silent()
    return Live(console, began) if console.is_terminal else Lines(console, began)


def quiet_or_lines() -> Silent:
    """What a call from Python shows: lines where a person types or in a notebook, nothing in a program."""
    return Lines(Console()) if hasattr(sys, "ps1") or "ipykernel" in sys.modules else Silent()
