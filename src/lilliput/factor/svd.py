"""Factorize: replace layers by two thinner ones, by truncated singular value decomposition."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lilliput.code.base import attach, codes, copy_model, reason
from lilliput.code.deploy import build
from lilliput.code.low_rank import LowRank, refusal
from lilliput.code.names import find, parameter_names
from lilliput.errors import near
from lilliput.graph.tables import tables
from lilliput.proposal import Known, Proposals, Refusal
from lilliput.stage import Reference, Stage
from lilliput.task import Task


@dataclass(frozen=True)
class Factorize(Stage):
    """Replace layers of weight W (out, n) by two of weights A (out, r) and B (r, n), which hold r (out + n) values.

    Give one of rank, energy, budget and allocation. A layer where it would save nothing, and one that is neither linear
    nor an ungrouped convolution, is left alone (see `skipped`). By budget, singular values are taken greedily in the
    order of s_i^2 / (||W||_F^2 (out + n)).

    Args:
        rank: The same r everywhere.
        energy: In (0, 1): the least r whose squared singular values hold that share of ||W||_F^2.
        budget: In (0, 1): the share of all values of the chosen layers that is kept, spent on the singular values that
            hold the most energy a value.
        allocation: Pairs (tensor, rank).
        where: Glob patterns on module or tensor names; "*" takes every weight of two and more axes.

    Raises:
        ValueError: For settings out of range, and when no layer would become smaller.

    Example:
        >>> net = Factorize(rank=1)(nn.Sequential(nn.Linear(8, 8)), None, None)
        >>> sorted(tuple(p.shape) for p in net.parameters())
        [(1, 8), (8,), (8, 1)]

    Source:
        Denton et al., Exploiting linear structure within convolutional networks, NIPS 2014, arXiv:1404.0736.
    """

    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    allocation: tuple[tuple[str, int], ...] = ()
    where: str = "*"

    structural: ClassVar[bool] = True
    moment: ClassVar[str] = "structure"
    follows: ClassVar[tuple[str, ...]] = ("Narrow",)

    def __post_init__(self) -> None:
        given = [self.rank, self.energy, self.budget, self.allocation or None]
        if sum(value is not None for value in given) != 1:
            raise ValueError(
                "Factorize: exactly one of rank, energy, budget and allocation must be given, got "
                f"{[value for value in given if value is not None]}. Write Factorize(energy=0.9)."
            )
        for rank in (1 if self.rank is None else self.rank, *(rank for _, rank in self.allocation)):
            if rank < 1:
                raise ValueError(f"Factorize: rank must be at least 1, got {rank}.")
        for name, share in (("energy", self.energy), ("budget", self.budget)):
            if share is not None and not 0 < share < 1:
                raise ValueError(f"Factorize: {name} must be in (0, 1), got {share:g}. It is a share.")

    def ranks(self, model: nn.Module) -> dict[str, int]:
        """The rank of every layer that becomes two."""
        return self._sort(model)[0]

    def skipped(self, model: nn.Module) -> dict[str, str]:
        """The tensors that `where` takes in but that are left alone, each with the reason."""
        return self._sort(model)[1]

    def __call__(self, model: nn.Module, task: Task | None, reference: Reference | None) -> nn.Module:
        ranks, skipped = self._sort(model)
        if not ranks:
            raise ValueError(
                f"Factorize: some layer must become smaller, got none: {next(iter(skipped.values()), '')}. "
                "Lower the rank, the energy or the budget."
            )
        model = copy_model(model)
        for name, rank in ranks.items():
            attach(model, name, LowRank(rank))
        return build(model)

    def label(self) -> str:
        return f"low rank {self.budget:g}" if self.budget is not None else "low rank"

    @classmethod
    def proposals(cls, model: nn.Module, task: Task, known: Known) -> Proposals | Refusal:
        """Offer half of the values, where some layer becomes smaller by it and lookup tables do not dominate."""
        half = cls(budget=0.5)
        if tables(model):
            return Refusal("most values lie in lookup tables")
        return Proposals((half,)) if half.ranks(model) else Refusal("no layer would become smaller at half its values")

    def _sort(self, model: nn.Module) -> tuple[dict[str, int], dict[str, str]]:
        skipped: dict[str, str] = {}
        matrices: dict[str, Tensor] = {}
        tensors, coded = parameter_names(model), codes(model)
        if self.allocation:
            names = [name for name, _ in self.allocation]
            for name in names:
                if name not in tensors:
                    raise ValueError(
                        f"Factorize: allocation must name tensors of the model, got {name!r}. {near(name, tensors)}"
                    )
        else:
            names = find(model, self.where, who="Factorize")
        for name in names:
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            why = (reason(model, name) or refusal(module)) if attribute == "weight" else "it is no layer's weight"
            if name in coded:
                why = "it is stored by a code already: realize it first"
            elif not path:
                why = "the model is this one layer: wrap it in nn.Sequential"
            elif _places(model, module) > 1:
                why = "the layer is held in several places"
            elif _read_by_its_parent(model, path):
                why = "its parent reads its weight directly"
            if why:
                skipped[name] = why
            else:
                matrices[name] = tensors[name].detach().float().reshape(len(tensors[name]), -1)
        ranks = self._choose(matrices)
        for name, rank in list(ranks.items()):
            out, n = matrices[name].shape
            if rank * (out + n) >= out * n:
                skipped[name] = f"rank {rank} would save no values"
                del ranks[name]
        return ranks, skipped

    def _choose(self, matrices: Mapping[str, Tensor]) -> dict[str, int]:
        if self.allocation:
            return {name: rank for name, rank in self.allocation if name in matrices}
        if self.rank is not None:
            return dict.fromkeys(matrices, self.rank)
        values = {name: torch.linalg.svdvals(matrix) for name, matrix in matrices.items()}
        if self.energy is not None:
            return {name: rank_by_energy(s, self.energy) for name, s in values.items()}
        assert self.budget is not None
        return ranks_by_budget(
            values, {name: (int(m.shape[0]), int(m.shape[1])) for name, m in matrices.items()}, self.budget
        )


def rank_by_energy(singular_values: Tensor, energy: float) -> int:
    """The least r with s_1^2 + ... + s_r^2 >= energy * ||W||_F^2.

    Example:
        >>> rank_by_energy(torch.tensor([3.0, 1.0, 0.1]), 0.9)
        2
    """
    squares = singular_values.double().square()
    share = squares.cumsum(0) / squares.sum().clamp_min(1e-30)
    return int((share < energy - 1e-12).sum()) + 1 if energy < 1 else len(squares)


def ranks_by_budget(
    singular_values: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, int]], budget: float
) -> dict[str, int]:
    """Ranks that keep at most `budget` of all values (never less than rank 1): the singular values with the most
    energy a value, relative to their layer's, come first. A layer whose rank would save nothing stays whole.

    Example:
        >>> ranks_by_budget({"a": torch.tensor([2.0, 0.1]), "b": torch.ones(2)}, {"a": (2, 8), "b": (2, 8)}, 0.95)
        {'a': 1, 'b': 2}
    """
    ranks = dict.fromkeys(singular_values, 1)

    def cost(name: str) -> int:
        out, n = shapes[name]
        return min(ranks[name] * (out + n), out * n)

    gains = sorted(
        (-(float(s[i]) ** 2) / max(float(s.square().sum()), 1e-30) / sum(shapes[name]), name, i)
        for name, s in singular_values.items()
        for i in range(1, len(s))
    )
    limit = budget * sum(math.prod(shape) for shape in shapes.values())
    spent, full = sum(cost(name) for name in ranks), set[str]()
    for _, name, i in gains:
        if name in full or i != ranks[name]:
            continue
        before = cost(name)
        ranks[name] += 1
        if spent + cost(name) - before > limit:
            ranks[name] -= 1
            full.add(name)
        else:
            spent += cost(name) - before
    return ranks


def _places(model: nn.Module, module: nn.Module) -> int:
    return sum(child is module for parent in model.modules() for child in parent._modules.values())


def _read_by_its_parent(model: nn.Module, path: str) -> bool:
    """Attention (and the fast path of the Transformer layers) reads the weights of its linear layers itself."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer)
