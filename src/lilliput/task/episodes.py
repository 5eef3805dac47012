"""Episodes: a network as a policy in a simulator, scored by what it earns, trained on states the dense one visits."""

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lilliput.task.arrays import Arrays
from lilliput.task.meaning import Kind
from lilliput.task.nested import Model, joined, mapped, on, predict
from lilliput.task.protocol import Score
from lilliput.task.read import source


def greedy(outputs: Tensor) -> Any:
    """The action with the largest output, for each state."""
    return outputs.argmax(-1).numpy()


class Episodes(Arrays):
    """Use a network as a policy: the score is the mean return of its episodes, each begun by a seed.

    Splits are seeds. The dense network plays the training seeds once, and training imitates it on the states that it
    visited; there are no labels. Decisions read the returns on the validation seeds.

    Args:
        name: what the task is called in files and reports.
        make: () -> an environment with the interface of Gymnasium: `reset(seed=...)` -> (state, info) and
            `step(action)` -> (state, reward, terminated, truncated, info). A state is an array, or arrays in a
            dictionary or tuple.
        policy: the dense network, whose states are trained on.
        train: the seeds of the episodes that the dense network plays for training.
        val: the seeds that decisions read.
        test: the seeds that are read once, at the end; they may be left out.
        steps: the most steps of an episode.
        act: outputs (n, ...) on the processor -> n actions; without it the action with the largest output.
        outputs: what the outputs are: "logits" of actions, or "values".
        batch_size: states in a training batch.

    Raises:
        ValueError: without a seed in a split.

    Example:
        >>> class Coin:
        ...     def reset(self, seed):
        ...         self.side = seed % 2
        ...         return np.array([self.side], "float32"), {}
        ...     def step(self, action):
        ...         return np.array([self.side], "float32"), float(action == self.side), True, False, {}
        >>> guess = lambda x: torch.cat([1 - x, x], 1)
        >>> Episodes("coin", Coin, guess, train=range(4), val=range(4)).score(guess).value
        1.0
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        policy: Model,
        train: Iterable[int],
        val: Iterable[int],
        test: Iterable[int] | None = None,
        *,
        steps: int = 500,
        act: Callable[[Any], Any] = greedy,
        outputs: Kind = "logits",
        batch_size: int = 64,
    ) -> None:
        self._make, self._act, self._steps = make, act, steps
        given = {"train": train, "val": val} | ({} if test is None else {"test": test})
        self._seeds = {split: tuple(map(int, seeds)) for split, seeds in given.items()}
        for split, seeds in self._seeds.items():
            if not seeds:
                raise ValueError(f"Episodes {name}: {split} must have at least one seed, got none.")
        # Whatever is compared on test is returns; its states stand in for those of val, so that nobody plays it early.
        seen = [self._played(policy, self._seeds[split])[1] for split in ("train", "val")]
        super().__init__(
            name,
            (seen[0], None),
            (seen[1], None),
            None if test is None else (seen[1], None),
            loss="mse",
            metric="mse",
            higher_is_better=True,
            outputs=outputs,
            batch_size=batch_size,
        )
        self.loss_name, self.metric_name = "", "return"

    def _played(self, policy: Model, seeds: tuple[int, ...]) -> tuple[list[float], Any]:
        """(return of each episode, all states in the order of steps): episodes run side by side, to call it seldom."""
        worlds = [self._make() for _ in seeds]
        state = [world.reset(seed=seed)[0] for world, seed in zip(worlds, seeds, strict=True)]
        returns, alive, seen = [0.0] * len(seeds), list(range(len(seeds))), []
        for _ in range(self._steps):
            together = mapped(lambda *parts: torch.from_numpy(np.stack(parts)), *(_arrays(state[i]) for i in alive))
            seen.append(together)
            actions = self._act(on(predict(policy, together, len(alive)), torch.device("cpu")))
            going = []
            for i, action in zip(alive, actions, strict=True):
                state[i], reward, terminated, truncated, _ = worlds[i].step(action)
                returns[i] += float(reward)
                if not (terminated or truncated):
                    going.append(i)
            alive = going
            if not alive:
                break
        return returns, joined(seen)

    def against(self, dense: Model) -> "Episodes":
        return self  # it is judged by what its episodes earn

    def score(self, model: Model, split: str = "val") -> Score:
        self.split(split)
        outcomes = np.array(self._played(model, self._seeds[split])[0])
        if not np.isfinite(outcomes).all():
            raise ValueError(f"Task {self.name}: the return of every episode must be a finite number, got {outcomes}.")
        return Score(float(outcomes.mean()), outcomes)

    def size(self, split: str) -> int:
        """How many episodes a split has."""
        self.split(split)
        return len(self._seeds[split])

    @property
    def examples(self) -> int:
        """How many states training draws from."""
        return super().examples

    @cached_property
    def fingerprint(self) -> str:
        text = f"{super().fingerprint} {self._seeds} {self._steps} {source(self._make)} {source(self._act)}"
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _arrays(state: Any) -> Any:
    return mapped(lambda leaf: np.asarray(leaf, np.float32 if np.asarray(leaf).dtype == np.float64 else None), state)
