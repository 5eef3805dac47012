"""The command line. Nothing heavy is imported before a command runs."""

from lilliput.cli import jobs, results, runtimes  # each adds its commands, in this order
from lilliput.cli.app import IMPORTED, PROCESS, app, fail
from lilliput.targets.function import resolve

__all__ = ["app", "fail", "jobs", "main", "resolve", "results", "runtimes"]


def main() -> None:
    """The console script."""
    PROCESS.append(IMPORTED)
    app()
