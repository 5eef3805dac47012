"""Bases of a group's channels: where readers let channels be mixed, few mixtures say most of what all of them say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from lilliput.graph import slicing
from lilliput.graph.group import Group
from lilliput.graph.trace import agree, copied, run, sketch
from lilliput.graph.trial import awake

Freedom = Literal["any", "rotation", "none"]
FLOOR = 1e-6  # of the mean eigenvalue: directions that are never used have no exact inverse


@dataclass(frozen=True)
class Basis:
    """Mixtures of a group's channels, the most important first.

    Args:
        made: (channels, channels); what makes the channels, e, makes e @ made.
        read: (channels, channels); what reads them with columns W reads with W @ read, where read = made^-T.
        importance: (channels,); the squared share of what readers see that each mixture carries.
    """

    made: Tensor
    read: Tensor
    importance: Tensor


def freedom(model: nn.Module, example: Any, group: Group) -> Freedom:
    """Tell how a group's channels may be mixed: by any invertible matrix (readers are linear in them), by a rotation
    (there are dot products), or not at all; found by trying.
    """
    if not _mixable(model, group):
        return "none"
    work = awake(copied(model, "basis"))
    dense, draw = run(work, example), torch.Generator().manual_seed(group.size)
    rotation = torch.linalg.qr(torch.randn(group.size, group.size, generator=draw, dtype=torch.float64)).Q
    scales = torch.linspace(0.5, 2, group.size, dtype=torch.float64)
    tried: tuple[tuple[Freedom, Tensor], ...] = (("any", rotation * scales), ("rotation", rotation))
    for name, made in tried:
        mixed = sketch(work)
        mix_(mixed, group, made, torch.linalg.inv(made).T)
        if agree(dense, run(mixed, example), 1e-3):
            return name
    return "none"


def mixtures(model: nn.Module, group: Group, free: Freedom, moment: Tensor) -> Basis:
    """Find the mixtures of channels that carry most of what the readers see.

    With C the second moment of what is made and G = sum W^T W over the readers' columns W, an invertible M makes both
    diagonal and alike: M^T C M = M^-1 G M^-T = S, so that dropping mixture i loses S_i^2. With C = L L^T and
    L^T G L = U S^2 U^T it is M = L^-T U S^(1/2). A rotation takes the eigenvectors of C.

    Args:
        model: The model.
        group: A group of its channels.
        free: "any" or "rotation", as `freedom` says of it.
        moment: float64 (channels, channels), C.

    Returns:
        The basis.

    Source:
        Moore, Principal component analysis in linear systems, IEEE Transactions on Automatic Control 1981 (balancing);
        Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1936.
    """
    eye, gram = torch.eye(group.size, dtype=torch.float64), _gram(model, group)
    if free == "rotation":
        values, vectors = torch.linalg.eigh(moment)
        order = values.argsort(descending=True)
        return Basis(vectors[:, order], vectors[:, order], values[order].clamp_min(0) ** 2)
    moment = moment + eye * moment.diagonal().mean().clamp_min(1e-12) * FLOOR
    gram = gram + eye * gram.diagonal().mean().clamp_min(1e-12) * FLOOR
    lower = torch.linalg.cholesky(moment)
    squares, vectors = torch.linalg.eigh(lower.T @ gram @ lower)
    order = squares.argsort(descending=True)
    balanced = squares[order].clamp_min(1e-300) ** 0.5
    vectors = vectors[:, order]
    made = torch.linalg.solve_triangular(lower.T, vectors, upper=True) * balanced**0.5
    return Basis(made, lower @ vectors / balanced**0.5, balanced**2)


def unmixed(scores: Tensor) -> Basis:
    """The channels themselves, those with the highest scores first."""
    order = scores.argsort(descending=True, stable=True)
    eye = torch.eye(len(scores), dtype=torch.float64)[:, order]
    return Basis(eye, eye, scores[order].double())


def mix_(model: nn.Module, group: Group, made: Tensor, read: Tensor) -> None:
    """Mix a group's channels in place: makers by `made`, readers by `read`."""
    for part in group.parts:
        layer = model.get_submodule(part.layer)
        for name, dim in _tensors(layer, part.side):
            p = cast(Tensor, getattr(layer, name)).detach().clone()
            for index in _sets(part.index, part.channel, group.size):
                moved = p.movedim(dim, -1)
                moved[..., index] = (moved[..., index].double() @ (made if part.side == "out" else read)).to(p.dtype)
            setattr(layer, name, nn.Parameter(p, requires_grad=getattr(layer, name).requires_grad))


def moment(model: nn.Module, group: Group, use: Mapping[str, Tensor]) -> Tensor:
    """C: the mean of e e^T over the rows that the group's tables read, in float64.

    Args:
        model: The model.
        group: A group with tables among its makers.
        use: How often each row is read, by the path of the table; all rows alike where it says nothing.
    """
    total, count = torch.zeros(group.size, group.size, dtype=torch.float64), 0.0
    for part in group.parts:
        table = model.get_submodule(part.layer)
        if isinstance(table, slicing.TABLES):
            rows = table.weight.detach().double().cpu()
            read = use.get(part.layer, torch.ones(len(rows), dtype=torch.float64))
            total += rows.T @ (read[:, None] * rows)
            count += float(read.sum())
    return total / max(count, 1.0)


def _gram(model: nn.Module, group: Group) -> Tensor:
    total = torch.zeros(group.size, group.size, dtype=torch.float64)
    for part in group.parts:
        if part.side == "in":
            layer = model.get_submodule(part.layer)
            for name, dim in _tensors(layer, "in"):
                for index in _sets(part.index, part.channel, group.size):
                    columns = cast(Tensor, getattr(layer, name)).detach().double().cpu().movedim(dim, -1)
                    rows = columns[..., index].flatten(0, -2)
                    total += rows.T @ rows
    return total


def _mixable(model: nn.Module, group: Group) -> bool:
    """Whether all of a group's channels are made by maps and tables, and read whole by maps without groups."""
    for part in group.parts:
        layer = model.get_submodule(part.layer)
        plain = isinstance(layer, (*slicing.MAPS, *slicing.TABLES)) and getattr(layer, "groups", 1) == 1
        if not plain or (part.side == "out" and isinstance(layer, nn.RNNBase)):
            return False
        if not _sets(part.index, part.channel, group.size):
            return False
    return group.multiple == 1


def _tensors(layer: nn.Module, side: str) -> list[tuple[str, int]]:
    """The parameters of a layer that hold a side's channels, and along which dimension."""
    if isinstance(layer, nn.RNNBase):
        return [(n, 1) for n, _ in layer.named_parameters(recurse=False) if n.startswith("weight_ih_l0")]
    names = [n for n, _ in layer.named_parameters(recurse=False)]
    return [(n, dim) for n in names if (dim := slicing.channels(layer, side, n)) is not None]


def _sets(index: tuple[int, ...], channel: tuple[int, ...], size: int) -> list[Tensor]:
    """The positions of all channels, once each, in the order of channels: one tensor for every time that they are read.

    None where some channel is read more often than another.
    """
    of: list[list[int]] = [[] for _ in range(size)]
    for position, c in sorted(zip(index, channel, strict=True)):
        of[c].append(position)
    if len({len(positions) for positions in of}) != 1:
        return []
    return [torch.tensor(once) for once in zip(*of, strict=True)]
