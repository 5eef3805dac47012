"""The command line. Nothing heavy is imported before a command runs."""

import sys

from lilliput.cli import init, jobs, results, runtimes  # each adds its commands, in this order
from lilliput.cli.app import IMPORTED, PROCESS, app, fail
from lilliput.targets.function import resolve

__all__ = ["app", "fail", "init", "jobs", "main", "resolve", "results", "runtimes"]


def main() -> None:
    """The console script."""
    PROCESS.append(IMPORTED)
    # An option of every command, which typer takes before the command alone.
    arguments = sys.argv[1:]
    app(sorted(arguments, key=lambda argument: argument != "--debug") if "--debug" in arguments else arguments)
