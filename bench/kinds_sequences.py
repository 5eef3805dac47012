"""Small networks of other people's kinds on series and text, with invented data: bench/kinds.py."""

from typing import Any

import torch
from kinds_tables import Kind
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, LENGTH = 20, 9


# --------------------------------------------------------------------------------------------------------------- data


def waves(count: int) -> tuple[Tensor, Tensor]:
    """Noisy signals of four frequencies."""
    labels, time = torch.randint(0, 4, (count,)), torch.arange(32.0)
    phase = torch.rand(count, 1) * 6
    return ((time * (labels + 1)[:, None] / 6 + phase).sin() + 0.4 * torch.randn(count, 32))[:, None], labels


def forecasts(count: int) -> tuple[Tensor, Tensor]:
    """Twenty-four steps of a noisy sum of two waves, and the four steps after them."""
    time, phase = torch.arange(28.0), torch.rand(count, 2, 1) * 6
    clean = (time / 3 + phase[:, 0]).sin() + 0.5 * (time / 1.3 + phase[:, 1]).sin()
    return (clean + 0.1 * torch.randn_like(clean))[:, :24, None], clean[:, 24:]


def series(count: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 10, 3)
    return x, x.sum(1).argmax(1)


def lengths(count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Series of four to ten steps, and how long each is."""
    x, length = torch.randn(count, 10, 3), torch.randint(4, 11, (count,))
    known = (torch.arange(10)[None] < length[:, None])[..., None]
    return {"x": x * known, "length": length}, (x * known).sum(1).argmax(1)


def text(count: int) -> tuple[Tensor, Tensor]:
    """Texts of five to nine words, filled up with zeros: which of three groups of words is the most frequent."""
    ids = torch.randint(1, WORDS, (count, LENGTH))
    ids[torch.arange(LENGTH) >= torch.randint(5, LENGTH + 1, (count, 1))] = 0
    groups = torch.stack([((ids % 3 == group) & (ids > 0)).sum(1) for group in range(3)], 1)
    return ids, groups.argmax(1)


def masked(count: int) -> tuple[dict[str, Tensor], Tensor]:
    ids, labels = text(count)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}, labels


def tags(count: int) -> tuple[Tensor, Tensor]:
    """The group of each word, which the word before it shifts; no label where there is no word."""
    ids, _ = text(count)
    before = F.pad(ids, (1, 0))[:, :-1]
    return ids, torch.where(ids > 0, (ids + (before > WORDS // 2)) % 3, -100)


def language(count: int) -> tuple[Tensor, Tensor]:
    """Texts in which a word nearly always follows from the one before it."""
    ids = [torch.randint(0, WORDS, (count,))]
    for _ in range(LENGTH):
        random = torch.rand(count) < 0.15
        ids.append(torch.where(random, torch.randint(0, WORDS, (count,)), (7 * ids[-1] + 3) % WORDS))
    both = torch.stack(ids, 1)
    return both[:, :-1], both[:, 1:]


def translations(count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Each word's translation, in order; the decoder is shown what it should have said so far."""
    source = torch.randint(1, WORDS, (count, 6))
    target = (source * 7) % WORDS
    return {"source": source, "said": F.pad(target, (1, 0))[:, :-1]}, target


# ----------------------------------------------------------------------------------------------------------- networks


class Dilated(nn.Module):
    """A temporal convolution that sees nothing of the future."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.conv = nn.Conv1d(inputs, outputs, 3, padding=self.pad, dilation=dilation)
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)[:, :, : -self.pad] + self.skip(x))


class TCN(nn.Module):
    """Forecasts four steps from a stack of dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Dilated(1, 16, 1), Dilated(16, 16, 2), Dilated(16, 16, 4), Dilated(16, 16, 8))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.layers(x.transpose(1, 2))[:, :, -1])
        return y


class Reader(nn.Module):
    """An LSTM over series of different lengths, read at the last step of each."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(3, 24, batch_first=True), nn.Linear(24, 3)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        states, _ = self.lstm(x)
        last = (length - 1).view(-1, 1, 1).expand(-1, 1, states.size(2))
        y: Tensor = self.out(states.gather(1, last).squeeze(1))
        return y


class BothWays(nn.Module):
    """The last states of a GRU that reads in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(3, 16, batch_first=True, bidirectional=True), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.gru(x)
        y: Tensor = self.out(torch.cat([h[-2], h[-1]], dim=1))
        return y


class Rollout(nn.Module):
    """A GRU reads a series; a cell continues it step by step, fed with what it said."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.cell, self.out = nn.GRU(1, 24, batch_first=True), nn.GRUCell(1, 24), nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, h = self.encoder(x)
        h, step, said = h[0], x[:, -1], []
        for _ in range(4):
            h = self.cell(step, h)
            step = self.out(h)
            said.append(step)
        return torch.cat(said, dim=1)


class Encoder(nn.Module):
    """torch's transformer encoder with a padding mask, and the mean over real words."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.1, batch_first=True)
        self.table, self.encoder = nn.Embedding(WORDS, 24, padding_idx=0), nn.TransformerEncoder(layer, 2)
        self.out = nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        h = self.encoder(self.table(ids), src_key_padding_mask=padding)
        h = h.masked_fill(padding.unsqueeze(-1), 0.0)
        y: Tensor = self.out(h.sum(1) / (~padding).sum(1, keepdim=True))
        return y


class Causal(nn.Module):
    """Masked self-attention written by hand, as in small GPTs."""

    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (part.view(n, t, self.heads, width // self.heads).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(n, t, width))
        return x + self.mlp(self.ln_2(x))


class LanguageModel(nn.Module):
    """A causal language model whose output layer is its table of words."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
        self.blocks, self.ln_f = nn.ModuleList(Causal(width) for _ in range(2)), nn.LayerNorm(width)
        self.out = nn.Linear(width, WORDS, bias=False)
        self.out.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.out(self.ln_f(x))
        return y


class Rotary(nn.Module):
    """Attention whose positions are rotations, kept as a buffer of complex numbers, as in Llama."""

    rotations: Tensor

    def __init__(self, width: int = 24, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.table = heads, nn.Embedding(WORDS, width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mlp, self.out = nn.Sequential(nn.Linear(width, 48), nn.SiLU(), nn.Linear(48, width)), nn.Linear(width, 3)
        half = width // heads // 2
        angles = torch.outer(torch.arange(LENGTH), 100.0 ** (-torch.arange(half) / half))
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles))

    def rotated(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.rotations[: x.shape[2]]).flatten(3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        n, t, width = x.shape
        q, k, v = (part(x).view(n, t, self.heads, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)
        x = x + self.proj(y.transpose(1, 2).reshape(n, t, width))
        y = self.out((x + self.mlp(x)).mean(1))
        return y


class Translator(nn.Module):
    """torch's encoder and decoder."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, width), nn.Parameter(0.1 * torch.randn(6, width))
        self.transformer = nn.Transformer(width, 2, 1, 1, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(width, WORDS)

    def forward(self, source: Tensor, said: Tensor) -> Tensor:
        a, b = self.words(source) + self.places, self.words(said) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(said.shape[1])
        y: Tensor = self.out(self.transformer(a, b, tgt_mask=mask, tgt_is_causal=True))
        return y


class Tagger(nn.Module):
    """A label for each word, from a two-way LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 16, padding_idx=0)
        self.lstm, self.out = nn.LSTM(16, 16, batch_first=True, bidirectional=True), nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.out(self.lstm(self.table(ids))[0])
        return y


class Pooling(nn.Module):
    """A learnt weight for each step of a series, over which is then averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(WORDS, 24, padding_idx=0), nn.Linear(24, 32)
        self.score, self.out = nn.Linear(32, 1), nn.Linear(32, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.table(ids)))
        weights = self.score(h).squeeze(-1).masked_fill(ids == 0, float("-inf")).softmax(dim=1)
        y: Tensor = self.out(torch.einsum("nt,ntd->nd", weights, h))
        return y


def bert() -> nn.Module:
    """Hugging Face's BERT with a head for classes."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=WORDS, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
            max_position_embeddings=16, num_labels=3,
        )
    )  # fmt: skip


def bert_loss(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits, labels)


def bert_right(outputs: Any, labels: Tensor) -> Tensor:
    return (outputs.logits.argmax(1) == labels).float()


THIRD = 1 / 3
VALUES = {"loss": "mse", "metric": "r2"}
KINDS: dict[str, Kind] = {
    "1-D CNN": Kind(
        lambda: nn.Sequential(nn.Conv1d(1, 16, 5, 2), nn.ReLU(), nn.Conv1d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(),
                              nn.Linear(96, 4)),
        waves, chance=0.25, last=("5",),
    ),
    "dilated TCN": Kind(TCN, forecasts, VALUES),
    "LSTM with lengths": Kind(Reader, lengths, chance=THIRD),
    "two-way GRU": Kind(BothWays, series, chance=THIRD),
    "GRUCell in a loop": Kind(Rollout, forecasts, VALUES),
    "transformer with a padding mask": Kind(Encoder, text, chance=THIRD),
    "causal language model": Kind(
        LanguageModel, language, chance=1 / WORDS, heads={"blocks.0.c_attn": 2, "blocks.1.c_attn": 2}
    ),
    "complex buffers": Kind(Rotary, text, chance=THIRD, heads={"q": 2, "k": 2, "v": 2}),
    "encoder-decoder": Kind(Translator, translations, chance=1 / WORDS, steps=300),
    "Hugging Face BERT": Kind(
        bert, masked, {"loss": bert_loss, "metric": bert_right}, chance=THIRD, last=("classifier",),
        heads={f"bert.encoder.layer.{i}.attention.self.{x}": 2 for i in (0, 1) for x in ("query", "key", "value")},
    ),
    "tagger with ignore_index": Kind(Tagger, tags, chance=THIRD),
    "attention pooling": Kind(Pooling, text, chance=THIRD),
}  # fmt: skip
