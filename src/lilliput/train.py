"""Train: the one training loop. Distillation, pruning and quantizing happen in it as rules."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.layout import place
from lilliput.modes import train_
from lilliput.muon import Muon
from lilliput.rule import Rule, State, frozen, nothing, start_anew, thawed, to
from lilliput.rule import parameters as extras
from lilliput.schedule import Cosine, Schedule, at
from lilliput.stage import Reference, Stage, on
from lilliput.task import Batch, Task, call

CHECKPOINT_SECONDS = 30.0


Layout = Callable[[nn.Module, Task, int | None], bool]
"""(model, task, batch size) -> whether images lie with their channels last while it trains (lilliput.layout)."""


def channels_first(model: nn.Module, task: Task, batch_size: int | None) -> bool:
    """The layout of torch."""
    return False


class Diverged(ArithmeticError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Train(Stage):
    """Train for `steps` optimizer steps: supervised * (the task's loss) + what the rules add.

    Args:
        steps: optimizer steps of the whole training.
        lr: the learning rate, a number or a schedule of the step.
        rules: what happens while it trains: gradual pruning, distillation.
        supervised: the weight of the task's own loss (against the dense network's outputs where the task has no
            labels); 0 leaves the rules' losses alone.
        batch_size: examples in a batch; None: the task's own.
        optimizer: "adamw", "sgd" (momentum 0.9, Nesterov), or "muon" (lilliput.muon, with AdamW for vectors and tables
            of embeddings), which needs about half the steps, and more time for each.
        weight_decay: of tensors with two and more dimensions.
        clip: the largest norm of the whole gradient; 0: as it is.
        seed: of the order of the batches and of random numbers inside the network.
        until: stop at this step, a rung of the same schedule; None: run to the end. Training on from a rung gives the
            same numbers as never having stopped.

    Raises:
        ValueError: for steps or until below 1, and for another optimizer.
        Diverged: while training, when the loss or a weight is not finite.

    Example:
        >>> x, y = torch.randn(32, 4), torch.zeros(32, dtype=torch.long)
        >>> task = Task("zeros", train=(x, y), val=(x, y))
        >>> net = nn.Linear(4, 2)
        >>> trained = Train(20, lr=0.1)(net, task, Reference(net, task))
        >>> task.score(trained).value > 0.9
        True
    """

    steps: int
    lr: float | Schedule = field(default_factory=lambda: Cosine(3e-3))
    rules: tuple[Rule, ...] = ()
    supervised: float = 1.0
    batch_size: int | None = None
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    clip: float = 0.0
    seed: int = 0
    until: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.until is not None and not 1 <= self.until <= self.steps):
            raise ValueError(
                f"Train: steps must be at least 1 and until between 1 and steps, got steps={self.steps}, "
                f"until={self.until}."
            )
        if self.optimizer not in ("adamw", "sgd", "muon"):
            raise ValueError(f"Train: optimizer must be 'adamw', 'sgd' or 'muon', got {self.optimizer!r}.")

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return fit(self, model, task, reference)


def _optimizer(
    stage: Train, parameters: Iterable[nn.Parameter], model: nn.Module | None = None
) -> torch.optim.Optimizer:
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("Train: the model must have a trainable parameter, got none. Unfreeze one.")
    matrices = [p for p in trained if (p.dim() > 1 and p.shape[-1] > 1) or p.dim() > 2]
    chosen = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if id(p) not in chosen], "weight_decay": 0.0},
    ]
    if stage.optimizer == "muon":
        # A row of a table is learned from the few examples that have it: it shares no directions with the others.
        modules = [] if model is None else [*model.modules()]
        tables = {id(p) for module in modules if _looks_up(module) for p in module.parameters()}
        hidden = [p for p in matrices if id(p) not in tables and not p.is_complex()]
        chosen = {id(p) for p in hidden}
        groups[0]["params"] = [p for p in matrices if id(p) not in chosen]
        groups.append({"params": hidden, "weight_decay": stage.weight_decay, "orthogonal": True})
    groups = [group for group in groups if group["params"]]
    if stage.optimizer == "muon":
        return Muon(groups)
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    return torch.optim.AdamW(groups, lr=1e-3, fused=not any(p.is_complex() for p in trained))


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def fit(
    stage: Train,
    model: nn.Module,
    task: Task,
    reference: Reference,
    *,
    load: Callable[[], dict[str, Any] | None] = lambda: None,
    save: Callable[[dict[str, Any]], None] = lambda checkpoint: None,
    stop: Callable[[int], bool] = lambda step: False,
    seconds: float | None = None,
    layout: Layout = channels_first,
) -> nn.Module:
    """Run `stage` on a copy of `model`; `load` and `save` keep the checkpoints, `stop(step)` ends it early.

    A checkpoint holds the model, the optimizer, every rule's state with its learnable extras and the step; with batches
    that are a pure function of (seed, step) the rest of the training is the same as if it had never been interrupted.

    Args:
        stage: the training.
        model: what it begins with; it is not changed.
        task: gives the batches.
        reference: the dense network.
        load: gives the checkpoint to go on from, or None.
        save: keeps a checkpoint.
        stop: asked after every step.
        seconds: the most time that it may take. Schedules and rules then follow steps or time, whichever is further, so
            a training that the machine slows down has fewer steps and still ends well.
        layout: how images lie in memory while it trains.
    """
    # glibc hands large blocks back and faults them in anew at every step, until one of them has been freed.
    torch.empty(30 * 2**18).zero_()
    model = copy_model(model).to(reference.device)
    train_(model, task)
    until = stage.until or stage.steps
    checkpoint = _usable(load(), until)
    # Momenta are kept as the weights lie, so a training goes on in the layout that it began with.
    last = layout(model, task, stage.batch_size) if checkpoint is None else checkpoint.get("channels_last", False)
    states = [to(rule.begin(model, task, reference, stage.steps), reference.device) for rule in stage.rules]
    place(model, last)
    optimizer = _optimizer(stage, [*model.parameters(), *extras(states)], model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step, steps, course = 0, stage.steps, Course(stage.steps, seconds)
    if checkpoint is not None:
        states = _restored(checkpoint, model, optimizer, states, reference.device)
        step = checkpoint["step"]
        course = Course(stage.steps, seconds, checkpoint.get("done", 0.0))
    else:
        torch.manual_seed(stage.seed * 7919)
    saved = time.monotonic()
    for batch in task.batches(until, stage.seed, stage.batch_size, step):
        batch, steps = _moved(batch, reference.device), course.steps_at(step)
        for rule, state in zip(stage.rules, states, strict=True):
            batch = rule.batch(state, model, step, steps, batch)
        _set_lr(optimizer, at(stage.lr, step, steps))
        output = call(model, batch.inputs)
        loss = _loss(stage, states, model, task, (step, steps), batch, output, reference)
        _clear(parameters)
        loss.backward()
        for i, rule in enumerate(stage.rules):
            states[i] = rule.on_grad(states[i], model, step, steps)
        if stage.clip:
            nn.utils.clip_grad_norm_(parameters, stage.clip, foreach=True)
        if step % 20 == 0 and not bool(torch.isfinite(loss)):
            raise Diverged(
                f"Train: the loss must stay finite, got {float(loss.detach())} at step {step}. Lower the learning rate."
            )
        optimizer.step()
        for i, rule in enumerate(stage.rules):
            states[i] = start_anew(rule.on_step(states[i], model, step, steps), model, optimizer)
        step += 1
        if stop(step) or step == steps:
            break
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(_checkpoint(model, optimizer, states, step, course.done, last))
            saved = time.monotonic()
    _check_finite(parameters)
    if step < steps:
        save(_checkpoint(model, optimizer, states, step, course.done, last))
    else:
        for rule, state in zip(stage.rules, states, strict=True):
            rule.end(state, model)
    return place(model.cpu(), last=False).eval()


class Course:
    """How far a training is on its way: by steps, or by time where it has a limit and time is further.

    Args:
        steps: the most steps.
        seconds: the most time, above 0; None for none.
        done: the fraction that was done before.

    Example:
        >>> Course(100, None).steps_at(50), Course(100, 1e9).steps_at(50), Course(100, 1e-9).steps_at(50)
        (100, 100, 51)
    """

    def __init__(self, steps: int, seconds: float | None, done: float = 0.0) -> None:
        self.steps, self.seconds, self.done = steps, seconds, done
        self.began = time.monotonic() - done * (seconds or 0.0)

    def steps_at(self, step: int) -> int:
        """How many steps the whole training has, as `step` (from 0) begins: those at which `step` is as far as it is.

        The last step before the time is over knows that it is the last.
        """
        if self.seconds is None:
            return self.steps
        self.done = max(self.done, step / self.steps, min(1.0, (time.monotonic() - self.began) / self.seconds))
        return max(step + 1, round(step / self.done)) if step and self.done else self.steps


def _loss(
    stage: Train,
    states: list[State],
    model: nn.Module,
    task: Task,
    place: tuple[int, int],
    batch: Batch,
    output: Any,
    reference: Reference,
) -> Tensor:
    if stage.supervised and not task.labelled and batch.targets is None:
        batch = replace(batch, targets=task.imitated(reference.outputs(batch)))
    loss = task.loss(output, batch) * stage.supervised if stage.supervised else nothing(output)
    for rule, state in zip(stage.rules, states, strict=True):
        added = rule.loss(state, model, *place, batch, output, reference)
        if added is not None:
            loss = loss + added
    return loss


def _usable(checkpoint: dict[str, Any] | None, until: int) -> dict[str, Any] | None:
    return None if checkpoint is None or checkpoint["step"] > until else checkpoint


def _restored(
    checkpoint: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    states: list[State],
    device: torch.device,
) -> list[State]:
    """Load a checkpoint into the model, the optimizer and the random generators; returns the states of the rules."""
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    restored = [
        thawed(state, saved, lambda value: value.to(device))
        for state, saved in zip(states, checkpoint["rules"], strict=True)
    ]
    _set_random(checkpoint["random"])
    return restored


def _clear(parameters: list[nn.Parameter]) -> None:
    """Drop the gradients; `zero_grad` of torch's optimizers raises while another thread exports a model."""
    for parameter in parameters:
        parameter.grad = None


def _set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _check_finite(parameters: list[Tensor]) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise Diverged("Train: the weights must stay finite, got NaN or infinity. Lower the learning rate.")


def _checkpoint(
    model: nn.Module, optimizer: torch.optim.Optimizer, states: list[State], step: int, done: float, channels_last: bool
) -> dict[str, Any]:
    random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rules": [frozen(state) for state in states],
        "step": step,
        "done": done,
        "channels_last": channels_last,
        "random": random,
    }


def _set_random(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if torch.cuda.is_available() and len(states) == 1 + torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states[1:])


def _moved(batch: Batch, device: torch.device) -> Batch:
    """A batch's inputs and targets where the model is; `index` stays, it points into main memory."""
    if device.type == "cpu":
        return batch
    return replace(batch, inputs=on(batch.inputs, device), targets=on(batch.targets, device))
