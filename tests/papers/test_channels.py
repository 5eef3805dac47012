"""Channels that go: the scores of the papers, and a network that computes the same where nothing was lost."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Task
from lilliput.code.base import attach
from lilliput.code.masked import Masked
from lilliput.errors import NotSupported
from lilliput.export.onnx import Session, trace
from lilliput.graph.channels import groups, remove_channels
from lilliput.prune.channels import SCORES, PruneChannels, filters, geometric_median, l1, l2
from lilliput.prune.slimming import Slimming


class Dense(nn.Module):
    """Concatenations of what came before, a batch norm over two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(12)
        self.c, self.d, self.f = nn.Conv2d(12, 4, 1), nn.Conv2d(16, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = torch.cat([x, self.b(x)], 1)
        x = torch.cat([x, self.c(self.n(x).relu())], 1)
        return self.f(self.d(x).relu().mean((2, 3)))


class Inverted(nn.Module):
    """A residual block with a depthwise convolution, and a grouped one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.e, self.n = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24)
        self.d, self.p = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1)
        self.g, self.f = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.p(F.relu6(self.d(F.relu6(self.n(self.e(x))))))
        return self.f(self.g(x).relu().mean((2, 3)))


class Gated(nn.Module):
    """Squeeze and excite: a channel's gate is read off all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12)
        self.p, self.q, self.f = nn.Linear(12, 4), nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x)).relu()
        gate = self.q(self.p(x.mean((2, 3))).relu()).sigmoid()
        return self.f((x * gate[:, :, None, None]).mean((2, 3)))


class Recurrent(nn.Module):
    """A convolution read by a GRU, read by a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g = nn.Conv1d(3, 8, 3), nn.GRU(8, 12, batch_first=True)
        self.h, self.f = nn.LSTM(12, 10, batch_first=True, bidirectional=True), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.h(self.g(self.a(x).relu().transpose(1, 2))[0])[0].mean(1))


class Normed(nn.Module):
    """The feed-forward block of a transformer, behind a layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n, self.u = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 16)
        self.v, self.f = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.f(x + self.v(F.gelu(self.u(self.n(x)))))


NETS = {
    "concatenation": (Dense, (3, 8, 8)),
    "depthwise and grouped": (Inverted, (3, 8, 8)),
    "gates": (Gated, (3, 8, 8)),
    "recurrent": (Recurrent, (3, 9)),
    "layer norm": (Normed, (6,)),
}


def made(name: str) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    build, shape = NETS[name]
    model, x = build(), torch.randn(24, *shape)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.weight.data.uniform_(0.5, 2)
    y = torch.arange(24) % 3
    return model.eval(), Task(name, train=(x, y), val=(x, y), batch_size=8)


def silence_(model: nn.Module, task: Task, share: float) -> None:
    """Zero all that makes and reads the last channels of each run of each free group: they contribute nothing.

    Where a layer norm sees the channels, they are left: it would divide by other numbers.
    """
    for group in groups(model, task.example):
        layers = [model.get_submodule(p.layer) for p in group.parts]
        if not group.removable or any(isinstance(layer, nn.LayerNorm) for layer in layers):
            continue
        classes = torch.tensor(group.classes)
        gone = torch.cat(
            [
                own[len(own) - round(share * len(own)) :]
                for label in range(group.multiple)
                if len(own := (classes == label).nonzero().flatten())
            ]
        )
        for part, layer in zip(group.parts, layers, strict=True):
            index = torch.tensor(part.index)[torch.isin(torch.tensor(part.channel), gone)]
            with torch.no_grad():
                for tensor, p in layer.named_parameters():
                    if isinstance(layer, nn.RNNBase) and part.side == "out":
                        p.unflatten(0, (-1, layer.hidden_size))[:, index] = 0
                        if tensor.startswith("weight_hh"):
                            p[:, index] = 0
                    elif isinstance(layer, nn.RNNBase):
                        p.index_fill_(1, index, 0) if tensor.startswith("weight_ih_l0") else None
                    elif part.side == "out":
                        p[index] = 0
                    elif tensor == "weight" and getattr(layer, "groups", 1) == 1:
                        p[:, index] = 0


@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("name", NETS)
def test_channels_that_contribute_nothing_go_and_nothing_changes(name: str, score: str) -> None:
    model, task = made(name)
    silence_(model, task, 0.5)
    where = "u" if name == "layer norm" else "*"
    small = PruneChannels(0.5, score, where=where)(model, task, None)
    x = task.split("val")[0]
    torch.testing.assert_close(small(x), model(x), atol=1e-5, rtol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < 0.65 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NETS)
def test_what_is_left_trains(name: str) -> None:
    model, task = made(name)
    small = PruneChannels(0.5, "taylor")(model, task, None)
    assert all(type(m).__module__.startswith(("torch.nn", __name__.split(".")[0], "test")) for m in small.modules())
    x, y = task.split("val")
    before = float(F.cross_entropy(small(x), y).detach())
    optimizer = torch.optim.SGD(small.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(small(x), y)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < before and all(p.grad is not None for p in small.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_what_is_left_exports(name: str) -> None:
    model, task = made(name)
    small, x = PruneChannels(0.5, "geometric_median")(model, task, None), task.split("val")[0]
    outputs = Session(trace(small, task.example).proto).outputs(x)
    np.testing.assert_allclose(outputs, small(x).detach().numpy(), atol=1e-4)


def test_li_ranks_by_the_sum_of_absolute_weights() -> None:
    """Section 3.1: s_j = sum |F_ij|, over the layer that makes the channel and no other."""
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    group = groups(net, torch.zeros(1, 2, 8, 8))[0]
    torch.testing.assert_close(l1(net, group), net[0].weight.abs().sum((1, 2, 3)).detach())
    torch.testing.assert_close(l2(net, group), net[0].weight.square().sum((1, 2, 3)).sqrt().detach())


def test_the_geometric_median_goes_and_not_the_smallest() -> None:
    """Figure 1 of He et al.: norms 1, 2, 3 keep 3 and drop 1; the one that others can stand in for is 2."""
    net = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 2))
    net[0].weight.data = torch.tensor([[1.0], [2.0], [3.0]])
    group = groups(net, torch.zeros(1, 1))[0]
    assert geometric_median(net, group).tolist() == [3.0, 2.0, 3.0] and int(l2(net, group).argmin()) == 0
    x = torch.randn(4, 1)
    task = Task("line", train=x, val=x)
    assert PruneChannels(0.34, "geometric_median")(net, task, None)[0].weight.flatten().tolist() == [1.0, 3.0]


def test_scales_rank_across_layers_as_slimming_says() -> None:
    """Liu et al., section 3: one threshold for all the scales of the network."""
    net = nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
    ).eval()
    net[1].weight.data = torch.tensor([0.1, -5.0, 0.2, -4.0])
    net[4].weight.data = torch.tensor([3.0, 0.3, 2.0, 1.0])
    x = torch.randn(4, 2)
    small = PruneChannels(0.375, "batchnorm_scale", "global")(net, Task("t", train=x, val=x), None)
    assert small[1].weight.tolist() == [-5.0, -4.0] and small[4].weight.tolist() == [3.0, 2.0, 1.0]
    plain = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="no batch norm scales its channels"):
        PruneChannels(0.5, "batchnorm_scale")(plain, Task("t", train=x, val=x), None)


def test_slimming_adds_the_sum_of_the_scales() -> None:
    """Equation 1; its subgradient pulls every scale towards zero by lambda."""
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    net[1].weight.data = torch.tensor([2.0, -1.0, 0.0])
    rule = Slimming(0.25)
    state = rule.begin(net, None, None, 10)
    added = rule.loss(state, net, 0, 10, None, torch.zeros(1), None)
    added.backward()
    assert added.item() == 0.75 and net[1].weight.grad.tolist() == [0.25, -0.25, 0.0]
    assert net[0].weight.grad is None and net[1].bias.grad is None
    with pytest.raises(ValueError, match=r"must have batch norms with scales.*score='l2'"):
        rule.begin(nn.Linear(2, 2), None, None, 10)
    with pytest.raises(ValueError, match="strength must be at least 0, got -1"):
        Slimming(-1.0)


def test_global_removes_that_many_and_leaves_one() -> None:
    net = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 10), nn.Linear(10, 2))
    net[0].weight.data.mul_(1e-3)
    x = torch.randn(8, 2)
    task = Task("t", train=x, val=x)
    for sparsity in (0.25, 0.5, 0.8):
        small = PruneChannels(sparsity, "random", "global")(net, task, None)
        assert small[0].out_features + small[1].out_features == 16 - int(sparsity * 16)
    assert PruneChannels(0.99, "l2", "global")(net, task, None)[1].weight.shape == (1, 1)
    even = PruneChannels(0.5, "l2", "global", multiple=4)(net, task, None)
    assert even[0].out_features == 4 and even[1].out_features % 4 == 0


def test_filters_are_everything_that_makes_a_channel() -> None:
    assert filters(nn.Conv2d(6, 8, 3, groups=2)).shape == (8, 27)
    assert filters(nn.ConvTranspose1d(6, 8, 3)).shape == (8, 18)
    assert filters(nn.LSTM(5, 4, bidirectional=True)).shape == (4, 4 * 2 * (5 + 4))
    assert filters(nn.Embedding(7, 3)).shape == (3, 7)


@pytest.mark.parametrize("score", SCORES)
def test_no_sparsity_removes_nothing(score: str) -> None:
    model, x = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval(), torch.randn(8, 3)
    task = Task("t", train=(x, torch.arange(8) % 2), val=x)
    for allocation in ("uniform", "global"):
        same = PruneChannels(0.0, score, allocation)(model, task, None)
        assert same is not model and torch.equal(same(x), model(x))


def test_where_takes_a_group_by_any_layer_that_makes_it() -> None:
    model, task = made("depthwise and grouped")
    small = PruneChannels(0.5, where="d")(model, task, None)
    assert (small.e.out_channels, small.d.groups, small.p.in_channels, small.a.out_channels) == (12, 12, 12, 8)


def test_what_cannot_be_done_says_what_to_do() -> None:
    model, task = made("layer norm")
    for sparsity in (1.0, -0.1, 50):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\).*write 0.5"):
            PruneChannels(sparsity)
    with pytest.raises(ValueError, match="Did you mean 'l2', 'l1'"):
        PruneChannels(0.5, "l3")
    with pytest.raises(ValueError, match="allocation must be 'uniform' or 'global', got 'erk'"):
        PruneChannels(0.5, allocation="erk")
    with pytest.raises(ValueError, match="multiple must be at least 1"):
        PruneChannels(0.5, multiple=0)
    with pytest.raises(ValueError, match="where must match a layer that makes channels, got 'w'"):
        PruneChannels(0.5, where="w")(model, task, None)
    with pytest.raises(ValueError, match="got none: 3 channels made by f; they stay: they are the output"):
        PruneChannels(0.5, where="f")(model, task, None)
    assert PruneChannels(0.5).skipped(model, task) == {"f": "they are the output"}
    thin = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 4), nn.Linear(4, 3))
    assert PruneChannels(0.5).skipped(thin, task)["0"] == "there is only one"
    assert PruneChannels(0.5)(thin, task, None)[1].out_features == 2
    with pytest.raises(ValueError, match="there is only one"):
        PruneChannels(0.5, where="0")(thin, task, None)
    model.u.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        PruneChannels(0.5, where="u")(model, task, None)
    coded, _ = made("layer norm")
    attach(coded, "u.weight", Masked(torch.ones(16, 8, dtype=torch.bool)))
    with pytest.raises(NotSupported, match="realize"):
        PruneChannels(0.5)(coded, task, None)


def test_gated_halves_stay_with_the_reason() -> None:
    """Torch's GLU halves its input, so channel i goes with channel i + half: not followed, but said."""
    net = nn.Sequential(nn.Linear(6, 16), nn.GLU(), nn.Linear(8, 3))
    x = torch.randn(8, 6)
    assert PruneChannels(0.5).skipped(net, Task("t", train=x, val=x))["0"]
    with pytest.raises(ValueError, match="is left alone"):
        remove_channels(net, x[:1], {"0": torch.arange(8)})
