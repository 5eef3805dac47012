"""The space: which compositions of techniques can be tried on a network, and the recipe of each."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lilliput.code.base import holders
from lilliput.distill.logits import Distill
from lilliput.factor.svd import Factorize
from lilliput.graph.stages import FoldBatchNorm, Student
from lilliput.prune.prune import Prune
from lilliput.quant.quantize import Quantize
from lilliput.recipe import Recipe
from lilliput.rule import Rule
from lilliput.schedule import Cosine
from lilliput.task import Task
from lilliput.train import Train

WIDTHS = (1.0, 0.875, 0.75, 0.625, 0.5, 0.4375, 0.375, 0.3125, 0.25, 0.1875, 0.125, 0.0625)

MOST_AT_ONCE = 0.6  # zeros that a short training recovers from; more are made while it trains

# How more zeros are made: what lies on the measured front of accuracy and time, the most accurate first. The
# names are those of the records, which a test holds them against.
SPARSE: dict[str, Callable[[float], Rule]] = {
    "Taylor": lambda sparsity: Prune(sparsity, "taylor", allocation="normalized"),
    "global magnitude": lambda sparsity: Prune(sparsity, allocation="normalized"),
}


@dataclass(frozen=True)
class Plan:
    """One structure: how many of the removable blocks go, which early layer strides, how wide the rest is.

    rows: the fraction of a lookup table's rows that goes (they are stored sparsely, not removed). labels: the weight of
    the task's own loss in training, against one for the distance to the dense outputs. spread: widths differ, by how
    much each group's channels weigh, instead of one fraction for all. rank: the fraction of values that stays when
    layers are replaced by two of low rank.
    """

    blocks: int = 0
    stride: int = 0
    width: float = 1.0
    multiple: int = 4
    rows: float = 0.0
    labels: float = 0.3
    spread: bool = False
    rank: float = 1.0

    def name(self) -> str:
        """A short text for people."""
        parts = [f"{self.blocks} blocks fewer"] if self.blocks else []
        parts += ["early stride"] if self.stride else []
        parts += [f"width {self.width:g}{' spread' if self.spread else ''}"] if self.width != 1 else []
        parts += [f"{self.rows:.0%} of rows gone"] if self.rows else []
        parts += [f"low rank {self.rank:g}"] if self.rank != 1 else []
        parts += ["mostly from labels"] if self.labels > 1 else []
        return ", ".join(parts) or "same structure"


@dataclass(frozen=True)
class Tail:
    """What is done to a trained structure: how much of it is set to zero and how many bits its weights get.

    method: a name in SPARSE, where the zeros are made while it trains.
    """

    bits: float = 32.0
    sparsity: float = 0.0
    trained: bool = True
    method: str = "Taylor"

    def name(self) -> str:
        """A short text for people."""
        if self.bits >= 32:
            return "float32"
        text = f"{self.bits:g} bits" + (f", {self.sparsity:.0%} zeros" if self.sparsity else "")
        text += f" by {self.method}" if self.method != "Taylor" else ""
        return text if self.trained else text + " without training"


@dataclass(frozen=True)
class Space:
    """What can be varied on one network, and what is left alone with the reason.

    blocks: removable ones, the least missed first. strides: layers that may take a stride (read a
    pooled input, where `pooled`). narrow: whether channels
    can go. tables: lookup tables whose rows can go.
    """

    blocks: tuple[str, ...] = ()
    strides: tuple[str, ...] = ()
    pooled: bool = False
    narrow: bool = False
    tables: tuple[str, ...] = ()
    labels: tuple[float, ...] = (0.0,)
    left: tuple[tuple[str, str], ...] = ()
    widths: tuple[float, ...] = field(default=WIDTHS)

    def first(self) -> list[Plan]:
        """Plans that are worth trying on any network: where the search starts."""
        deep, early = len(self.blocks), int(bool(self.strides))
        rows = 0.6 if self.tables else 0.0
        plans = [
            Plan(deep, early, 0.5, 4, rows),
            Plan(deep, 0, 0.5, 4, rows, 1.0),
            Plan(0, 0, 0.875, 4, rows, 1.0),
            Plan(deep, early, 0.375, 4, rows),
            Plan(deep, early, 0.5, 4, rows, 1.0),
            Plan(0, 0, 0.625, 8, rows, 1.0),
            Plan(deep // 2, early, 0.5, 8, rows),
            Plan(deep, early, 0.5, 4, rows, spread=True),
        ]
        if not self.narrow:
            plans = [replace(plan, width=1.0, spread=False) for plan in plans]
        plans = [replace(plan, labels=self.labels[-1 if plan.labels == 1 else 0]) for plan in plans]
        return list(dict.fromkeys(plans))

    def recipe(self, plan: Plan) -> Recipe:
        """The structure of a plan, not trained yet."""
        stages: list[Any] = []
        if plan.blocks or plan.stride or plan.width != 1:
            early = self.strides[: plan.stride]
            striding, pooling = ((), early) if self.pooled else (early, ())
            stages.append(
                Student(
                    remove=self.blocks[: plan.blocks],
                    stride=striding,
                    pool=pooling,
                    width=1.0 if plan.spread else plan.width,
                    multiple=plan.multiple,
                    target=round(plan.width**2, 6) if plan.spread else 1.0,
                )
            )
        if plan.rank != 1:
            stages.append(Factorize(budget=plan.rank))
        if plan.rows:
            stages.append(Prune(plan.rows, pattern="channel", where=",".join(self.tables)))
        return Recipe(tuple(stages))

    def ask(self, trial: Any) -> Plan:
        """The plan that a trial of the sampler stands for."""
        blocks = trial.suggest_int("blocks", 0, len(self.blocks)) if self.blocks else 0
        stride = trial.suggest_int("stride", 0, 1) if self.strides else 0
        width = trial.suggest_categorical("width", self.widths) if self.narrow else 1.0
        multiple = trial.suggest_categorical("multiple", (4, 8)) if self.narrow else 4
        rows = trial.suggest_categorical("rows", (0.3, 0.5, 0.6, 0.7, 0.8)) if self.tables else 0.0
        labels = trial.suggest_categorical("labels", self.labels) if len(self.labels) > 1 else self.labels[0]
        spread = trial.suggest_categorical("spread", (False, True)) if self.narrow else False
        rank = 1.0 if self.tables else trial.suggest_categorical("rank", (1.0, 0.5))
        return Plan(blocks, stride, width, multiple, rows, labels, spread, rank)

    def params(self, plan: Plan) -> dict[str, Any]:
        """The sampler's parameters of a plan: the inverse of `ask`."""
        found: dict[str, Any] = {}
        if self.blocks:
            found["blocks"] = plan.blocks
        if self.strides:
            found["stride"] = plan.stride
        if self.narrow:
            found |= {"width": plan.width, "multiple": plan.multiple, "spread": plan.spread}
        found |= {"rows": plan.rows} if self.tables else {"rank": plan.rank}
        if len(self.labels) > 1:
            found["labels"] = plan.labels
        return found


def training(steps: int, batch_size: int, lr: float, seed: int, labels: float, until: int | None = None) -> Train:
    """The full training of a student: distillation from the dense network throughout, on one cosine."""
    return Train(
        steps=steps,
        lr=Cosine(lr),
        rules=(Distill(),),
        supervised=labels,
        batch_size=batch_size,
        weight_decay=0.01,
        seed=seed,
        until=None if until is None or until >= steps else until,
    )


def tail(
    which: Tail,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    labels: float,
    bits: tuple[tuple[str, int], ...],
    tables: tuple[str, ...] = (),
) -> tuple[Any, ...]:
    """The stages of a tail, behind a trained structure. A lookup table gets one step size: one for each of its many
    short rows would weigh as much as their codes."""
    stages: list[Any] = [FoldBatchNorm()]
    polish = Train(
        steps=steps,
        lr=Cosine(lr),
        rules=(Distill(),),
        supervised=labels,
        batch_size=batch_size,
        weight_decay=0.0,
        seed=seed,
    )
    if which.sparsity > MOST_AT_ONCE:  # gradually; 8 bits lose nothing after it
        stages.append(replace(polish, lr=Cosine(4 * lr), rules=(SPARSE[which.method](which.sparsity), Distill())))
    elif which.sparsity:
        stages.append(Prune(which.sparsity))
    if which.bits < 32:
        width = max(2, min(8, round(which.bits)))
        rest = tuple(name for name, _ in bits if name not in tables)
        if tables:
            stages.append(
                Quantize(
                    bits=width,
                    where=",".join(tables),
                    per="tensor",
                    biases="float32",
                    allocation=tuple(pair for pair in bits if pair[0] in tables),
                )
            )
        if rest or not tables:
            stages.append(
                Quantize(
                    bits=width,
                    where=",".join(rest) if tables else "*",
                    allocation=tuple(pair for pair in bits if pair[0] not in tables),
                )
            )
        if which.trained and which.sparsity <= MOST_AT_ONCE:
            stages.append(polish)
    return tuple(stages)


def tables(model: nn.Module) -> tuple[str, ...]:
    """Lookup tables that are most of the model and nobody else's: their rows can go."""
    total = sum(p.numel() for p in model.parameters())
    return tuple(
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        and module.weight.numel() > 0.5 * total
        and len(holders(model, f"{name}.weight" if name else "weight")) == 1
    )


def batch_size_for(task: Task) -> int:
    """A batch that keeps one core busy without starving the optimizer of steps."""
    return min(128, max(8, task.examples // 20)) if task.batch_size == 64 else task.batch_size


def count_values(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def is_stochastic(model: nn.Module) -> bool:
    """Whether training draws from the global random state (dropout), so that trainings must not run side by side."""
    return (
        any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
        or any(isinstance(m, nn.RNNBase) and m.dropout > 0 for m in model.modules())
        or any(isinstance(m, torch.nn.MultiheadAttention) and m.dropout > 0 for m in model.modules())
    )
