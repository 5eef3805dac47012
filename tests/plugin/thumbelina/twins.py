"""A structural method: hidden units that do nearly the same become one. And a finding: how many there are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import copy_model
from lilliput.finding import Finding
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage
from lilliput.task import Task

ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class TwinUnits(Finding):
    """Hidden units whose incoming weights differ by less than `tolerance` of their norm from those of another unit.

    Attributes:
        layers: names of the layers that have hidden units.
        twins: how many units of each have a twin.
    """

    layers: tuple[str, ...]
    twins: tuple[int, ...]


def twin_units(model: nn.Module, task: Task, tolerance: float = 1e-3) -> TwinUnits:
    """Count the hidden units of a model that have a twin."""
    gaps_of = [(name, _gaps(first)) for name, first, _ in _pairs(model)]
    return TwinUnits(
        tuple(name for name, _ in gaps_of), tuple(int((gaps.amin(1) < tolerance).sum()) for _, gaps in gaps_of)
    )


@dataclass(frozen=True)
class MergeTwins(Stage):
    """Merge hidden units with the one most like them: the unit goes, and its outgoing weights are added to the other's.

    Exact where both have the same incoming weights. A model without hidden units between linear layers stays as it is.

    Args:
        share: the fraction of each hidden layer's units that is merged away, in [0, 1).
    """

    share: float = 0.25

    structural: ClassVar[bool] = True
    same_graph: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"
    follows: ClassVar[tuple[str, ...]] = ("RemoveBlocks",)

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"MergeTwins: share must be in [0, 1), got {self.share:g}. For half the units write 0.5.")

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        model = copy_model(model)
        for _, first, second in list(_pairs(model)):
            for _ in range(int(self.share * first.out_features)):
                _merge_(first, second)
        return model

    def label(self) -> str:
        return f"{self.share:.0%} of twins merged"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer a quarter, half and three quarters of the hidden units."""
        if not list(_pairs(model)):
            return Refusal("no activation lies between two linear layers")
        return Proposals((cls(0.25), cls(0.5), cls(0.75)), 1)


def _pairs(model: nn.Module) -> Iterator[tuple[str, nn.Linear, nn.Linear]]:
    """Linear layers that follow one another in a Sequential, with an activation between."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Sequential):
            layers = list(module.named_children())
            for (name, first), (_, between), (_, second) in zip(layers, layers[1:], layers[2:], strict=False):
                if isinstance(first, nn.Linear) and isinstance(between, ACTIVATIONS) and isinstance(second, nn.Linear):
                    yield f"{path}.{name}" if path else name, first, second


def _gaps(layer: nn.Linear) -> Tensor:
    """(units, units): how far incoming weights are apart, relative to their norm; infinite on the diagonal."""
    rows = layer.weight.detach()
    rows = rows if layer.bias is None else torch.cat([rows, layer.bias.detach()[:, None]], 1)
    gaps = torch.cdist(rows, rows) / rows.norm(dim=1).clamp_min(1e-12)
    return gaps.fill_diagonal_(torch.inf)


@torch.no_grad()
def _merge_(first: nn.Linear, second: nn.Linear) -> None:
    """Take one unit out, in place: the one that is most like another."""
    goes, stays = divmod(int(_gaps(first).argmin()), first.out_features)
    outgoing = second.weight.detach().clone()
    outgoing[:, stays] += outgoing[:, goes]
    kept = torch.arange(first.out_features) != goes
    _set_(first, "weight", first.weight[kept])
    if first.bias is not None:
        _set_(first, "bias", first.bias[kept])
    _set_(second, "weight", outgoing[:, kept])
    first.out_features = second.in_features = int(kept.sum())


def _set_(module: Any, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=old.requires_grad))
