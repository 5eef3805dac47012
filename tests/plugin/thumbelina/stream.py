"""A task that holds no array of examples: sequences drawn anew for every step."""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lilliput.task import Batch, Meaning, Score, Task, predict, source


class MarkovStream(Task):
    """Which symbol comes next: walks through a random graph of symbols, no two batches alike.

    Args:
        symbols: how many there are.
        length: of each walk.
        held_out: how many walks val and test have.
        seed: of the graph.
    """

    metric_name = "next symbol"
    meaning = Meaning("logits", ignore=None, labels=())
    loss_name = "cross_entropy"

    def __init__(self, symbols: int = 6, length: int = 4, held_out: int = 64, seed: int = 0) -> None:
        self.name = f"walks of {length}"
        self.length, self.held_out, self.seed = length, held_out, seed
        generator = torch.Generator().manual_seed(seed)
        self.chances = (4 * torch.randn(symbols, symbols, generator=generator)).softmax(1)

    @property
    def splits(self) -> tuple[str, ...]:
        return ("train", "val", "test")

    @property
    def fingerprint(self) -> str:
        told = repr((self.chances.tolist(), self.length, self.held_out, self.batch_size)) + source(type(self))
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def probe(self, split: str) -> Batch:
        return self._walks(self.held_out, -1 - self.splits.index(split))

    def batches(self, steps: int, seed: int, batch_size: int | None = None, first: int = 0) -> Iterator[Batch]:
        for step in range(first, steps):
            yield self._walks(batch_size or self.batch_size, (seed << 32) + step)

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return F.cross_entropy(output, batch.targets)

    def score(self, model: Any, split: str = "val") -> Score:
        batch = self.probe(split)
        outputs = predict(model, batch.inputs)
        right = (outputs.argmax(1) == batch.targets).double().numpy()
        return Score(float(right.mean()), right, outputs)

    def _walks(self, count: int, number: int) -> Batch:
        generator = torch.Generator().manual_seed(hash((self.seed, number)) % 2**63)
        walk = [torch.randint(len(self.chances), (count,), generator=generator)]
        for _ in range(self.length):
            walk.append(torch.multinomial(self.chances[walk[-1]], 1, generator=generator)[:, 0])
        seen = F.one_hot(torch.stack(walk[:-1], 1), len(self.chances)).float()
        return Batch(seen, walk[-1])
