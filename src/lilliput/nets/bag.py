"""A text classifier whose table of n-gram embeddings is the model."""

from torch import Tensor, nn

from lilliput.registry import register


@register("net")
class Bag(nn.Module):
    """Classify a sum of embeddings linearly: (n, length) bucket ids, int64 -> (n, classes).

    y = W (sum of the rows of the table at the ids above zero) / sqrt(how many there are) + b. Id zero is padding, so
    texts of different lengths share a tensor. Dividing by the root keeps the sum's spread the same for every length
    (the paper divides by the count, which scored 0.8 points less on `languages`).

    Args:
        buckets: Rows of the table.
        width: Columns of the table.
        classes: Outputs.

    Example:
        >>> import torch
        >>> from lilliput.nets.bag import Bag
        >>> Bag(buckets=100, width=8, classes=3)(torch.tensor([[5, 7, 0], [9, 0, 0]])).shape
        torch.Size([2, 3])

    Source:
        A. Joulin, E. Grave, P. Bojanowski, T. Mikolov. Bag of Tricks for Efficient Text Classification. EACL 2017.
        arXiv:1607.01759, section 2.
    """

    def __init__(self, buckets: int = 2**17, width: int = 64, classes: int = 79) -> None:
        super().__init__()
        self.table, self.linear = nn.Embedding(buckets, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        kept = (ids > 0).to(self.table.weight.dtype)
        weight = kept * kept.sum(1, keepdim=True).clamp_min(1.0).rsqrt()
        y: Tensor = self.linear((weight.unsqueeze(1) @ self.table(ids)).squeeze(1))
        return y
