"""Channel groups: what goes together, narrower networks that compute what the wide one does on what is left."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import NotSupported
from lilliput.graph import (
    Group,
    Sizes,
    choose,
    groups,
    kept,
    magnitude,
    remove_channels,
    rounded,
    skipped,
    taylor,
    uniform,
    widths,
)
from lilliput.graph.narrow import silence_
from lilliput.graph.trace import copied, run


class Residual(nn.Module):
    """A stem, a block with a shortcut, a block with a convolution on its shortcut, pooling and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.a1, self.n1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.a2, self.n2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b1, self.b2 = nn.Conv2d(8, 10, 3, 2, 1), nn.Conv2d(10, 16, 3, padding=1)
        self.short, self.fc = nn.Conv2d(8, 16, 1, 2), nn.Linear(16, 5)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(self.n2(self.a2(self.relu(self.n1(self.a1(x))))) + x)
        x = self.relu(self.b2(self.relu(self.b1(x))) + self.short(x))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Concat(nn.Module):
    """Two branches side by side, then flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(12, 6, 3)
        self.fc = nn.Linear(6 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.c(torch.cat([self.a(x).relu(), self.b(x)], 1)).flatten(1))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, a group norm, PReLU and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.g, self.n = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3, groups=4), nn.GroupNorm(4, 24)
        self.d, self.p = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.PReLU(24)
        self.t, self.f = nn.ConvTranspose2d(24, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.t(self.p(self.d(self.n(self.g(self.a(x)))))).relu())


class Series(nn.Module):
    """Conv1d on a raw series, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.fc = nn.Conv1d(1, 5, 5, 2, 1), nn.Conv1d(5, 7, 3, 2, 1), nn.Linear(35, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(F.relu(self.c2(F.relu(self.c1(x.unsqueeze(1))))), 1))


class Chain(nn.Module):
    """Linear layers with a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        return self.c(h + self.b(h).relu())


class Recurrent(nn.Module):
    """An embedding of each step, a recurrent layer, a Linear on its last output or hidden state."""

    def __init__(self, kind: type[nn.RNNBase], hidden: bool = False, **settings: object) -> None:
        super().__init__()
        self.e, self.hidden = nn.Linear(1, 6), hidden
        self.r = kind(6, 10, batch_first=True, **settings)
        self.f = nn.Linear(20 if settings.get("bidirectional") else 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, state = self.r(self.e(x[..., None]))
        if not self.hidden:
            return self.f(out[:, -1])
        state = state[0] if isinstance(state, tuple) else state
        return self.f(torch.cat([state[-2], state[-1]], -1) if self.r.bidirectional else state[-1])


class Words(nn.Module):
    """A table of words, averaged."""

    def __init__(self, bag: bool) -> None:
        super().__init__()
        self.e, self.f, self.bag = (nn.EmbeddingBag if bag else nn.Embedding)(30, 12), nn.Linear(12, 3), bag

    def forward(self, ids: Tensor) -> Tensor:
        return self.f(self.e(ids) if self.bag else self.e(ids).mean(1))


MODELS = {
    "residual": (Residual, lambda n: torch.randn(n, 3, 8, 8)),
    "concat": (Concat, lambda n: torch.randn(n, 3, 6, 6)),
    "grouped": (Grouped, lambda n: torch.randn(n, 3, 8, 8)),
    "conv1d": (Series, lambda n: torch.randn(n, 20)),
    "linear": (Chain, lambda n: torch.randn(n, 6)),
    "gru": (lambda: Recurrent(nn.GRU), lambda n: torch.randn(n, 7)),
    "gru hidden": (lambda: Recurrent(nn.GRU, True, bidirectional=True), lambda n: torch.randn(n, 7)),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True), lambda n: torch.randn(n, 7)),
    "lstm hidden": (lambda: Recurrent(nn.LSTM, True, num_layers=2), lambda n: torch.randn(n, 7)),
    "rnn": (lambda: Recurrent(nn.RNN, num_layers=3), lambda n: torch.randn(n, 7)),
    "embedding": (lambda: Words(False), lambda n: torch.randint(0, 30, (n, 4))),
    "embedding bag": (lambda: Words(True), lambda n: torch.randint(0, 30, (n, 4))),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    build, draw = MODELS[name]
    model = build().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model, draw(1), draw(5)


@pytest.mark.parametrize("name", MODELS)
def test_removed_channels_are_those_that_nobody_hears(name: str) -> None:
    """Narrower network = wide network in which the readers of the removed channels have zero weights."""
    model, example, x = made(name)
    listed = groups(model, example)
    free = [g for g in listed if g.removable]
    assert len(free) == len(listed) - 1 and skipped(listed)[0].reason == "they are the output"
    keep = kept(listed, {g.name: torch.rand(g.size) for g in listed}, uniform(listed, 0.5, 1))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    small = remove_channels(model, example, keep, listed)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    silent = copied(model, "test")
    silence_(silent, free, keep)
    if name == "grouped":  # a group norm sees the silent channels of its run
        small.n = silent.n = nn.Identity()
    assert torch.allclose(small(x), silent(x), atol=1e-5)
    assert small(x).shape == model(x).shape and not torch.allclose(small(x), model(x), atol=1e-3)
    small.train()(x).sum().backward()
    assert all(p.grad is not None and p.shape == p.grad.shape for p in small.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_sizes_count_what_the_narrow_network_has(name: str) -> None:
    model, example, _ = made(name)
    listed = groups(model, example)
    counts = uniform(listed, 0.6, 1)
    small = remove_channels(model, example, kept(listed, magnitude(model, listed), counts), listed)
    assert Sizes(model, example, listed)(counts).values == sum(p.numel() for p in small.parameters())
    assert Sizes(model, example, listed)(counts).macs == pytest.approx(
        Sizes(small, example, groups(small, example))({}).macs
    )


def test_groups_print_as_sentences() -> None:
    model, example, _ = made("residual")
    texts = [str(g) for g in groups(model, example)]
    assert texts[0] == "8 channels made by stem, bn, a2 and n2, read by a1, b1 and short."
    assert texts[1] == "12 channels made by a1 and n1, read by a2."
    assert texts[-1] == "5 channels made by fc; they stay: they are the output."
    assert {g.name for g in groups(model, example)} == {"stem", "a1", "b1", "b2", "fc"}


def test_runs_of_grouped_layers_stay_equal() -> None:
    model, example, _ = made("grouped")
    by_name = {g.name: g for g in groups(model, example)}
    assert by_name["a"].multiple == 4 and by_name["g"].multiple == 4 and by_name["t"].multiple == 1
    assert rounded(by_name["g"], 13, 1) == 12 and rounded(by_name["g"], 13, 8) == 16
    with pytest.raises(ValueError, match="equally many channels in each of its 4 runs, got"):
        remove_channels(model, example, {"g": torch.arange(8)})
    small = remove_channels(
        model, example, {"g": choose(by_name["g"], torch.rand(24), 8), "a": choose(by_name["a"], torch.rand(16), 8)}
    )
    assert (small.g.in_channels, small.g.out_channels, small.g.groups, small.d.groups) == (8, 8, 4, 8)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.gain, self.b = nn.Linear(4, 8), nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.gain)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.b(self.a(x)).relu()))


class Mixed(nn.Module):
    """Something that mixes channels or counts them; Torch-Pruning reads it as harmless."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.b = how, nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.how == "softmax":
            h = h.softmax(-1)
        elif self.how == "flip":
            h = h.flip(-1)
        elif self.how == "scale":
            h = h / h.shape[-1]
        elif self.how == "view":
            h = h.view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        return self.b(h)


def reasons(model: nn.Module, example: object) -> dict[str, str]:
    return {g.name: g.reason for g in groups(model.eval(), example)}


@pytest.mark.parametrize("how", ["softmax", "scale", "view"])
def test_what_mixes_channels_is_left_alone(how: str) -> None:
    torch.manual_seed(0)
    assert reasons(Mixed(how), torch.rand(1, 4))["a"]
    assert reasons(Mixed(""), torch.rand(1, 4))["a"] == ""


def test_parts_that_cannot_change_say_why() -> None:
    assert "parameter gain of a custom module" in reasons(Own(), torch.rand(1, 4))["a"]
    frozen = Chain()
    frozen.b.weight.requires_grad_(False)
    assert reasons(frozen, torch.rand(1, 6))["a"] == "b is frozen"
    assert reasons(Chain().requires_grad_(False), torch.rand(1, 6))["a"] == ""  # nothing trains: nothing is meant by it
    tied = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(6, 9, bias=False))
    tied[3].weight = tied[0].weight
    said = reasons(tied, torch.zeros(1, 2, dtype=torch.long))
    assert "shares a parameter" in said["0"] and "shares a parameter" in said["2"] and said["1"] == ""
    thin = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(1, 2))
    assert reasons(thin, torch.rand(1, 4))["1"] == "there is only one"
    unused = Chain()
    unused.extra = nn.Linear(2, 2)
    assert reasons(unused, torch.rand(1, 6))["extra"] == "no run of the example joins it to the output"


def test_attention_is_left_alone_and_its_feed_forward_is_not() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    listed = groups(
        nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)).eval(), torch.rand(1, 5, 3)
    )
    said = {g.name: g.reason for g in listed}
    assert "MultiheadAttention" in said["0"]
    assert said["1.layers.0.linear1"] == said["1.layers.1.linear1"] == ""


def test_a_model_that_fails_is_reported_not_raised() -> None:
    class Fails(Chain):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such luck")

    assert all("no such luck" in why for why in reasons(Fails(), torch.rand(1, 6)).values())


def test_lstm_with_projection_stays() -> None:
    model = nn.LSTM(3, 8, proj_size=4, batch_first=True)
    assert all(why for why in reasons(model, torch.rand(1, 5, 3)).values())


def test_wrong_requests_say_what_to_do() -> None:
    model, example, _ = made("linear")
    with pytest.raises(KeyError, match=r"no group 'aa'\. Did you mean 'a'"):
        remove_channels(model, example, {"aa": torch.arange(2)})
    with pytest.raises(ValueError, match="c is left alone: they are the output"):
        remove_channels(model, example, {"c": torch.arange(2)})
    for bad in ([], [1, 0], [0, 0], [16]):
        with pytest.raises(ValueError, match=r"sorted indices in \[0, 16\)"):
            remove_channels(model, example, {"a": torch.tensor(bad, dtype=torch.long)})
    listed = groups(model, example)
    with pytest.raises(ValueError, match=r"multiplier must be in \(0, 1\], got 50"):
        uniform(listed, 50)
    with pytest.raises(ValueError, match=r"target must be in \(0, 1\]"):
        widths(model, example, listed, 0, magnitude(model, listed))
    coded = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(NotSupported):
        groups(coded, torch.rand(1, 2))


def test_zero_weights_hide_nothing() -> None:
    """A block whose last norm starts at zero: the trial still sees who reads what."""
    model, example, _ = made("residual")
    model.n2.weight.data.zero_()
    model.n2.bias.data.zero_()
    assert {g.name for g in groups(model, example) if g.removable} == {"stem", "a1", "b1", "b2"}
    assert not model.n2.weight.any()


def test_tuples_and_dictionaries() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(2, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"z": self.c(self.a(x) + self.b(y))}

    x, y = torch.rand(1, 3), torch.rand(1, 2)
    for example in ((x, y), {"x": x, "y": y}):
        listed = groups(Two().eval(), example)
        assert str(listed[0]) == "8 channels made by a and b, read by c."
        assert run(remove_channels(Two(), example, {"a": torch.arange(3)}, listed), example)[0].shape == (1, 2)


def test_magnitude_is_the_norm_over_coupled_tensors() -> None:
    model, example, _ = made("linear")
    listed = groups(model, example)
    a, b, c = model.a, model.b, model.c
    squares = a.weight.square().sum(1) + a.bias.square() + b.weight.square().sum(1) + b.bias.square()
    squares = (squares + b.weight.square().sum(0) + c.weight.square().sum(0)).sqrt()
    assert torch.allclose(magnitude(model, listed)["a"], 2 * squares / squares.sum())


def test_taylor_is_gradient_times_weight() -> None:
    model, example, x = made("linear")
    listed = groups(model, example)
    scores = taylor(model, listed, lambda net: [net(x).square().mean()])["a"]
    assert all(p.grad is None for p in model.parameters())
    model(x).square().mean().backward()
    expected = torch.zeros(16)
    for layer, side in ((model.a, "out"), (model.b, "out"), (model.b, "in"), (model.c, "in")):
        product = layer.weight * layer.weight.grad
        expected += product.sum(1 if side == "out" else 0) ** 2
        if side == "out":
            expected += (layer.bias * layer.bias.grad) ** 2
    assert torch.allclose(scores, expected, rtol=1e-4)


def test_a_silent_channel_scores_nothing_and_goes_first() -> None:
    model, example, x = made("residual")
    model.a1.weight.data[3], model.a1.bias.data[3], model.a2.weight.data[:, 3] = 0, 0, 0
    listed = groups(model, example)
    for scores in (magnitude(model, listed), taylor(model, listed, lambda net: [net(x).square().sum()])):
        assert scores["a1"].argmin() == 3 and scores["a1"][3] == 0
        small = remove_channels(model, example, kept(listed, scores, {"a1": 11}), listed)
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_exactly_the_same_where_the_removed_channels_are_zero() -> None:
    model, example, x = made("conv1d")
    model.c2.weight.data[:, 2] = 0
    small = remove_channels(model, example, {"c1": torch.tensor([0, 1, 3, 4])})
    assert torch.allclose(small(x), model(x), atol=1e-6)
    assert small.c1.out_channels == small.c2.in_channels == 4


@pytest.mark.parametrize("of", ["values", "macs"])
@pytest.mark.parametrize("name", ["residual", "grouped", "lstm"])
def test_widths_meet_their_target(name: str, of: str) -> None:
    model, example, _ = made(name)
    listed = groups(model, example)
    sizes, scores = Sizes(model, example, listed), magnitude(model, listed)
    counts = widths(model, example, listed, 0.4, scores, of=of, round_to=1)
    assert getattr(sizes(counts), of) <= 0.4 * getattr(sizes({}), of)
    assert all(counts[g.name] % g.multiple == 0 and 0 < counts[g.name] <= g.size for g in listed if g.removable)
    more = widths(model, example, listed, 0.8, scores, of=of, round_to=1)
    assert all(more[name] >= counts[name] for name in counts)
    remove_channels(model, example, kept(listed, scores, counts), listed)


def test_widths_spare_what_is_sensitive() -> None:
    model, example, _ = made("residual")
    listed = groups(model, example)
    harmless, dear = {2: 0.0, 4: 0.0}, {2: 10.0, 4: 9.0, 8: 8.0}
    measured = {"stem": harmless, "a1": dear, "b1": dear, "b2": dear}
    counts = widths(model, example, listed, 0.7, magnitude(model, listed), round_to=2, sensitivity=measured)
    assert counts["stem"] < 8 and counts["a1"] == 12


def test_widths_round_to_multiples() -> None:
    group = Group("g", 25, (), (0,) * 25)
    assert [rounded(group, w, 8) for w in (25, 24.9, 13, 11, 1)] == [25, 24, 16, 8, 8]
    assert rounded(Group("g", 6, (), (0,) * 6), 3, 8) == 3
    assert rounded(Group("g", 6, (), (0,) * 6, "it is the output"), 3) == 6


class Mixer(nn.Module):
    """A transposed feed-forward: Torch-Pruning takes positions for channels there."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.t1, self.t2 = nn.Linear(4, 8), nn.Linear(6, 10), nn.Linear(10, 6)
        self.c1, self.c2, self.f = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        x = x + self.t2(F.gelu(self.t1(x.transpose(1, 2)))).transpose(1, 2)
        return self.f((x + self.c2(F.gelu(self.c1(x)))).mean(1))


class Squeeze(nn.Module):
    """Channels that are multiplied by what was computed from their own means."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.e, self.o = (
            nn.Conv2d(3, 16, 3),
            nn.Conv2d(16, 4, 1),
            nn.Conv2d(4, 16, 1),
            nn.Conv2d(16, 8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.a(x))
        gate = self.e(F.silu(self.r(h.mean((2, 3), keepdim=True)))).sigmoid()
        return self.o(h * gate).mean((2, 3))


class Shuffle(nn.Module):
    """Half of the channels pass through a convolution, then the halves are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.f = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        u, v = self.a(x).chunk(2, 1)
        h = torch.cat([u, self.b(v)], 1).unflatten(1, (2, 8)).transpose(1, 2).flatten(1, 2)
        return self.f(self.c(h).mean((2, 3)))


@pytest.mark.parametrize(
    ("build", "shape", "free"),
    [(Mixer, (1, 6, 4), {"e", "t1", "c1"}), (Squeeze, (1, 3, 7, 7), {"a", "r"}), (Shuffle, (1, 3, 5, 5), {"c"})],
)
def test_harder_shapes_are_narrowed_where_they_can_be(
    build: type[nn.Module], shape: tuple[int, ...], free: set[str]
) -> None:
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    listed = groups(model, x)
    assert {g.name for g in listed if g.removable} == free
    scores, counts = magnitude(model, listed), uniform(listed, 0.5, 1)
    assert remove_channels(model, x, kept(listed, scores, counts), listed)(x).shape == model(x).shape


@pytest.mark.slow
def test_a_walk_that_goes_round_without_end_is_stopped() -> None:
    """A rotary embedding's slices and concatenations give the walk of Torch-Pruning new positions for ever."""
    transformers = pytest.importorskip("transformers")

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformers.LlamaModel(
                transformers.LlamaConfig(
                    hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32, vocab_size=50
                )
            )

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.net(input_ids=input_ids).last_hidden_state

    said = reasons(Last(), {"input_ids": torch.arange(7)[None]})
    assert said["net.layers.0.self_attn.q_proj"] == "they go round without end"
    assert said["net.layers.0.mlp.gate_proj"] == ""


def test_a_walk_whose_positions_grow_every_time_round_is_stopped() -> None:
    """Products of vectors of one column: each time through the flattening there are a few times as many positions."""

    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables, self.out = nn.ModuleList(nn.Embedding(9, 1) for _ in range(4)), nn.Linear(7, 1)

        def forward(self, ids: Tensor) -> Tensor:
            rows = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
            products = torch.bmm(rows, rows.transpose(1, 2)).flatten(1)[:, [1, 2, 3, 6, 7, 11]]
            y: Tensor = self.out(torch.cat([rows[:, 0], products], 1))
            return y

    said = reasons(Products(), torch.zeros(2, 4, dtype=torch.long))
    assert said["tables.0"] == "they go round without end"
