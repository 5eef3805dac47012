"""Small networks of other people's kinds on numbers, categories and pairs, with invented data: bench/kinds.py.

Each is written as people write it, has a few thousand parameters, and is trained in a second or two. All metrics are 1
at best, so that what is well above chance means the same for all.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from lilliput import Task
from lilliput.task import call, mapped

SIZES = {"train": 1500, "val": 400, "test": 400}
Data = Callable[[int], tuple[Any, Any]]


def runner(model: nn.Module) -> Callable[..., Any]:
    """A function that gives a network its numbers as wide as its weights are."""
    wide = next((each.dtype for each in model.parameters() if each.is_floating_point()), torch.float32)

    def run(*args: Any, **named: Any) -> Any:
        args, named = mapped(lambda leaf: leaf.to(wide) if leaf.is_floating_point() else leaf, (args, named))
        return model(*args, **named)

    return run


@dataclass(frozen=True)
class Kind:
    """A network, its data, and how it is trained.

    Args:
        build: makes the untrained network.
        data: count -> inputs and targets, drawn from torch's generator.
        task: settings of `lilliput.Task`: loss and metric.
        chance: what a guess reaches in the metric, whose best is 1.
        last: the layers that make outputs or codes, whose width pruning must keep.
        heads: how many heads the layers of self-written attention have.
        steps: of training.
        loss: (outputs, targets) -> loss of the training, where training shows other outputs than the task knows.
        after: what is done to the trained network, in place of training it so from the start.
    """

    build: Callable[[], nn.Module]
    data: Data
    task: dict[str, Any] = field(default_factory=dict)
    chance: float = 0.0
    last: tuple[str, ...] = ("out",)
    heads: dict[str, int] = field(default_factory=dict)
    steps: int = 200
    loss: Callable[[Any, Any], Tensor] | None = None
    after: Callable[[nn.Module], nn.Module] | None = None

    def job(self, seed: int = 0) -> tuple[nn.Module, Task, Task]:
        """The trained network, its task, and the task with a test split, which no tool is given."""
        torch.manual_seed(seed)
        splits = {name: self.data(count) for name, count in SIZES.items()}
        given = Task("kind", train=splits["train"], val=splits["val"], **self.task)
        model = self.build()
        self.train(model, given, self.steps)
        if self.after is not None:
            model = self.after(model)
        return model.eval(), given, Task("kind", **splits, **self.task)

    def train(self, model: nn.Module, task: Task, steps: int) -> None:
        """The user's own loop, which is also the fine-tuning after pruning."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
        model.train()
        for batch in task.batches(steps, seed=0):
            optimizer.zero_grad()
            outputs = call(runner(model), batch.inputs)
            loss = task.loss(outputs, batch) if self.loss is None else self.loss(outputs, batch.targets)
            loss.backward()
            optimizer.step()
        model.eval()

    def good(self, score: float) -> bool:
        """Whether a score is well above chance: a third of the way to the best."""
        return score >= self.chance + (1 - self.chance) / 3


# --------------------------------------------------------------------------------------------------------------- data


def fixed(*shape: int) -> Tensor:
    """The same random numbers for every split."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def classes(count: int) -> tuple[Tensor, Tensor]:
    """Which of three random quadratic forms of eight numbers is the largest."""
    x = torch.randn(count, 8)
    return x, (x @ fixed(8, 3) + (x.square() - 1) @ fixed(8, 3)).argmax(1)


def number(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8)
    return x, x[:, :1] * x[:, 1:2] + x[:, 2:3].relu() - 0.5 * x[:, 3:4] + 0.1 * torch.randn(count, 1)


def amounts(count: int) -> tuple[Tensor, Tensor]:
    """Numbers that are never negative."""
    x = torch.randn(count, 8)
    return x, torch.stack([x[:, 0].abs(), (x[:, 1] + x[:, 2]).relu()], 1)


def labels(count: int) -> tuple[Tensor, Tensor]:
    """Four yes-no labels at once."""
    x = torch.randn(count, 8)
    return x, (x @ fixed(8, 4) > 0).float()


def mixtures(count: int) -> tuple[Tensor, Tensor]:
    x = (torch.randn(count, 4) @ fixed(4, 24)).tanh()
    return x, x


def visits(count: int) -> tuple[dict[str, Tensor], Tensor]:
    """A user and an item that fit or do not."""
    user, item = torch.randint(0, 60, (count,)), torch.randint(0, 40, (count,))
    fit = (fixed(60, 2)[user] * fixed(40, 2)[item]).sum(1)
    return {"user": user, "item": item}, (fit > 0).float()


def clicks(count: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Four numbers, three categories, the last five pages that were seen."""
    x, ids = torch.randn(count, 4), torch.stack([torch.randint(0, rows, (count,)) for rows in (100, 40, 10)], 1)
    pages = torch.randint(0, 30, (count, 5))
    score = fixed(100)[ids[:, 0]] + fixed(40)[ids[:, 1]] + x[:, 0] + fixed(30)[pages].sum(1)
    return (x, ids, pages), (score > 0).float()


def pairs(count: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Two views of one thing, or of two."""
    x = torch.randn(count, 4)
    same = torch.rand(count) < 0.5
    other = torch.where(same[:, None], x, torch.randn(count, 4))
    return tuple(v @ fixed(4, 12) + 0.2 * torch.randn(count, 12) for v in (x, other)), same.float()  # type: ignore[return-value]


def kind_and_size(count: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    x = torch.randn(count, 8)
    return x, (x[:, :3].argmax(1), x[:, 3:4] + x[:, 4:5].abs())


# ----------------------------------------------------------------------------------------------------------- networks


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


class Net(nn.Module):
    """A perceptron with named layers."""

    def __init__(self, inputs: int = 8, hidden: int = 48, outputs: int = 3) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(F.relu(self.two(F.relu(self.one(x)))))
        return y


class Amount(Net):
    """A regression whose outputs are never negative."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class AutoEncoder(nn.Module):
    """Twenty-four numbers through a neck of four."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.decoder(self.encoder(x))
        return y


class VAE(nn.Module):
    """Draws its code while training, and takes the mean afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(24, 48)
        self.mean, self.log_variance = nn.Linear(48, 4), nn.Linear(48, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 48), nn.ReLU(), nn.Linear(48, 24))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.inner(x).relu()
        mean, log_variance = self.mean(h), self.log_variance(h)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


def elbo(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    again, mean, log_variance = outputs
    divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean()
    return F.mse_loss(again, x) + 1e-3 * divergence


def explained(outputs: Any, x: Tensor) -> Tensor:
    """Share of the variance that the (first) output keeps, over all values."""
    again = outputs if isinstance(outputs, Tensor) else outputs[0]
    return 1 - (again - x).square().mean() / x.var()


class TwoTowers(nn.Module):
    """Users and items embedded into one space, in which they are compared by a dot product."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(60, 16), nn.Embedding(40, 16)
        self.left = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
        self.right = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        return 5 * (
            F.normalize(self.left(self.user(user)), dim=-1) * F.normalize(self.right(self.item(item)), dim=-1)
        ).sum(-1)


class DLRM(nn.Module):
    """Embedding bags and a perceptron, their dot products, a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(rows, 8, mode="sum") for rows in (100, 40, 10))
        self.pages = nn.EmbeddingBag(30, 8, mode="sum")
        self.bottom = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(8 + 10, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("below", torch.tril_indices(5, 5, -1), persistent=False)

    def forward(self, x: Tensor, ids: Tensor, pages: Tensor) -> Tensor:
        dense = self.bottom(x)
        rows = [table(ids[:, i : i + 1]) for i, table in enumerate(self.tables)]
        stacked = torch.stack([dense, *rows, self.pages(pages)], dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))[:, self.below[0], self.below[1]]
        y: Tensor = self.top(torch.cat([dense, products], dim=1))
        return y.squeeze(1)


class Siamese(nn.Module):
    """One tower that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = mlp(12, 32, 8)
        self.scale, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(1.0))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        apart = (self.tower(a) - self.tower(b)).square().sum(1)
        return self.shift - self.scale * apart


class Experts(nn.Module):
    """A gate sends each example to the two best of four experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        y = x.new_zeros(x.shape[0], 3)
        for i, expert in enumerate(self.experts):
            share = torch.where(chosen == i, weights, 0.0).sum(-1, keepdim=True)
            y = y + share * expert(x)
        return y


class Normed(Net):
    """weight_norm on the hidden layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.utils.parametrizations.weight_norm(self.one), parametrizations.weight_norm(self.two)


class Spectral(Net):
    """spectral_norm, of the older kind, on a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.two = nn.utils.spectral_norm(self.two)


class Symmetric(nn.Module):
    """A parametrization of one's own: the weight is a symmetric matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).transpose(-1, -2)


class Mirrored(Net):
    """A layer whose weight is symmetric."""

    def __init__(self) -> None:
        super().__init__()
        parametrize.register_parametrization(self.two, "weight", Symmetric())


class Helped(Net):
    """A second head helps training, and is not there afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.one(x))
        y = self.out(F.relu(self.two(h)))
        return (y, self.helper(h)) if self.training else y


def helped(outputs: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], y) + 0.3 * F.cross_entropy(outputs[1], y)


@dataclass
class Answer:
    """What a network says."""

    kind: Tensor
    size: Tensor


class Dataclass(nn.Module):
    """A class and a number, returned as a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU())
        self.kind, self.size = nn.Linear(48, 3), nn.Linear(48, 1)

    def forward(self, x: Tensor) -> Answer:
        h = self.body(x)
        return Answer(self.kind(h), self.size(h))


def answer_loss(outputs: Any, targets: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs.kind, targets[0]) + F.mse_loss(outputs.size, targets[1])


def answer_right(outputs: Any, targets: tuple[Tensor, Tensor]) -> Tensor:
    return (outputs.kind.argmax(1) == targets[0]).float()


def masked(model: nn.Module) -> nn.Module:
    """Half of the weights of two layers are masked, as torch.nn.utils.prune does."""
    assert isinstance(model, Net)
    for layer in (model.one, model.two):
        prune.l1_unstructured(layer, "weight", 0.5)
    return model


BITS = {"loss": "bce", "metric": "accuracy"}
NUMBERS = {"loss": "mse", "metric": "r2"}
THIRD = 1 / 3
KINDS: dict[str, Kind] = {
    "MLP": Kind(lambda: mlp(8, 48, 3), classes, chance=THIRD, last=("4",)),
    "regression (N, 1)": Kind(lambda: Net(outputs=1), number, NUMBERS),
    "regression that ends in ReLU": Kind(lambda: Amount(outputs=2), amounts, NUMBERS),
    "several yes-no labels": Kind(lambda: Net(outputs=4), labels, BITS, chance=0.5),
    "auto-encoder": Kind(AutoEncoder, mixtures, NUMBERS, last=("encoder.2", "decoder.2")),
    "variational auto-encoder": Kind(
        VAE, mixtures, {"loss": elbo, "metric": explained}, last=("mean", "log_variance", "decoder.2")
    ),
    "two-tower recommender": Kind(TwoTowers, visits, BITS, chance=0.5, last=("left.2", "right.2"), steps=300),
    "DLRM": Kind(DLRM, clicks, {"loss": "bce", "metric": "auc"}, chance=0.5, last=("top.2",)),
    "siamese": Kind(Siamese, pairs, BITS, chance=0.5, last=("tower.4",)),
    "mixture of experts": Kind(Experts, classes, chance=THIRD, last=("gate", *(f"experts.{i}.2" for i in range(4)))),
    "weight_norm": Kind(Normed, classes, chance=THIRD),
    "spectral_norm": Kind(Spectral, classes, chance=THIRD),
    "masks of torch.nn.utils.prune": Kind(Net, classes, chance=THIRD, after=masked),
    "half precision": Kind(Net, classes, chance=THIRD, after=nn.Module.half),
    "float64": Kind(Net, classes, chance=THIRD, after=nn.Module.double),
    "parametrization of one's own": Kind(Mirrored, classes, chance=THIRD),
    "auxiliary head": Kind(Helped, classes, chance=THIRD, loss=helped),
    "dataclass as output": Kind(
        Dataclass, kind_and_size, {"loss": answer_loss, "metric": answer_right}, chance=THIRD, last=("kind", "size")
    ),
}
