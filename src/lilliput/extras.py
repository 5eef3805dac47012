"""Extras: import packages that only a part of lilliput needs, or say what installs them."""

from collections.abc import Iterator
from contextlib import contextmanager


def missing(who: str, package: str, install: str) -> ModuleNotFoundError:
    """Make the error for a package that is not installed.

    Args:
        who: What needs it.
        package: Its name in quotation marks, and what of it is needed.
        install: What pip installs to bring it.

    Returns:
        The error.

    Example:
        >>> print(missing("svg", "'graphs'", "lilliput[pictures]"))
        svg needs the package 'graphs', which is not installed. Run: pip install 'lilliput[pictures]'
    """
    return ModuleNotFoundError(
        f"{who} needs the package {package}, which is not installed. Run: pip install '{install}'"
    )


@contextmanager
def extra(name: str, who: str) -> Iterator[None]:
    """Import packages of an optional extra; where one is missing, name the extra that brings it.

    Args:
        name: The extra, one of pyproject.toml's.
        who: What needs its packages.

    Raises:
        ModuleNotFoundError: Where a package that is imported inside is not installed. Other errors of an import, such
            as those of a damaged package, pass as they are.

    Example:
        >>> with extra("report", "svg"):
        ...     import absent
        Traceback (most recent call last):
        ModuleNotFoundError: svg needs the package 'absent', which is not installed. Run: pip install 'lilliput[report]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise missing(who, repr(package), f"lilliput[{name}]") from error
