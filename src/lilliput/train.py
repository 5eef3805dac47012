"""Train: the one training loop. Distillation, pruning and quantizing happen in it as rules."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.rule import Rule, State, frozen, nothing, start_anew, thawed, to
from lilliput.rule import parameters as extras
from lilliput.schedule import Cosine, Schedule, at
from lilliput.stage import Reference, Stage, on
from lilliput.task import Batch, Task, call

CHECKPOINT_SECONDS = 30.0


class Diverged(ArithmeticError):
    """The loss became NaN or infinite."""


@dataclass(frozen=True)
class Train(Stage):
    """Train for `steps` optimizer steps: supervised * (the task's loss) + what the rules add.

    Args:
        steps: optimizer steps of the whole training.
        lr: the learning rate, a number or a schedule of the step.
        rules: what happens while it trains: gradual pruning, distillation.
        supervised: the weight of the task's own loss; 0 leaves the rules' losses alone.
        batch_size: examples in a batch; None: the task's own.
        optimizer: "adamw" or "sgd" (momentum 0.9, Nesterov).
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
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f"Train: optimizer must be 'adamw' or 'sgd', got {self.optimizer!r}.")

    def __call__(self, model: nn.Module, task: Task, reference: Reference) -> nn.Module:
        return fit(self, model, task, reference)


def _optimizer(stage: Train, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    trained = [p for p in parameters if p.requires_grad]
    if not trained:
        raise ValueError("Train: the model must have a trainable parameter, got none. Unfreeze one.")
    matrices = [p for p in trained if (p.dim() > 1 and p.shape[-1] > 1) or p.dim() > 2]
    chosen = {id(p) for p in matrices}
    groups = [
        {"params": matrices, "weight_decay": stage.weight_decay},
        {"params": [p for p in trained if id(p) not in chosen], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=True)
    return torch.optim.AdamW(groups, lr=1e-3, fused=not any(p.is_complex() for p in trained))


def fit(
    stage: Train,
    model: nn.Module,
    task: Task,
    reference: Reference,
    *,
    load: Callable[[], dict[str, Any] | None] = lambda: None,
    save: Callable[[dict[str, Any]], None] = lambda checkpoint: None,
    stop: Callable[[int], bool] = lambda step: False,
) -> nn.Module:
    """Run `stage` on a copy of `model`; `load` and `save` keep the checkpoints, `stop(step)` ends it early.

    A checkpoint holds the model, the optimizer, every rule's state with its learnable extras and the step; with batches
    that are a pure function of (seed, step) the rest of the training is the same as if it had never been interrupted.
    """
    # glibc hands large blocks back and faults them in anew at every step, until one of them has been freed.
    torch.empty(30 * 2**18).zero_()
    model = copy_model(model).to(reference.device)
    model.train()
    states = [to(rule.begin(model, task, reference, stage.steps), reference.device) for rule in stage.rules]
    optimizer = _optimizer(stage, [*model.parameters(), *extras(states)])
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step, until = 0, stage.until or stage.steps
    checkpoint = load()
    if checkpoint is not None and checkpoint["step"] <= until:
        states = _restored(checkpoint, model, optimizer, states, reference.device)
        step = checkpoint["step"]
    else:
        torch.manual_seed(stage.seed * 7919)
    saved = time.monotonic()
    for batch in task.batches(until, stage.seed, stage.batch_size, step):
        batch = _moved(batch, reference.device)
        for rule, state in zip(stage.rules, states, strict=True):
            batch = rule.batch(state, model, step, stage.steps, batch)
        _set_lr(optimizer, at(stage.lr, step, stage.steps))
        output = call(model, batch.inputs)
        loss = _loss(stage, states, model, task, step, batch, output, reference)
        _clear(parameters)
        loss.backward()
        for i, rule in enumerate(stage.rules):
            states[i] = rule.on_grad(states[i], model, step, stage.steps)
        if stage.clip:
            nn.utils.clip_grad_norm_(parameters, stage.clip, foreach=True)
        if step % 20 == 0 and not bool(torch.isfinite(loss)):
            raise Diverged(
                f"Train: the loss must stay finite, got {float(loss.detach())} at step {step}. Lower the learning rate."
            )
        optimizer.step()
        for i, rule in enumerate(stage.rules):
            states[i] = start_anew(rule.on_step(states[i], model, step, stage.steps), model, optimizer)
        step += 1
        if stop(step):
            break
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            save(_checkpoint(model, optimizer, states, step))
            saved = time.monotonic()
    _check_finite(parameters)
    if step < stage.steps:
        save(_checkpoint(model, optimizer, states, step))
    else:
        for rule, state in zip(stage.rules, states, strict=True):
            rule.end(state, model)
    return model.cpu().eval()


def _loss(
    stage: Train,
    states: list[State],
    model: nn.Module,
    task: Task,
    step: int,
    batch: Batch,
    output: Any,
    reference: Reference,
) -> Tensor:
    loss = task.loss(output, batch) * stage.supervised if stage.supervised else nothing(output)
    for rule, state in zip(stage.rules, states, strict=True):
        added = rule.loss(state, model, step, stage.steps, batch, output, reference)
        if added is not None:
            loss = loss + added
    return loss


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


def _checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer, states: list[State], step: int) -> dict[str, Any]:
    random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rules": [frozen(state) for state in states],
        "step": step,
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
