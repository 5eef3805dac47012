"""Rule: one thing done while training, in our loop or attached to the optimizer of any other."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.names import theta
from lilliput.stage import Reference
from lilliput.task import Batch, Task, leaves

State = dict[str, Any]
"""What a rule remembers while training: tensors, and modules, which are trained with the model (learnable extras)."""


class Rule:
    """Do one thing while a network trains: gradual pruning, distillation, a growing penalty.

    A frozen dataclass with six moments. Each is given the state, and those that return a state may change it; the loop
    owns and checkpoints it. `steps` is how many optimizer steps the whole training has (another number at every step
    where time limits it and the machine gets slower or faster), `step` counts them from 0, and a setting that may
    change with them is read by `lilliput.schedule.at`.

    A module in the state that `begin` returns is a learnable extra (a projection of hints, gates, a generator): the
    loop moves it to the device, trains its parameters with the model's optimizer and checkpoints it. Later moments
    return the same module under the same key.

    A key "fresh NAME" that `on_step` puts into the state holds a mask of the entries of tensor NAME that start anew:
    the loop zeroes the optimizer's momenta there and takes the key out.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Frugal(Rule):
        ...     strength: float = 0.1
        ...     def loss(self, state, model, step, steps, batch, output, reference):
        ...         return self.strength * sum(p.abs().sum() for p in model.parameters())
        >>> Frugal().has_loss, Rule().has_loss
        (True, False)
    """

    version: ClassVar[int] = 1

    @property
    def has_loss(self) -> bool:
        """Whether this rule adds to the loss: whether it has a `loss` of its own."""
        return type(self).loss is not Rule.loss

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        """Prepare the model (attach codes) before the optimizer exists, and return the first state."""
        return {}

    def batch(self, state: State, model: nn.Module, step: int, steps: int, batch: Batch) -> Batch:
        """The batch that the model is given at step number `step`; inputs and targets may be others than the task's.

        A batch whose inputs were changed has no `index`: what is kept for training examples does not hold for it.
        """
        return batch

    def loss(
        self,
        state: State,
        model: nn.Module,
        step: int,
        steps: int,
        batch: Batch,
        output: Any,
        reference: Reference | None,
    ) -> Tensor | None:
        """What this rule adds to the loss of a batch at step number `step`; None adds nothing."""
        return None

    def on_grad(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        """After backward, before the optimizer's step number `step`."""
        return state

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        """After the optimizer's step number `step`."""
        return state

    def end(self, state: State, model: nn.Module) -> State:
        """After the last step."""
        return state

    @contextmanager
    def attached(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int | None = None,
        task: Task | None = None,
        reference: Reference | None = None,
        teacher: nn.Module | None = None,
        state: State | None = None,
    ) -> Iterator["Attached"]:
        """Drive this rule by the steps of an optimizer that is not ours.

        Learnable extras of the rule that the optimizer does not hold join its first group of parameters until the
        block ends, so that they train with that group's settings and under its schedulers. To give them settings of
        their own, call `begin` first, give `lilliput.rule.parameters(state)` to the optimizer, and pass `state`.

        Args:
            model: what is trained.
            optimizer: holds every trainable parameter of the model and no other (extras aside).
            steps: how many optimizer steps there will be; may be left out where nothing of the rule depends on it.
            task: the task, for rules that ask it something.
            reference: the dense model with its outputs, for distillation by a task's batches.
            teacher: the dense model alone, for distillation by any batches; it is set to eval mode.
            state: what `begin` returned, where it was called before the optimizer was made.

        Raises:
            ValueError: when a trainable parameter of the model is not in the optimizer, or the other way round; when
                `steps` is missing though the rule changes with them.

        Example:
            >>> from lilliput import Prune
            >>> net = torch.nn.Linear(4, 4); adam = torch.optim.AdamW(net.parameters())
            >>> with Prune(0.5).attached(net, adam, steps=1):
            ...     net(torch.ones(1, 4)).sum().backward(); adam.step()
            >>> int((net.weight == 0).sum())
            8
        """
        who = type(self).__name__
        if steps is None and self._changes():
            raise ValueError(
                f"{who}: steps must be given, since it changes with them, got None. Pass steps=, the number of "
                "optimizer steps of the training."
            )
        steps = 1 if steps is None else steps
        # Accelerate and Lightning wrap the optimizer; the steps that are really taken are those of the one inside.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if teacher is not None:
            reference = Reference(teacher, task, device=device)
        if state is None:
            check(model, optimizer, who)
            before = {id(p) for p in model.parameters() if p.requires_grad}
            state = self.begin(model, task, reference, steps)
            if {id(p) for p in model.parameters() if p.requires_grad} != before:
                raise ValueError(
                    f"{who}: parameters must exist before the optimizer does, but this rule adds some to the model. "
                    "Call begin first, then make the optimizer, and pass state=."
                )
        extras = parameters(to(state, device))
        check(model, optimizer, who, extras)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        joined = [p for p in extras if id(p) not in held]
        # Not a group of its own: a learning-rate schedule counts the groups that there were when it was made.
        optimizer.param_groups[0]["params"] += joined
        driver = Attached(self, model, state, steps, reference)
        handles = [optimizer.register_step_pre_hook(driver.before), optimizer.register_step_post_hook(driver.after)]
        try:
            yield driver
        finally:
            for handle in handles:
                handle.remove()
            group, gone = optimizer.param_groups[0], {id(p) for p in joined}
            group["params"] = [p for p in group["params"] if id(p) not in gone]
            driver.state = self.end(driver.state, model)

    def _changes(self) -> bool:
        """Whether what this rule does depends on the step."""
        moments = ("batch", "on_grad", "on_step")
        settings: list[Any] = [getattr(self, field.name) for field in fields(self)] if is_dataclass(self) else []
        return any(getattr(type(self), name) is not getattr(Rule, name) for name in moments) or any(
            map(callable, settings)
        )


class Attached:
    """A rule at work in another loop: `step` counts the optimizer's steps that were really taken."""

    def __init__(self, rule: Rule, model: nn.Module, state: State, steps: int, reference: Reference | None) -> None:
        self.rule, self.model, self.state, self.steps, self.reference = rule, model, state, steps, reference
        self.step = 0

    def batch(self, inputs: Any, targets: Any = None) -> Batch:
        """The batch that the rule makes of this one, for rules that change it.

        Args:
            inputs: what the model would be given, or a `Batch`.
            targets: what the loss would compare with.
        """
        return self.rule.batch(self.state, self.model, self.step, self.steps, _batch(inputs, targets))

    def loss(self, batch: Any, output: Any) -> Tensor:
        """What to add to the loss of this batch.

        Args:
            batch: a `Batch` of the task, or the inputs as the model was given them: a tensor, a tuple or a dictionary
                by argument name.
            output: what the model returned for them.
        """
        added = self.rule.loss(self.state, self.model, self.step, self.steps, _batch(batch), output, self.reference)
        return nothing(output) if added is None else added

    def before(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """The optimizer is about to step."""
        if not _skips(optimizer):
            self.state = self.rule.on_grad(self.state, self.model, self.step, self.steps)

    def after(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """The optimizer has stepped."""
        # A loop may zero the gradients of its model alone, as the Hugging Face Trainer does.
        for parameter in parameters(self.state):
            parameter.grad = None
        if not _skips(optimizer):
            state = self.rule.on_step(self.state, self.model, self.step, self.steps)
            self.state = start_anew(state, self.model, optimizer)
            self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of this loop must hold beside the model's and the optimizer's."""
        return {"step": self.step, "state": frozen(self.state)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.step = saved["step"]
        self.state = thawed(self.state, saved["state"])


def _batch(given: Any, targets: Any = None) -> Batch:
    return given if isinstance(given, Batch) else Batch(given, targets, None, 0)


def nothing(output: Any) -> Tensor:
    """Zero, from which a backward pass may start: the sum of no entry of the outputs."""
    return next(leaf for leaf in leaves(output) if leaf.is_floating_point()).flatten()[:0].sum()


# -------------------------------------------------------------------------------------------------- states with modules


def modules(state: State) -> dict[str, nn.Module]:
    """The learnable extras of a state."""
    return {name: value for name, value in state.items() if isinstance(value, nn.Module)}


def parameters(states: State | Iterable[State]) -> list[nn.Parameter]:
    """The trainable parameters of the learnable extras of one state, or of several."""
    every = [states] if isinstance(states, dict) else states
    return [p for state in every for module in modules(state).values() for p in module.parameters() if p.requires_grad]


def to(state: State, device: torch.device) -> State:
    """A state whose modules are on a device; tensors are where their rule put them."""
    for module in modules(state).values():
        module.to(device)
    return state


def frozen(state: State) -> State:
    """A state as a checkpoint holds it: modules as their `state_dict`."""
    return {name: value.state_dict() if isinstance(value, nn.Module) else value for name, value in state.items()}


def thawed(state: State, saved: State, place: Callable[[Tensor], Tensor] = lambda value: value) -> State:
    """The inverse of `frozen`: `saved` tensors, and the modules of `state` with what was saved of them.

    Args:
        state: what `begin` returned.
        saved: what `frozen` made.
        place: puts a tensor where it belongs.
    """
    extras = modules(state)
    for name, module in extras.items():
        module.load_state_dict(saved[name])
    return {name: extras[name] if name in extras else place(value) for name, value in saved.items()}


@torch.no_grad()
def start_anew(state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    """Zero the optimizer's momenta where the keys "fresh NAME" of a state say so; returns the state without them."""
    fresh = {key: where for key, where in state.items() if key.startswith("fresh ")}
    for key, where in fresh.items():
        parameter = theta(model, key.removeprefix("fresh "))
        for held in optimizer.state.get(parameter, {}).values():
            if isinstance(held, Tensor) and held.shape == parameter.shape:
                held.masked_fill_(where, 0)
    return {key: value for key, value in state.items() if key not in fresh} if fresh else state


def _skips(optimizer: torch.optim.Optimizer) -> bool:
    """A fused optimizer is called even when a gradient scaler found an overflow, and then does nothing."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow > 0)


def check(model: nn.Module, optimizer: torch.optim.Optimizer, who: str, extras: Iterable[Tensor] = ()) -> None:
    """Raise ValueError unless the optimizer trains exactly the trainable parameters of the model, and maybe extras."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owned = {id(p) for p in model.parameters()} | {id(p) for p in extras}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"{who}: the optimizer must hold every trainable parameter, but misses {missing[:3]}. "
            "Make the optimizer after codes are attached, or freeze these with requires_grad_(False)."
        )
    if held - owned:
        raise ValueError(
            f"{who}: the model must hold every parameter of the optimizer, but {len(held - owned)} are "
            "not its own. Make the optimizer after codes are attached."
        )
