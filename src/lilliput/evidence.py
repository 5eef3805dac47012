"""Evidence: one script a system in the checkout's evidence/ folder, each measuring one published claim."""

import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from lilliput.errors import near
from lilliput.files import write

Key = TypeVar("Key")


def folder() -> Path:
    """Find the evidence/ folder of the checkout: below the working directory, or beside src/.

    Raises:
        ValueError: Where lilliput runs without a checkout.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (root / "evidence").is_dir():
            return root / "evidence"
    raise ValueError(
        "evidence: needs the repository's evidence/ folder, which is not part of the installed package. "
        "Run it in a clone."
    )


def scripts() -> dict[str, Path]:
    """List every system that has a script."""
    return {path.stem: path for path in sorted(folder().glob("*.py"))}


def interval(values: Sequence[float], digits: int = 4) -> list[float]:
    """Return the central 95% for the mean of a few runs, by Student's t; of one run, itself twice.

    Args:
        values: The results of the runs.
        digits: Digits to round to.

    Returns:
        The lower and the upper end.

    Example:
        >>> interval([0.8, 0.9, 1.0])
        [0.6516, 1.1484]
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return [round(mean, digits)] * 2
    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return [round(mean - half, digits), round(mean + half, digits)]


def front(points: Mapping[Key, tuple[float, float]]) -> list[Key]:
    """The keys of the points (gain, cost) that no other beats: of no less gain at no more cost, and different.

    Example:
        >>> front({"a": (0.9, 2.0), "b": (0.8, 1.0), "c": (0.8, 2.0)})
        ['a', 'b']
    """
    from lilliput.search.choose import unbeaten

    keys = list(points)
    return [keys[i] for i in unbeaten([(-gain, cost) for gain, cost in points.values()])]


def load(key: str) -> ModuleType:
    """Import the script of one system.

    Raises:
        KeyError: For an unknown system.
    """
    known = scripts()
    if key not in known:
        raise KeyError(f"evidence: must be a known system, got {key!r}. {near(key, known)}")
    path = known[key]
    spec = importlib.util.spec_from_file_location(f"evidence_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # so that a pool finds its functions
    spec.loader.exec_module(module)
    return module


def each(function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    """The results of a script's function for every job, in order, computed side by side.

    Args:
        function: one of the functions that the script defines, of one argument.
        jobs: what it is called with.
    """
    from torch import nn

    from lilliput.search.cores import count_workers
    from lilliput.search.pool import Pool

    key = Path(function.__code__.co_filename).stem
    with Pool(workers=min(len(jobs), count_workers(nn.Identity()))) as pool:
        return [call.result() for call in [pool.submit(_one, key, function.__name__, job) for job in jobs]]


def _one(desk: Any, key: str, function: str, job: Any) -> Any:
    module = sys.modules.get(f"evidence_{key}") or load(key)
    return getattr(module, function)(job)


def gather(key: str | None, quick: bool, out: Path) -> Iterator[Path]:
    """Run one script, or all; each `measure(quick)` gives a record that is written to `out`. Yield their paths.

    Raises:
        KeyError: For an unknown system.
        ValueError: For a record without what every record needs.
    """
    modules = {name: load(name) for name in (scripts() if key is None else [key])}
    from lilliput.cost.measure import machine
    from lilliput.record import commit, versions

    out.mkdir(parents=True, exist_ok=True)
    for name, module in modules.items():
        began = time.monotonic()
        measured: dict[str, Any] = module.measure(quick)
        if not {"claim", "baseline", "rows"} <= set(measured):
            raise ValueError(f"evidence: {name} must return claim, baseline and rows, got {sorted(measured)}.")
        record = {
            "system": name,
            "size": "quick" if quick else "full",
            **measured,
            "machine": machine(),
            "versions": versions(),
            "commit": commit(),
            "wall_s": round(time.monotonic() - began, 2),
        }
        path = out / f"{name}{'.quick' if quick else ''}.json"
        data = json.dumps(record, indent=1, allow_nan=False).encode()
        write(path, lambda file, data=data: file.write(data))  # type: ignore[misc]
        yield path
