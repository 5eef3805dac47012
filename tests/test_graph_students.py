"""Blocks that go, earlier strides, and students made of both and of fewer channels."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.graph import (
    PassThrough,
    earlier_stride,
    fold_batchnorm,
    groups,
    removable,
    remove_blocks,
    reset,
    set_stride,
    skipped_blocks,
    student,
)
from lilliput.graph.stages import RemoveBlocks
from lilliput.proposal import Known, Proposals
from lilliput.task import Task


class Block(nn.Module):
    """Two convolutions and a shortcut, as in ResNet-20."""

    def __init__(self, a: int, b: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b)
        same = a == b and stride == 1
        self.short = nn.Identity() if same else nn.Sequential(nn.Conv2d(a, b, 1, stride), nn.BatchNorm2d(b))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(h + self.short(x))


class Stages(nn.Module):
    """A stem, stages as torchvision names them, pooling and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 8))
        self.layer2 = nn.Sequential(Block(8, 16, 2), Block(16, 16))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.bn(self.conv(x)).relu()))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Inverted(nn.Module):
    """An inverted bottleneck whose inside is a sequence."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(a, 12, 1), nn.Conv2d(12, 12, 3, 1, 1, groups=12), nn.Conv2d(12, b, 1))
        self.same = a == b

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.same else self.conv(x)


class Layer(nn.Module):
    """An encoder layer that is called with extra arguments and returns a tuple."""

    def __init__(self, d: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.q, self.k, self.v, self.o = heads, *(nn.Linear(d, d) for _ in range(4))
        self.n1, self.n2, self.i, self.j = nn.LayerNorm(d), nn.LayerNorm(d), nn.Linear(d, 16), nn.Linear(16, d)

    def forward(self, hidden: Tensor, mask: Tensor | None = None, **settings: bool) -> tuple[Tensor]:
        n, t, d = hidden.shape
        q, k, v = (f(hidden).view(n, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d)
        hidden = self.n1(hidden + self.o(y))
        return (self.n2(hidden + self.j(F.gelu(self.i(hidden)))),)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, hidden: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        for layer in self.layer:
            hidden = layer(hidden, mask, output_attentions=False)[0]
        return {"last_hidden_state": hidden}


class Text(nn.Module):
    """Embeddings and an encoder with dictionary inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.encoder = nn.Embedding(20, 8), Encoder()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        return self.encoder(self.words(input_ids), attention_mask)


TEXT = {"input_ids": torch.randint(0, 20, (1, 5)), "attention_mask": torch.ones(1, 5)}
IMAGE = torch.linspace(0, 1, 256).view(1, 1, 16, 16)


def test_blocks_of_a_residual_network() -> None:
    model = Stages().eval()
    assert removable(model, IMAGE) == ["layer1.0", "layer1.1", "layer2.1"]
    assert [str(l) for l in skipped_blocks(model, IMAGE)][:1] == [
        "layer2.0 is left alone: it turns the shape (1, 8, 16, 16) into (1, 16, 8, 8)"
    ]
    small = remove_blocks(model, IMAGE, ["layer1.0", "layer2.1"])
    assert type(small.layer1[0]) is type(small.layer2[1]) is nn.Identity and isinstance(model.layer1[0], Block)
    stem = model.bn(model.conv(IMAGE)).relu()
    by_hand = model.fc(torch.flatten(model.avgpool(model.layer2[0](model.layer1[1](stem))), 1))
    assert torch.allclose(small(IMAGE), by_hand)


def test_blocks_of_a_transformer_keep_their_names() -> None:
    model = Text().eval()
    assert removable(model, TEXT) == ["encoder.layer.0", "encoder.layer.1", "encoder.layer.2"]
    small = remove_blocks(model, TEXT, ["encoder.layer.1"])
    assert isinstance(small.encoder.layer[1], PassThrough)
    assert set(small.state_dict()) == {k for k in model.state_dict() if ".layer.1." not in k}
    h = model.encoder.layer[2](model.encoder.layer[0](model.words(TEXT["input_ids"]))[0])[0]
    assert torch.allclose(small(**TEXT)["last_hidden_state"], h)


def test_torch_encoder_layers_are_deleted() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = (
        nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoder(layer, 3), nn.Linear(8, 2)).eval(),
        torch.rand(1, 4, 3),
    )
    assert removable(model, x) == ["1.layers.0", "1.layers.1", "1.layers.2"]
    small = remove_blocks(model, x, ["1.layers.0", "1.layers.2"])
    assert len(small[1].layers) == small[1].num_layers == 1 and len(model[1].layers) == 3
    assert torch.allclose(small(x), model[2](model[1].layers[1](model[0](x))), atol=1e-6)


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)

    def forward(self, source: Tensor, prefix: Tensor) -> Tensor:
        read: Tensor = self.body(source, prefix)
        return read


def test_torch_decoder_layers_are_deleted_but_the_last_of_each_stack() -> None:
    torch.manual_seed(0)
    model, x = Translator().eval(), (torch.rand(6, 4, 8), torch.rand(6, 3, 8))
    both = [f"body.{stack}.layers.{i}" for stack in ("encoder", "decoder") for i in (0, 1)]
    example = tuple(part[:1] for part in x)
    assert removable(model, example) == both
    small = remove_blocks(model, example, ["body.decoder.layers.0"])
    body = model.body
    assert torch.allclose(small(*x), body.decoder.norm(body.decoder.layers[1](x[1], body.encoder(x[0]))), atol=1e-6)
    task = Task("toy", train=(*x, x[1]), val=(*x, x[1]), loss="mse", metric="mse")
    offered = RemoveBlocks.proposals(model, task, Known("size", None))
    assert isinstance(offered, Proposals) and 1 <= len(offered.options) < 4
    for stage in offered.options:
        assert stage(model, task, None)(*x).shape == x[1].shape


def test_the_inside_of_a_block_is_its_own_business() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), Inverted(4, 4), Inverted(4, 6), Inverted(6, 6)).eval()
    assert removable(model, IMAGE) == ["1", "3"]


def test_lone_layers_of_a_sequence() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    assert removable(model, torch.rand(1, 4)) == ["2"]


def test_blocks_that_must_stay() -> None:
    tied = Stages().eval()
    tied.layer1[1].conv1.weight = tied.layer1[0].conv1.weight
    assert removable(tied, IMAGE) == ["layer2.1"]
    assert any("shares a parameter" in str(l) for l in skipped_blocks(tied, IMAGE))
    frozen = Stages().eval()
    frozen.layer1[0].requires_grad_(False)
    assert removable(frozen, IMAGE) == ["layer1.1", "layer2.1"]
    with pytest.raises(ValueError, match="does not run without"):
        remove_blocks(frozen, IMAGE, ["layer2.0"])
    with pytest.raises(KeyError, match=r"no module 'layer1\.2'\. Did you mean"):
        remove_blocks(frozen, IMAGE, ["layer1.2"])


def test_stride_of_a_network_with_global_pooling() -> None:
    model = Stages().eval()
    assert earlier_stride(model, IMAGE) == ["conv"]
    small = set_stride(model, IMAGE, "conv")
    assert small.conv.stride == (2, 2) and model.conv.stride == (1, 1)
    assert small(IMAGE).shape == (1, 3) and torch.equal(small.fc.weight, model.fc.weight)
    pooled = set_stride(model, IMAGE, "conv", pool=True)
    assert set(pooled.state_dict()) == set(model.state_dict())
    assert torch.allclose(pooled(IMAGE), model(F.avg_pool2d(IMAGE, 2)))
    assert type(model.conv) is nn.Conv2d
    assert {g.name for g in groups(pooled, IMAGE) if g.removable} == {
        g.name for g in groups(model, IMAGE) if g.removable
    }
    folded = fold_batchnorm(pooled, IMAGE)
    assert torch.allclose(folded(IMAGE), pooled(IMAGE), atol=1e-5)


def test_a_linear_on_positions_is_resampled() -> None:
    """A map that is constant over positions gives the same answer from half of them."""
    model = nn.Sequential(nn.Conv1d(1, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    x = torch.full((2, 1, 8), 0.7)
    assert earlier_stride(model, x[:1]) == ["0"]
    small = set_stride(model, x[:1], "0")
    assert small[3].in_features == 16
    assert torch.allclose(small(x), model(x), atol=1e-5)
    flat = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Flatten(), nn.Linear(50, 3))
    y = torch.full((2, 1, 5, 5), 0.3)
    assert torch.allclose(set_stride(flat, y[:1], "0")(y), flat(y), atol=1e-5)


def test_stride_that_changes_the_output_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU())
    assert earlier_stride(model, IMAGE) == []
    with pytest.raises(ValueError, match="the output must keep its shape"):
        set_stride(model, IMAGE, "0")
    with pytest.raises(ValueError, match="must be a convolution, got ReLU"):
        set_stride(model, IMAGE, "1")
    with pytest.raises(ValueError, match="stride must be at least 2, got 1"):
        set_stride(model, IMAGE, "0", 1)
    with pytest.raises(KeyError, match="no module 'conv'"):
        set_stride(model, IMAGE, "conv")


def test_a_student_inherits() -> None:
    model = Stages().eval()
    small = student(model, IMAGE, remove=["layer1.0"], stride=["conv"], width=0.5, multiple=4)
    assert small.conv.stride == (2, 2) and small.conv.out_channels == 4 and small.fc.in_features == 8
    rows = {tuple(row.flatten().tolist()) for row in model.conv.weight}
    assert all(tuple(row.flatten().tolist()) in rows for row in small.conv.weight)
    assert model.conv.out_channels == 8 and small(IMAGE).shape == (1, 3)
    counts = student(model, IMAGE, remove=["layer1.0"], widths={"conv": 6, "layer1.1.conv1": 3, "layer1.0.conv1": 2})
    assert (counts.conv.out_channels, counts.layer1[1].conv1.out_channels) == (6, 3)
    assert counts.layer2[1].conv1.out_channels == 16
    third = student(model, IMAGE, target=0.3, multiple=2)
    assert sum(p.numel() for p in third.parameters()) <= 0.3 * sum(p.numel() for p in model.parameters())
    with pytest.raises(ValueError, match="give one of width, widths and target"):
        student(model, IMAGE, target=0.3, width=0.5)
    with pytest.raises(KeyError, match="no group 'con'"):
        student(model, IMAGE, widths={"con": 6})
    with pytest.raises(ValueError, match="init must be"):
        student(model, IMAGE, init="warm")


def test_random_students_depend_on_the_seed_alone() -> None:
    model = Stages().eval()
    state = torch.random.get_rng_state()
    a, b, c = (student(model, IMAGE, width=0.5, init="random", seed=s) for s in (1, 1, 2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(a.conv.weight, b.conv.weight) and not torch.equal(a.conv.weight, c.conv.weight)
    model.bn.running_mean.fill_(3)
    assert not reset(model, 0).bn.running_mean.any() and bool(model.bn.running_mean.all())


def test_students_share_nothing_with_the_dense_model() -> None:
    model = Stages().eval()
    for small in (
        student(model, IMAGE),
        student(model, IMAGE, remove=["layer1.0"]),
        student(model, IMAGE, width=0.5),
        set_stride(model, IMAGE, "conv", pool=True),
        fold_batchnorm(model, IMAGE),
    ):
        mine = {t.untyped_storage().data_ptr() for t in small.state_dict().values()}
        assert not mine & {t.untyped_storage().data_ptr() for t in model.state_dict().values()}


def test_text_student() -> None:
    model = Text().eval()
    small = student(model, TEXT, remove=["encoder.layer.0"], width=0.5)
    assert small.encoder.layer[1].i.out_features == 8 and small.encoder.layer[1].q.out_features == 8
    assert small(**TEXT)["last_hidden_state"].shape == (1, 5, 8)


def test_half_precision_keeps_its_type() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GRU(8, 8, batch_first=True)).to(torch.bfloat16).eval()
    x = torch.rand(1, 3, 4, dtype=torch.bfloat16)
    small = student(model, x, width=0.5)
    assert small[1].input_size == 4 and all(p.dtype == torch.bfloat16 for p in small.parameters())


class Padded(nn.Conv2d):
    """A convolution that holds its padding as a module, as mobile networks for other frameworks' weights do."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, groups=groups, bias=False)
        self.padding_before = nn.ZeroPad2d(size // 2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.padding_before(x))


class Mobile(nn.Module):
    """Inverted residuals of such convolutions; the first one has a depthwise convolution that keeps its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = Padded(3, 8, 3, 2), nn.ModuleList([Turned(8, 12), Turned(12, 12), Turned(12, 12)])
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Turned(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.deep, self.norm = Padded(inputs, inputs, 3, groups=inputs), nn.BatchNorm2d(inputs)
        self.project, self.skips = Padded(inputs, outputs, 1), inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.norm(self.deep(x)).relu())
        return x + y if self.skips else y


def test_a_convolution_that_holds_its_padding_is_no_block() -> None:
    assert removable(Mobile().eval(), torch.randn(1, 3, 32, 32)) == ["blocks.1", "blocks.2"]
