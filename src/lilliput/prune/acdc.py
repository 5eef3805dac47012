"""AC/DC: alternate sparse and dense training, which gives one network that is good at both."""

from dataclasses import dataclass

import torch
from torch import nn

from lilliput.code.names import theta
from lilliput.prune._masking import Masking, check_number
from lilliput.rule import Rule, State
from lilliput.stage import Reference
from lilliput.task import Task


@dataclass(frozen=True)
class ACDC(Masking, Rule):
    """Alternate phases of sparse training, under a fixed mask of the largest weights, and of dense training.

    In a compressed phase the largest weights alone train; in a decompressed one all of them do, the dropped ones from
    zero. The training begins dense and ends compressed: iterative hard thresholding, slowly.

        w <- T_k(w) when a compressed phase begins, T_k keeping the k largest |w|

    Momenta start anew at each switch for the weights that leave or come back.

    Args:
        sparsity: The fraction that is zero in compressed phases, a number in [0, 1).
        pattern: As in `Prune`.
        allocation: As in `Prune`.
        where: As in `Prune`.
        phases: How many compressed phases there are.
        warmup: The fraction of the training at which the first compressed phase begins.
        until: The fraction at which the last one begins; in between, phases of both kinds are equally long.

    Raises:
        ValueError: For settings out of range.

    Example:
        >>> net = nn.Linear(8, 8); sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> with ACDC(0.5, phases=2).attached(net, sgd, steps=8):
        ...     for _ in range(8): net(torch.randn(4, 8)).square().sum().backward(); sgd.step()
        >>> int((net.weight == 0).sum())
        32

    Source:
        Peste, Iofinova, Vladu and Alistarh, AC/DC: Alternating compressed/decompressed training of deep neural
        networks, NeurIPS 2021, arXiv:2106.12379, algorithm 1.
    """

    sparsity: float = 0.9
    phases: int = 5
    warmup: float = 0.1
    until: float = 0.75

    def __post_init__(self) -> None:
        check_number(self.sparsity, "ACDC")
        super().__post_init__()
        if self.phases < 1 or not 0 <= self.warmup <= self.until < 1:
            raise ValueError(
                f"ACDC: phases must be at least 1 and 0 <= warmup <= until < 1, got phases={self.phases}, "
                f"warmup={self.warmup}, until={self.until}."
            )

    def compressed(self, step: int, steps: int) -> bool:
        """Tell whether step number `step` trains the kept weights alone."""
        start, last = round(self.warmup * steps), min(round(self.until * steps), steps - 1)
        if step >= last or step < start or self.phases == 1:
            return step >= last
        return (step - start) * (self.phases - 1) / (last - start) % 1 < 0.5

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        state = super().begin(model, task, reference, steps)
        return self._switch_(state, model) if self.compressed(0, steps) else state

    def on_step(self, state: State, model: nn.Module, step: int, steps: int) -> State:
        now, then = self.compressed(step, steps), self.compressed(step + 1, steps)
        return state if now == then else self._switch_(state, model, then)

    @torch.no_grad()
    def _switch_(self, state: State, model: nn.Module, compress: bool = True) -> State:
        before = {name: ~code.mask for name, code in self.masked(model).items()}
        self.keep_(self.rated(state, model), model, self.sparsity if compress else 0.0)
        fresh = {}
        for name, code in self.masked(model).items():
            theta(model, name).mul_(code.mask)
            fresh[f"fresh {name}"] = ~code.mask if compress else before[name]
        return {**state, **fresh}
