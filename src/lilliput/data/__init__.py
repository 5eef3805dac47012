"""Tasks from data that comes inside packages: one file a task, nothing is downloaded when they run.

A function of the same name (with `_` for `-`) in each file returns `(model, task)`: the trained dense network in eval
mode and what it must preserve. `TASKS` is read off the folder and imports neither torch nor any data.
"""

import ast
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lilliput.extras import missing

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor, nn

    Net = TypeVar("Net", bound=nn.Module)

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """Describe one line of `lilliput tasks`.

    Args:
        target: Where the function is, as "module:function".
        about: What the task is.
        size_bytes: The size of the dense network.
        needs: The extra of lilliput that brings its data.
    """

    target: str
    about: str
    size_bytes: int
    needs: str


def _tasks() -> dict[str, Entry]:
    """What the files of this folder name in `TASKS = {name: (about, size_bytes, needs)}`, without importing them."""
    entries = {}
    for file in sorted(FOLDER.glob("[a-z]*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "TASKS":
                for name, (about, size_bytes, needs) in ast.literal_eval(node.value).items():
                    target = f"{__name__}.{file.stem}:{name.replace('-', '_')}"
                    entries[name] = Entry(target, about, size_bytes, needs)
    return entries


TASKS: dict[str, Entry] = _tasks()


def package_file(package: str, *parts: str, install: str = "lilliput[demo]") -> Path:
    """Find a file inside an installed package without importing it.

    Args:
        package: The package.
        parts: The path inside it.
        install: What to install where it is missing.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: With the install line, where the package or the file is missing.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder, *parts)
        if path.exists():
            return path
    raise missing("lilliput.data: this task", f"{package!r} with {'/'.join(parts) or 'its files'}", install)


def cache_folder() -> Path:
    """Return the folder in the user's cache for files that are made once: LILLIPUT_CACHE, or the platform's place for
    these.
    """
    from platformdirs import user_cache_path

    return Path(os.environ.get("LILLIPUT_CACHE") or user_cache_path("lilliput"))


def progress() -> "Progress":
    """Make a progress bar on standard error, silent where that is not a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def stratified(labels: "Tensor", sizes: tuple[int, ...], seed: int) -> "list[Tensor]":
    """Split indices at random into disjoint sorted sets in which every class has its share.

    Args:
        labels: The class of each example.
        sizes: How many examples each set has.
        seed: The seed of the draw.

    Returns:
        One index tensor a set.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    rank = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        rank[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    order = order[rank[order].argsort(stable=True)]
    return [part.sort().values for part in order.split([*sizes, len(labels) - sum(sizes)])[: len(sizes)]]


def pretrained(model: "Net", name: str) -> "Net":
    """Load the weights that come with lilliput under `name` into `model`, and put it into eval mode."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(FOLDER / "weights" / f"{name}.safetensors"))
    return model.eval()
