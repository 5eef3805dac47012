"""Show progress while a search runs: its phase, how far it is, and the best point so far."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn


class Silent:
    """Shows nothing: for logs, pipes and callers from Python."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def phase(self, text: str, total: int) -> None:
        """A new part of the work, of `total` units."""

    def advance(self, text: str = "") -> None:
        """One unit done."""

    def best(self, text: str) -> None:
        """A better point was found."""

    def say(self, text: str) -> None:
        """A line that stays."""


class Live(Silent):
    """One progress bar a phase and the best point under it, on a terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
        )
        self._task: TaskID | None = None
        self._best = ""

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def phase(self, text: str, total: int) -> None:
        if self._task is not None:
            done = self._bar.tasks[-1].total or 0
            self._bar.update(self._task, completed=done, note="")
        self._task = self._bar.add_task(escape(text), total=max(1, total), note="")

    def advance(self, text: str = "") -> None:
        if self._task is not None:
            self._bar.update(self._task, advance=1, note=escape(text))

    def best(self, text: str) -> None:
        if text != self._best:
            self._best = text
            self._bar.console.print(f"  [green]best so far[/green] {escape(text)}")

    def say(self, text: str) -> None:
        self._bar.console.print(text)
