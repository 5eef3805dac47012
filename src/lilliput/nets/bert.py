"""A bidirectional transformer that embeds sentences."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.registry import register


class Attention(nn.Module):
    """Attend over the tokens that `bias` leaves in, (n, length, width) -> the same.

    softmax(Q K^T / sqrt(d) + bias) V for each head of d columns (width / heads at first), then a linear map. bias is
    (n, 1, 1, length): zero for a token, very negative for padding.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        n, length, _ = x.shape
        width = self.query.out_features  # less than that of x once heads have gone
        shape = (n, length, self.heads, width // self.heads)
        q, k, v = (part(x).view(shape).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = ((q @ k.transpose(2, 3)) * (1 / math.sqrt(shape[3])) + bias).softmax(-1)
        y: Tensor = self.output((weights @ v).transpose(1, 2).reshape(n, length, width))
        return y


class Layer(nn.Module):
    """Add attention and then a feed-forward network to the input, each followed by a norm (the post-norm of BERT)."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width, eps)
        self.wide, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.narrow_norm = nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention(x, bias))
        y: Tensor = self.narrow_norm(x + self.narrow(F.gelu(self.wide(x))))
        return y


@register("net")
class SentenceBert(nn.Module):
    """Embed texts as unit vectors: (n, length) token ids and their mask, int64 -> (n, width).

    The mean of the last layer over the tokens that the mask keeps, divided by its norm. With the default arguments it
    has the shape of all-MiniLM-L6-v2: 22,564,608 values. The row for the first of BERT's two token types, the only one
    that single texts use, is part of `position`.

    Args:
        words: Rows of the table of tokens.
        positions: The longest text, in tokens.
        width: Values a token.
        layers: How many layers.
        heads: Attention heads a layer, which divide the width.
        hidden: The width of the feed-forward network.
        eps: Added to variances in norms.

    Example:
        >>> import torch
        >>> from lilliput.nets.bert import SentenceBert
        >>> net = SentenceBert(words=100, layers=1)
        >>> vector = net(torch.tensor([[5, 7, 0]]), torch.tensor([[1, 1, 0]]))
        >>> vector.shape, round(vector.norm().item(), 4)
        (torch.Size([1, 384]), 1.0)

    Source:
        J. Devlin et al. BERT. NAACL 2019. arXiv:1810.04805; N. Reimers, I. Gurevych. Sentence-BERT. EMNLP 2019.
        arXiv:1908.10084; W. Wang et al. MiniLM. NeurIPS 2020. arXiv:2002.10957.
    """

    def __init__(
        self,
        words: int = 30522,
        positions: int = 512,
        width: int = 384,
        layers: int = 6,
        heads: int = 12,
        hidden: int = 1536,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.word, self.position = nn.Embedding(words, width), nn.Embedding(positions, width)
        self.norm = nn.LayerNorm(width, eps)
        self.layers = nn.ModuleList(Layer(width, heads, hidden, eps) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        kept = attention_mask.to(self.word.weight.dtype)
        bias = (1 - kept)[:, None, None, :] * -1e9
        x = self.norm(self.word(input_ids) + self.position.weight[: input_ids.shape[1]])
        for layer in self.layers:
            x = layer(x, bias)
        mean = (x * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True).clamp_min(1.0)
        return F.normalize(mean, dim=1)


@register("net")
class States(nn.Module):
    """Return the hidden states of chosen layers: (n, length) ids and mask -> (n, len(layers), length, width).

    Padding is zero. A smaller encoder is distilled from these.

    Args:
        encoder: The network.
        layers: Which layers, counted from 1.

    Example:
        >>> import torch
        >>> net = States(SentenceBert(words=100, layers=2, width=8, heads=2, hidden=16), (1, 2))
        >>> net(torch.tensor([[5, 7, 0]]), torch.tensor([[1, 1, 0]])).shape
        torch.Size([1, 2, 3, 8])

    Source:
        X. Jiao et al. TinyBERT. Findings of EMNLP 2020. arXiv:1909.10351, equation 8.
    """

    def __init__(self, encoder: SentenceBert, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.encoder, self.chosen = encoder, layers

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        net = self.encoder
        kept = attention_mask.to(net.word.weight.dtype)
        x, states = net.norm(net.word(input_ids) + net.position.weight[: input_ids.shape[1]]), []
        for layer in net.layers:
            x = layer(x, (1 - kept)[:, None, None, :] * -1e9)
            states.append(x * kept[:, :, None])
        return torch.stack([states[i - 1] for i in self.chosen], 1)


@register("net")
class Classifier(nn.Module):
    """Classify texts by a linear head on sqrt(width) times an encoder's unit vector, (n, length) -> (n, classes).

    Args:
        encoder: The network.
        classes: Outputs.

    Example:
        >>> import torch
        >>> net = Classifier(SentenceBert(words=100, layers=1, width=8, heads=2, hidden=16), 3)
        >>> net(torch.tensor([[5, 7, 0]]), torch.tensor([[1, 1, 0]])).shape
        torch.Size([1, 3])
    """

    def __init__(self, encoder: SentenceBert, classes: int) -> None:
        super().__init__()
        width = encoder.word.embedding_dim
        self.encoder, self.head, self.size = encoder, nn.Linear(width, classes), math.sqrt(width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        y: Tensor = self.head(self.size * self.encoder(input_ids, attention_mask))
        return y
