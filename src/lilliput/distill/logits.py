"""Distillation of outputs: the student imitates what the dense network says."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.reference import Reference, asked
from lilliput.rule import Rule, State
from lilliput.schedule import Schedule, at
from lilliput.task import Batch, Meaning, Task, outline
from lilliput.task.meaning import Kind
from lilliput.task.nested import children


@dataclass(frozen=True)
class Distill(Rule):
    """Match softened outputs: weight * T^2 KL(softmax(z_t / T) || softmax(z_s / T)), z_t the dense network's outputs.

    Outputs that are no classes are compared by cross entropy of bits, by cosine or by squared error, as the task's loss
    reads them. With a task's batches the dense outputs are computed once per (example, augmentation); with any other
    batch the dense network is run on its inputs.

    Nested outputs (tuples, dictionaries, a Hugging Face `ModelOutput`) are compared tensor by tensor and summed: all
    floating-point ones that both networks return at the same place, single numbers (a loss) left out.

    Args:
        weight: of this loss, a number or a schedule of the step; at 0 nothing is computed.
        temperature: T.
        outputs: what the outputs are: "logits", "probabilities", "bits", "directions" or "values"; None: what the task
            says, logits with the classes on the last axis where there is no task.
        draws: under how many augmentations of each example the dense network is asked. What it says of an example
            differs little from one augmentation to the next, so batches under later ones are compared with what it
            said under these: two teach a small network as well as sixteen, for an eighth of the time. None: under all.

    Raises:
        ValueError: when there is neither a reference nor a teacher; when the networks return different structures.

    Example:
        >>> import torch
        >>> dense, student = nn.Linear(4, 3), nn.Linear(4, 3); sgd = torch.optim.SGD(student.parameters(), 0.1)
        >>> x = torch.randn(8, 4)
        >>> with Distill().attached(student, sgd, teacher=dense) as rule:
        ...     rule.loss(x, student(x)).backward(); sgd.step()

    Source:
        Hinton, Vinyals and Dean, Distilling the knowledge in a neural network, 2015, arXiv:1503.02531, section 2.
    """

    weight: float | Schedule = 1.0
    temperature: float = 4.0
    outputs: Kind | None = None
    draws: int | None = None

    def __post_init__(self) -> None:
        if self.draws is not None and self.draws < 1:
            raise ValueError(f"Distill: draws must be at least 1, got {self.draws}. None asks under all of them.")
        if not self.temperature > 0:
            raise ValueError(f"Distill: temperature must be above 0, got {self.temperature}. The usual one is 4.")
        if self.outputs is not None:
            Meaning(self.outputs)  # says which there are

    def begin(self, model: nn.Module, task: Task | None, reference: Reference | None, steps: int) -> State:
        asked(reference, "Distill")
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
        reference, weight = asked(reference, "Distill"), at(self.weight, step, steps)
        if weight == 0:
            return None
        meaning = Meaning("logits", axis=-1) if reference.task is None else reference.task.meaning
        if self.outputs is not None:
            meaning = replace(meaning, kind=self.outputs)
        parts = [
            divergence(mine, dense, self.temperature, meaning)
            for mine, dense in pairs(output, reference.outputs(batch, self.draws))
        ]
        return weight * sum(parts[1:], parts[0])


def pairs(output: Any, dense: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two nested outputs that are compared, in order.

    Args:
        output: what the student returned for some inputs.
        dense: what the dense network returned for the same inputs.

    Raises:
        ValueError: where no tensor of the one has a counterpart of its shape in the other.

    Example:
        >>> import torch
        >>> z = torch.zeros(2, 3)
        >>> len(list(pairs({"loss": z.sum(), "logits": z}, {"logits": z, "cache": None})))
        1
    """
    matched = list(_pairs(output, dense))
    if not matched or any(mine.shape != theirs.shape for mine, theirs in matched):
        raise ValueError(
            f"Distill: the outputs of both networks must have tensors of one shape at the same places, got "
            f"{outline(output)} and, dense, {outline(dense)}. Let a wrapping module return what is to be compared."
        )
    yield from matched


def _pairs(output: Any, dense: Any) -> Iterator[tuple[Tensor, Tensor]]:
    if isinstance(output, Tensor) and isinstance(dense, Tensor):
        if output.is_floating_point() and output.ndim:
            yield output, dense
        return
    mine, theirs = children(output) or {}, children(dense) or {}
    for key in mine:
        if key in theirs:
            yield from _pairs(mine[key], theirs[key])


def divergence(output: Tensor, dense: Tensor, temperature: float, meaning: Meaning) -> Tensor:
    """The mean divergence of a student's outputs from the dense ones, in the way of the task's loss.

    Args:
        output: (n, ...).
        dense: (n, ...).
        temperature: T, for classes.
        meaning: what the numbers stand for.

    Returns:
        A number: the mean over the examples and, where each has several labels, over those.
    """
    q, p = (meaning.log_probabilities(z, temperature) for z in (output, dense))
    if p is not None and q is not None:
        places = p.numel() // (len(p) * p.shape[-1])
        return F.kl_div(q, p, reduction="batchmean", log_target=True) * (temperature**2 / places)
    if meaning.kind == "bits":
        return F.binary_cross_entropy_with_logits(output, dense.sigmoid())
    if meaning.kind == "directions":
        return (1 - F.cosine_similarity(output, dense, dim=-1)).mean()
    return F.mse_loss(output, dense)
