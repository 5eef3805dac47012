"""Commands that shrink networks, apply recipes and say what there is. Nothing heavy is imported before one runs."""

import json
import os
import shlex
import sys
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lilliput.cli.app import app, began, console, fail, speaking
from lilliput.targets import Given
from lilliput.targets.function import resolve

if TYPE_CHECKING:
    from lilliput.search.finish import Result

Target = Annotated[
    str,
    typer.Argument(
        help="an embedded name (see: lilliput tasks), file.py:function or package.module:function returning "
        "(model, task), model.onnx, timm:NAME, hf:FOLDER or data.csv"
    ),
]
Out = Annotated[Path | None, typer.Option(help="folder for the results [default: lilliput-NAME]")]


@app.command()
def shrink(
    target: Target,
    floor: Annotated[
        str, typer.Option(help="what may be lost: 1% is a point of accuracy, 0.5r half a percent of the dense score")
    ] = "1%",
    objective: Annotated[str, typer.Option("--for", help="size, latency, macs or memory")] = "size",
    file: Annotated[str, typer.Option(help="what is deployed: lil or onnx; sizes are this file's")] = "lil",
    runtime: Annotated[
        str | None, typer.Option(help="where it runs: ort or engine; the better of both when left out")
    ] = None,
    sure: Annotated[str, typer.Option(help="how probable it must be that the floor is kept on new data")] = "90%",
    worst_class: Annotated[
        str | None, typer.Option(help="what each class, and each group of the task, may lose, such as 3%")
    ] = None,
    max_bytes: Annotated[str | None, typer.Option(help="the best score whose file fits, such as 2MB")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="the best score that is as fast as this")] = None,
    max_peak: Annotated[str | None, typer.Option(help="the best score that runs in this memory, such as 256KB")] = None,
    strip: Annotated[
        bool | None,
        typer.Option("--strip/--names", help="whether model.onnx has no names inside; yes with --file onnx"),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train/--no-train", help="whether to train, or to store the network in fewer bytes alone")
    ] = True,
    budget: Annotated[str, typer.Option(help="wall time of the whole command, such as 90s or 5m")] = "5m",
    trials: Annotated[int | None, typer.Option(help="structures to try instead of a budget; repeatable")] = None,
    workers: Annotated[
        str | None, typer.Option(help="processes that train, or ray://HOST; one a core when left out")
    ] = None,
    device: Annotated[str, typer.Option(help="where to train")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help="name=8x128: fix an input's free sizes (ONNX)")] = None,
    calib: Annotated[Path | None, typer.Option(help="data.npz with the inputs by name (ONNX)")] = None,
    data: Annotated[
        Path | None, typer.Option(help="a folder of pictures for each class (timm:), a table of texts and labels (hf:)")
    ] = None,
    label: Annotated[str | None, typer.Option(help="the column that is predicted (data.csv, hf:)")] = None,
    weights: Annotated[Path | None, typer.Option(help="the network's tensors, .pt or .safetensors (timm:)")] = None,
    seed: Annotated[int, typer.Option(help="of the search and every training")] = 0,
    out: Out = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the search in --out")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be tried, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json and nothing else")] = False,
) -> None:
    """Make a network as small (or as fast) as a floor on its quality allows.

    Example: lilliput shrink digits --floor 0.5% --budget 5m
    """
    files = {name: None if path is None else str(path) for name, path in (("data", data), ("weights", weights))}
    given = Given(target, label=label, calib=None if calib is None else str(calib), shape=tuple(shape or ()), **files)
    _shrink(
        given,
        dry_run,
        as_json,
        floor=floor,
        objective=objective,
        file=file,
        runtime=runtime,
        sure=sure,
        train=train,
        worst_class=worst_class,
        strip=strip,
        max_bytes=max_bytes,
        max_latency_ms=max_latency_ms,
        max_peak=max_peak,
        budget=None if trials is not None else budget,
        trials=trials,
        workers=workers,
        device=device,
        seed=seed,
        out=out,
        resume=resume,
    )


def _shrink(given: Given, dry_run: bool = False, as_json: bool = False, command: str = "", **settings: Any) -> None:
    """Search, or say what would be tried; `settings` are those of lilliput.shrink."""
    start = began()
    with speaking():
        from lilliput.search import ask
        from lilliput.search.question import question

        asked = signature(question).parameters
        question(**{name: settings[name] for name in asked if name in settings})  # before anything heavy is imported
        if settings.get("budget") is not None:
            ask.seconds(settings["budget"])
        settings["workers"] = ask.workers(settings.get("workers"))
        from lilliput.targets import opened

        model, task = opened(given)
        if dry_run:
            from lilliput.search.dry import plan
            from lilliput.search.dry import show as describe

            planned = plan(model, task, **settings)
            if as_json:
                print(json.dumps(planned, indent=1))
            else:
                describe(planned, console)
            return
        from lilliput.search.progress import shown_on
        from lilliput.shrinking import shrink as search

        command = command or shlex.join(["lilliput", *sys.argv[1:]])
        origin = {"cwd": os.getcwd(), **given.plain()}
        show = shown_on(console, as_json, start)
        result = search(model, task, show=show, command=command, began=start, origin=origin, **settings)
    _say(result, as_json)


def _say(result: "Result", as_json: bool) -> None:
    """Print what a search found, and leave with status 3 where that is not what was asked."""
    if as_json:
        print(json.dumps(result.summary, indent=1))
    else:
        from lilliput.report.account import told
        from lilliput.report.page import lacking
        from lilliput.report.summary import verdict
        from lilliput.report.tables import front

        console.print(front(result.summary, console.width))
        for line in (verdict(result.summary), *told(result.summary)):
            console.print(line, highlight=False, markup=False)
        page = result.folder.resolve() / "report.html"
        for line in filter(None, (f"report: {page}", lacking())):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    if not result.met:
        fail(
            f"FloorNotMet: no point that was found meets the question. The nearest are in the report, the dense "
            f"network's files in {result.folder}. Allow more with --floor, or more time with --budget.",
            3,
        )


@app.command()
def finish(
    folder: Annotated[Path, typer.Argument(help="a folder that shrink wrote")],
    as_json: Annotated[bool, typer.Option("--json", help="print summary.json and nothing else")] = False,
) -> None:
    """Choose, test and report what a search has left that was killed; nothing is trained.

    Example: lilliput finish lilliput-digits
    """
    with speaking():
        from lilliput.search.progress import shown_on
        from lilliput.shrinking import finish as conclude

        result = conclude(folder, show=shown_on(console, as_json, began()))
    _say(result, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the results")] = Path("lilliput-demo"),
    budget: Annotated[str, typer.Option(help="wall time of the search")] = "2m",
) -> None:
    """The main job on the embedded digits: a ResNet-20 made many times smaller in two minutes.

    Example: lilliput demo
    """
    import shutil

    begins, records = "lilliput shrink digits --floor 1%", out / "records"
    if records.exists():
        from lilliput.store import Store

        with speaking():
            origin = Store(records).record("origin") or {}
            if not str(origin.get("command")).startswith(begins):
                raise ValueError(
                    f"demo: {out} must be empty, new or of an earlier demo, got another search. Choose another --out."
                )
        shutil.rmtree(records)
    command = f"{begins} --budget {budget}"
    _shrink(Given("digits"), command=command, floor="1%", budget=budget, out=out)


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
        needs = escape(f"lilliput[{entry.needs}]") if entry.needs else ""
        table.add_row(name, entry.about, shown(entry.size_bytes), needs)
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
            listed = entries(each)
            table = Table(
                title=each, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False
            )
            table.add_column("name", overflow="fold", min_width=19)
            if foreign := any(entry.package != "lilliput" for entry in listed):
                table.add_column("package", overflow="fold")
            table.add_column("what it does", overflow="fold")
            for entry in listed:
                package = [escape(entry.package)] if foreign else []
                table.add_row(escape(entry.name), *package, escape(entry.summary.partition(". ")[0].rstrip(".")))
            if listed or family:
                console.print(table)
                console.print()


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="recipe.toml")],
    target: Annotated[
        str, typer.Argument(help="an embedded name, file.py:function or package.module:function giving (model, task)")
    ],
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
        from lilliput.report.page import lacking, write

        for line in filter(None, (str(write(folder)), lacking())):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
