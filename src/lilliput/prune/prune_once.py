"""Prune once for all: fine-tune one pruned encoder on many tasks, with its zeros held in place."""

from dataclasses import dataclass

from torch import nn

from lilliput.code.base import attach, codes, reason
from lilliput.code.masked import Masked
from lilliput.code.names import find, parameter_names
from lilliput.distill.logits import Distill
from lilliput.quant.quantize import Quantize
from lilliput.rule import Rule, State
from lilliput.schedule import Cosine
from lilliput.stage import Reference, Stage
from lilliput.task import Task
from lilliput.train import Train


@dataclass(frozen=True)
class PatternLock(Rule):
    """Keep what is zero at zero while the rest trains: W = m * theta with the mask m = (W != 0) of the first step.

    Masks that a model brings along are kept. A plain tensor (a sparse checkpoint) gets one where at least the fraction
    `least` of it is zero.

    Args:
        where: Which tensors, as in `Prune`.
        least: The fraction of zeros from which a plain tensor is locked.

    Raises:
        ValueError: When no tensor of `where` has zeros to keep.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 1)
        >>> net.weight.data = torch.tensor([[0.0, 3.0]])
        >>> state = PatternLock().begin(net, None, None, 10)
        >>> codes(net)["weight"][0].mask
        tensor([[False,  True]])

    Source:
        Zafrir, Larey, Boudoukh, Shen and Wasserblat, Prune once for all: sparse pre-trained language models, ENLSP
        workshop at NeurIPS 2021, arXiv:2111.05754 (pattern-lock, in the fine-tuning of the sparse model).
    """

    where: str = "*"
    least: float = 0.1

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        before, tensors, locked = codes(model), parameter_names(model), 0
        for name in find(model, self.where, who="PatternLock"):
            if name in before:
                locked += isinstance(before[name][0], Masked)
            elif reason(model, name) is None and float((tensors[name] == 0).float().mean()) >= self.least:
                attach(model, name, Masked(tensors[name] != 0))
                locked += 1
        if not locked:
            raise ValueError(
                f"PatternLock: a tensor of {self.where!r} must be masked or have {self.least:.0%} zeros, "
                "got none. Prune the model first."
            )
        return {}


def transfer(
    steps: int,
    quantized: int = 0,
    *,
    lr: float = 2e-4,
    bits: int = 8,
    where: str = "*",
    lock: bool = True,
    distill: Distill | None = None,
    supervised: float = 1.0,
    batch_size: int | None = None,
    seed: int = 0,
) -> tuple[Stage, ...]:
    """Make the stages that teach a sparse model a task: `steps` with its zeros locked, then `quantized` on a grid of
    `bits`.

    Args:
        steps: Steps of fine-tuning with float weights.
        quantized: Steps of quantization-aware training after them; 0 for none.
        lr: The peak learning rate.
        bits: The bits of the grid.
        where: Which tensors are quantized.
        lock: Whether zeros stay; False gives the same stages for a dense model.
        distill: Distillation from the dense model of that task.
        supervised: The weight of the task's own loss.
        batch_size: Examples a step; the task's by default.
        seed: The seed of the batches.

    Returns:
        The stages, in order.

    Example:
        >>> [type(stage).__name__ for stage in transfer(100, 20)]
        ['Train', 'Quantize', 'Train']

    Source:
        Zafrir et al., 2021, arXiv:2111.05754: fine-tuning with pattern-lock and distillation, then the same with
        quantization-aware training.
    """
    rules: tuple[Rule, ...] = (*((PatternLock(),) if lock else ()), *((distill,) if distill else ()))
    train = Train(steps, Cosine(lr, warmup=0.1), rules, supervised, batch_size, clip=1.0, seed=seed)
    if not quantized:
        return (train,)
    again = Train(quantized, Cosine(lr / 4, warmup=0.0), rules, supervised, batch_size, clip=1.0, seed=seed + 1)
    return train, Quantize(bits, where=where), again
