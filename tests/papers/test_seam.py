"""SeaM: frozen weights, masks found by gradient, and the smaller module that they leave."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lilliput.code.base import codes, realize
from lilliput.code.names import theta
from lilliput.export.onnx import Session, trace
from lilliput.graph.empty import RemoveEmpty, remove_empty
from lilliput.graph.fold import fold_batchnorm
from lilliput.prune import seam
from lilliput.prune.masks import masks
from lilliput.prune.seam import Reused, Seam, binary, retention, reuse
from lilliput.prune.subproblem import restricted, subproblem
from lilliput.search.check import check
from lilliput.stage import Reference
from lilliput.task import Task, predict
from lilliput.train import Train


def problem() -> tuple[nn.Module, Task]:
    """Five classes of noisy patterns and a convolutional network, with a batch norm, that was trained on them."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 2, 6, 6, generator=draw)

    def some(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(count) % 5
        return centres[y] + 0.5 * torch.randn(count, 2, 6, 6, generator=draw), y

    task = Task("patterns", some(200), some(100), some(150), batch_size=32)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(48, 5),
    )
    trained = Train(60, lr=0.01)(net, task, Reference(net, task))
    assert task.score(trained).value > 0.95
    return trained.eval(), task


MODEL, TASK = problem()


@pytest.mark.parametrize("pattern", ["elements", "channel"])
def test_weights_never_change(pattern: str) -> None:
    pruned = Seam((1, 3), steps=30, pattern=pattern)(MODEL, TASK, None)
    folded = fold_batchnorm(MODEL, TASK.example)
    for name, weight in folded.named_parameters():
        assert torch.equal(theta(pruned.get_submodule("body"), name), weight), name
    assert 0 < retention(pruned) < 1
    assert all(p.requires_grad for p in pruned.parameters()), "as it was before"


def test_masks_are_binary_forward_and_straight_through_backward_clipped() -> None:
    s = torch.tensor([0.3, 0.0, -2.0, 5.0], requires_grad=True)
    (binary(s) * torch.tensor([0.5, -0.25, 3.0, -7.0])).sum().backward()
    assert binary(s).tolist() == [1, 0, 0, 1]
    assert s.grad is not None and s.grad.tolist() == [0.5, -0.25, 1.0, -1.0]


@pytest.mark.parametrize("pattern", ["elements", "channel"])
def test_retention_rate_is_the_count_of_kept_weights(pattern: str) -> None:
    pruned = Seam((0, 2, 4), steps=40, pattern=pattern)(MODEL, TASK, None)
    weights = {name: code.mask for name, code in masks(pruned).items() if code.mask.dim() > 1}
    assert sum(mask.numel() for mask in weights.values()) == sum(p.numel() for p in MODEL.parameters() if p.dim() > 1)
    kept = sum(int(mask.sum()) for mask in weights.values())
    plain = realize(pruned)
    assert kept == sum(int(plain.get_parameter(name).count_nonzero()) for name in weights)
    total = sum(mask.numel() for mask in weights.values())
    assert retention(pruned) == pytest.approx(kept / total)


def test_the_loss_is_cross_entropy_through_the_head_plus_alpha_times_the_retention_rate() -> None:
    sub = subproblem(TASK, (1, 3))
    body = fold_batchnorm(MODEL, TASK.example).eval().requires_grad_(False)
    net = Reused(body, seam._head(body, TASK.example, (1, 3), False))
    names = [name for name, p in body.named_parameters() if p.dim() > 1]
    scores, masked = seam._elements(body, TASK.example, names, "magnitude")
    with torch.no_grad():
        for s in scores.values():
            s.sub_(0.4)
    batch = next(iter(sub.batches(1, 0)))
    entropy, rate = seam.terms(net, masked(), names, sub, batch)
    with torch.no_grad():
        cut = fold_batchnorm(MODEL, TASK.example).eval()
        kept = 0
        for name in names:
            mask = scores[name] > 0
            kept += int(mask.sum())
            cut.get_parameter(name).mul_(mask)
        logits = net.head(cut(batch.inputs).relu())
    torch.testing.assert_close(entropy, F.cross_entropy(logits, batch.targets))
    total = sum(s.numel() for s in scores.values())
    assert rate.item() == pytest.approx(kept / total)
    rate.backward()
    for s in scores.values():
        torch.testing.assert_close(s.grad, torch.full_like(s, 1 / total))


def test_a_larger_alpha_keeps_fewer_weights() -> None:
    rates = [retention(Seam((1, 3), steps=60, alpha=alpha)(MODEL, TASK, None)) for alpha in (0.1, 10.0)]
    assert rates[1] < rates[0] / 2


def test_few_weights_answer_the_sub_problem_as_well() -> None:
    full = subproblem(TASK, (1, 3)).score(restricted(MODEL, (1, 3))).value
    small, sub = reuse(MODEL, TASK, (1, 3), steps=100)
    assert sub.score(small).value >= full
    kept = sum(int(p.count_nonzero()) for p in small.parameters() if p.dim() > 1)
    assert kept <= 0.15 * sum(p.numel() for p in MODEL.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("classes", "rest", "pattern"),
    [((1, 3), False, "elements"), ((4,), True, "channel"), ((0, 2, 3), False, "channel")],
)
def test_the_smaller_module_computes_what_the_masked_one_does(
    classes: tuple[int, ...], rest: bool, pattern: str
) -> None:
    pruned = Seam(classes, rest, steps=60, alpha=10.0, pattern=pattern)(MODEL, TASK, None)
    small = remove_empty(pruned, TASK.example)
    x = TASK.split("test")[0]
    torch.testing.assert_close(predict(small, x), predict(pruned, x))
    torch.testing.assert_close(predict(small, x * 3 - 1), predict(pruned, x * 3 - 1), rtol=1e-4, atol=1e-4)
    assert not codes(small)
    values = [sum(p.numel() for p in net.parameters()) for net in (small, realize(pruned))]
    assert values[0] < values[1]
    assert small(TASK.example).shape == (1, len(classes) + rest)


def test_the_smaller_module_trains_and_can_be_shrunk() -> None:
    small, sub = reuse(MODEL, TASK, (1, 3), steps=60, alpha=10.0, pattern="channel")
    check(small, sub)
    trained = Train(30, lr=0.003)(small, sub, Reference(small, sub))
    assert sub.score(trained).value >= sub.score(small).value


@pytest.mark.slow
def test_the_smaller_module_exports() -> None:
    small, sub = reuse(MODEL, TASK, (1, 3), steps=60, alpha=10.0, pattern="channel")
    x = sub.split("test")[0]
    outputs = Session(trace(small, sub.example).proto).outputs(x)
    torch.testing.assert_close(torch.from_numpy(outputs), predict(small, x), rtol=1e-4, atol=1e-5)


def test_networks_of_several_inputs() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.fc(a + b)
            return y

    x, y = {"a": torch.eye(3).repeat(4, 1), "b": torch.eye(3).repeat(4, 1)}, torch.arange(3).repeat(4)
    small, sub = reuse(Sum(), Task("sum", (x, y), (x, y)), (2, 0), steps=3)
    assert predict(small, sub.split("val")[0]).shape == (8, 2)


def test_starts_as_the_slice_of_the_full_network() -> None:
    head = seam._head(MODEL, TASK.example, (3, 1), False)
    x = TASK.split("val")[0]
    torch.testing.assert_close(predict(Reused(MODEL, head), x), predict(MODEL, x)[:, [3, 1]].relu())
    both = seam._head(MODEL, TASK.example, (2,), True)
    assert both.weight.tolist() == [[0, 0, 1, 0, 0], [1, 1, 0, 1, 1]]


def test_subproblem_relabels_and_balances() -> None:
    x, y = TASK.split("train")
    inputs, labels = subproblem(TASK, (3, 1)).split("train")
    assert torch.equal(inputs, x[(y == 3) | (y == 1)])
    assert torch.equal(labels, (y[(y == 3) | (y == 1)] == 1).long())
    sub = subproblem(TASK, (2,), rest=True)
    for split in ("train", "val", "test"):
        inputs, labels = sub.split(split)
        assert torch.bincount(labels).tolist() == [int((TASK.split(split)[1] == 2).sum())] * 2
        others = TASK.split(split)[1][
            [int((TASK.split(split)[0] == one).flatten(1).all(1).nonzero()) for one in inputs[labels == 1]]
        ]
        counts = torch.bincount(others, minlength=5)[[0, 1, 3, 4]]
        assert int(counts.max() - counts.min()) <= 1, "evenly from all others"
    assert sub.batch_size == TASK.batch_size and sub.higher_is_better


@pytest.mark.parametrize(
    ("classes", "rest", "match"),
    [
        ((1,), False, r"two labels to tell apart.*rest=True"),
        ((), False, r"two labels"),
        ((1, 1), False, r"must differ, got \(1, 1\). Name each once"),
        ((-1, 2), False, r"whole numbers from 0 up"),
        ((True, 2), False, r"whole numbers"),
    ],
)
def test_classes_are_checked_before_any_work(classes: tuple[int, ...], rest: bool, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Seam(classes, rest)
    with pytest.raises(ValueError, match=match):
        subproblem(TASK, classes, rest)


def test_classes_must_be_there() -> None:
    with pytest.raises(ValueError, match=re.escape("got 7, which no train example has. Choose from [0, 1, 2, 3, 4].")):
        Seam((1, 7))(MODEL, TASK, None)
    with pytest.raises(ValueError, match=r"rest=True needs other classes.*leave rest out"):
        subproblem(TASK, (0, 1, 2, 3, 4), rest=True)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(ValueError, match=r"below the network's number of outputs.*0 to 2"):
        Seam((1, 4))(narrow, TASK, None)
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"class labels and the loss 'cross_entropy', got 'mse'"):
        subproblem(Task("mse", (x, x), (x, x), loss="mse", metric="mse"), (0, 1))
    with pytest.raises(TypeError, match="labelled data"):
        subproblem(Task("bare", x, (x, torch.arange(4))), (0, 1))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps and every"),
        ({"alpha": -1.0}, "alpha must be"),
        ({"lr": 0.0}, "lr"),
        ({"pattern": "2:4"}, "'elements' or 'channel'"),
        ({"start": "zeros"}, "'ones' or 'magnitude'"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Seam((0, 1), **settings)


def test_no_channels_to_mask_says_what_to_do() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(72, 5))
    stage = Seam((0, 1), steps=5, pattern="channel")
    with pytest.raises(ValueError, match="pattern='elements'"):
        stage(nn.Sequential(nn.Flatten(), nn.LayerNorm(72), nn.Linear(72, 5)), TASK, None)
    assert retention(Seam((0, 1), steps=5)(flat, TASK, None)) <= 1


def test_remove_empty_takes_what_is_not_read_and_what_is_not_made_and_nothing_else() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 2))
    x = torch.randn(16, 3)
    with torch.no_grad():
        net[2].weight[:, 0] = 0  # hidden unit 0 is not read
        net[0].weight[1] = 0
        net[0].bias[1] = 0  # unit 1 is not made
        net[0].weight[2] = 0  # unit 2 is its bias alone: it stays
        net[2].weight[3] = 0
        net[2].bias[3] = 0  # a sigmoid makes one half of zero: it stays
    small = remove_empty(net, x[:1])
    assert (small[0].out_features, small[2].out_features) == (6, 6)
    torch.testing.assert_close(small(x), net(x))
    y = torch.arange(16) % 2
    assert RemoveEmpty()(net, Task("t", (x, y), (x, y)), None)[0].out_features == 6


def test_remove_empty_follows_emptiness_backwards_and_drops_blocks_that_add_nothing() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = (x + self.two(self.one(x).relu())).relu()
            return y

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), Block(), Block(), nn.Linear(4, 2))
    with torch.no_grad():
        net[4].two.weight.zero_()
        net[4].two.bias.zero_()
        net[5].one.weight[:, 2] = 0
        net[6].weight[:, 2] = 0  # but the block's sum still reads and makes channel 2
        net[2].weight[1:, 3] = 0
        net[2].weight[0, 3] = 0  # unit 3 of the first layer is not read
    x = torch.randn(20, 3)
    small = remove_empty(net, x[:1])
    assert isinstance(small[4], nn.Identity) and small[0].out_features == 5 and small[2].out_features == 3
    torch.testing.assert_close(small(x), net(x))
