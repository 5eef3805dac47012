"""Commands that compile, time and compare ONNX files, and measure the claims of systems."""

from pathlib import Path
from typing import Annotated, Any

import typer

from lilliput.cli.app import app, console, speaking


@app.command()
def measure(
    files: Annotated[list[Path], typer.Argument(help="ONNX files; the first is what the others are compared with")],
    seconds: Annotated[float, typer.Option(help="how long to measure")] = 4.0,
    batch: Annotated[int, typer.Option(help="examples in each call")] = 1,
    shape: Annotated[list[str] | None, typer.Option(help="name=8x128: an input's free sizes")] = None,
) -> None:
    """Compare the latency and bytes of ONNX files in one interleaved run.

    Example: lilliput measure lilliput-digits/model.onnx other.onnx
    """
    with speaking():
        from lilliput.search.compare import compare

        console.print(compare(files, seconds, batch, shape or []))


@app.command("compile")
def compile_(
    model: Annotated[Path, typer.Argument(help="model.onnx")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="folder to write [default: MODEL-engine]")] = None,
    to: Annotated[str, typer.Option("--for", help="native, portable, cortex-m or wasm")] = "native",
    cc: Annotated[str | None, typer.Option(help='the C compiler, such as clang or "python -m ziglang cc"')] = None,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="choose kernels by a cost model, do not measure")] = False,
    shape: Annotated[list[str] | None, typer.Option(help="name=1x3x224x224: an input's largest sizes")] = None,
    example: Annotated[
        Path | None,
        typer.Option(
            help=".npy (or .npz by input name): inputs such as it will see, to skip zero activations where that pays"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print manifest.json and nothing else")] = False,
) -> None:
    """Compile an ONNX file to a small C program whose kernels skip the zeros.

    Example: lilliput compile lilliput-digits/model.onnx
    """
    with speaking():
        from lilliput.engine.compile import write
        from lilliput.engine.describe import described
        from lilliput.engine.target import target
        from lilliput.search.compare import shapes

        given: Any = None
        if example is not None:
            import numpy as np

            try:
                given = np.load(example, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ValueError(f"compile: {example} must be a file of numpy's (.npy or .npz): {error}") from error
        folder = write(
            model, out or Path(f"{model.stem}-engine"), target(to, cc), not no_tune, shapes(shape or []), given=given
        )
    if as_json:
        print((folder / "manifest.json").read_text(encoding="utf-8"))
    else:
        for part in described(folder):
            console.print(part, highlight=False)


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="ONNX files; the first is what the others are compared with")],
    runtimes: Annotated[str, typer.Option(help="of engine, onnxruntime, openvino")] = "onnxruntime,engine",
    seconds: Annotated[float, typer.Option(help="how long to measure")] = 8.0,
    batch: Annotated[int, typer.Option(help="examples in each call")] = 1,
    shape: Annotated[list[str] | None, typer.Option(help="name=8x128: an input's free sizes")] = None,
    out: Annotated[Path | None, typer.Option(help="a JSON file for the record")] = None,
) -> None:
    """Compare ONNX files in several runtimes, all in one interleaved run, as ratios to the first.

    Example: lilliput bench dense.onnx pruned.onnx --runtimes onnxruntime,engine
    """
    with speaking():
        from lilliput.search.compare import compare

        console.print(compare(files, seconds, batch, shape or [], [name.strip() for name in runtimes.split(",")], out))


@app.command()
def evidence(
    key: Annotated[str | None, typer.Argument(help="a system; all of them when left out")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="prove in seconds that the scripts run")] = False,
    out: Annotated[Path, typer.Option(help="folder for the records")] = Path("results"),
) -> None:
    """Measure the claim of a published system on this machine, and write the record.

    Example: lilliput evidence learn2compress --quick
    """
    with speaking():
        from lilliput.evidence import gather

        for path in gather(key, quick, out):
            console.print(str(path), highlight=False, soft_wrap=True, markup=False)
