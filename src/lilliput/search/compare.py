"""lilliput measure and bench: compare ONNX files and runtimes in one interleaved run."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from lilliput.cost.measure import latency, machine
from lilliput.errors import near
from lilliput.files import write
from lilliput.onnx.session import Session
from lilliput.runtimes import open_session
from lilliput.search.ask import shown

TYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
}


def shapes(given: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """name=8x128 as sizes by name.

    Example:
        >>> shapes(["x=8x128"])
        {'x': (8, 128)}
    """
    by_name = {}
    for text in given:
        name, _, sizes = text.partition("=")
        try:
            by_name[name] = tuple(int(size) for size in sizes.split("x"))
        except ValueError:
            raise ValueError(f"shape must be written name=8x128, got {text!r}.") from None
    return by_name


def example(session: Session, batch: int, fixed: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Random inputs of a session: free leading sizes become `batch`, other free sizes need `fixed`."""
    draw = np.random.default_rng(0)
    inputs: dict[str, Any] = {}
    for value in session.inputs:
        sizes = fixed.get(value.name)
        if sizes is None:
            free = [size for size in value.shape[1:] if not isinstance(size, int)]
            if free:
                written = "x".join(str(size) if isinstance(size, int) else "64" for size in value.shape)
                raise ValueError(
                    f"measure: the input {value.name} must have fixed sizes, got free ones {free}. Fix "
                    f"them with --shape {value.name}={written}."
                )
            sizes = (batch, *value.shape[1:])
        kind = TYPES.get(value.type)
        if kind is None:
            raise ValueError(f"measure: inputs must be numbers, got {value.type} for {value.name}.")
        inputs[value.name] = (
            draw.standard_normal(sizes) if np.issubdtype(kind, np.floating) else np.ones(sizes)
        ).astype(kind)
    if unknown := set(fixed) - set(inputs):
        raise ValueError(f"measure: --shape must name an input, got {unknown.pop()!r}. {near('', inputs)}")
    return inputs


def compare(
    files: Sequence[Path],
    seconds: float,
    batch: int,
    given: Sequence[str],
    runtimes: Sequence[str] = ("onnxruntime",),
    out: Path | None = None,
) -> Table:
    """Make a table of bytes, median, quartiles and the ratio to the first file in the first runtime, all in one run.

    Args:
        files: The ONNX files.
        seconds: The time of the whole run.
        batch: Examples a call.
        given: Sizes of inputs with free ones, as "name=8x128".
        runtimes: Each file is measured in each of them.
        out: Where the record is written as JSON.

    Returns:
        The table.
    """
    for path in files:
        if not path.is_file():
            raise ValueError(f"measure: the file must exist, got {path}.")
    fixed = shapes(given)
    first = Session(files[0])
    inputs = example(first, batch, fixed)
    sizes = {name: x.shape for name, x in inputs.items()}
    sessions: dict[tuple[int, str], Any] = {}  # by the place of the file, which may be given twice
    for number, path in enumerate(files):
        for runtime in runtimes:
            session = open_session(runtime, path, sizes)
            sessions[number, runtime] = session
            try:
                session.run(session.feed(inputs))
            except Exception as error:
                raise ValueError(
                    f"measure: {path} must run on inputs of the first file, {sizes}, in {runtime}, but "
                    f"raised: {error}. Fix sizes with --shape and --batch."
                ) from error
    rows = latency(
        {f"{number} {runtime}": session for (number, runtime), session in sessions.items()},
        inputs,
        seconds=seconds,
        batch=len(next(iter(inputs.values()))),
    )
    times = dict(zip(sessions, rows.values(), strict=True))
    base = times[0, runtimes[0]]
    several = list(runtimes) != ["onnxruntime"]
    table = Table(title="one interleaved run, one thread" + ("" if several else ", ONNX Runtime"), title_justify="left")
    for column in ("file", *(["runtime"] if several else []), "bytes", "median ms", "quartiles ms", "times faster"):
        table.add_column(column, justify="left" if column in ("file", "runtime") else "right")
    for (number, runtime), t in times.items():
        name = str(files[number])
        table.add_row(
            escape(name),
            *([runtime] if several else []),
            shown(Path(name).stat().st_size),
            f"{t.median_ms:.4f}",
            f"{t.q1_ms:.4f} to {t.q3_ms:.4f}",
            f"{base.median_ms / t.median_ms:.2f}",
        )
    if out is not None:
        record = {
            "machine": machine(),
            "inputs": {name: list(size) for name, size in sizes.items()},
            "rows": [
                {
                    "file": str(files[number]),
                    "bytes": files[number].stat().st_size,
                    **asdict(t),
                    "runtime": t.runtime,
                    "times_faster": round(base.median_ms / t.median_ms, 4),
                }
                for (number, _), t in times.items()
            ],
        }
        data = json.dumps(record, indent=1).encode()
        write(out, lambda file: file.write(data))
    return table
