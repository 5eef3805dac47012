"""The networks that MNIST-1D was introduced with.

Source: S. Greydanus, D. Kobak. Scaling Down Deep Learning with MNIST-1D. ICML 2024. arXiv:2011.14439, section 2 and the
notebooks beside it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.registry import register


@register("net")
class MLP(nn.Module):
    """Classify by two hidden layers with a shortcut, (n, 40) -> (n, 10); 78,858 values.

    h = relu(W1 x), y = W3 (h + relu(W2 h)), each with its bias.

    Args:
        length: Values a signal.
        hidden: The width of both hidden layers.
        classes: Outputs.

    Example:
        >>> import torch
        >>> from lilliput.nets.mnist1d import MLP
        >>> MLP()(torch.zeros(2, 40)).shape
        torch.Size([2, 10])
    """

    def __init__(self, length: int = 40, hidden: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(length, hidden), nn.Linear(hidden, hidden)
        self.linear3 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.linear1(x))
        y: Tensor = self.linear3(h + F.relu(self.linear2(h)))
        return y


@register("net")
class CNN(nn.Module):
    """Classify by three strided convolutions and a linear layer, (n, 40) -> (n, 10); 5,210 values.

    Args:
        channels: The channels of each convolution.
        classes: Outputs.

    Example:
        >>> import torch
        >>> from lilliput.nets.mnist1d import CNN
        >>> CNN()(torch.zeros(2, 40)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int = 25, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(1, channels, 5, stride=2, padding=1)
        self.conv2 = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(channels, channels, 3, stride=2, padding=1)
        self.linear = nn.Linear(5 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.conv1(x.unsqueeze(1)))
        y: Tensor = self.linear(torch.flatten(F.relu(self.conv3(F.relu(self.conv2(h)))), 1))
        return y


@register("net")
class GRU(nn.Module):
    """Read one value at a time by a recurrent layer and classify its last state; (n, 40) -> (n, 10); 51,594 values.

    The paper's notebook reads the sequence in both directions and classifies every state; this one keeps a single state
    of 128 values, so that the recurrence has to remember.

    Args:
        hidden: Values of the state.
        classes: Outputs.

    Example:
        >>> import torch
        >>> from lilliput.nets.mnist1d import GRU
        >>> GRU()(torch.zeros(2, 40)).shape
        torch.Size([2, 10])
    """

    def __init__(self, hidden: int = 128, classes: int = 10) -> None:
        super().__init__()
        self.gru = nn.GRU(1, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x.unsqueeze(2))
        y: Tensor = self.linear(states[:, -1])
        return y
