"""A folder of Hugging Face with a text classifier and its tokenizer, and a table of texts and labels."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.extras import extra
from lilliput.targets import Given
from lilliput.targets.rows import column, columns, splits
from lilliput.task import Task

ABOUT = "hf:FOLDER with --data texts.csv"
OPTIONS = ("data", "label")
PREFIX = "hf:"
TEXTS = ("text", "sentence", "review", "content")
LABELS = ("label", "labels", "target", "class")
LONGEST = 512
"""Tokens of a text that count."""


class Logits(nn.Module):
    """The logits of a classifier as its only output.

    Args:
        model: a model of transformers that returns `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        found: Tensor = self.model(**inputs).logits
        return found


def reads(target: str) -> bool:
    """Names with the prefix hf:."""
    return target.startswith(PREFIX)


def read(given: Given) -> tuple[nn.Module, Task]:
    """The classifier and the task of labelling the texts; one column holds texts, another labels (`--label`).

    Labels are numbers of classes, or names that the model's own list of labels holds.

    Raises:
        ValueError: for a folder without a classifier, a table that is not given, and labels that the model lacks.
    """
    with extra("hf", "TARGET hf:"):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    folder = Path(given.target.removeprefix(PREFIX))
    if not (folder / "config.json").is_file():
        raise ValueError(f"TARGET: {folder} must be a folder with config.json, as save_pretrained writes it.")
    if given.data is None:
        raise ValueError(f"TARGET: {given.target} must come with --data texts.csv, a table of texts and labels.")
    path = Path(given.data)
    table = columns(path)
    name = column(table, given.label, LABELS, path)
    others = [other for other in table if other != name]
    if not others:
        raise ValueError(f"TARGET: {path} must hold texts beside {name!r}, got this column alone.")
    texts = next((table[usual] for usual in TEXTS if usual in others), table[others[0]])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"TARGET: {folder} must hold a text classifier and its tokenizer, but: {str(error).splitlines()[0]} Other "
            "models are shrunk by a function of yours: see docs/guide/text.md."
        ) from error
    limit = min(
        LONGEST, int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", LONGEST))
    )
    tokens: Any = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    inputs = {key: value for key, value in tokens.items() if isinstance(value, Tensor)}
    targets = _labels(table[name], dict(model.config.label2id or {}), int(model.config.num_labels), path)
    rows = splits(targets, path)
    task = Task(
        folder.resolve().name,
        **{split: ({key: value[at] for key, value in inputs.items()}, targets[at]) for split, at in rows.items()},
        batch_size=32,
    )
    return Logits(model.eval()), task


def _labels(texts: list[str], known: dict[str, int], count: int, path: Path) -> Tensor:
    """Numbers of classes."""
    numbers = [int(known.get(text, text if text.strip().isdigit() else -1)) for text in texts]
    if wrong := sorted({text for text, number in zip(texts, numbers, strict=True) if not 0 <= number < count}):
        raise ValueError(
            f"TARGET: labels of {path} must be one of {sorted(known)} or a number below {count}, got {wrong[:3]}."
        )
    return torch.tensor(numbers)
