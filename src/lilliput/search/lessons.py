"""Lessons: the dense network's outputs on the training data, which workers compute side by side before they train."""

from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lilliput.search.job import Job
from lilliput.search.pool import Pool
from lilliput.search.work import lesson, teach
from lilliput.task import joined, leaves
from lilliput.task.nested import output_names

PART = 512  # training examples whose dense outputs a worker computes in one call


@dataclass(frozen=True)
class Lesson:
    """The dense network's outputs on the training examples under one augmentation, as workers compute them.

    Args:
        key: under which they are kept.
        draw: the number of the augmentation.
        futures: their parts.
    """

    key: str
    draw: int
    futures: "list[Future[Any]]"

    @property
    def ready(self) -> bool:
        """Whether they need not be waited for."""
        return all(future.done() for future in self.futures)

    def keep(self, job: Job, pool: Pool) -> None:
        """Wait for them and keep them, where workers map them and in the store."""
        whole = joined([future.result() for future in self.futures])
        outputs = dict(zip(output_names(whole), leaves(whole), strict=True))
        pool.put(lesson(self.key), outputs)
        job.store.put(self.key, {"kind": "outputs", "draw": self.draw}, outputs)


def lessons(job: Job, pool: Pool) -> list[Lesson]:
    """Have the dense network's outputs on every (example, augmentation) computed side by side; workers map them."""
    waiting: list[Lesson] = []
    for draw in range(min(job.taught, job.task.draws)):
        key = f"outputs-{job.runner.start}-{draw}"
        if (known := job.store.tensors(key)) is not None:
            pool.put(lesson(key), known)
            continue
        parts = list(pairwise([*range(0, job.task.examples, PART), job.task.examples]))
        futures = [pool.submit(teach, draw, first, last) for first, last in parts]
        waiting.append(Lesson(key, draw, futures))
    return waiting
