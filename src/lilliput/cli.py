"""The command line. Nothing heavy is imported before a command runs."""

import importlib
import importlib.util
import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from lilliput.task import Task

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="A trained neural network in, a many times smaller and faster one out, with the measured "
    "proof.\n\nExample: lilliput shrink digits --floor 1% --budget 2m",
)
console, errors = Console(), Console(stderr=True)

Target = Annotated[
    str,
    typer.Argument(
        help="an embedded name (see: lilliput tasks), file.py:function or "
        "package.module:function returning (model, task), or model.onnx"
    ),
]
Out = Annotated[Path | None, typer.Option(help="folder for the results [default: lilliput-NAME]")]


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
        fail("stopped. What is finished is kept: go on with --resume.", 130)
    except (ValueError, NotSupported, ImportError, OSError, ExportError, StoreError) as error:
        fail(error)
    except (TypeError, KeyError) as error:
        text = str(error.args[0]) if error.args else ""
        if " must " not in text:
            raise
        fail(text)


def resolve(target: str) -> "tuple[nn.Module, Task]":
    """(model, task) of an embedded name, file.py:function or package.module:function.

    Raises ValueError for a target that is none of these, that raises, or that returns something else.
    """
    from torch import nn

    from lilliput.data import TASKS
    from lilliput.errors import near
    from lilliput.task import Task

    where = TASKS[target].target if target in TASKS else target
    place, _, name = where.rpartition(":")
    if not place:
        raise ValueError(
            "TARGET must be an embedded name, file.py:function, package.module:function or model.onnx, "
            f"got {target!r}. {near(target, TASKS)}"
        )
    module = _module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise ValueError(f"TARGET: {place} must have a function {name!r}. {near(name, known) if known else ''}".strip())
    try:
        found = function()
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(
            f"TARGET: {target} must return (model, task), but raised {type(error).__name__}: {error}"
        ) from error
    if not (
        isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], nn.Module) and isinstance(found[1], Task)
    ):
        shown = tuple(type(part).__name__ for part in found) if isinstance(found, tuple) else type(found).__name__
        raise ValueError(f"TARGET: {target} must return (model, task), an nn.Module and a lilliput.Task, got {shown}.")
    return found


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise ValueError(f"TARGET: the module must be importable, got {place!r}: {error}.") from error
    path = Path(place).resolve()
    if not path.is_file():
        raise ValueError(f"TARGET: the file must exist, got {place}.")
    stem = path.stem if path.stem not in sys.modules else f"target_{path.stem}"
    spec = importlib.util.spec_from_file_location(stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ImportError:
        raise
    except Exception as error:
        raise ValueError(f"TARGET: {place} must run, but raised {type(error).__name__}: {error}") from error
    return module


@app.command()
def shrink(
    target: Target,
    floor: Annotated[
        str, typer.Option(help="what may be lost: 1% is a point of accuracy, 0.5r half a percent of the dense score")
    ] = "1%",
    objective: Annotated[str, typer.Option("--for", help="size, latency or macs")] = "size",
    max_bytes: Annotated[str | None, typer.Option(help="the best score whose model.onnx fits, such as 2MB")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="the best score that is as fast as this")] = None,
    budget: Annotated[str, typer.Option(help="wall time of the whole command, such as 90s or 5m")] = "5m",
    trials: Annotated[int | None, typer.Option(help="structures to try instead of a budget; repeatable")] = None,
    device: Annotated[str, typer.Option(help="where to train")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help="name=8x128: fix an input's free sizes (ONNX)")] = None,
    calib: Annotated[Path | None, typer.Option(help="data.npz with the inputs by name (ONNX)")] = None,
    seed: Annotated[int, typer.Option(help="of the search and every training")] = 0,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the search in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be tried, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json and nothing else")] = False,
) -> None:
    """Make a network as small (or as fast) as a floor on its quality allows.

    Example: lilliput shrink digits --floor 0.5% --budget 5m
    """
    _shrink(
        target,
        floor,
        objective,
        max_bytes,
        max_latency_ms,
        budget,
        trials,
        device,
        shape,
        calib,
        seed,
        out,
        resume,
        dry_run,
        as_json,
        shlex.join(["lilliput", *sys.argv[1:]]),
    )


def _shrink(
    target: str,
    floor: str,
    objective: str,
    max_bytes: str | None,
    max_latency_ms: float | None,
    budget: str,
    trials: int | None,
    device: str,
    shape: list[str] | None,
    calib: Path | None,
    seed: int,
    out: Path | None,
    resume: bool,
    dry_run: bool,
    as_json: bool,
    command: str,
) -> None:
    with speaking():
        from lilliput.search import ask

        ask.floor(floor)
        ask.seconds(budget)
        if max_bytes is not None:
            ask.size_bytes(max_bytes)
        if target.endswith(".onnx"):
            from lilliput.search.onnx_target import load_target

            model: nn.Module
            model, task = load_target(Path(target), calib, shape or [])
        elif shape or calib:
            raise ValueError(
                f"shrink: --shape and --calib must come with a model.onnx, got {target}. A task brings its own arrays."
            )
        else:
            model, task = resolve(target)
        from lilliput.search.progress import Live, Silent
        from lilliput.shrinking import shrink as search

        settings: dict[str, Any] = dict(
            floor=floor,
            objective=objective,
            budget=None if trials is not None else budget,
            trials=trials,
            max_bytes=max_bytes,
            max_latency_ms=max_latency_ms,
            seed=seed,
            out=out,
            resume=resume,
            device=device,
        )
        if dry_run:
            from lilliput.search.dry import plan
            from lilliput.search.dry import show as describe

            found = plan(model, task, **settings)
            if as_json:
                print(json.dumps(found, indent=1))
            else:
                describe(found, console)
            return
        live = Live(console) if console.is_terminal and not as_json else Silent()
        result = search(model, task, show=live, command=command, **settings)
    if as_json:
        print(json.dumps(result.summary, indent=1))
    else:
        from lilliput.report.summary import verdict
        from lilliput.report.tables import front

        console.print(front(result.summary))
        console.print(verdict(result.summary), highlight=False, markup=False)
        page = result.folder.resolve() / "report.html"
        console.print(f"report: {page}", highlight=False, soft_wrap=True, markup=False)
    if not result.met:
        fail(
            f"FloorNotMet: no point that was found meets the question. The nearest are in the report, the dense "
            f"network's files in {result.folder}. Allow more with --floor, or more time with --budget.",
            3,
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("lilliput-demo"),
    budget: Annotated[str, typer.Option(help="wall time of the search")] = "2m",
) -> None:
    """The main job on the embedded digits: a ResNet-20 made many times smaller in two minutes.

    Example: lilliput demo
    """
    import shutil

    marker = out / "records"
    if marker.exists():
        shutil.rmtree(marker)
    _shrink(
        "digits",
        "1%",
        "size",
        None,
        None,
        budget,
        None,
        "cpu",
        None,
        None,
        0,
        out,
        False,
        False,
        False,
        f"lilliput shrink digits --floor 1% --budget {budget}",
    )


@app.command()
def tasks() -> None:
    """The embedded networks that can be shrunk by name.

    Example: lilliput tasks
    """
    from lilliput.data import TASKS
    from lilliput.search.ask import shown

    table = Table(title="Embedded tasks", title_justify="left")
    for column in ("name", "what", "dense", "needs"):
        table.add_column(column)
    for name, entry in sorted(TASKS.items()):
        table.add_row(name, entry.about, shown(entry.size_bytes), f"lilliput[{entry.needs}]" if entry.needs else "")
    console.print(table)


@app.command()
def methods(
    family: Annotated[str | None, typer.Option(help="one family, such as stage, rule, code or score")] = None,
) -> None:
    """Every method there is by family, those of installed packages too.

    Example: lilliput methods --family score
    """
    with speaking():
        from lilliput.registry import FAMILIES, entries

        for each in [family] if family else FAMILIES:
            found = entries(each)
            table = Table(
                title=each, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False
            )
            table.add_column("name", overflow="fold", min_width=19)
            if foreign := any(entry.package != "lilliput" for entry in found):
                table.add_column("package", overflow="fold")
            table.add_column("what it does", overflow="fold")
            for entry in found:
                package = [escape(entry.package)] if foreign else []
                table.add_row(escape(entry.name), *package, escape(entry.summary.partition(". ")[0].rstrip(".")))
            if found or family:
                console.print(table)
                console.print()


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml")],
    target: Target,
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("lilliput-run"),
    seed: Annotated[int, typer.Option(help="of every training")] = 0,
    device: Annotated[str, typer.Option(help="where to train")] = "cpu",
) -> None:
    """Apply one recipe to a network, export it, score it and write its files.

    Example: lilliput run recipe.toml digits
    """
    with speaking():
        from lilliput.recipe import Recipe
        from lilliput.search.apply import apply

        if not recipe.is_file():
            raise ValueError(f"run: the recipe must be a TOML or JSON file that exists, got {recipe}.")
        sys.path.insert(0, "")  # stages of your own lie where the command is given
        steps = Recipe.read(recipe)
        model, task = resolve(target)
        summary = apply(model, task, steps, out, seed, device)
    print(json.dumps(summary, indent=1))


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a folder that shrink wrote")]) -> None:
    """Rebuild report.html from summary.json.

    Example: lilliput report lilliput-digits
    """
    with speaking():
        from lilliput.report.page import write

        console.print(str(write(folder)), highlight=False, soft_wrap=True, markup=False)


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


def main() -> None:
    """The console script."""
    app()


if __name__ == "__main__":
    main()
