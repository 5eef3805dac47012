"""Heads that go: gates, and attention that computes the same without those that nobody hears."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput import Task
from lilliput.export.onnx import Session, trace
from lilliput.graph.heads import HeadAttention, heads, remove_heads
from lilliput.nets.bert import SentenceBert
from lilliput.prune.channels import PruneChannels
from lilliput.prune.heads import SCORES, PruneHeads, gate_scores
from lilliput.recipe import Recipe, plain
from lilliput.task import Batch


class Encoder(nn.Module):
    """Two of torch's own layers on a series."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, 16, 0.0, batch_first=True, **settings)
        self.a, self.e = nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.f = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self.e(self.a(x)).mean(1))


def bert() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    net = SentenceBert(words=40, positions=8, width=12, layers=2, heads=4, hidden=20).eval()
    ids = torch.randint(0, 40, (12, 6))
    kept = (torch.arange(6) < torch.randint(2, 7, (12, 1))).long()
    inputs = {"input_ids": ids, "attention_mask": kept}
    y = F.normalize(torch.randn(12, 12), dim=1)
    return net, Task("texts", train=(inputs, y), val=(inputs, y), loss="mse", metric="mse", batch_size=4)


def torch_encoder() -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    x, y = torch.randn(12, 5, 3), torch.arange(12) % 3
    return Encoder().eval(), Task("series", train=(x, y), val=(x, y), batch_size=4)


class Fused(nn.Module):
    """Attention with one layer for query, key and value: three blocks, or head after head."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.together = 4, 3, together
        self.qkv, self.output = nn.Linear(10, 36), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if self.together:
            parts = self.qkv(x).view(n, length, self.num_heads, 3 * self.head_dim).transpose(1, 2).chunk(3, 3)
        else:
            parts = self.qkv(x).view(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        found: Tensor = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
        y: Tensor = self.output(found)
        return y


class Blocks(nn.Module):
    """Two layers of fused attention with residuals."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.a, self.f = nn.Linear(3, 10), nn.Linear(10, 3)
        self.wide, self.back = nn.Linear(10, 8), nn.Linear(8, 10)
        self.att = nn.ModuleList(Fused(together) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for layer in self.att:
            x = x + layer(x)
        x = x + self.back(self.wide(x).relu())
        return self.f(x.mean(1))


def fused(together: bool) -> tuple[nn.Module, Task]:
    torch.manual_seed(0)
    x, y = torch.randn(12, 5, 3), torch.arange(12) % 3
    return Blocks(together).eval(), Task("series", train=(x, y), val=(x, y), batch_size=4)


NETS = {"bert": bert, "torch": torch_encoder, "fused": lambda: fused(False), "head after head": lambda: fused(True)}


def silence_(model: nn.Module, gone: dict[str, list[int]]) -> None:
    """Zero the output columns of these heads."""
    for h in heads(model, EXAMPLE[type(model)]):
        layer = model.get_submodule(h.name)
        output = layer.out_proj if isinstance(layer, nn.MultiheadAttention) else layer.output
        with torch.no_grad():
            output.weight[:, h.rows(torch.tensor(gone[h.name]))] = 0


EXAMPLE = {type(model): task.example for model, task in (make() for make in NETS.values())}


@pytest.mark.parametrize("score", ["importance", "taylor"])
@pytest.mark.parametrize("net", NETS)
def test_silent_heads_score_zero_and_go_and_nothing_changes(net: str, score: str) -> None:
    model, task = NETS[net]()
    names = [h.name for h in heads(model, task.example)]
    silence_(model, {names[0]: [1, 3], names[1]: [0, 2]})
    rated = PruneHeads(0.5, score).rated(model, task, heads(model, task.example))
    assert [rated[names[0]][i] == 0 for i in range(4)] == [False, True, False, True]
    small = PruneHeads(0.5, score)(model, task, None)
    assert [h.count for h in heads(small, task.example)] == [2, 2]
    inputs = task.split("val")[0]
    a, b = (m(**inputs) if isinstance(inputs, dict) else m(inputs) for m in (model, small))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    held, was = (
        sum(p.numel() for n, p in m.named_parameters() if "att" in n and "norm" not in n) for m in (small, model)
    )
    assert held < 0.56 * was


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS)
def test_what_is_left_trains_and_exports(net: str) -> None:
    model, task = NETS[net]()
    small = PruneHeads(0.5, allocation="uniform")(model, task, None)
    small = PruneChannels(0.5, where="*.linear1" if net == "torch" else "*wide")(small, task, None)
    inputs, y = task.split("val")
    first = [None, None]
    optimizer = torch.optim.SGD(small.parameters(), 0.05)
    for i in range(2):
        output = small.train()(**inputs) if isinstance(inputs, dict) else small.train()(inputs)
        first[i] = float(task.loss(output, Batch(inputs, y)).detach())
        optimizer.zero_grad()
        task.loss(output, Batch(inputs, y)).backward()
        optimizer.step()
    assert first[1] < first[0]
    small.eval()
    expected = small(**inputs) if isinstance(inputs, dict) else small(inputs)
    outputs = Session(trace(small, task.example).proto).outputs(inputs)
    np.testing.assert_allclose(outputs, expected.detach().numpy(), atol=1e-5)
    again = PruneHeads(0.5, "l2", "uniform")(small, task, None)
    assert [h.count for h in heads(again, task.example)] == [1, 1]


def test_importance_is_the_mean_slope_of_the_loss_in_the_gates() -> None:
    """Equation 2 of section 4.1, by finite differences: scaling a head's output columns is its gate."""
    model, task = torch_encoder()
    modules = heads(model, task.example)
    scores = gate_scores(model, task, modules)
    x, y = task.split("train")

    def losses(h: int, xi: float) -> Tensor:
        layer = model.e.layers[1].self_attn
        before = layer.out_proj.weight.detach().clone()
        with torch.no_grad():
            layer.out_proj.weight[:, 2 * h : 2 * h + 2] *= xi
            loss = F.cross_entropy(model.train()(x), y, reduction="none").double()
            layer.out_proj.weight.copy_(before)
        return loss

    expected = [float((losses(h, 1.01) - losses(h, 0.99)).abs().mean() / 0.02) for h in range(4)]
    torch.testing.assert_close(scores["e.layers.1.self_attn"], torch.tensor(expected), rtol=0.02, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{}, {"batch_first": True}, {"bias": False}, {"batch_first": True, "kdim": 6, "vdim": 5}]
)
def test_head_attention_is_multihead_attention(settings: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 4, **settings)
    q, k, v = torch.randn(3, 3, 8), torch.randn(3, 3, layer.kdim), torch.randn(3, 3, layer.vdim)
    late, hidden = torch.ones(3, 3).triu(1).bool(), torch.tensor([[False, False, True]] * 3)
    twin = HeadAttention(layer)
    for options in (
        {},
        {"attn_mask": late},
        {"attn_mask": torch.randn(3, 3)},
        {"attn_mask": torch.randn(12, 3, 3)},
        {"key_padding_mask": hidden},
        {"average_attn_weights": False},
        {"need_weights": False},
    ):
        expected, outputs = layer(q, k, v, **options), twin(q, k, v, **options)
        torch.testing.assert_close(outputs[0], expected[0], atol=1e-6, rtol=1e-5)
        assert (outputs[1] is None) == (expected[1] is None)
        if expected[1] is not None:
            torch.testing.assert_close(outputs[1], expected[1], atol=1e-6, rtol=1e-5)
    one = layer(q[0], k[0], v[0])
    torch.testing.assert_close(twin(q[0], k[0], v[0]), one, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the original's
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_layers_take_masks_after_losing_heads(norm_first: bool) -> None:
    """The encoder's fused path would look for the tensors of the original."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, 0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    modules = heads(encoder, x)
    small = remove_heads(encoder, x, {h.name: torch.tensor([0, 2]) for h in modules}, modules)
    for h in modules:
        encoder.get_submodule(h.name).out_proj.weight.data[:, h.rows(torch.tensor([1, 3]))] = 0
    with torch.no_grad():
        for options in (
            {},
            {"src_key_padding_mask": padding},
            {"mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True},
        ):
            seen = ~padding if "src_key_padding_mask" in options else torch.ones(2, 5, dtype=torch.bool)
            torch.testing.assert_close(small(x, **options)[seen], encoder(x, **options)[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("score", SCORES)
def test_counts_are_exact_and_every_layer_keeps_one(score: str) -> None:
    model, task = bert()
    for sparsity, left in ((0.0, 8), (0.25, 6), (0.5, 4), (0.75, 2)):
        small = PruneHeads(sparsity, score)(model, task, None)
        counts = [h.count for h in heads(small, task.example)]
        assert sum(counts) == left and min(counts) > 0 and small is not model
    assert [h.count for h in heads(PruneHeads(0.9, score, "uniform")(model, task, None), task.example)] == [1, 1]
    with pytest.raises(ValueError, match=r"sparsity must be at most 0.75, got 0.9.*remove_blocks"):
        PruneHeads(0.9, score)(model, task, None)


def test_a_head_owns_its_rows_and_columns() -> None:
    model, task = bert()
    small = remove_heads(model, task.example, {"layers.0.attention": torch.tensor([1, 2])})
    a, b = model.layers[0].attention, small.layers[0].attention
    assert torch.equal(b.query.weight, a.query.weight[3:9]) and torch.equal(b.value.bias, a.value.bias[3:9])
    assert torch.equal(b.output.weight, a.output.weight[:, 3:9]) and torch.equal(b.output.bias, a.output.bias)
    assert small.layers[1].attention.heads == 4 and b.heads == 2


class Shared(nn.Module):
    """Attention whose heads are laid out across each other, or that share a key."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.heads = how, 2
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(3))
        self.k_proj = nn.Linear(8, 4 if how == "one key" else 8)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        if self.how == "one key":
            q, k = self.q_proj(x).view(n, length, 2, 4).transpose(1, 2), self.k_proj(x)[:, None]
            v = self.v_proj(x).view(n, length, 2, 4).transpose(1, 2)
            y = ((q @ k.transpose(2, 3)).softmax(-1) @ v).transpose(1, 2).reshape(n, length, -1)
        else:
            q, k, v = (p(x).view(n, length, -1, self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
            w = torch.einsum("nldh,nsdh->nhls", q, k).softmax(-1)
            y = torch.einsum("nhls,nsdh->nldh", w, v).reshape(n, length, -1)
        return self.o_proj(y) / math.sqrt(2)


def test_what_cannot_be_done_says_what_to_do() -> None:
    model, task = bert()
    for sparsity in (1.0, -0.5, 50):
        with pytest.raises(ValueError, match=r"sparsity must be in \[0, 1\)"):
            PruneHeads(sparsity)
    with pytest.raises(ValueError, match="Did you mean 'importance'"):
        PruneHeads(0.5, "importanc")
    with pytest.raises(ValueError, match="allocation must be"):
        PruneHeads(0.5, allocation="erk")
    with pytest.raises(ValueError, match=r"where must match an attention module, got 'layers.0.atention'. Did you"):
        PruneHeads(0.5, where="layers.0.atention")(model, task, None)
    with pytest.raises(KeyError, match="no attention module 'x'"):
        remove_heads(model, task.example, {"x": torch.tensor([0])})
    for bad in ([], [1, 0], [4]):
        with pytest.raises(ValueError, match=r"sorted indices in \[0, 4\)"):
            remove_heads(model, task.example, {"layers.0.attention": torch.tensor(bad, dtype=torch.long)})
    one = nn.TransformerEncoderLayer(8, 1, 16, batch_first=True)
    x = torch.randn(4, 3, 8)
    series = Task("t", train=(x, x), val=(x, x), loss="mse", metric="mse")
    with pytest.raises(ValueError, match="got none: 1 heads of 8 in self_attn; they stay: there is only one"):
        PruneHeads(0.5)(one, series, None)
    assert PruneHeads(0.5).skipped(one, series) == {"self_attn": "there is only one"}
    with pytest.raises(ValueError, match="where must match an attention module"):
        PruneHeads(0.5)(nn.Linear(8, 8), series, None)
    for how, why in (("one key", "several heads share a key"), ("across", "computes something else")):
        assert why in heads(nn.Sequential(Shared(how)), x)[0].reason
    own = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    own.self_attn = nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True)
    assert heads(own, x)[0].reason == "it adds a key and value of its own"
    own.self_attn = nn.MultiheadAttention(8, 2, batch_first=True)
    own.self_attn.in_proj_weight.requires_grad_(False)
    assert heads(own, x)[0].reason == "self_attn is frozen"


def test_is_a_stage_that_leaves_its_argument_alone() -> None:
    model, task = bert()
    before, text = {k: v.clone() for k, v in model.state_dict().items()}, str(model)
    stage = PruneHeads(0.5)
    first, second = stage(model, task, None), stage(model, task, None)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and str(model) == text
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert Recipe.parse([plain(stage)]).stages == (stage,)


@pytest.mark.slow
def test_hugging_face_modules() -> None:
    transformers = pytest.importorskip("transformers")
    config = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "vocab_size": 50,
        "max_position_embeddings": 20,
    }

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = transformers.BertModel(transformers.BertConfig(**config))

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.net(input_ids=input_ids).last_hidden_state[:, 0]

    torch.manual_seed(0)
    model, ids = Last().eval(), torch.randint(5, 50, (6, 7))
    inputs, y = {"input_ids": ids}, torch.randn(6, 16)
    task = Task("t", train=(inputs, y), val=(inputs, y), loss="mse", metric="mse", batch_size=3)
    for h in heads(model, task.example):
        model.get_submodule(h.output).weight.data[:, h.rows(torch.tensor([0, 3]))] = 0
    small = PruneHeads(0.5)(model, task, None)
    torch.testing.assert_close(small(ids), model(ids), atol=1e-5, rtol=1e-5)
    assert small.net.encoder.layer[1].attention.self.query.out_features == 8
