"""A table of numbers and categories: a network is trained to predict one column, then it is what is shrunk."""

import hashlib
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lilliput.data import cache_folder
from lilliput.files import write
from lilliput.stage import Reference
from lilliput.targets import Given
from lilliput.targets.rows import column, columns, splits
from lilliput.task import Task
from lilliput.train import Train, fit

ABOUT = "data.csv"
OPTIONS = ("label",)
USUAL = ("label", "target", "y", "class")
CLASSES = 20
"""A column of whole numbers with at most as many different values holds classes."""
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?"})
"""What stands for a value that is not known, in small letters."""
CATEGORIES = 5000
"""Values of a category that are told apart; rarer ones are one."""
WIDTH, EPOCHS, STEPS = 128, 40, (500, 6000)
VERSION = 2  # rises when the trained weights change


class Tabular(nn.Module):
    """Embed each category, put the numbers beside them, and apply two hidden layers.

    Args:
        numbers: how many columns of numbers there are.
        sizes: how many values each category has.
        outputs: how many numbers it returns.
    """

    def __init__(self, numbers: int, sizes: list[int], outputs: int) -> None:
        super().__init__()
        widths = [min(16, math.ceil(size**0.5)) for size in sizes]
        self.tables = nn.ModuleList(nn.Embedding(*each) for each in zip(sizes, widths, strict=True))
        width = numbers + sum(widths)
        self.layers = nn.Sequential(
            *(nn.Linear(width, WIDTH), nn.ReLU(), nn.Dropout(0.1)),
            *(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Dropout(0.1)),
            nn.Linear(WIDTH, outputs),
        )

    def forward(self, numbers: Tensor | None = None, categories: Tensor | None = None) -> Tensor:
        parts = [] if numbers is None else [numbers]
        if categories is not None:
            parts += [table(categories[:, i]) for i, table in enumerate(self.tables)]
        found: Tensor = self.layers(torch.cat(parts, 1))
        return found


def reads(target: str) -> bool:
    """Files with the ending of a table."""
    return target.endswith((".csv", ".tsv"))


def read(given: Given) -> tuple[nn.Module, Task]:
    """The trained network and its task: accuracy where the column holds classes, R2 where it holds numbers.

    Rows without a value to predict are left out. Numbers are scaled to mean 0 and variance 1 of the training rows,
    missing ones become the mean; values of categories that training rows do not show are one. Weights are kept in the
    user's cache under a digest of the file, so that a search that goes on finds the same network.

    Raises:
        ValueError: for a table that cannot be read, or holds nothing to predict from.
    """
    path = Path(given.target)
    table = columns(path)
    name = column(table, given.label, USUAL, path)
    known = [place for place, text in enumerate(table[name]) if not _missing(text)]
    table = {each: [texts[place] for place in known] for each, texts in table.items()}
    texts = table.pop(name)
    classes = sorted(set(texts))
    if len(classes) < 2 or not table:
        raise ValueError(
            f"TARGET: column {name!r} of {path} must hold at least two values and not be the only one, got "
            f"{len(classes)} values beside {len(table)} columns. Name another with --label."
        )
    if numeric := not _told_apart(classes):
        targets = _numbers(texts).unsqueeze(1)
    else:
        targets = torch.tensor([classes.index(text) for text in texts])
    rows = splits(torch.zeros(len(texts)) if numeric else targets, path)
    if numeric:
        targets = _scaled(targets, rows["train"])
    inputs, sizes = _inputs(table, rows["train"])
    task = Task(
        path.stem,
        **{split: ({key: value[at] for key, value in inputs.items()}, targets[at]) for split, at in rows.items()},
        loss="mse" if numeric else "cross_entropy",
        metric="r2" if numeric else "accuracy",
        batch_size=max(16, min(256, len(rows["train"]) // 8)),
    )
    outputs = 1 if numeric else len(classes)
    return _trained(Tabular(inputs["numbers"].shape[1] if "numbers" in inputs else 0, sizes, outputs), task, path, name)


def _trained(model: nn.Module, task: Task, path: Path, name: str) -> tuple[nn.Module, Task]:
    """The model with weights from the cache, or trained."""
    digest = hashlib.blake2b(path.read_bytes() + f"{name} {VERSION}".encode(), digest_size=12).hexdigest()
    file = cache_folder() / f"table-{digest}.safetensors"
    if not file.exists():
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                scale = 0.0 if parameter.dim() < 2 else (2 / parameter.shape[1]) ** 0.5
                parameter.normal_(0, 1, generator=generator).mul_(scale)
        steps = min(max(EPOCHS * task.size("train") // task.batch_size, STEPS[0]), STEPS[1])
        model = fit(Train(steps, lr=3e-3, weight_decay=0.02), model, task, Reference(model, task))
        weights = {key: value.contiguous() for key, value in model.state_dict().items()}
        write(file, lambda out: out.write(save(weights)))
    model.load_state_dict(load_file(file))
    return model.eval(), task


def _missing(text: str) -> bool:
    return text.strip().lower() in MISSING


def _told_apart(classes: list[str]) -> bool:
    """Whether values are classes: words, or few whole numbers."""
    try:
        return len(classes) <= CLASSES and all(float(text).is_integer() for text in classes)
    except ValueError:
        return True


def _numbers(texts: list[str]) -> Tensor:
    return torch.tensor([math.nan if _missing(text) else float(text) for text in texts])


def _scaled(values: Tensor, train: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the training rows; what is missing becomes the mean."""
    known = values[train]
    mean = known.nanmean(0)
    spread = ((known - mean) ** 2).nanmean(0).sqrt()
    return ((values - mean) / torch.where(spread > 0, spread, 1.0)).nan_to_num(0.0)


def _inputs(table: dict[str, list[str]], train: Tensor) -> tuple[dict[str, Tensor], list[int]]:
    """Columns of numbers side by side, and of categories, with the number of values of each."""
    numbers, categories, sizes = [], [], list[int]()
    seen = set(train.tolist())
    for texts in table.values():
        try:
            numbers.append(_numbers(texts))
        except ValueError:
            counts: dict[str, int] = {}
            for place, text in enumerate(texts):
                counts[text] = counts.get(text, 0) + (place in seen)
            often = sorted((text for text in counts if counts[text]), key=lambda text: -counts[text])[:CATEGORIES]
            index = {text: i for i, text in enumerate(often, 1)}  # 0: a value that training rows do not show
            categories.append(torch.tensor([index.get(text, 0) for text in texts]))
            sizes.append(len(often) + 1)
    inputs = {}
    if numbers:
        inputs["numbers"] = _scaled(torch.stack(numbers, 1), train)
    if categories:
        inputs["categories"] = torch.stack(categories, 1)
    return inputs, sizes
