"""run: apply a recipe to a copy of a model. What was trained before is read from the store, not trained again."""

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import codes, copy_model, realize, uncoded
from lilliput.code.state import describe, reattach
from lilliput.recipe import Recipe, next_key, start_key
from lilliput.stage import Reference, Stage
from lilliput.store import Store
from lilliput.task import Task
from lilliput.train import Layout, Train, channels_first, fit

BUILT = 8  # structures that a runner keeps


def run(
    model: nn.Module,
    task: Task,
    recipe: Recipe | tuple[Stage, ...] | list[Stage],
    store: Store | str | Path | None = None,
    *,
    seed: int = 0,
    reference: Reference | None = None,
) -> nn.Module:
    """Apply a recipe to a copy of a model.

    Stages that change shapes are given plain tensors: codes are realized first.

    Args:
        model: the dense network.
        task: what must be preserved.
        recipe: the stages, in order.
        store: a folder in which trainings and their checkpoints are kept; a run that was killed continues from there.
        seed: part of the key under which results are kept.
        reference: the dense network with its outputs; made from `model` without one.

    Returns:
        The new model, with its codes.

    Example:
        >>> import torch, lilliput
        >>> net = torch.nn.Linear(4, 2); x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
        >>> small = run(net, lilliput.Task("toy", (x, y), (x, y)), [lilliput.Prune(0.5)])
        >>> int((small.weight == 0).sum())
        4
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe(tuple(recipe))
    if store is None:
        with TemporaryDirectory() as folder:
            return Runner(model, task, Store(folder), seed, reference).make(recipe)
    return Runner(model, task, store if isinstance(store, Store) else Store(store), seed, reference).make(recipe)


class Runner:
    """Everything that runs of recipes on one model and task share: the dense model's outputs, the store, the keys."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        store: Store,
        seed: int = 0,
        reference: Reference | None = None,
        device: str | torch.device = "cpu",
        layout: Layout = channels_first,
    ) -> None:
        self.layout = layout
        task = task.against(model if reference is None else reference.model)
        self.model, self.task, self.store, self.seed = model, task, store, seed
        self.start = start_key(model, task, seed)
        self.reference = reference or self._reference(torch.device(device))
        self.trained_s = 0.0
        self.steps = 0
        self._built: dict[str, nn.Module] = {}

    def _reference(self, device: torch.device) -> Reference:
        def load(draw: int) -> dict[str, Tensor] | None:
            return self.store.tensors(f"outputs-{self.start}-{draw}")

        def save(draw: int, outputs: dict[str, Tensor]) -> None:
            self.store.put(f"outputs-{self.start}-{draw}", {"kind": "outputs", "draw": draw}, outputs)

        dense = copy_model(self.model).requires_grad_(False)
        return Reference(dense, self.task, load, save, device)

    def key(self, recipe: Recipe) -> str:
        """The key of a recipe's result."""
        key = self.start
        for stage in recipe.stages:
            key = next_key(key, stage)
        return key

    def make(
        self, recipe: Recipe, stop: Callable[[int], bool] = lambda step: False, seconds: float | None = None
    ) -> nn.Module:
        """The model of a recipe.

        Args:
            recipe: the stages.
            stop: asked after every step of a training with its number; a training that it ends is not kept.
            seconds: the most time that a training may take; it then has as many steps as fit, at most those asked for.
        """
        keys = [self.start]
        for stage in recipe.stages:
            keys.append(next_key(keys[-1], stage))
        first = max((i for i, key in enumerate(keys) if key in self._built), default=0)
        model = copy_model(self._built[keys[first]] if first else self.model).eval()
        for i, stage in enumerate(recipe.stages[first:], first):
            if isinstance(stage, Train):
                if self._goes_on(recipe.stages[i + 1 :], keys[i + 2 :]):
                    continue  # its result is only where a later training began, which is done
                model = self._train(model, stage, keys[i], keys[i + 1], stop, seconds)
                continue
            if stage.structural and codes(model):
                model = realize(model)
            model = stage(model, self.task, self.reference)
            if stage.structural:
                self._keep(keys[i + 1], model)
        return model

    def _goes_on(self, after: tuple[Stage, ...], keys: list[str]) -> bool:
        """Whether one of the trainings that follow at once is in the store."""
        trainings = itertools.takewhile(lambda pair: isinstance(pair[0], Train), zip(after, keys, strict=True))
        return any(self.store.record(key) is not None for _, key in trainings)

    def _keep(self, key: str, model: nn.Module) -> None:
        """Keep a structure: to build one again takes longer than a hundred steps of training it."""
        self._built[key] = copy_model(model)
        while len(self._built) > BUILT:
            del self._built[next(iter(self._built))]

    def _train(
        self, model: nn.Module, stage: Train, before: str, key: str, stop: Callable[[int], bool], seconds: float | None
    ) -> nn.Module:
        if (restored := self._restored(model, key)) is not None:
            return restored
        schedule = next_key(before, replace(stage, until=None))
        began, first, last = time.monotonic(), 0, 0
        cut = False

        def load() -> dict[str, Any] | None:
            nonlocal first
            checkpoint = self.store.checkpoint(schedule)
            if checkpoint is not None:
                first = checkpoint["step"]
            return checkpoint

        def halt(step: int) -> bool:
            nonlocal cut, last
            last, cut = step, stop(step)
            return cut

        result = fit(
            stage,
            model,
            self.task,
            self.reference,
            load=load,
            stop=halt,
            save=lambda checkpoint: self.store.keep_checkpoint(schedule, checkpoint),
            seconds=seconds,
            layout=self.layout,
        )
        spent, steps = time.monotonic() - began, max(0, last - first)
        self.trained_s += spent
        if not cut:
            self.steps += steps
            record = {"kind": "train", "steps": steps, "seconds": round(spent, 3), "codes": describe(result)}
            self.store.put(key, record, result.state_dict())
            if stage.until is None:
                self.store.drop_checkpoint(schedule)
        return result

    def _restored(self, model: nn.Module, key: str) -> nn.Module | None:
        """The result of a training that is in the store, with its codes, which nothing is measured for; or None."""
        record = self.store.record(key)
        if record is not None and "codes" not in record:
            self.store.damaged.append(f"{key}.json, written by an earlier version, which did not say the codes")
            return None
        tensors = self.store.tensors(key) if record else None
        if record is None or tensors is None:
            return None
        result = uncoded(model)
        reattach(result, record["codes"], tensors)
        # At a rung rules are still at work, and what their hooks count is in the tensors too.
        missing = result.load_state_dict(tensors, strict=False).missing_keys
        return None if missing else result.eval()
