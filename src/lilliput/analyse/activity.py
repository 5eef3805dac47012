"""Activity: measure which share of a network's units is active, layer by layer, once or over a training."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.errors import near
from lilliput.finding import Finding
from lilliput.rule import Rule, State
from lilliput.stage import Reference, calibration, on
from lilliput.task import Task, leaves, length, predict

SWITCHES = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardswish)


@dataclass(frozen=True)
class Activity(Finding):
    """Hold the fraction of each layer's outputs that are not zero, over all examples and places, and its dead units.

    Args:
        layers: The names of the layers.
        active: A fraction in [0, 1] for each.
        units: How many units each has (channels, where the output is an image).
        dead: How many of them no example switches on.
        examples: How many examples were looked at.

    Example:
        >>> print(Activity(("relu",), (0.5,), (8,), (1,), 100))
        relu: 50.0% active, 1 of 8 dead
    """

    layers: tuple[str, ...]
    active: tuple[float, ...]
    units: tuple[int, ...]
    dead: tuple[int, ...]
    examples: int

    def __str__(self) -> str:
        rows = zip(self.layers, self.active, self.units, self.dead, strict=True)
        return "\n".join(f"{name}: {active:.1%} active, {dead} of {units} dead" for name, active, units, dead in rows)


def activity(model: nn.Module, task: Task, where: str = "*", split: str = "val") -> Activity:
    """Measure how active the layers of a model are on a split of its task, in eval mode.

    active_l = mean over examples i, units j (and places) of [h_l(x_i)_j != 0].

    Args:
        model: The model.
        task: Gives the inputs.
        where: Glob patterns on module names, separated by commas, whose outputs are counted; "*" takes every activation
            module that can put out zeros (ReLU, ReLU6, Threshold, Hardswish).
        split: "train", "val" or "test".

    Returns:
        The finding.

    Raises:
        ValueError: When `where` matches no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]])), net[0].bias.data.zero_()
        >>> x = torch.tensor([[1.0], [2.0], [3.0]])
        >>> print(activity(net, Task("tiny", train=(x, x), val=(x, x), loss="mse", metric="mse")))
        1: 50.0% active, 1 of 2 dead

    Source:
        The fraction that Bricken et al., Emergence of sparse representations from noise, ICML 2023, follow.
    """
    return _seen(model, _chosen(model, where, "activity"), task.probe(split).inputs)


@dataclass(frozen=True)
class FollowActivity(Rule):
    """Record how active the layers are while a network trains.

    Every `every` steps, on the first `examples` training inputs (evenly spread, without augmentation or noise), in eval
    mode. The state holds "active NAME" and "dead NAME", one value for each record, and "steps", after how many steps it
    was made; `activities(state)` reads them.

    Args:
        every: Steps between records.
        where: As in `activity`.
        examples: How many training inputs are looked at.

    Raises:
        ValueError: Without a task, for settings below 1, and when `where` matches no module.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> x = torch.rand(8, 1); task = Task("tiny", train=(x, x), val=(x, x), loss="mse", metric="mse")
        >>> with FollowActivity(every=2).attached(net, sgd, steps=4, task=task) as driver:
        ...     for _ in range(4): net(x).sum().backward(); sgd.step()
        >>> driver.state["steps"].tolist()
        [0, 2, 4]
    """

    every: int = 100
    where: str = "*"
    examples: int = 256

    def __post_init__(self) -> None:
        if self.every < 1 or self.examples < 1:
            raise ValueError(
                f"FollowActivity: every and examples must be at least 1, got every={self.every}, "
                f"examples={self.examples}."
            )

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        if task is None:
            raise ValueError("FollowActivity: a task must be given to take inputs from, got None. Pass task=.")
        inputs = calibration(task, self.examples)
        keys = inputs if isinstance(inputs, dict) else range(len(leaves(inputs)))
        state = {f"input {key}": value for key, value in zip(keys, leaves(inputs), strict=True)}
        return self._recorded({**state, "steps": torch.zeros(0, dtype=torch.int64)}, model, 0)

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        return self._recorded(state, model, step + 1) if (step + 1) % self.every == 0 or step + 1 == steps else state

    def _recorded(self, state: State, model: nn.Module, step: int) -> State:
        given = {key.removeprefix("input "): value for key, value in state.items() if key.startswith("input ")}
        inputs: Any = given
        if "0" in given:
            inputs = given["0"] if len(given) == 1 else tuple(given[str(i)] for i in range(len(given)))
        seen = _seen(model, _chosen(model, self.where, "FollowActivity"), inputs)
        new = dict(state)
        new["steps"] = torch.cat([state["steps"], torch.tensor([step], device=state["steps"].device)])
        for i, name in enumerate(seen.layers):
            for key, value in ((f"active {name}", float(seen.active[i])), (f"dead {name}", float(seen.dead[i]))):
                now = torch.tensor([value], device=state["steps"].device)
                new[key] = torch.cat([state[key], now]) if key in state else now
        return new


def activities(state: State) -> dict[str, tuple[tuple[int, float], ...]]:
    """Read what `FollowActivity` recorded: for each layer (after how many steps, the fraction active)."""
    steps = state["steps"].tolist()
    return {
        key.removeprefix("active "): tuple(zip(steps, value.tolist(), strict=True))
        for key, value in state.items()
        if key.startswith("active ")
    }


def _chosen(model: nn.Module, where: str, who: str) -> list[str]:
    patterns = [pattern.strip() for pattern in where.split(",")]
    known = {name: module for name, module in model.named_modules() if name and "parametrizations" not in name}
    chosen = [
        name
        for name, module in known.items()
        if (isinstance(module, SWITCHES) if where == "*" else any(fnmatchcase(name, pattern) for pattern in patterns))
    ]
    if not chosen:
        what = "the model must have activation modules (ReLU)" if where == "*" else "where must match a module"
        raise ValueError(
            f"{who}: {what}, got {where!r}. {near(where, known)} An activation that is a function has "
            "no name: choose the module whose output it is."
        )
    return chosen


def _seen(model: nn.Module, names: list[str], inputs: Any) -> Activity:
    """What the modules put out on these inputs, as counts."""
    ons, values = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    alive: dict[str, Tensor] = {}

    def listen(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() > 1:
                active = output != 0
                ons[name] += int(active.sum())
                values[name] += active.numel()
                unit = 1 if active.dim() > 3 else -1  # of pictures the channels, of vectors and sequences the features
                once = active.transpose(unit, -1).reshape(-1, active.shape[unit]).any(0)
                alive[name] = alive[name] | once if name in alive else once

        return hook

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _listening(model, {name: listen(name) for name in names}):
        predict(model, on(inputs, device))
    shown = [name for name in names if name in alive]
    return Activity(
        tuple(shown),
        tuple(ons[name] / max(values[name], 1) for name in shown),
        tuple(len(alive[name]) for name in shown),
        tuple(int((~alive[name]).sum()) for name in shown),
        length(inputs),
    )


@contextmanager
def _listening(model: nn.Module, hooks: dict[str, Any]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
