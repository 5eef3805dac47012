"""lilliput init: write the file that says which network is shrunk and what it must preserve, from a few questions."""

import zipfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lilliput.cli.app import app, console, speaking

MEANINGS = {
    "classes": ("cross_entropy", "accuracy", "one class of several for each example"),
    "yes-no": ("bce", "f1", "one or several yes-or-no answers"),
    "numbers": ("mse", "r2", "numbers, such as prices or coordinates"),
}
"""What outputs are: the loss, the metric, and how a person says it."""
SPLITS = ("train", "val", "test")
PAIRS = (("x", "y"), ("inputs", "targets"), ("images", "labels"), ("x", "t"), ("data", "target"))
HEAD = '''"""The network that `lilliput shrink {stem}:network` makes smaller, and what it must preserve."""

{imports}


def network():
    model = {model}
'''
WEIGHTS = {
    ".safetensors": ("from safetensors.torch import load_file", "    model.load_state_dict(load_file({path!r}))\n"),
    "": ("", '    model.load_state_dict(torch.load({path!r}, map_location="cpu", weights_only=True))\n'),
}
ARRAYS = "    data = np.load({path!r}, allow_pickle=False)\n"
TASK = """    task = lilliput.Task(
        {name!r},
{splits}
        loss={loss!r},
        metric={metric!r},
    )
    return model, task
"""


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="the file to write")] = Path("mine.py"),
    network: Annotated[
        str | None, typer.Option(help="what builds your network: package.module:Class or file.py:function")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="its tensors, .pt or .safetensors; empty where it has them")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="data.npz, or what returns (train, val, test): package.module:function")
    ] = None,
    outputs: Annotated[str | None, typer.Option(help="what its outputs are: classes, yes-no or numbers")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file")] = False,
) -> None:
    """Write a file for shrink from a few questions; what is given as an option is not asked.

    Example: lilliput init mine.py --network nets.py:Net --weights net.pt --data data.npz --outputs classes
    """
    with speaking():
        if file.suffix != ".py":
            raise ValueError(f"init: the file must end in .py, got {file}.")
        if file.exists() and not force:
            raise ValueError(f"init: {file} must not exist yet. Name another file, or overwrite it with --force.")
        network = network or typer.prompt("What builds your network (package.module:Class or file.py:function)")
        if weights is None:
            weights = typer.prompt("A file with its tensors (empty: it has them)", default="", show_default=False)
        data = data or typer.prompt("Your data (data.npz, or a function that returns train, val and test)")
        if outputs is None:
            for name, (_, metric, meaning) in MEANINGS.items():
                console.print(f"  {name}: {meaning}; judged by {metric}", highlight=False, markup=False)
            outputs = typer.prompt("What its outputs are", default="classes")
        text = written(file, network, weights, data, outputs)
        file.write_text(text, encoding="utf-8")
    name = escape(str(file))
    console.print(f"wrote {name}. Look through it, then see what would be tried:", highlight=False, soft_wrap=True)
    console.print(f"  lilliput shrink {name}:network --dry-run", highlight=False, soft_wrap=True)


def written(file: Path, network: str, weights: str, data: str, outputs: str) -> str:
    """The text of the file.

    Args:
        file: where it will stand.
        network: "module:callable".
        weights: a path, or an empty text.
        data: "module:callable", or the path of an npz.
        outputs: one of MEANINGS.

    Raises:
        ValueError: for what is none of these, and for an npz without inputs and targets.
    """
    if outputs not in MEANINGS:
        raise ValueError(f"init: outputs must be one of {', '.join(MEANINGS)}, got {outputs!r}.")
    imports, lines = {"import lilliput"}, ""
    module, built = _callable(network, "network")
    imports.add(f"from {module} import {built}")
    if weights:
        needed, line = WEIGHTS.get(Path(weights).suffix, WEIGHTS[""])
        imports.add(needed or "import torch")
        lines += line.format(path=weights)
    if data.endswith(".npz"):
        imports.add("import numpy as np")
        read, splits = _arrays(Path(data))
        lines += read
        if "torch.randperm" in read:
            imports.add("import torch")
    else:
        module, function = _callable(data, "data")
        imports.add(f"from {module} import {function}")
        lines += f"    train, val, test = {function}()\n"
        splits = {split: split for split in SPLITS}
    loss, metric, _ = MEANINGS[outputs]
    task = TASK.format(
        name=file.stem,
        splits="\n".join(f"        {split}={value}," for split, value in splits.items()),
        loss=loss,
        metric=metric,
    )
    ordered = sorted(imports, key=lambda line: (line.startswith("from"), line))
    return HEAD.format(stem=file.name, imports="\n".join(ordered), model=f"{built}()") + lines + task


def _callable(text: str, what: str) -> tuple[str, str]:
    """Module and name of "package.module:Class" or "file.py:Class"."""
    module, _, name = text.strip().rpartition(":")
    module = module.removesuffix(".py").strip("./").replace("/", ".")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(
            f"init: {what} must be package.module:Name or file.py:Name"
            f"{', or data.npz' if what == 'data' else ''}, got {text!r}."
        )
    return module, name


def _arrays(path: Path) -> tuple[str, dict[str, str]]:
    """The lines that read an npz, and what each split is."""
    if not path.is_file():
        raise ValueError(f"init: the file must exist, got {path}.")
    with zipfile.ZipFile(path) as whole:
        names = [name.removesuffix(".npy") for name in whole.namelist()]
    read = ARRAYS.format(path=str(path))
    for x, y in PAIRS:
        for form in ("{0}_{1}", "{1}_{0}"):
            parts = {split: [form.format(part, split) for part in (x, y)] for split in SPLITS}
            found = {split: pair for split, pair in parts.items() if set(pair) <= set(names)}
            if "train" in found and "val" in found:
                return read, {split: f"(data[{a!r}], data[{b!r}])" for split, (a, b) in found.items()}
        if {x, y} <= set(names):
            read += f"    x, y = data[{x!r}], data[{y!r}]\n"
            read += "    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).numpy()\n"
            read += "    a, b = int(0.7 * len(x)), int(0.85 * len(x))  # val chooses, test is read once at the end\n"
            places = ("order[:a]", "order[a:b]", "order[b:]")
            return read, {split: f"(x[{at}], y[{at}])" for split, at in zip(SPLITS, places, strict=True)}
    raise ValueError(
        f"init: {path} must hold x and y, or x_train, y_train, x_val, y_val (or inputs and targets, images and "
        f"labels), got {sorted(names)}."
    )
