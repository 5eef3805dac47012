"""L0: penalize the number of weights that are not zero, through random gates that make it differentiable."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lilliput.code.base import codes, copy_model
from lilliput.code.names import theta
from lilliput.prune import patterns
from lilliput.prune._masking import attach_gates, harden_, second
from lilliput.prune.hard_concrete import HardConcrete
from lilliput.prune.masks import Allocation, check_allocation, check_sparsity, select
from lilliput.rule import Rule, State
from lilliput.schedule import Cubic, Schedule, at
from lilliput.stage import Reference, Stage
from lilliput.task import Batch, Task


@dataclass(frozen=True)
class L0(Stage, Rule):
    """Put a hard concrete gate (`HardConcrete`) on every weight, and penalize the share of gates that is expected open.

        loss + lambda E,  E = mean of sigmoid(log alpha - beta log(-gamma / zeta)),
        lambda <- max(0, lambda + rate (E - (1 - sparsity_t))) after each step

    The price of a weight rises for as long as there are too many. At `until` of the training the gates become masks, by
    the highest alpha, and the kept weights train on; the sparsity is exact. In a loop that is not ours apply it as a
    stage first, then make the optimizer, which must hold log alpha too.

    Args:
        sparsity: A number s means Cubic(s, begin=0.1); or a schedule of the step.
        rate: The step size of the dual ascent; 0 holds lambda at `price`, the paper's way.
        price: The first lambda.
        until: The fraction of the training at which gates become masks.
        allocation: As in `Prune`.
        where: As in `Prune`.
        seed: The seed of the gates.

    Raises:
        ValueError: For settings out of range.
        NotSupported: For tensors that have a code already.

    Example:
        >>> net = L0(0.5)(nn.Linear(8, 8), None, None); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with L0(0.5).attached(net, sgd, steps=4) as rule:
        ...     for _ in range(4):
        ...         y = net(torch.randn(4, 8)); (y.square().sum() + rule.loss(None, y)).backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Louizos, Welling and Kingma, Learning sparse neural networks through L0 regularization, ICLR 2018,
        arXiv:1712.01312, equations 10 to 13. Lambda by dual ascent: Gallego-Posada et al., Controlled sparsity via
        constrained optimization, NeurIPS 2022, arXiv:2208.04425.
    """

    sparsity: float | Schedule = 0.9
    rate: float = 1.0
    price: float = 0.0
    until: float = 0.75
    allocation: Allocation = "global"
    where: str = "*"
    seed: int = 0

    def __post_init__(self) -> None:
        check_allocation(self.allocation, "L0")
        pairs = () if isinstance(self.allocation, str) else self.allocation
        for value in (at(self.schedule, 0, 1), at(self.schedule, 1, 1), *(value for _, value in pairs)):
            check_sparsity(value, patterns.parse("elements"), "L0")
        if not 0 < self.until <= 1 or not self.rate >= 0 or not self.price >= 0:
            raise ValueError(
                f"L0: until must be in (0, 1], rate and price at least 0, got until={self.until}, "
                f"rate={self.rate}, price={self.price}."
            )

    @property
    def schedule(self) -> Schedule:
        """How sparse the network is while it trains."""
        given = self.sparsity
        return Cubic(given, begin=0.1) if isinstance(given, int | float) else given

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        model = copy_model(model)
        self.begin(model, task, reference, 1)
        return model

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        attach_gates(model, self.where, self.allocation, "L0", lambda name: HardConcrete(name, self.seed))
        return {"price": torch.tensor(self.price)}

    def gates(self, model: nn.Module) -> dict[str, tuple[HardConcrete, Tensor]]:
        """Return the code and log alpha / speed of each tensor, by its name."""
        gates = {name: chain[0] for name, chain in codes(model).items() if isinstance(chain[0], HardConcrete)}
        return {name: (code, second(model, name)) for name, code in gates.items()}

    def expected(self, model: nn.Module) -> Tensor:
        """Return E, the share of gates that is expected open."""
        opened = [code.opened(scaled) for code, scaled in self.gates(model).values()]
        return torch.stack([part.sum() for part in opened]).sum() / sum(part.numel() for part in opened)

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
        opened = self.expected(model)
        charge: Tensor = state["price"].to(opened.device) * opened
        return charge

    @torch.no_grad()
    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        gates = self.gates(model)
        if any(int(code.step) < 0 for code, _ in gates.values()):
            return {"price": torch.zeros(())}
        if step + 1 < min(steps, round(self.until * steps)):
            for code, _ in gates.values():
                code.step.fill_(step + 1)
            surplus = self.expected(model).cpu() - (1 - at(self.schedule, step + 1, steps))
            return {"price": (state["price"].cpu() + self.rate * surplus).clamp_min(0)}
        rated = {name: scaled.float() for name, (_, scaled) in gates.items()}
        new = select(rated, at(self.schedule, 1, 1), self.allocation, patterns.parse("elements"))
        for name, (code, scaled) in gates.items():
            theta(model, name).mul_(code.eval().gates(scaled))
            code.mask, code.step = new[name], torch.full_like(code.step, -1)
        return {"price": torch.zeros(())}

    def end(self, state: State, model: nn.Module) -> State:
        for name, (code, _) in self.gates(model).items():
            harden_(model, name, code.mask.clone())
        return state
