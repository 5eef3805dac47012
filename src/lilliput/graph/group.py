"""Groups of coupled channels: their names, and the choice of the channels that stay by scores."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lilliput.graph.trace import Skipped


@dataclass(frozen=True)
class Part:
    """One side of one layer: position index[k] of that side belongs to the group's channel channel[k]."""

    layer: str
    side: str  # "out": the layer makes the channel (or passes it on); "in": it reads it
    index: tuple[int, ...]
    channel: tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Describe channels of several layers that must be removed together, because additions and such couple them.

    Args:
        name: The first layer that makes them.
        size: How many there are.
        parts: The sides of layers that they belong to.
        classes: One label a channel; where labels differ (a grouped convolution, a group norm) each must keep equally
            many.
        reason: Why none may go; empty when some may.
    """

    name: str
    size: int
    parts: tuple[Part, ...]
    classes: tuple[int, ...]
    reason: str = ""

    @property
    def removable(self) -> bool:
        return not self.reason

    @property
    def multiple(self) -> int:
        """Widths are multiples of this."""
        return max(len(set(self.classes)), 1)

    def __str__(self) -> str:
        made = list(dict.fromkeys(p.layer for p in self.parts if p.side == "out"))
        read = list(dict.fromkeys(p.layer for p in self.parts if p.side == "in"))
        if not self.parts:
            return f"{self.name} stays: {self.reason}."
        text = f"{self.size} channels made by {_listed(made)}" + (f", read by {_listed(read)}" if read else "")
        if self.multiple > 1:
            text += f", equally many in each of {self.multiple} runs"
        return f"{text}; they stay: {self.reason}." if self.reason else f"{text}."


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}" if names else "nothing"


def skipped(groups: Iterable[Group]) -> tuple[Skipped, ...]:
    """The groups that stay, each with its reason."""
    return tuple(Skipped(g.name, g.reason) for g in groups if g.reason)


def choose(group: Group, scores: Tensor, count: int) -> Tensor:
    """The sorted indices of the `count` channels with the highest scores, equally many from each run of the group."""
    if not 0 < count <= group.size or count % group.multiple:
        raise ValueError(
            f"choose: {group.name} must keep a multiple of {group.multiple} in [1, {group.size}], got {count}."
        )
    classes = torch.tensor(group.classes)
    per = count // group.multiple
    picked = []
    for label in range(group.multiple):
        members = (classes == label).nonzero().flatten()
        picked.append(members[scores[members].argsort(descending=True, stable=True)[:per]])
    return torch.cat(picked).sort().values
