"""Pruning of attention heads: remove whole heads, which gives smaller plain layers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from lilliput.errors import near
from lilliput.graph.heads import Heads, heads, opened, remove_heads
from lilliput.stage import Reference, Stage
from lilliput.statistics.sources import Labelled
from lilliput.task import Task

SCORES = ("importance", "taylor", "l2", "random")


@dataclass(frozen=True)
class PruneHeads(Stage):
    """Remove the attention heads of the lowest scores: their rows of query, key and value, their columns of the output.

    Scores are divided by their norm in the layer. "importance" is |dL/d xi_h| on average over examples, xi_h = 1 a gate
    on head h (Michel et al.); "taylor" the square of the batches' own gradient in the gate (Molchanov et al.), both on
    256 training examples; "l2" the norm of all the head's weights, for which no labels are needed; "random". Every
    layer keeps at least one head; one that has only one, or shares or hides its tensors, is left alone (see `skipped`).

    An `nn.MultiheadAttention` becomes a `lilliput.graph.heads.HeadAttention`, since it cannot have fewer heads of the
    same size. The hidden units between the two linear layers of a block are channels: see `PruneChannels`.

    Args:
        sparsity: The fraction of heads that goes, in [0, 1).
        score: One of the names above.
        allocation: "global" (the lowest of all layers) or "uniform" (as many in every layer).
        where: Glob patterns on the names of attention modules, separated by commas.
        seed: The seed of the random score and of drawn labels.

    Raises:
        ValueError: For settings out of range, where no attention module matches or can lose a head, and where every
            layer's last head would have to go.

    Example:
        >>> net = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True); x = torch.randn(8, 3, 8)
        >>> task = Task("tokens", train=(x, x), val=(x, x), loss="mse", metric="mse")
        >>> PruneHeads(0.5)(net, task, None).self_attn.num_heads
        2

    Source:
        Michel, Levy and Neubig, Are sixteen heads really better than one?, NeurIPS 2019, arXiv:1905.10650, section 4.1
        (the score); Molchanov et al., Importance estimation for neural network pruning, CVPR 2019, arXiv:1906.10771,
        section 3.2 (gates).
    """

    sparsity: float
    score: str = "importance"
    allocation: str = "global"
    where: str = "*"
    seed: int = 0

    structural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(
                f"PruneHeads: sparsity must be in [0, 1), got {self.sparsity:g}. For half the heads write 0.5."
            )
        if self.score not in SCORES:
            raise ValueError(f"PruneHeads: score must be a known name, got {self.score!r}. {near(self.score, SCORES)}")
        if self.allocation not in ("global", "uniform"):
            raise ValueError(f"PruneHeads: allocation must be 'global' or 'uniform', got {self.allocation!r}.")

    def skipped(self, model: nn.Module, task: Task) -> dict[str, str]:
        """List the attention modules that `where` takes in but that keep all their heads, each with the reason."""
        return {h.name: h.reason for h in self._chosen(heads(model, task.example)) if h.reason}

    def _chosen(self, every: Iterable[Heads]) -> list[Heads]:
        patterns = [pattern.strip() for pattern in self.where.split(",")]
        return [h for h in every if any(fnmatchcase(h.name, pattern) for pattern in patterns)]

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        every = heads(model, task.example)
        chosen = self._chosen(every)
        if not chosen:
            raise ValueError(
                f"PruneHeads: where must match an attention module, got {self.where!r}. "
                f"{near(self.where, [h.name for h in every])}"
            )
        free = [h for h in chosen if h.removable]
        if not free:
            raise ValueError(f"PruneHeads: some heads must be free to go, got none: {chosen[0]} Widen where=.")
        scores = {name: score / score.norm().clamp_min(1e-30) for name, score in self.rated(model, task, free).items()}
        return remove_heads(model, task.example, self._kept(free, scores), every)

    def rated(self, model: nn.Module, task: Task, modules: Iterable[Heads]) -> dict[str, Tensor]:
        """Compute one score a head, (heads,) for each attention module."""
        modules = list(modules)
        if self.score in ("importance", "taylor"):
            return gate_scores(model, task, modules, self.score, self.seed)
        work, generator = opened(model, modules), torch.Generator().manual_seed(self.seed)
        if self.score == "random":
            return {h.name: torch.rand(h.count, generator=generator) for h in modules}
        return {h.name: norms(work, h) for h in modules}

    def _kept(self, free: list[Heads], scores: dict[str, Tensor]) -> dict[str, Tensor]:
        total = sum(h.count for h in free)
        if self.allocation == "uniform":
            drop = {h.name: min(round(self.sparsity * h.count), h.count - 1) for h in free}
        else:
            most, goal = total - len(free), int(self.sparsity * total + 1e-9)
            if goal > most:
                raise ValueError(
                    f"PruneHeads: {len(free)} attention modules keep one of {total} heads each, so "
                    f"sparsity must be at most {most / total:g}, got {self.sparsity:g}. Remove whole "
                    "layers with lilliput.graph.remove_blocks."
                )
            drop = dict.fromkeys(scores, 0)
            ranked = sorted((float(s), i, name) for name, of in scores.items() for i, s in enumerate(of))
            counts = {h.name: h.count for h in free}
            for _, _, name in ranked:
                if goal and drop[name] < counts[name] - 1:
                    drop[name], goal = drop[name] + 1, goal - 1
        return {h.name: scores[h.name].argsort(stable=True)[drop[h.name] :].sort().values for h in free}


def gate_scores(
    model: nn.Module, task: Task, modules: Iterable[Heads], score: str = "importance", seed: int = 0
) -> dict[str, Tensor]:
    """Measure how much the loss L depends on gates xi_h = 1 that multiply the output of each head h.

    importance: I_h = E_x |dL(x) / d xi_h| = E_x |Att_h(x)^T dL(x) / d Att_h(x)|. taylor: the sum over batches of
    (dL / d xi_h)^2, L the batch's mean loss, which lets examples that pull in opposite directions cancel. Measured on a
    plain copy in eval mode; a task without labels is given ones drawn from the model's own outputs.

    Args:
        model: The model.
        task: Gives the examples and the loss.
        modules: The attention modules.
        score: "importance" or "taylor".
        seed: The seed of the choice of examples and of drawn labels.

    Returns:
        Scores (heads,) by the name of the module.
    """
    modules = list(modules)
    work = opened(model, modules).eval().float().requires_grad_(False)
    scores = {h.name: torch.zeros(h.count) for h in modules}
    data = Labelled.of(work, task, 256, seed)
    with torch.enable_grad(), _gates(work, modules) as gates:
        for loss, share in data.losses():
            loss.backward()
            for name, passed in gates.items():
                slopes = torch.stack([g.grad for g in passed if g.grad is not None]).sum(0).cpu()
                passed.clear()
                change = slopes.sum(0).square() if score == "taylor" else (slopes.abs().sum(0) * share)
                scores[name] += change
    return scores


@contextmanager
def _gates(model: nn.Module, modules: Iterable[Heads]) -> Iterator[dict[str, list[Tensor]]]:
    """Gates, one an example and head, on what the heads hand to their output map, kept by name for each call."""
    gates: dict[str, list[Tensor]] = {h.name: [] for h in modules}

    def gate(h: Heads, module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
        x: Tensor = args[0]
        xi = torch.ones(len(x), h.count, device=x.device, requires_grad=True)
        gates[h.name].append(xi)
        return ((x * xi.repeat_interleave(h.size, 1).view(len(x), *[1] * (x.dim() - 2), -1)),)

    hooks = [model.get_submodule(h.output).register_forward_pre_hook(partial(gate, h)) for h in modules]
    try:
        yield gates
    finally:
        for hook in hooks:
            hook.remove()


def norms(model: nn.Module, h: Heads) -> Tensor:
    """Compute the L2 norm of each head's rows of query, key and value and columns of the output."""
    every = torch.arange(h.count)
    total = torch.zeros(h.count)
    for path in (*h.projections, h.output):
        weight = cast(nn.Linear, model.get_submodule(path)).weight.detach()
        squares = (weight.T if path == h.output else weight).float().square().sum(1).cpu()
        owned = h.rows if path == h.output else h.projected
        total += torch.stack([squares[owned(head[None])].sum() for head in every])
    return total.sqrt()
