"""Record: the commit, versions and machine of a result, so that it can be reproduced."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("lilliput", "torch", "onnx", "onnxruntime", "onnxscript", "optuna", "torch-pruning", "numpy")


def versions() -> dict[str, str]:
    """The versions that a result depends on: Python's and those of installed packages.

    Returns:
        Version by name.

    Example:
        >>> versions()["python"].count(".")
        2
    """
    known = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    return known


def commit() -> str | None:
    """The commit of the checkout that lilliput runs from.

    Returns:
        Its hash, with "+" where tracked files are changed; None where lilliput is installed.
    """
    here = Path(__file__).parent
    if not (here / "../../pyproject.toml").resolve().exists():
        return None
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=5)
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if head.returncode else head.stdout.strip() + ("+" if changes.stdout.strip() else "")
