"""Reference: the dense model, what it says and what it sees on the way, each computed once where that is possible."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.task import Batch, Task, call, joined, leaves, mapped, on, take
from lilliput.task.nested import output_names as names

CHUNK = 64  # examples that the dense model is run on at a time


def _nothing_stored(draw: int) -> dict[str, Tensor] | None:
    return None


def _not_stored(draw: int, outputs: dict[str, Tensor]) -> None:
    return None


@dataclass
class Reference:
    """Hold the dense model, and compute its outputs and features on any batch.

    What it computes for a training example under an augmentation is kept in main memory, where the batch says which
    examples it holds (`batch.index`) and the task how many there are; outputs go to the store as well. For any other
    batch (a loader of one's own, a batch that a rule has mixed) the model is run.

    Args:
        model: the dense model; it is moved to `device` and set to eval mode.
        task: the task whose batches come; None where only batches without an index do.
        load: gives the stored outputs of an augmentation by name, or None.
        save: stores the outputs of all examples under an augmentation.
        device: where the model runs and training happens.
        example: inputs of one example, where there is no task to ask.
        keep_bytes: most memory for what is kept; beyond it the model is run again.

    Example:
        >>> dense = nn.Linear(2, 3)
        >>> Reference(dense).outputs(Batch(torch.ones(4, 2), None, None, 0)).shape
        torch.Size([4, 3])
    """

    model: nn.Module
    task: Task | None = None
    load: Callable[[int], dict[str, Tensor] | None] = _nothing_stored
    save: Callable[[int, dict[str, Tensor]], None] = _not_stored
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    example: Any = None
    keep_bytes: int = 2**31

    def __post_init__(self) -> None:
        self._tables: dict[Hashable, _Table] = {}
        self._refused: set[Hashable] = set()
        self.model.to(self.device).eval()

    def outputs(self, batch: Batch, draws: int | None = None) -> Any:
        """The dense model's outputs for a batch, in whatever structure it returns them.

        Args:
            batch: the batch.
            draws: from how many augmentations they are taken: for a batch under a later one, those of its examples
                under the one that is as far behind a multiple of this. None: from the batch's own.
        """
        if batch.index is None or self.task is None:
            return self._kept(("outputs", batch.draw), batch, self._call)
        draw = batch.draw if draws is None else batch.draw % draws
        key = ("outputs", draw)
        if key not in self._tables:
            self.prepare(draw)
        if draw != batch.draw and not (key in self._tables and self._tables[key].holds(batch.index)):
            batch = self.task.batch(batch.index, draw)
        return self._kept(key, batch, self._call)

    def features(
        self, batch: Batch, paths: tuple[str, ...], reduce: Callable[[Tensor], Tensor] = lambda h: h
    ) -> dict[str, Tensor]:
        """What modules of the dense model return for a batch, by path.

        Args:
            batch: the batch.
            paths: paths of modules; of a module that returns several tensors the first is taken.
            reduce: what is kept of each, such as a mean over places; a function that is the same object every time.
        """
        key, compute = ("features", paths, reduce, batch.draw), partial(self._features, paths, reduce)
        features: dict[str, Tensor] = self._kept(key, batch, compute)
        return features

    def prepare(self, draw: int) -> None:
        """Make room for the outputs under an augmentation, from the store where they are."""
        key = ("outputs", draw)
        if self.task is None or key in self._tables or key in self._refused:
            return
        self.task.prepare(draw)
        example = self._call(self.sample())
        table, stored, order = self._room(key, example), self.load(draw), names(example)
        if table is not None and stored is not None and set(stored) == set(order):
            rows = iter([stored[name] for name in order])
            table.rows, table.whole = mapped(lambda leaf: next(rows), example), True
        elif table is not None:
            table.store = partial(self.save, draw)

    def sample(self) -> Any:
        """Inputs of one example.

        Raises:
            ValueError: where neither an example nor a task was given.
        """
        if self.example is None and self.task is None:
            raise ValueError(
                "Reference: an example must be given where there is no task, got None. Pass "
                "reference=lilliput.Reference(dense, example=inputs[:1])."
            )
        return self.task.example if self.example is None and self.task else self.example

    def _call(self, inputs: Any) -> Any:
        if self.model.training:  # a module that holds it was set to train
            self.model.eval()
        with torch.no_grad():
            return call(self.model, on(inputs, self.device))

    def _features(self, paths: tuple[str, ...], reduce: Callable[[Tensor], Tensor], inputs: Any) -> dict[str, Tensor]:
        with watched(self.model, paths) as seen:
            self._call(inputs)
        return {path: reduce(seen[path]) for path in paths}

    def _kept(self, key: Hashable, batch: Batch, compute: Callable[[Any], Any]) -> Any:
        """`compute(batch.inputs)`, from the table of `key` for the examples that are in it."""
        index = batch.index
        if index is None or self.task is None or key in self._refused:
            return compute(batch.inputs)
        table = self._tables.get(key)
        if table is None or not table.holds(index):
            # The whole batch, since a matrix product of fewer rows may round differently: a training that goes on after
            # an interruption must see the same numbers.
            parts = [compute(take(batch.inputs, slice(i, i + CHUNK))) for i in range(0, len(index), CHUNK)]
            table = table or self._room(key, parts[0], min(CHUNK, len(index)))
            if table is None or not table.put(index, joined(parts)):
                self._tables.pop(key, None)
                self._refused.add(key)
                return compute(batch.inputs)
        return mapped(lambda rows: rows[index].to(self.device), table.rows)

    def _room(self, key: Hashable, rows: Any, count: int = 1) -> "_Table | None":
        """A table for the rows of all training examples, or None where they have no row each or memory is short."""
        assert self.task is not None
        examples, tensors = self.task.examples, leaves(rows)
        if not tensors or any(leaf.ndim == 0 or len(leaf) != count for leaf in tensors):
            self._refused.add(key)
            return None
        size = examples * sum(leaf[0].numel() * leaf.element_size() for leaf in tensors)
        if size + sum(table.size for table in self._tables.values()) > self.keep_bytes:
            self._refused.add(key)
            return None
        empty = mapped(lambda leaf: torch.zeros(examples, *leaf.shape[1:], dtype=leaf.dtype), rows)
        # Several threads may come here at once; one of them makes the table.
        return self._tables.setdefault(key, _Table(empty, torch.zeros(examples, dtype=torch.bool), size))


def asked(reference: Reference | None, who: str) -> Reference:
    """The reference that a method asks for; raises ValueError where there is none."""
    if reference is None:
        raise ValueError(
            f"{who}: a reference must be given (the dense model), got None. Pass reference=lilliput.Reference(dense, "
            "task), or teacher=dense in a loop without a task."
        )
    return reference


@dataclass(eq=False)
class _Table:
    """Rows of all training examples, which of them are known, and whether all are."""

    rows: Any
    known: Tensor
    size: int
    store: Callable[[dict[str, Tensor]], None] | None = None
    whole: bool = False

    def holds(self, index: Tensor) -> bool:
        """Whether the rows of these examples are known."""
        return self.whole or bool(self.known[index].all())

    def put(self, index: Tensor, rows: Any) -> bool:
        """Keep those rows that are not known yet; False where they have another shape than those before."""
        mine, new, missing = leaves(self.rows), leaves(rows), ~self.known[index]
        if [leaf.shape[1:] for leaf in mine] != [leaf.shape[1:] for leaf in new]:
            return False
        for kept, row in zip(mine, new, strict=True):
            kept[index[missing]] = row.to(kept)[missing]
        self.known[index] = True
        if bool(self.known.all()) and not self.whole:
            self.whole = True
            if self.store is not None:
                self.store(dict(zip(names(self.rows), mine, strict=True)))
        return True


@contextmanager
def watched(model: nn.Module, paths: tuple[str, ...]) -> Iterator[dict[str, Tensor]]:
    """What modules return, by path, in forward passes inside the block."""
    seen: dict[str, Tensor] = {}

    def watch(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        seen[path] = leaves(output)[0]

    handles = [model.get_submodule(path).register_forward_hook(partial(watch, path)) for path in paths]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
