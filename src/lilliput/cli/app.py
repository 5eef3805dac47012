"""The typer application of the command line: consoles, and error messages on exit."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

IMPORTED = time.monotonic()
PROCESS: list[float] = []
"""When the process began, but for Python's own start, until its one command has asked."""


DEBUG = [False]
"""Whether an error shows where it was raised."""


def began() -> float:
    """When the command was given: what a budget counts from. A program that calls several commands gives each now."""
    return PROCESS.pop() if PROCESS else time.monotonic()


app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="A trained neural network in, a many times smaller and faster one out, with the measured "
    "proof.\n\nExample: lilliput shrink digits --floor 1% --budget 2m",
)
console, errors = Console(), Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        from lilliput import __version__

        print(f"lilliput {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error was raised (anywhere in the line).")
    ] = False,
) -> None:
    """What holds for every command."""
    DEBUG[:] = [debug]


def fail(message: object, status: int = 2) -> NoReturn:
    """Say what went wrong on stderr and leave."""
    errors.print(f"[red]error[/red] {escape(str(message))}", highlight=False, soft_wrap=True)
    raise typer.Exit(status)


@contextmanager
def speaking() -> Iterator[None]:
    """What the caller can mend is said in one line, with status 2; anything else is a bug and shows where."""
    from lilliput.errors import ExportError, NotSupported, StoreError

    try:
        yield
    except KeyboardInterrupt:
        fail(
            "stopped. The folder holds the best so far, if there was any: go on with --resume, or choose and test what "
            "there is with lilliput finish.",
            130,
        )
    except (ValueError, NotSupported, ImportError, OSError, ExportError, StoreError) as error:
        if DEBUG[0]:
            errors.print(traceback.format_exc().rstrip(), highlight=False, markup=False, soft_wrap=True)
        fail(error)
    except (TypeError, KeyError) as error:
        text = str(error.args[0]) if error.args else ""
        if " must " not in text:
            raise
        fail(text)
