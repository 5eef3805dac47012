"""Bonsai networks: recurrent cells of neurons that each compute a logic gate."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lilliput.registry import register


class Gate(nn.Module):
    """Apply an activation with which one neuron computes any logic function of two or three inputs in {-1, 1}.

        A(x) = w (f + (1 - f) (4 - 6|w| + 4|w|^2 - |w|^3)) + l (x - clip(x, -3, 3)),
        w = clip(x, -3, 3) - 2 clip(x, -1, 1).

    x and A(x) have any shape. w is a wave of straight lines through (-3, -1), (-1, 1), (1, -1) and (3, 1); the second
    term of the bracket makes it round, sign(w) (1 - (1 - |w|)^4). (The author's "Ameo", whose pieces this puts into one
    line.) So A(x_1 + x_2 - 1) is x_1 xor x_2, A(x) is not x, and A(-x) is x.

    Args:
        factor: f, between the round wave (0) and straight lines (1).
        leak: l, the slope beyond 3 and -3.

    Raises:
        ValueError: For a factor outside [0, 1] and for a negative leak.

    Example:
        >>> x = torch.tensor([[-1., -1.], [-1., 1.], [1., 1.]])
        >>> Gate()(x.sum(1) - 1).tolist()
        [-1.0, 1.0, -1.0]

    Source:
        Casey Primozic, Logic through the lens of neural networks, 2022 (the function), and Growing bonsai networks with
        RNNs, 2023 (its mixture of straight and round; cprimozic.net/blog).
    """

    def __init__(self, factor: float = 0.5, leak: float = 0.01) -> None:
        super().__init__()
        if not 0 <= factor <= 1 or not leak >= 0:
            raise ValueError(f"Gate: factor must be in [0, 1] and leak at least 0, got {factor} and {leak}.")
        self.factor, self.leak = factor, leak

    def forward(self, x: Tensor) -> Tensor:
        inside = x.clamp(-3, 3)
        w = inside - 2 * x.clamp(-1, 1)
        a = w.abs()
        y: Tensor = w * (self.factor + (1 - self.factor) * (4 - a * (6 - a * (4 - a)))) + self.leak * (x - inside)
        return y

    def extra_repr(self) -> str:
        return f"factor={self.factor}, leak={self.leak}"


class Cell(nn.Module):
    """Compute a recurrent cell whose output is not its state: (n, T, inputs) -> (n, T, outputs).

        y_t = A(V [x_t, s_t] + b),   s_(t+1) = A(W [x_t, s_t] + c),

    with s_0 trained like the rest. V: (outputs, inputs + state), W: (state, inputs + state). Every neuron does the same
    (weigh, add a bias, A), so that the cell is a graph with one kind of node.

    Args:
        inputs: Values a step.
        outputs: Outputs a step.
        state: Values of the state.
        activation: A; a `Gate` by default.
        noise: The standard deviation of what is added to every s_t but s_0 in training mode. States then move to where
            A is flat and hold bits, and weights that only correct their third decimal go (this is ours, not the
            author's).

    Source:
        Primozic, Growing bonsai networks with RNNs, 2023, "RNN architecture" and "Trainable initial states".
    """

    def __init__(
        self, inputs: int, outputs: int, state: int, activation: nn.Module | None = None, noise: float = 0.0
    ) -> None:
        super().__init__()
        self.inputs, self.noise = inputs, noise
        self.output, self.recurrent = nn.Linear(inputs + state, outputs), nn.Linear(inputs + state, state)
        self.initial = nn.Parameter(torch.empty(state).uniform_(-1, 1))
        self.activation = Gate() if activation is None else activation
        for layer in (self.output, self.recurrent):
            nn.init.xavier_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        inputs, weight = self.inputs, self.recurrent.weight
        # No output enters the loop: what needs no state is computed for all times at once, before it and after it.
        seen, back = F.linear(x, weight[:, :inputs], self.recurrent.bias), weight[:, inputs:].T
        state = self.initial.expand(len(x), -1)
        states = [state]
        for now in seen.unbind(1)[:-1]:
            state = self.activation(torch.addmm(now, state, back))
            if self.training and self.noise:
                state = state + self.noise * torch.randn_like(state)
            states.append(state)
        y: Tensor = self.activation(self.output(torch.cat([x, torch.stack(states, 1)], -1)))
        return y


@register("net")
class Bonsai(nn.Module):
    """Chain recurrent cells, and return the last one's outputs as they are: (n, T, inputs) -> (n, T, outputs).

    `lilliput.export.bonsai` makes a graph of what is left of it after pruning.

    Args:
        inputs: Values a step.
        outputs: Outputs a step.
        state: Values of each cell's state; its length is the number of cells.
        width: Outputs of each cell but the last.
        factor: That of `Gate`.
        leak: That of `Gate`.
        noise: That of `Cell`.

    Example:
        >>> Bonsai(inputs=1, outputs=1, state=(8,))(torch.ones(2, 5, 1)).shape
        torch.Size([2, 5, 1])

    Source:
        Primozic, Growing bonsai networks with RNNs, 2023.
    """

    def __init__(
        self,
        inputs: int = 1,
        outputs: int = 1,
        state: Sequence[int] = (8,),
        width: int = 8,
        factor: float = 0.5,
        leak: float = 0.01,
        noise: float = 0.0,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs, self.factor, self.leak = inputs, outputs, factor, leak
        sizes = [inputs, *[width] * (len(state) - 1), outputs]
        self.cells = nn.Sequential(
            *(Cell(sizes[i], sizes[i + 1], count, Gate(factor, leak), noise) for i, count in enumerate(state))
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cells(x)
        return y
