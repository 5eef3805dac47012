"""SeaM: keep of a trained network what some of its classes need, by a gradient search over masks."""

import math
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lilliput.code.base import attach, realize
from lilliput.code.masked import Masked
from lilliput.code.names import parameter_names, theta
from lilliput.graph import slicing
from lilliput.graph.channels import groups
from lilliput.graph.empty import MIXERS, remove_empty
from lilliput.graph.fold import fold_batchnorm
from lilliput.prune import patterns
from lilliput.prune.masks import masks, prunable
from lilliput.prune.subproblem import check_classes, restricted, subproblem
from lilliput.stage import Reference, Stage, on
from lilliput.task import Batch, Task, call

Masks = dict[str, Tensor]


class Reused(nn.Sequential):
    """Put a head that answers the sub-problem on a network: head(relu(body(x))), (n, ...) -> (n, classes)."""

    body: nn.Module
    relu: nn.Module
    head: nn.Linear

    def __init__(self, body: nn.Module, head: nn.Linear) -> None:
        super().__init__(OrderedDict(body=body, relu=nn.ReLU(), head=head))


class ReusedInputs(Reused):
    """Do as `Reused` for a network of several inputs, by place or by name."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = self.head(self.relu(self.body(*args, **kwargs)))
        return y


class _Binary(torch.autograd.Function):
    """1 where s > 0, else 0; backward as if it were s, clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        return (s > 0).to(s.dtype)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> Tensor:
        return gradient[0].clamp(-1, 1)


def binary(s: Tensor) -> Tensor:
    """Return 1 where s > 0, else 0, with a straight-through gradient.

    Args:
        s: Scores of any shape.

    Returns:
        Zeros and ones of the type of the scores.

    Example:
        >>> binary(torch.tensor([0.5, -0.5, 0.0]))
        tensor([1., 0., 0.])
    """
    made: Tensor = _Binary.apply(s)  # type: ignore[no-untyped-call]
    return made


@dataclass(frozen=True)
class Seam(Stage):
    """Find by gradient descent masks that keep of frozen weights W only those that some classes need.

    W_m = W * m, m = 1 where s > 0 else 0. The scores s are trained, together with a small linear head on the network's
    outputs, to lower

        L = CE(head(relu(f(x; W_m))), y) + alpha * R,    R = sum(m) / count(m), the weight retention rate,

    over the sub-problem's examples; the gradient passes the threshold straight through, clipped to [-1, 1]. Of the
    masks seen every `every` steps those of the lowest R stay whose validation score is no lower than the full network's
    among these classes; where no masks reach that, those of the highest score minus R.

    A weight's share of alpha R is alpha / count(m): the larger the network and the fewer the steps, the larger alpha
    (the paper's one to two go with hundreds of epochs).

    The result is a `Reused` with `Masked` weights in eval mode, batch norms folded. `remove_empty` makes a smaller
    plain module of it; `reuse` does both.

    Args:
        classes: The outputs to keep, in the order of the new labels.
        rest: Whether there is one more label for every other class (classes=(7,), rest=True is binary: 7 or not).
        steps: Steps of the search.
        alpha: The weight of the retention rate.
        lr: The learning rate of the scores, falling to zero by half a cosine.
        head_lr: The learning rate of the head, falling likewise.
        pattern: "elements" (the paper's) masks single weights, and a bias goes with the last weight of its output;
            "channel" masks whole channels of coupled layers, both where they are made and where they are read.
        start: "ones" (the paper's), where all scores fall to the threshold together and those that are missed come
            back, or "magnitude", where scores start at the ranks of |W| in (0, 1] and fall one after the other: far
            fewer steps.
        where: The weights that may go, as in `Prune`.
        every: Steps between masks that are scored.
        batch_size: Examples a step; the task's by default.
        seed: The seed of the batches.

    Raises:
        ValueError: For classes that are repeated, unknown, or fewer than two labels, and for settings out of range.

    Example:
        >>> x, y = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
        >>> task = Task("eye", (x, y), (x, y), batch_size=16)
        >>> net = nn.Linear(4, 4); net.weight.data, net.bias.data = 4 * torch.eye(4) + 0.01, torch.zeros(4)
        >>> small = Seam(classes=(1, 2), steps=60)(net, task, None)
        >>> retention(small) < 0.5, subproblem(task, (1, 2)).score(small).value
        (True, 1.0)

    Source:
        Qi, Sun, Gao, Zhang, Li and Liu, Reusing deep neural network models through model re-engineering, ICSE 2023,
        arXiv:2304.00245; threshold, clipping, head, the norms' fixed statistics and the choice among masks as in the
        authors' code (github.com/qibinhang/SeaM). There a bias has a mask of its own, and every fifth epoch trains the
        head alone. The channel pattern, the start by magnitude and the falling learning rate are ours.
    """

    classes: tuple[int, ...]
    rest: bool = False
    steps: int = 400
    alpha: float = 4.0
    lr: float = 0.05
    head_lr: float = 0.01
    pattern: str = "elements"
    start: str = "magnitude"
    where: str = "*"
    every: int = 20
    batch_size: int | None = None
    seed: int = 0

    structural: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_classes(self.classes, self.rest, "Seam")
        if self.steps < 1 or self.every < 1:
            raise ValueError(f"Seam: steps and every must be at least 1, got {self.steps} and {self.every}.")
        if not (self.alpha >= 0 and self.lr > 0 and self.head_lr > 0):
            raise ValueError(
                f"Seam: alpha must be at least 0 and lr and head_lr above 0, got alpha={self.alpha:g}, "
                f"lr={self.lr:g}, head_lr={self.head_lr:g}."
            )
        if self.pattern not in ("elements", "channel"):
            raise ValueError(f"Seam: pattern must be 'elements' or 'channel', got {self.pattern!r}.")
        if self.start not in ("ones", "magnitude"):
            raise ValueError(f"Seam: start must be 'ones' or 'magnitude', got {self.start!r}.")

    def __call__(self, model: nn.Module, task: Task, reference: Reference | None) -> nn.Module:
        device = torch.device("cpu") if reference is None else reference.device
        sub, example = subproblem(task, self.classes, self.rest), on(task.example, device)
        plain = realize(model).to(device)
        flags = {name: p.requires_grad for name, p in plain.named_parameters()}
        if wrong := next((name for name, p in plain.named_parameters() if p.dtype != torch.float32), None):
            raise ValueError(
                f"Seam: weights must be float32, got {plain.get_parameter(wrong).dtype} in {wrong}. Call "
                "model.float() first."
            )
        body = fold_batchnorm(plain, example).eval().requires_grad_(False)
        head = _head(body, example, self.classes, self.rest).to(device)
        net = Reused(body, head) if isinstance(example, Tensor) else ReusedInputs(body, head)
        names, skipped = prunable(body, self.where, patterns.parse("elements"), "Seam")
        if not names:
            why = next(iter(skipped.values()), "")
            raise ValueError(f"Seam: some weight must be free to go, got none of {list(skipped)[:3]}: {why}.")
        scores, masked = (_elements if self.pattern == "elements" else _channels)(body, example, names, self.start)
        optimizer = torch.optim.Adam(
            [
                {"params": list(scores.values()), "lr": self.lr},
                {"params": list(net.head.parameters()), "lr": self.head_lr},
            ]
        )
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        floor, best = sub.score(restricted(body, self.classes, self.rest)).value, (False, -math.inf)
        for step, batch in enumerate(sub.batches(self.steps, self.seed, self.batch_size), 1):
            entropy, rate = terms(net, masked(), names, sub, batch)
            optimizer.zero_grad()
            (entropy + self.alpha * rate).backward()
            optimizer.step()
            falling.step()
            if step % self.every == 0 or step == self.steps:
                with torch.no_grad():
                    m = masked()
                    lost, kept = sub.loss_of(floor, sub.score(under(net, m)).value), float(_rate(body, m, names))
                rank = (lost <= 0, -kept if lost <= 0 else -lost - kept)
                if rank >= best:
                    best, best_state = rank, (m, {key: value.clone() for key, value in net.head.state_dict().items()})
        net.head.load_state_dict(best_state[1])
        _attach(net, best_state[0])
        for name in parameter_names(net.body):
            theta(net.body, name).requires_grad_(flags.get(name, True))
        return net.cpu().eval()


def terms(net: Reused, m: Masks, names: Collection[str], sub: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the two terms of the loss: the cross entropy under masks m, and the weight retention rate R."""
    device = net.head.weight.device
    output = call(under(net, m), on(batch.inputs, device))
    labels = None if batch.targets is None else batch.targets.to(device)
    return sub.loss(output, replace(batch, targets=labels)), _rate(net.body, m, names)


def retention(model: nn.Module) -> float:
    """Compute the weight retention rate of a masked network: kept weights over all weights of its masked matrices.

    Args:
        model: A network with masks.

    Returns:
        The rate, in [0, 1].

    Example:
        >>> net = nn.Linear(4, 1)
        >>> attach(net, "weight", Masked(torch.tensor([[True, False, False, False]])))
        >>> retention(net)
        0.25
    """
    seen = [code.mask for code in masks(model).values() if code.mask.dim() > 1]
    return sum(int(mask.sum()) for mask in seen) / max(1, sum(mask.numel() for mask in seen))


def reuse(
    model: nn.Module, task: Task, classes: tuple[int, ...], rest: bool = False, **settings: Any
) -> tuple[nn.Module, Task]:
    """Make a smaller plain network for some of the classes, and their task: what `shrink` and `compile` take.

    Args:
        model: The network for all classes.
        task: The task of all classes.
        classes: The outputs to keep, in the order of the new labels.
        rest: Whether there is one more label for every other class.
        settings: Those of `Seam`.

    Returns:
        The network and the task of the sub-problem.

    Example:
        >>> x, y = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> small, sub = reuse(net, Task("eye", (x, y), (x, y)), (1, 2), steps=5)
        >>> small(sub.example).shape
        torch.Size([1, 2])
    """
    pruned = Seam(classes, rest, **settings)(model, task, None)
    return remove_empty(pruned, task.example), subproblem(task, classes, rest)


def _head(body: nn.Module, example: Any, classes: tuple[int, ...], rest: bool) -> nn.Linear:
    """(outputs -> classes): starts as the slice of these classes, and the sum of the others where there is a rest."""
    with torch.no_grad():
        shape = call(body, example).shape
    if len(shape) != 2 or max(classes) >= shape[1]:
        raise ValueError(
            f"Seam: classes must be below the network's number of outputs, got {classes} for outputs of "
            f"shape {tuple(shape)}. Choose from 0 to {shape[-1] - 1}."
        )
    head = nn.Linear(shape[1], len(classes) + rest)
    with torch.no_grad():
        head.bias.zero_()
        head.weight.fill_(0.0)
        for row, label in enumerate(classes):
            head.weight[row, label] = 1.0
        if rest:
            head.weight[-1] = (head.weight[:-1].sum(0) == 0).float()
    return head


def _scores(sizes: Masks, start: str) -> Masks:
    """Where the search starts: at one, or at the rank of each magnitude among all of them, in (0, 1]."""
    flat = torch.cat([size.detach().flatten() for size in sizes.values()])
    ranks = torch.ones_like(flat)
    if start == "magnitude":
        ranks[flat.argsort(stable=True)] = torch.arange(1, len(flat) + 1).to(flat) / len(flat)
    parts = ranks.split([size.numel() for size in sizes.values()])
    return {
        name: part.view_as(size).clone().requires_grad_()
        for (name, size), part in zip(sizes.items(), parts, strict=True)
    }


def _elements(body: nn.Module, example: Any, names: list[str], start: str) -> tuple[Masks, Callable[[], Masks]]:
    """A score for every weight; the masks also switch off the bias of an output that has no weight left."""
    scores = _scores({name: body.get_parameter(name).abs() for name in names}, start)
    biases = {}
    for name in names:
        path = name.rpartition(".")[0]
        layer = body.get_submodule(path)
        if isinstance(layer, (nn.Linear, *slicing.CONVS)) and layer.bias is not None:
            biases[name] = f"{path}.bias" if path else "bias"

    def masked() -> Masks:
        by_name = {name: binary(s) for name, s in scores.items()}
        return by_name | {bias: by_name[name].flatten(1).amax(1) for name, bias in biases.items()}

    return scores, masked


def _channels(body: nn.Module, example: Any, names: list[str], start: str) -> tuple[Masks, Callable[[], Masks]]:
    """A score for every channel of every group; the masks cover what makes it and what reads it."""
    allowed = set(names)
    sizes: Masks = {}
    places: list[tuple[str, int, Tensor, str, Tensor]] = []
    for group in groups(body, example):
        layers = {part.layer: body.get_submodule(part.layer) for part in group.parts}
        weights = [
            f"{path}.weight" if path else "weight" for path, layer in layers.items() if isinstance(layer, slicing.MAPS)
        ]
        fits = not any(isinstance(layer, MIXERS) or slicing.partitions(layer) > 1 for layer in layers.values())
        if not group.removable or not fits or not allowed.issuperset(weights):
            continue
        sizes[group.name] = torch.zeros(group.size, device=next(body.parameters()).device)
        for part in group.parts:
            layer = layers[part.layer]
            for tensor, value in layer.named_parameters(recurse=False):
                dim = slicing.channels(layer, part.side, tensor)
                if dim is not None and not (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
                    energy = value.square().transpose(0, dim).flatten(1).sum(1) if value.dim() > 1 else value * 0
                    share = energy[torch.tensor(part.index)] / energy.sum().clamp_min(1e-12)
                    sizes[group.name].index_add_(0, torch.tensor(part.channel), share * group.size)
                    places.append(
                        (
                            f"{part.layer}.{tensor}" if part.layer else tensor,
                            dim,
                            torch.tensor(part.index),
                            group.name,
                            torch.tensor(part.channel),
                        )
                    )
    if not sizes:
        raise ValueError(
            "Seam: pattern 'channel' needs a group of channels that can go, got none. Use pattern='elements'."
        )
    scores = _scores(sizes, start)

    def masked() -> Masks:
        gates = {name: binary(s) for name, s in scores.items()}
        by_name: Masks = {}
        for name, dim, index, group, channel in places:
            shape = body.get_parameter(name).shape
            gate = gates[group].new_ones(shape[dim]).index_put((index,), gates[group][channel])
            m = by_name.get(name)
            factor = gate.view(-1, *(1,) * (len(shape) - dim - 1))
            by_name[name] = factor.expand(shape) if m is None else m * factor
        return by_name

    return scores, masked


def under(net: Reused, m: Masks) -> Callable[..., Tensor]:
    """The network under masks."""
    held = {f"body.{name}": net.body.get_parameter(name) * mask for name, mask in m.items()}

    def answer(*args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = functional_call(net, held, args, kwargs)
        return output

    return answer


def _rate(body: nn.Module, m: Masks, names: Collection[str]) -> Tensor:
    """R: kept weights over all; those without a mask are kept."""
    total = sum(body.get_parameter(name).numel() for name in names)
    kept = [m[name].sum() if name in m else torch.tensor(float(body.get_parameter(name).numel())) for name in names]
    return torch.stack(kept).sum() / total


def _attach(net: Reused, m: Masks) -> None:
    """Masks as codes; made full and narrowed then, so that the weights behind them stay what they are."""
    for name, mask in m.items():
        code = Masked(torch.ones_like(mask, dtype=torch.bool))
        attach(net, f"body.{name}", code)
        code.mask.copy_(mask > 0)
