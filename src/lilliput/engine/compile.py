"""compile: turn an ONNX file into a folder with its C program, shared library and manifest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lilliput.engine import activity
from lilliput.engine import tune as tuning
from lilliput.engine.build import library
from lilliput.engine.example import example
from lilliput.engine.fuse import fused
from lilliput.engine.graph import Array, Graph
from lilliput.engine.kernels.stripes import striped
from lilliput.engine.levels import narrowable, narrowed
from lilliput.engine.lower import lowered, supported
from lilliput.engine.plan import Plan, planned
from lilliput.engine.read import read
from lilliput.engine.run import Engine
from lilliput.engine.target import Target, target
from lilliput.engine.write import manifest, written


def compile(
    model: Any,
    out: str | Path | None = None,
    *,
    to: str = "native",
    cc: str | None = None,
    tune: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, Array] | None = None,
    example: Any = None,
) -> Engine:
    """Compile an ONNX model to C, and load it.

    With `example` the model is run on it to learn which products have many zero inputs; those may then be computed by
    kernels that skip zeros. The result is right for any input.

    Args:
        model: A path, its bytes or a ModelProto.
        out: The folder to write; by default a temporary one, which goes with the Engine.
        to: "native", "portable", "cortex-m" or "wasm".
        cc: The C compiler; by default one that is found.
        tune: Whether kernels are chosen by measuring them, else by a cost model.
        shapes: The largest size of each input that has free ones; it runs any smaller one.
        constants: Inputs that are bound to these numbers, by name.
        example: A representative input, or several along the first dimension (arrays by name where the model has
            several inputs).

    Returns:
        The compiled model.

    Raises:
        ValueError: For a file that is damaged, or settings that do not fit it.
        NotSupported: Naming every node that cannot be compiled; nothing is written.
        OSError: Where no compiler is found.
        ExportError: Where the compiler fails.

    Example:
        >>> import torch; from lilliput.onnx.trace import trace
        >>> x = torch.rand(1, 4)
        >>> compile(trace(torch.nn.Linear(4, 2), x).proto, tune=False)(x.numpy()).shape
        (1, 2)
    """
    machine = target(to, cc)
    folder = write(model, out, machine, tune, shapes, constants, example)
    engine = Engine(folder)
    if out is None:
        import weakref

        weakref.finalize(engine, shutil.rmtree, folder, ignore_errors=True)
    return engine


def write(
    model: Any,
    out: str | Path | None,
    machine: Target,
    tune: bool = True,
    shapes: Mapping[str, Sequence[int]] | None = None,
    constants: Mapping[str, Array] | None = None,
    given: Any = None,
) -> Path:
    """Compile a model into a folder, which is whole or not there.

    Args:
        model: As in `compile`.
        out: As in `compile`.
        tune: As in `compile`.
        shapes: As in `compile`.
        constants: As in `compile`.
        machine: What to compile for.
        given: The example of `compile`.

    Returns:
        The folder.

    Raises:
        ValueError, NotSupported, ExportError: as `compile`.
    """
    name = Path(model).name if isinstance(model, str | Path) else "model.onnx"
    measure = tune and machine.name == "native" and machine.here

    def start() -> Graph:
        return fused(lowered(read(model, shapes, constants, supported)))

    active: dict[str, float] = {}
    if given is not None:
        here = machine if machine.here and machine.library else target()
        active = activity.shares(start(), here, given, lambda plan, folder: _save(plan, folder, here, name))

    def made(levels: bool) -> tuple[Plan, bool]:
        graph = start()
        for node in graph.nodes:
            if node.op == "MatMul" and node.y.name in active:
                node.attrs["active"] = active[node.y.name]
        more = not levels and narrowable(graph)
        graph = striped(narrowed(graph) if levels else graph)
        return planned(graph, tuning.measured(graph, machine) if measure else tuning.estimated(machine)), more

    plan, quantized = made(levels=False)
    if quantized:  # computed on numbers, where zeros are skipped, or on levels: whichever takes less time
        plan = min(plan, made(levels=True)[0], key=lambda p: p.cost_ns)
    folder = Path(tempfile.mkdtemp(prefix="lilliput-")) if out is None else Path(out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".compile-", dir=folder.parent))
    try:
        _save(plan, temporary, machine, name)
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(temporary.iterdir()):
            os.replace(path, folder / path.name)
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _save(plan: Plan, folder: Path, machine: Target, name: str) -> None:
    """Write a plan's files into an existing folder."""
    graph, source = plan.graph, written(plan, name)
    (folder / "model.c").write_text(source.c, encoding="utf-8")
    (folder / "model.h").write_text(source.h, encoding="utf-8")
    if source.weights:
        (folder / "model.weights").write_bytes(source.weights)
    text = example(
        machine,
        list(zip(source.inputs, graph.inputs, strict=True)),
        list(zip(source.outputs, graph.outputs, strict=True)),
        graph.sizes,
        len(source.weights),
    )
    (folder / "example.c").write_text(text, encoding="utf-8")
    facts: dict[str, Any] = {
        "model": name,
        "target": machine.name,
        "cc": list(machine.cc),
        "flags": list(machine.flags),
        "link": list(machine.link),
        "library": machine.library,
        "errors": source.errors,
    }
    if machine.library:
        library(folder / "model.c", folder / machine.library, machine)
        facts["library_bytes"] = (folder / machine.library).stat().st_size
    text = json.dumps(manifest(plan, source, facts), indent=1)
    (folder / "manifest.json").write_text(text, encoding="utf-8")
