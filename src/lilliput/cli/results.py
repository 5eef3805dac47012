"""Commands that use what a search has left, and one that says what this machine offers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lilliput.cli.app import app, console, speaking

Folder = Annotated[Path, typer.Argument(help="a folder that shrink wrote")]


@app.command()
def pick(
    folder: Folder,
    point: Annotated[str | None, typer.Argument(help="its name or key, or how one of them begins")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write [default: FOLDER-picked]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the points as data")] = False,
) -> None:
    """List the points whose files a search has kept, or write the files of one that was not chosen.

    Example: lilliput pick lilliput-digits "7 blocks fewer, early stride, width 0.5, 4 bits" --out wider
    """
    with speaking():
        from lilliput.search import kept

        if point is not None:
            target = out or folder.with_name(f"{folder.resolve().name}-picked")
            kept.pick(folder, point, target)
            console.print(str(target), highlight=False, soft_wrap=True, markup=False)
            return
        found = kept.points(folder)
        if as_json:
            print(json.dumps([{"key": each.key, **each.row} for each in found], indent=1))
            return
        console.print(_table(found))


def _table(points: list[Any]) -> Table:
    from lilliput.search.ask import shown

    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("key", no_wrap=True)
    for heading in ("val", "model.lil", "model.onnx"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("point", overflow="fold")
    for point in points:
        sizes = [shown(int(point.row[name])) for name in ("packed_bytes", "onnx_bytes")]
        table.add_row(point.key[:8], f"{point.row['val']:.4f}", *sizes, escape(str(point.row["name"])))
    return table


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="a folder that shrink wrote, model.lil or model.onnx")],
    data: Annotated[Path, typer.Argument(help=".npz with the inputs by name, or .npy with the only one")],
    out: Annotated[Path, typer.Option("--out", "-o", help="where to write the outputs")] = Path("outputs.npz"),
    batch: Annotated[int, typer.Option(help="examples in each call")] = 64,
) -> None:
    """Run a network that was shrunk on arrays, and write its outputs by name.

    Example: lilliput predict lilliput-digits images.npy --out answers.npz
    """
    with speaking():
        from lilliput.export.predict import predict as run

        written = run(model, data, out, batch)
    for name, shape in written.items():
        console.print(f"{name}: {' x '.join(map(str, shape))}", highlight=False, markup=False)
    console.print(str(out), highlight=False, soft_wrap=True, markup=False)


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="print it as data")] = False) -> None:
    """Say what this machine offers and what is missing: versions, cores, memory, compiler, extras.

    Example: lilliput doctor
    """
    with speaking():
        from lilliput.search.doctor import found

        rows = found()
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for row in rows:
        text = escape(row.text)  # extras are written in brackets
        table.add_row(row.what, text if row.good else f"[yellow]{text}[/yellow] {escape(row.do)}")
    console.print(table)
