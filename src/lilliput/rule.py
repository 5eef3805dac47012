"""Rule: one thing done while training, in our loop or attached to the optimizer of any other."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import theta
from lilliput.stage import Reference
from lilliput.task import Batch, Task

State = dict[str, Tensor]


class Rule:
    """One thing done while training: gradual pruning, distillation, a growing penalty.

    A frozen dataclass with five moments. Each takes the state (tensors only) and may return a new one; the loop owns
    and checkpoints it. `steps` is how many optimizer steps the whole training has. A rule that has a `loss` adds to the
    loss; in a loop that is not ours its user writes `loss = loss + rule.loss(batch, output)`.

    A key "fresh NAME" that `on_step` puts into the state holds a mask of the entries of tensor NAME that start anew:
    the loop zeroes the optimizer's momenta there and takes the key out.
    """

    version: ClassVar[int] = 1

    @property
    def has_loss(self) -> bool:
        """Whether this rule adds to the loss: whether it has a `loss` of its own."""
        return type(self).loss is not Rule.loss

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        """Prepare the model (attach codes) before the optimizer exists, and return the first state."""
        return {}

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
        """After backward, before the optimizer's step number `step` (from 0)."""
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
        steps: int,
        task: Task | None = None,
        reference: Reference | None = None,
    ) -> Iterator["Attached"]:
        """Drive this rule by the steps of an optimizer that is not ours, for `steps` of them.

        Raises ValueError when a trainable parameter of the model is not in the optimizer, or the other way round.

        >>> import torch; from lilliput import Prune
        >>> net = torch.nn.Linear(4, 4); adam = torch.optim.AdamW(net.parameters())
        >>> with Prune(0.5).attached(net, adam, steps=1):
        ...     net(torch.ones(1, 4)).sum().backward(); adam.step()
        >>> int((net.weight == 0).sum())
        8
        """
        # Accelerate and Lightning wrap the optimizer; the steps that are really taken are those of the one inside.
        optimizer = getattr(optimizer, "optimizer", optimizer)
        check(model, optimizer, who=type(self).__name__)
        before = {id(p) for p in model.parameters() if p.requires_grad}
        driver = Attached(self, model, self.begin(model, task, reference, steps), steps, reference)
        if {id(p) for p in model.parameters() if p.requires_grad} != before:
            raise ValueError(
                f"{type(self).__name__}: parameters must exist before the optimizer does, but this rule "
                "adds some. Attach its code first, then make the optimizer."
            )
        handles = [optimizer.register_step_pre_hook(driver.before), optimizer.register_step_post_hook(driver.after)]
        try:
            yield driver
        finally:
            for handle in handles:
                handle.remove()
            driver.state = self.end(driver.state, model)


class Attached:
    """A rule at work in another loop: `step` counts the optimizer's steps that were really taken."""

    def __init__(self, rule: Rule, model: nn.Module, state: State, steps: int, reference: Reference | None) -> None:
        self.rule, self.model, self.state, self.steps, self.reference = rule, model, state, steps, reference
        self.step = 0

    def loss(self, batch: Batch, output: Tensor) -> Tensor:
        """What to add to the loss of this batch."""
        added = self.rule.loss(self.state, self.model, self.step, self.steps, batch, output, self.reference)
        return output.sum() * 0 if added is None else added

    def before(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """The optimizer is about to step."""
        if not _skips(optimizer):
            self.state = self.rule.on_grad(self.state, self.model, self.step, self.steps)

    def after(self, optimizer: torch.optim.Optimizer, *unused: Any) -> None:
        """The optimizer has stepped."""
        if not _skips(optimizer):
            state = self.rule.on_step(self.state, self.model, self.step, self.steps)
            self.state = start_anew(state, self.model, optimizer)
            self.step += 1


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
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found > 0)


def check(model: nn.Module, optimizer: torch.optim.Optimizer, who: str) -> None:
    """Raise ValueError unless the optimizer trains exactly the trainable parameters of the model."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    owned = {id(p) for p in model.parameters()}
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
